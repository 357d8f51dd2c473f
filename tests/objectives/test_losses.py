"""The losses and the measures of collapse, against their formulas in float64."""

from __future__ import annotations

import math

import pytest
import torch
from helpers.tolerances import assert_close
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from byola_fast.objectives.collapse import effective_rank, spread
from byola_fast.objectives.losses import bilinear_loss, byol_loss, directions, info_nce_loss, nt_xent_loss


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


def test_spread_is_its_formula_and_separates_health_from_collapse():
    z = torch.randn(9, 5)
    rows = torch.nn.functional.normalize(z.double(), dim=1)
    deviation = ((rows - rows.mean(0)).square().sum(0) / 8).sqrt()
    assert_close(spread(z), deviation.mean() * 5**0.5)
    assert 0.97 < spread(torch.randn(2000, 64)) < 1.03
    assert spread(torch.randn(1, 64).expand(50, 64)) < 1e-6
    assert spread(torch.randn(1, 64) + 0.05 * torch.randn(50, 64)) < 0.1


def cosine(a: list[float], b: list[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True)) / math.hypot(*a) / math.hypot(*b)


def nt_xent_by_hand(z1: Tensor, z2: Tensor, temperature: float) -> Tensor:
    """One term at a time, as the paper writes it."""
    batch = len(z1)
    z = torch.cat([z1, z2]).tolist()
    total = 0.0
    for i in range(2 * batch):
        others = [math.exp(cosine(z[i], z[k]) / temperature) for k in range(2 * batch) if k != i]
        total -= math.log(math.exp(cosine(z[i], z[(i + batch) % (2 * batch)]) / temperature) / sum(others))
    return torch.tensor(total / (2 * batch), dtype=torch.float64)


def info_nce_by_hand(q: Tensor, k: Tensor, negatives: Tensor, temperature: float) -> Tensor:
    total = 0.0
    for query, key in zip(q.tolist(), k.tolist(), strict=True):
        positive = math.exp(cosine(query, key) / temperature)
        total -= math.log(
            positive / (positive + sum(math.exp(cosine(query, n) / temperature) for n in negatives.tolist()))
        )
    return torch.tensor(total / len(q), dtype=torch.float64)


def bilinear_by_hand(anchor: Tensor, positive: Tensor, weight: Tensor) -> Tensor:
    a, p, w = anchor.double(), positive.double(), weight.double()
    total = 0.0
    for i in range(len(a)):
        scores = [float((a[i, :, None] * w * p[j, None, :]).sum()) for j in range(len(p))]
        total -= math.log(math.exp(scores[i]) / sum(math.exp(score) for score in scores))
    return torch.tensor(total / len(a), dtype=torch.float64)


SIZES = {"batch": st.integers(2, 9), "size": st.integers(1, 7), "temperature": st.floats(0.05, 2)}


@settings(max_examples=40, deadline=None)
@given(**SIZES)
def test_nt_xent_is_its_formula_and_does_not_mind_order(batch, size, temperature):
    z1, z2 = 3 * torch.randn(batch, size), torch.randn(batch, size)
    wanted = nt_xent_by_hand(z1, z2, temperature)
    assert_close(nt_xent_loss(z1, z2, temperature), wanted, factor=1 / temperature)
    assert_close(nt_xent_loss(z1.double(), z2.double(), temperature), wanted, factor=30)
    order = torch.randperm(batch)
    scale = torch.rand(batch, 1) + 0.5
    for a, b in ((z2, z1), (z1[order], z2[order]), (scale * z1, z2)):  # swapped views, other order, other lengths
        assert_close(nt_xent_loss(a, b, temperature), wanted, factor=1 / temperature)


@settings(max_examples=40, deadline=None)
@given(rows=st.integers(1, 6), count=st.integers(0, 6), **SIZES)
def test_info_nce_is_its_formula_and_leaves_empty_rows_out(batch, size, temperature, rows, count):
    q, k, negatives = torch.randn(batch, size), 4 * torch.randn(batch, size), directions(torch.randn(rows, size))
    count = min(count, rows)
    wanted = info_nce_by_hand(q, k, negatives[:count], temperature)
    actual = info_nce_loss(q, k, negatives, temperature, count=torch.tensor(count))
    assert_close(actual, wanted, factor=2 / temperature)
    assert_close(info_nce_loss(q, k, negatives[:count], temperature), wanted, factor=2 / temperature)
    order = torch.randperm(count)
    assert_close(info_nce_loss(q, k, negatives[:count][order], temperature), wanted, factor=2 / temperature)


