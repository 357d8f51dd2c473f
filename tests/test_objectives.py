"""The loss and the measure of collapse, against their formulas in float64."""

from __future__ import annotations

import math

import pytest
import torch
from tolerances import assert_close

from byola_fast.objectives import byol_loss, collapse_std


def test_loss_is_its_formula():
    q, z = torch.randn(7, 13) * 5, torch.randn(7, 13)
    cosines = [
        sum(a * b for a, b in zip(p, t, strict=True)) / math.hypot(*p) / math.hypot(*t)
        for p, t in zip(q.tolist(), z.tolist(), strict=True)
    ]
    wanted = torch.tensor(sum(2 - 2 * cosine for cosine in cosines) / 7, dtype=torch.float64)
    assert_close(byol_loss(q, z), wanted)
    assert_close(byol_loss(q.double(), z.double()), wanted)


@pytest.mark.parametrize(("scale", "loss"), [(3.0, 0.0), (-0.5, 4.0)])
def test_bounds_of_the_loss(scale, loss):
    q = torch.randn(5, 8)
    assert_close(byol_loss(q, scale * q), torch.tensor(loss, dtype=torch.float64))


def test_gradient_of_the_loss():
    q, z = (torch.randn(3, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(byol_loss, (q, z))


def test_zero_and_half_precision_are_finite():
    zero = torch.zeros(2, 4, requires_grad=True)
    loss = byol_loss(zero, torch.ones(2, 4))
    loss.backward()
    assert loss.item() == 2
    assert zero.grad.isfinite().all()
    large = torch.full((2, 4), 6e4, dtype=torch.float16)  # whose squares overflow half precision
    assert byol_loss(large, large).dtype == torch.float32
    assert_close(byol_loss(large, large), torch.tensor(0.0, dtype=torch.float64))


def test_collapse_is_its_formula_and_tells_health_from_collapse():
    z = torch.randn(9, 5)
    rows = torch.nn.functional.normalize(z.double(), dim=1)
    spread = ((rows - rows.mean(0)).square().sum(0) / 8).sqrt()
    assert_close(collapse_std(z), spread.mean() * 5**0.5)
    assert 0.97 < collapse_std(torch.randn(2000, 64)) < 1.03
    assert collapse_std(torch.randn(1, 64).expand(50, 64)) < 1e-6
    assert collapse_std(torch.randn(1, 64) + 0.05 * torch.randn(50, 64)) < 0.1


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: byol_loss(torch.ones(2, 3), torch.ones(2, 4)), ValueError, r"z: expected shape \(2, 3\)"),
        (lambda: byol_loss(torch.ones(3), torch.ones(3)), ValueError, "q: expected shape"),
        (lambda: byol_loss(torch.ones(0, 3), torch.ones(0, 3)), ValueError, "at least 1 sample, got 0"),
        (lambda: byol_loss(torch.ones(2, 3).long(), torch.ones(2, 3)), TypeError, "floating-point"),
        (lambda: collapse_std(torch.ones(1, 3)), ValueError, "at least 2 samples, got 1"),
    ],
)
def test_refused(call, error, words):
    with pytest.raises(error, match=words):
        call()
