"""log_mixup_exp against its formula in float64."""

from __future__ import annotations

import math

import pytest
import torch
from helpers.oracle import EPS
from helpers.oracle import log_mixup_exp as formula
from helpers.tolerances import assert_close
from hypothesis import given, settings
from hypothesis import strategies as st

from byola_fast import ops

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(4, 63, 97), (1, 1, 1), (0, 5, 7), (3, 0), (5,), (2, 3, 4, 5)])
def test_equals_the_formula(shape, dtype, device):
    x, z = (4 * torch.randn(shape, dtype=torch.float64).to(device, dtype) for _ in range(2))
    lam = torch.rand(shape[0], device=device)
    before = x.clone(), z.clone()
    y = ops.log_mixup_exp(x, z, lam)
    assert y.dtype == dtype
    assert y.is_contiguous()
    assert_close(y, formula(x, z, lam))
    assert torch.equal(x, before[0])
    assert torch.equal(z, before[1])


@settings(max_examples=60, deadline=None)
@given(
    batch=st.integers(0, 4),
    mels=st.integers(1, 20),
    frames=st.integers(1, 40),
    order=st.permutations([0, 1, 2]),
    stride=st.integers(1, 3),
    dtype=st.sampled_from(DTYPES),
)
def test_any_shape_stride_and_dtype(batch, mels, frames, order, stride, dtype):
    big = torch.randn(*[n * stride for n in (batch, mels, frames)]).to(dtype)
    x = big[::stride, ::stride, ::stride].permute(order)
    z = torch.randn(x.shape).to(dtype)
    lam = torch.rand(x.shape[0])
    assert_close(ops.log_mixup_exp(x, z, lam), formula(x, z, lam))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_special_values(dtype, device):
    inf, nan = math.inf, math.nan
    tiny = torch.finfo(dtype).smallest_normal / 4  # a denormal
    edge = math.log(torch.finfo(dtype).max)
    x = torch.tensor([-inf, inf, nan, 0.0, -0.0, tiny, -100.0, edge * (1 - 1e-6), edge + 1, -edge], dtype=dtype)
    z = torch.zeros_like(x)
    for lam in (0.0, 0.25, 1.0):
        rows = torch.stack([x, z]).to(device)
        y = ops.log_mixup_exp(rows, rows.flip(0), torch.full((2,), lam, device=device))
        weight = torch.full((2, 1), lam, dtype=dtype)
        direct = torch.log((1 - weight) * torch.stack([x, z]).exp() + weight * torch.stack([z, x]).exp() + EPS)
        assert_close(y, direct)
    assert torch.isnan(ops.log_mixup_exp(x.to(device)[None], z.to(device)[None], torch.zeros(1, device=device))[0, 2])


def test_nan_stays_in_its_sample(device):
    x, z = torch.randn(3, 5, 7, device=device), torch.randn(3, 5, 7, device=device)
    x[1] = math.nan
    y = ops.log_mixup_exp(x, z, torch.rand(3, device=device))
    assert y[1].isnan().all()
    assert y[[0, 2]].isfinite().all()


@pytest.mark.slow
def test_gradcheck(device):
    x, z = (torch.randn(2, 3, 5, dtype=torch.float64, device=device, requires_grad=True) for _ in range(2))
    lam = torch.rand(2, device=device)
    assert torch.autograd.gradcheck(lambda x, z: ops.log_mixup_exp(x, z, lam), (x, z))


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_of_each_dtype(dtype, device):
    x, z = (torch.randn(3, 63, 97, device=device).to(dtype).requires_grad_() for _ in range(2))
    lam, grad = torch.rand(3, device=device), torch.randn(3, 63, 97, device=device).to(dtype)
    got = torch.autograd.grad(ops.log_mixup_exp(x, z, lam), (x, z), grad)
    wide = [t.detach().double().requires_grad_() for t in (x, z)]
    expected = torch.autograd.grad(formula(*wide, lam), wide, grad.double())
    for a, b in zip(got, expected, strict=True):
        assert_close(a, b)


def test_second_derivative_says_no(device):
    x = torch.randn(1, 2, dtype=torch.float64, device=device, requires_grad=True)
    y = ops.log_mixup_exp(x, x, torch.rand(1, device=device)).sum()
    (grad,) = torch.autograd.grad(y, x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        grad.sum().backward()