@settings(max_examples=40, deadline=None)
@given(batch=st.integers(2, 9), size=st.integers(1, 7))
def test_bilinear_is_its_formula(batch, size):
    anchor, positive, weight = torch.randn(batch, size).tanh(), torch.randn(batch, size).tanh(), torch.randn(size, size)
    wanted = bilinear_by_hand(anchor, positive, weight)
    assert_close(bilinear_loss(anchor, positive, weight), wanted, factor=2)
    order = torch.randperm(batch)
    assert_close(bilinear_loss(anchor[order], positive[order], weight), wanted, factor=2)


@pytest.mark.parametrize(
    ("loss", "shapes"),
    [
        (lambda a, b: nt_xent_loss(a, b, 0.3), [(3, 4), (3, 4)]),
        (lambda a, b, n: info_nce_loss(a, b, n, 0.3, count=torch.tensor(2)), [(3, 4), (3, 4), (5, 4)]),
        (bilinear_loss, [(3, 4), (3, 4), (4, 4)]),
    ],
)
def test_gradients_of_the_contrastive_losses(loss, shapes):
    inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    assert torch.autograd.gradcheck(loss, inputs)


def test_contrastive_losses_keep_out_of_half_precision():
    """bfloat16 rows under autocast give the loss of the same rows in float32, to the bit."""
    a, b, w = torch.randn(5, 8).bfloat16(), torch.randn(5, 8).bfloat16(), torch.randn(8, 8)
    calls = [
        lambda a, b: nt_xent_loss(a, b, 0.1),
        lambda a, b: info_nce_loss(a, b, directions(b), 0.1),
        lambda a, b: bilinear_loss(a, b, w),
        byol_loss,
        spread,
    ]
    for call in calls:
        arguments = (a, b) if call is not spread else (a,)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            cast = call(*arguments)
        assert cast.dtype == torch.float32
        assert torch.equal(cast, call(*(x.float() for x in arguments)))


def test_effective_rank_is_its_formula():
    z = torch.randn(9, 5)
    values = torch.linalg.svdvals(z.double())
    share = values / values.sum()
    assert_close(effective_rank(z), (-(share * share.log()).sum()).exp())
    assert_close(effective_rank(3 * z), (-(share * share.log()).sum()).exp())


@pytest.mark.parametrize("rank", [1, 3, 7])
def test_effective_rank_of_known_matrices(rank):
    basis = torch.linalg.qr(torch.randn(20, rank, dtype=torch.float64)).Q
    other = torch.linalg.qr(torch.randn(9, rank, dtype=torch.float64)).Q
    equal = torch.tensor(float(rank), dtype=torch.float64)
    assert_close(effective_rank(basis @ other.T), equal, factor=1e4)  # p log p of values that should be 0
    assert effective_rank(torch.randn(2000, 16)) > 15.5
    assert effective_rank(torch.ones(50, 16) + 1e-4 * torch.randn(50, 16)) < 1.1
    assert effective_rank(torch.zeros(3, 4)) == 1
    assert effective_rank(torch.full((3, 4), float("nan"))).isnan()


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: byol_loss(torch.ones(2, 3), torch.ones(2, 4)), ValueError, r"z: expected shape \(2, 3\)"),
        (lambda: byol_loss(torch.ones(3), torch.ones(3)), ValueError, "q: expected shape"),
        (lambda: byol_loss(torch.ones(0, 3), torch.ones(0, 3)), ValueError, "at least 1 sample, got 0"),
        (lambda: byol_loss(torch.ones(2, 3).long(), torch.ones(2, 3)), TypeError, "floating-point"),
        (lambda: spread(torch.ones(1, 3)), ValueError, "at least 2 samples, got 1"),
        (lambda: effective_rank(torch.ones(0, 3)), ValueError, "at least 1 sample, got 0"),
        (lambda: effective_rank(torch.ones(3)), ValueError, "z: expected shape"),
        (lambda: nt_xent_loss(torch.ones(1, 3), torch.ones(1, 3)), ValueError, "z1: expected at least 2 samples"),
        (lambda: nt_xent_loss(torch.ones(2, 3), torch.ones(3, 3)), ValueError, r"z2: expected shape \(2, 3\)"),
        (
            lambda: info_nce_loss(torch.ones(2, 3), torch.ones(2, 3), torch.ones(4, 5)),
            ValueError,
            r"negatives: expected shape \(K, 3\), got \(4, 5\)",
        ),
        (
            lambda: bilinear_loss(torch.ones(2, 3), torch.ones(2, 3), torch.ones(3, 4)),
            ValueError,
            r"weight: expected shape \(3, 3\)",
        ),
        (lambda: bilinear_loss(torch.ones(2, 3).int(), torch.ones(2, 3), torch.ones(3, 3)), TypeError, "anchor"),
    ],
)
def test_refused(call, error, words):
    with pytest.raises(error, match=words):
        call()
