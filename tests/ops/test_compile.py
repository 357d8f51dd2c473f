"""torch.compile(fullgraph=True), without recompilation while crops, steps and the bank change."""

from __future__ import annotations

import pytest
import torch

from byola_fast import Augment, LogMel, augment, ops

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


@pytest.mark.parametrize("views", [{}, {"n_views": 1, "local_views": 2, "local_size": (4, 5)}], ids=["two", "crops"])
def test_the_module_compiles_once_without_graph_breaks(views, device):
    eager = Augment("byola-v2", seed=5, n_memory=7, shape=(8, 12), **views).to(device)
    traced = Augment("byola-v2", seed=5, n_memory=7, shape=(8, 12), **views).to(device)
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


def test_other_sizes_do_not_compile_again(device):
    rng = torch.tensor([1, 2], device=device)

    def model(x, lam):
        views, sums = ops.augment_views(x, *ops.draw_params(rng, x.shape[0], tuple(x.shape[1:])), rng)
        return ops.normalize(views, sums) + ops.log_mixup_exp(x, 2 * x, lam)

    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    for number, shape in enumerate([(3, 8, 12), (4, 8, 12), (5, 9, 13)]):
        x, lam = torch.randn(shape, device=device), torch.rand(shape[0], device=device)
        with torch.compiler.set_stance("fail_on_recompile" if number else "default"):
            torch.testing.assert_close(compiled(x, lam), model(x, lam))
    with torch.inference_mode():
        torch.testing.assert_close(compiled(x, lam), model(x, lam))
    x.requires_grad_()
    got, expected = (torch.autograd.grad(f(x, lam).square().sum(), x)[0] for f in (compiled, model))
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("n_fft", [64, 67])  # 67: plain PyTorch, in chunks if not compiled
def test_the_front_end_compiles_without_graph_breaks(n_fft, device):
    to_lms = LogMel(n_fft=n_fft, win_length=n_fft, n_mels=8).to(device)
    wav = torch.randn(2, 500, device=device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        torch.testing.assert_close(torch.compile(to_lms, fullgraph=True)(wav), to_lms(wav))


@pytest.mark.parametrize("transform", ["inside", "outside"])
def test_forward_mode_and_torch_func_with_a_compiled_function(transform, device):
    x, z = torch.randn(2, 3, 8, 12, device=device)
    crop = torch.tensor([[0, 1, 4, 7]] * 3, device=device)

    def product(f):
        return torch.func.jvp(f, (x,), (z,))[1] + torch.func.grad(lambda x: f(x).square().sum())(x)

    def model(x):
        return ops.resize_crop(x.sin(), crop)

    whole = torch.compile(lambda: product(model)) if transform == "inside" else None
    got = whole() if whole else product(torch.compile(model))
    torch.testing.assert_close(got, product(model))


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
