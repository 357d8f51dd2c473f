"""conv_block's statistics over two processes, against plain PyTorch on the joined batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import ranks
from torch import Tensor, nn

from byola_fast import AudioNTT2020, ops
from byola_fast.runtime.distributed import join

pytestmark = pytest.mark.slow
SIZES = (3, 5)  # of the two processes' batches
CASES = [
    # input channels, mean of the input, momentum, has a bias, the input has a gradient, autocast
    (1, 0.0, 0.1, True, False, False),
    (1, 30.0, None, True, False, False),
    (1, 0.0, 0.1, False, True, False),
    (5, 0.0, 0.1, True, True, False),
    (5, 30.0, None, False, False, False),
    (1, 0.0, 0.1, True, False, True),
    (5, 0.0, 0.1, True, True, True),
]


def draw(case: Any) -> tuple[list[Tensor], Tensor, nn.BatchNorm2d]:
    inputs, shift, momentum, has_bias, x_has_gradient, autocast = case
    torch.manual_seed(inputs)
    dtype = torch.float32 if autocast else torch.float64
    x = torch.randn(sum(SIZES), inputs, 9, 11, dtype=dtype) + shift
    x[: SIZES[0]] *= 2  # statistics of one process alone would be far off
    weight = torch.randn(6, inputs, 3, 3, dtype=dtype)
    bias, gamma, beta = torch.randn(3, 6, dtype=dtype)
    gamma[0] = 0
    norm = nn.BatchNorm2d(6, momentum=momentum).to(dtype)
    leaves = [x.requires_grad_(x_has_gradient)]
    leaves += [t.requires_grad_() for t in ((weight, bias, gamma, beta) if has_bias else (weight, gamma, beta))]
    return leaves, torch.randn(sum(SIZES), 6, 4, 5, dtype=dtype), norm


def answers(out: Tensor, grad: Tensor, leaves: list[Tensor], state: list[Tensor]) -> dict[str, list[Tensor]]:
    gradients = torch.autograd.grad(out, [t for t in leaves if t.requires_grad], grad.to(out))
    return {"out": [out.detach()], "gradients": list(gradients), "state": [t.clone() for t in state]}


def joined(case: Any) -> dict[str, list[Tensor]]:
    leaves, grad, norm = draw(case)
    x, weight, *rest = (t.double() for t in leaves)
    bias, gamma, beta = rest if len(rest) == 3 else (None, *rest)
    state = [t.double() if t.is_floating_point() else t for t in norm.buffers()]
    weight_of_batch = 1.0 if norm.momentum is None else norm.momentum
    y = F.conv2d(x, weight, bias, padding=1)
    y = F.batch_norm(y, state[0], state[1], gamma, beta, True, weight_of_batch, norm.eps)
    return answers(F.max_pool2d(F.relu(y), 2), grad.double(), leaves, state[:2])


def on_two(_: Any) -> list[dict[str, list[Tensor]]]:
    with join(torch.device("cpu")) as world:
        rows = slice(SIZES[0]) if world.rank == 0 else slice(SIZES[0], None)
        found = []
        for case in CASES:
            leaves, grad, norm = draw(case)
            leaves[0] = leaves[0].detach()[rows].requires_grad_(leaves[0].requires_grad)
            x, weight, *rest = leaves
            bias, gamma, beta = rest if len(rest) == 3 else (None, *rest)
            state = list(norm.buffers())
            settings: dict[str, Any] = {"training": True, "momentum": norm.momentum, "eps": norm.eps}
            settings["group"] = torch.distributed.group.WORLD
            with torch.autocast("cpu", torch.bfloat16, enabled=case[-1]):
                out = ops.conv_block(x, weight, bias, gamma, beta, *state, **settings)
            assert state[2] == 1
            found.append(answers(out, grad[rows], leaves, state[:2]))
        return found


def compiled(x: Tensor) -> list[Tensor]:
    """Return the gradients of a compiled and a plain call."""
    weight = torch.linspace(-1, 1, 6 * 9).view(6, 1, 3, 3).requires_grad_()
    with join(torch.device("cpu")) as world:
        settings: dict[str, Any] = {"training": True, "group": torch.distributed.group.WORLD}

        def block(weight: Tensor) -> Tensor:
            return ops.conv_block(x[world.rank], weight, None, weight[:, 0, 0, 0], weight[:, 0, 1, 1], **settings)

        calls = [block, torch.compile(block, fullgraph=True, backend="aot_eager")]
        return [torch.autograd.grad(call(weight).square().sum(), weight)[0] for call in calls]


def test_compiles(tmp_path):
    for plain, found in ranks.run(2, tmp_path, compiled, torch.randn(2, 3, 1, 9, 11)):
        torch.testing.assert_close(found, plain, rtol=1e-4, atol=1e-4)


def test_equals_the_joined_batch(tmp_path):
    first, second = ranks.run(2, tmp_path, on_two, None)
    for case, one, other in zip(CASES, first, second, strict=True):
        *_settings, has_bias, x_has_gradient, autocast = case
        wanted = joined(case)
        out = torch.cat(one["out"] + other["out"])
        assert out.dtype == (torch.bfloat16 if autocast else torch.float64)
        # of the norm: bfloat16 has eight bits; a rounded convolution flips single maxima, which moves gradients
        rounding, bound = (0.02, 0.4) if autocast else (1e-10, 1e-10)
        assert (out - wanted["out"][0]).norm() <= rounding * out.double().norm(), case
        gradients = [one["gradients"], other["gradients"]]
        if x_has_gradient:
            of_x = torch.cat([each.pop(0) for each in gradients])
            expected = wanted["gradients"].pop(0)
            assert (of_x - expected).norm() <= bound * expected.norm(), case
        for a, b, expected in zip(*gradients, wanted["gradients"], strict=True):
            assert ((a + b) - expected).norm() <= bound * expected.norm().clamp_min(1), case
        if has_bias:
            assert not one["gradients"][1].any()  # zeros that are there, for hooks
        for each in (one, other):
            for a, expected in zip(each["state"], wanted["state"], strict=True):
                torch.testing.assert_close(a.double(), expected, rtol=rounding, atol=rounding)


def encode(x: Tensor) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """Return embeddings, gradients averaged over the processes, and buffers of this process's part of a batch."""
    torch.manual_seed(3)
    encoder = AudioNTT2020(16, 16)
    encoder.fc.eval()  # no dropout
    with join(torch.device("cpu")) as world:
        if world.size > 1:
            encoder = nn.SyncBatchNorm.convert_sync_batchnorm(encoder)
        own = len(x) // world.size
        embeddings = encoder(x[world.rank * own :][:own])
        (embeddings.square().sum(1).mean()).backward()
        gradients = {name: p.grad / world.size for name, p in encoder.named_parameters()}
        if world.size > 1:  # DistributedDataParallel refuses SyncBatchNorm on the CPU
            for gradient in gradients.values():
                torch.distributed.all_reduce(gradient)
        return embeddings.detach(), gradients, {name: b.clone() for name, b in encoder.named_buffers()}


def test_a_converted_encoder_is_that_of_one_process(tmp_path):
    x = torch.randn(8, 1, 16, 24)
    x[:4] *= 3
    embeddings, gradients, buffers = encode(x)
    parts = ranks.run(2, tmp_path, encode, x)
    torch.testing.assert_close(torch.cat([part[0] for part in parts]), embeddings, rtol=1e-4, atol=1e-5)
    for _, found, state in parts:
        for name, wanted in gradients.items():
            assert (found[name] - wanted).norm() <= 1e-4 * wanted.norm() + 1e-6, name
        for name, wanted in buffers.items():
            torch.testing.assert_close(state[name], wanted, rtol=1e-4, atol=1e-5)
