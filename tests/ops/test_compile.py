"""torch.compile(fullgraph=True), without recompilation while crops, steps and the bank change."""

from __future__ import annotations

import pytest
import torch

from byola_fast import Augment, augment, ops

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def test_a_model_that_calls_the_ops_compiles_once_without_graph_breaks(device):
    def model(x, z, lam, crop, sums, weight):
        mixed = ops.log_mixup_exp(x, z, lam)
        y = ops.resize_crop(mixed, crop, size=(6, 9), interpolation="bicubic")
        return (ops.normalize(y, sums) * weight).square().mean()

    compiled = torch.compile(model, fullgraph=True)
    weight = torch.randn(6, 9, device=device)
    for step in range(4):
        x, z = (torch.randn(3, 8, 12, device=device, requires_grad=True) for _ in range(2))
        rng = torch.tensor([1, step], device=device)
        lam, _, crop, _ = ops.draw_params(rng, 3, (8, 12))
        sums = torch.rand(2, 3, dtype=torch.float64, device=device) + torch.tensor([50.0, 0, 50], device=device)
        arguments = (x, z, lam[0], crop[0], sums, weight)
        with torch.compiler.set_stance("fail_on_recompile" if step else "default"):
            got = torch.autograd.grad(compiled(*arguments), (x, z))
        expected = torch.autograd.grad(model(*arguments), (x, z))
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b)


def test_the_module_compiles_once_without_graph_breaks(device):
    eager = Augment("byola-v2", seed=5, n_memory=7, shape=(8, 12)).to(device)
    traced = Augment("byola-v2", seed=5, n_memory=7, shape=(8, 12)).to(device)
    compiled = torch.compile(traced, fullgraph=True)
    for step in range(5):
        x = torch.randn(3, 1, 8, 12, device=device)
        with torch.compiler.set_stance("fail_on_recompile" if step else "default"):
            got = compiled(x)
        for a, b in zip(got, eager(x), strict=True):
            torch.testing.assert_close(a, b)
    assert torch.equal(traced.rng, eager.rng)
    torch.testing.assert_close(traced.bank.rows, eager.bank.rows)
    assert torch.equal(traced.bank.cursor, eager.bank.cursor)


def test_the_function_compiles_and_draws_again_at_each_step(device):
    compiled = torch.compile(lambda x, step: augment(x, seed=3, step=step, return_params=True), fullgraph=True)
    x = torch.randn(4, 8, 12, device=device)
    for step in range(4):
        with torch.compiler.set_stance("fail_on_recompile" if step else "default"):
            _, _, params = compiled(x, torch.tensor(step, device=device))
        assert torch.equal(params.crop, augment(x, seed=3, step=step, return_params=True)[2].crop)


def test_without_a_seed_each_compiled_call_draws_again(device):
    compiled = torch.compile(lambda x: augment(x)[0], fullgraph=True)
    x = torch.randn(4, 8, 12, device=device)
    assert not torch.equal(compiled(x), compiled(x))


def test_an_unknown_bank_shape_raises_while_tracing():
    with pytest.raises(Exception, match="give shape="):
        torch.compile(Augment(), fullgraph=True)(torch.randn(3, 8, 12))
