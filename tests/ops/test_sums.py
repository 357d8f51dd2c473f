"""Sums, and what follows from them, where digits are easily lost: outliers, and a mean far from zero."""

from __future__ import annotations

import pytest
import torch
from helpers import oracle
from helpers.tolerances import assert_close

from byola_fast import augment, ops
from byola_fast.ops.reference import sample_sums_reference
from byola_fast.spectrograms.statistics import batch_stats


@pytest.mark.parametrize("outlier", [-300.0, 1e4, 1e8, 1e20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("place", [0, 77])
def test_sums_with_an_outlier(place, dtype, outlier, device):
    x = torch.randn(3, 500, device=device).to(dtype)
    x[1, place] = outlier
    sums, expected = ops.sample_sums(x), sample_sums_reference(x.double())
    torch.testing.assert_close(sums[:, 2], expected[:, 2], rtol=1e-6, atol=0)
    magnitude = x.double().abs().sum(1)
    assert ((sums[:, 1] - expected[:, 1]).abs() <= 1e-6 * magnitude).all()
    assert_close(ops.normalize(x, sums), oracle.normalize(x.double()), factor=10)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize(("mean", "std"), [(1e6, 0.01), (-1e9, 1.0), (1e4, 1e-3), (1e6, 0.0), (1e3, 1.0)])
def test_float64_values_far_from_zero(mean, std, inplace):
    x = mean + std * torch.randn(4, 8, 12, dtype=torch.float64)
    expected = oracle.normalize(x)
    got = ops.normalize(x.clone(), ops.sample_sums(x), inplace=inplace)
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)


def test_float64_values_far_from_zero_have_their_gradient():
    x = (1e6 + 0.01 * torch.randn(2, 3, 4, dtype=torch.float64)).requires_grad_()
    weight = torch.randn(2, 3, 4, dtype=torch.float64)
    (got,) = torch.autograd.grad((ops.normalize(x, ops.sample_sums(x)) * weight).sum(), x)
    centred = (x.detach() - 1e6).requires_grad_()
    y = (centred - centred.mean()) / centred.std()
    (expected,) = torch.autograd.grad((y * weight).sum(), centred)
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)


def test_sums_of_more_than_x_cannot_give_such_a_std():
    x = 1e6 + 0.01 * torch.randn(4, 8, dtype=torch.float64)
    with pytest.raises(ValueError, match="x: expected \\|mean\\| below 1e6 std, got mean 1e\\+06"):
        ops.normalize(x[:2], ops.sample_sums(x))


def test_statistics_of_float64_far_from_zero(device):
    x = 1e6 + 0.01 * torch.randn(4, 8, 12, dtype=torch.float64, device=device)
    torch.testing.assert_close(batch_stats(x), torch.stack([x.mean(), x.std()]), rtol=1e-9, atol=0)
    views = torch.stack(augment(x, seed=0, mixup="none"))
    expected = torch.stack(augment((x - x.mean()) * 100, seed=0, mixup="none"))
    torch.testing.assert_close(views, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize(("mean", "std"), [(80.0, 0.1), (1e3, 0.5), (1e17, 1e16)])
def test_views_far_from_zero(mean, std, interpolation, device):
    x = mean + std * torch.randn(3, 20, 50, device=device)
    whole = dict(stats=(0, 1), mixup="none", virtual_crop_scale=(1, 1), freq_scale=(1, 1), time_scale=(1, 1))
    views = torch.stack(augment(x, seed=0, interpolation=interpolation, **whole))
    expected = oracle.normalize(torch.stack([x, x]).double())
    torch.testing.assert_close(views.double(), expected, rtol=1e-4, atol=1e-4 + 1e-7 * mean / std)
