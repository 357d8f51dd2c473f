"""augment_views and normalize against the method in float64."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from helpers import oracle
from helpers.tolerances import assert_close
from hypothesis import given, settings
from hypothesis import strategies as st

from byola_fast import AugmentParams, ops
from byola_fast.ops import philox

INTERPOLATIONS = ["bilinear", "bicubic"]
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
RNG = torch.tensor([11, 5])


def draw(batch, shape, device="cpu", **kwargs):
    drawn = ops.draw_params(RNG.to(device), batch, shape, fader_gain=1.0, **kwargs)
    return AugmentParams(*drawn, RNG.to(device))


def run(x, params, **kwargs):
    return ops.augment_views(x, params.lam, params.bank_index, params.crop, params.fader, params.rng, **kwargs)


@pytest.mark.parametrize("mixup", ["log", "linear", "none"])
@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(5, 64, 96), (3, 63, 97), (2, 5, 7), (1, 1, 1), (4, 1, 1)])
def test_partners_from_the_batch(shape, dtype, interpolation, mixup, device):
    x = 2 * torch.randn(shape, device=device).to(dtype) - 1
    params = draw(shape[0], shape[1:], device)
    before = x.clone()
    views, sums = run(
        x, params, interpolation=interpolation, mixup=mixup, stats=torch.tensor([-1.0, 2.0], device=device)
    )
    expected = oracle.views(x, params, interpolation=interpolation, mixup=mixup, stats=(-1.0, 2.0))
    assert views.dtype == dtype
    assert_close(views, expected)
    assert_close(ops.normalize(expected.to(device), sums), oracle.normalize(expected), factor=1e6)  # sums of float32
    assert torch.equal(x, before)


@pytest.mark.parametrize("views", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 63, 97), (1, 1, 1), (0, 5, 7), (1, 6, 9)])
def test_any_number_of_views_of_any_size(shape, dtype, views, device):
    base = torch.randn(shape[0], shape[2], 2 * shape[1], device=device).to(dtype)
    x = base[..., ::2].transpose(1, 2)  # not contiguous
    params = draw(shape[0], shape[1:], device, views=views)
    for interpolation, size in (("bilinear", (32, 31)), ("bicubic", None)):
        made, sums = run(x, params, interpolation=interpolation, size=size)
        expected = oracle.views(x, params, interpolation=interpolation, size=size)
        assert_close(made, expected)
        wide = expected.flatten(2)
        assert torch.equal(sums[..., 0].cpu(), torch.full(sums.shape[:2], wide.shape[2], dtype=torch.float64))
        assert_close(sums[..., 1].float() / wide.shape[2], wide.mean(2), factor=1e5 if dtype is torch.float64 else 1)


@pytest.mark.parametrize("mixup", ["log", "linear", "gaussian", "none"])
def test_a_view_does_not_depend_on_the_others(mixup, device):
    """Bit for bit: in any number of views, alone, and in a second call for views of later numbers."""
    x, bank = torch.randn(3, 17, 37, device=device), torch.randn(5, 17, 37, device=device)
    held = torch.tensor(5, device=device)
    settings = {"bank": bank, "bank_count": held, "mixup": mixup, "sample_offset": 7}
    drawn = {"bank_count": held, "sample_offset": 7}
    whole, sums = run(x, draw(3, (17, 37), device, views=6, **drawn), **settings)
    for views, first in ((2, 0), (1, 0), (1, 3), (4, 2)):
        params = draw(3, (17, 37), device, views=views, first_view=first, **drawn)
        part, part_sums = run(x, params, first_view=first, **settings)
        assert torch.equal(part, whole[first : first + views])
        assert torch.equal(part_sums, sums[first : first + views])


@pytest.mark.parametrize("bank_dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
def test_partners_from_the_bank(interpolation, bank_dtype, device):
    x = torch.randn(4, 63, 97, device=device)
    bank = torch.randn(9, 63, 97, device=device).to(bank_dtype)
    bank[5:] = math.nan  # unfilled rows must have no effect
    count = torch.tensor(5, device=device)
    params = draw(4, (63, 97), device, bank_count=count)
    assert int(params.bank_index.max()) < 5
    views, _ = run(x, params, interpolation=interpolation, bank=bank, bank_count=count)
    assert_close(views, oracle.views(x, params, interpolation=interpolation, bank=bank))


def test_an_empty_bank_gives_partners_from_the_batch_or_a_pool(device):
    x = torch.randn(3, 8, 12, device=device)
    bank = torch.full((9, 8, 12), math.nan, device=device)
    none = torch.tensor(0, device=device)
    params = draw(3, (8, 12), device, bank_count=none)
    views, _ = run(x, params, bank=bank, bank_count=none)
    assert_close(views, oracle.views(x, params))
    for view in range(2):
        assert (params.bank_index[view].cpu() != torch.arange(3)).all()

    pool = torch.randn(7, 8, 12, device=device)
    params = draw(3, (8, 12), device, bank_count=none, pool=7, pool_offset=2)
    views, _ = run(x, params, pool=pool, bank=bank, bank_count=none)
    assert_close(views, oracle.views(x, params, bank=pool))
    assert (params.bank_index.cpu() != torch.arange(3) + 2).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_copy_of_the_batch_as_pool_gives_the_same_views(dtype, device):
    """Powers that the samples of a batch share are those that each computes."""
    x = torch.randn(9, 63, 97, device=device).to(dtype)
    params, stats = draw(9, (63, 97), device), torch.tensor([-1.0, 2.0], device=device)
    for shared, other in zip(run(x, params, stats=stats), run(x, params, stats=stats, pool=x.clone()), strict=True):
        assert torch.equal(shared, other)


def test_one_sample_is_not_mixed(device):
    x = torch.randn(1, 8, 12, device=device)
    params = draw(1, (8, 12), device)
    assert (params.bank_index == -1).all()
    assert_close(run(x, params)[0], oracle.views(x, params, mixup="none"))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_gaussian_noise_follows_from_seed_step_and_element(dtype, device):
    x = torch.randn(2, 3, 5, dtype=dtype, device=device)
    params = draw(2, (3, 5), device)
    whole = torch.tensor([[0, 0, 3, 5]] * 2, dtype=torch.int32, device=device).expand(2, 2, 4).contiguous()
    seed, step = RNG.tolist()
    params = replace(params, crop=whole, fader=0 * params.fader)
    views, _ = run(x, params, mixup="gaussian", canvas=(3, 5), sample_offset=40)
    expected = torch.zeros(2, 2, 15, dtype=torch.float64)
    for view in range(2):
        for b in range(2):
            for element in range(15):
                counter = (step, 40 + b, view, philox.SLOT_NOISE + element // 4)
                u = [w >> 8 for w in philox.philox4x32(*counter, seed, 0)]
                noise = oracle.philox_normal(u[2 * (element % 4 // 2) :])[element % 2]
                lam = float(params.lam[view, b])
                clean = math.exp(x[b].flatten()[element].double())
                expected[view, b, element] = math.log((1 - lam) * clean + math.exp(lam * noise) + oracle.EPS)
    assert_close(views, expected.view(2, 2, 3, 5))


def test_gaussian_noise_is_standard_normal():
    """With x = -inf and lam = 1 the mix is the noise; bounds are five standard errors."""
    x = torch.full((20, 64, 96), -math.inf)
    whole = torch.tensor([0, 0, 64, 96], dtype=torch.int32).expand(2, 20, 4).contiguous()
    one, zero = torch.ones(2, 20), torch.zeros(2, 20, 2)
    index = torch.zeros(2, 20, dtype=torch.int64)
    views, _ = ops.augment_views(x, one, index, whole, zero, RNG, mixup="gaussian", canvas=(64, 96))
    noise = views.double()
    error = 5 / math.sqrt(noise.numel())
    assert abs(noise.mean()) < error
    assert abs(noise.square().mean() - 1) < math.sqrt(2) * error
    assert abs(noise.pow(4).mean() - 3) < math.sqrt(96) * error
    assert abs((noise[0] * noise[1]).mean()) < error
    assert abs((noise[..., 1:] * noise[..., :-1]).mean()) < error


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_shape_stride_dtype_crop_and_canvas(data):
    shape = data.draw(st.tuples(st.integers(0, 4), st.integers(1, 30), st.integers(1, 40)))
    stride = data.draw(st.tuples(*[st.integers(1, 3)] * 3))
    dtype = data.draw(st.sampled_from(DTYPES))
    interpolation = data.draw(st.sampled_from(INTERPOLATIONS))
    mixup = data.draw(st.sampled_from(["log", "linear", "none"]))
    base = torch.randn(*[n * s for n, s in zip(shape, stride, strict=True)]).to(dtype)
    x = base[:: stride[0], :: stride[1], :: stride[2]]
    x = x.transpose(1, 2) if data.draw(st.booleans()) else x
    canvas = tuple(n + data.draw(st.integers(0, 20)) for n in x.shape[1:])
    size = data.draw(st.tuples(st.integers(1, 35), st.integers(1, 35)))
    seed = torch.Generator().manual_seed(data.draw(st.integers(0, 999)))
    crop = torch.stack([oracle.random_crops(x.shape[0], canvas, seed) for _ in range(2)])
    params = draw(x.shape[0], x.shape[1:])
    params = AugmentParams(params.lam, params.bank_index, crop, params.fader, params.rng)
    views, sums = run(x, params, interpolation=interpolation, mixup=mixup, canvas=canvas, size=size)
    expected = oracle.views(x, params, interpolation=interpolation, mixup=mixup, canvas=canvas, size=size)
    assert_close(views, expected)
    assert sums.shape == (2, x.shape[0], 3)


@pytest.mark.parametrize("dtype", DTYPES)
def test_out_is_filled_and_returned(dtype, device):
    x = torch.randn(3, 8, 12, device=device).to(dtype)
    params = draw(3, (8, 12), device)
    out = torch.full((2, 3, 8, 12), math.nan, device=device, dtype=dtype)
    views, sums = run(x, params, out=out)
    fresh, fresh_sums = run(x, params)
    assert views is out
    assert torch.equal(out, fresh)
    assert torch.equal(sums, fresh_sums)


def test_nan_stays_in_its_sample_and_its_partners(device):
    x = torch.randn(4, 8, 12, device=device)
    x[2, 3, 4] = math.nan
    params = draw(4, (8, 12), device)
    views, _ = run(x, params)
    touched = (params.bank_index == 2) | (torch.arange(4, device=device) == 2)
    assert views[~touched].isfinite().all()


@pytest.mark.slow
@pytest.mark.parametrize("views", [2, 3])
@pytest.mark.parametrize("mixup", ["log", "linear", "gaussian", "none"])
@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
def test_gradcheck(interpolation, mixup, views, device):
    x = torch.randn(3, 4, 5, dtype=torch.float64, device=device, requires_grad=True)
    stats = torch.tensor([0.3, 1.2], dtype=torch.float64, device=device, requires_grad=True)
    first_view = views - 2
    params = draw(3, (4, 5), device, views=views, first_view=first_view)
    named = {"stats": stats, "interpolation": interpolation, "mixup": mixup, "first_view": first_view}
    bank = torch.randn(4, 4, 5, dtype=torch.float64, device=device)
    for rows, count in ((None, None), (bank, torch.tensor(0)), (bank, torch.tensor(4))):

        def both(x, stats, rows=rows, count=count):
            count = None if count is None else count.to(device)
            views, sums = run(x, params, **named | {"stats": stats}, bank=rows, bank_count=count)
            return ops.normalize(views, sums), sums

        assert torch.autograd.gradcheck(both, (x, stats))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 5, 63, 97), (7,), (0, 3), (1,), (3, 1, 1)])
def test_normalize(shape, dtype, device):
    x = (5 + 3 * torch.randn(shape, device=device)).to(dtype)
    wide = x.double()
    n = max(x.numel(), 1)
    parts = [torch.stack([p.new_tensor(p.numel()), p.sum(), p.square().sum()]) for p in wide.flatten().chunk(3)]
    sums = torch.stack(parts) if parts else wide.new_zeros(1, 3)
    expected = oracle.normalize(wide) if n > 1 else wide * 0
    before = x.clone()
    assert_close(ops.normalize(x, sums), expected)
    assert torch.equal(x, before)
    view = x.clone()
    assert ops.normalize(view, sums, inplace=True) is view
    assert torch.equal(view, ops.normalize(x, sums))


def test_normalize_of_a_constant_is_zero(device):
    x = torch.full((2, 3, 4), -15.9424, device=device)
    wide = x.double()
    sums = torch.stack([torch.tensor(24.0).double().to(device), wide.sum(), wide.square().sum()])
    assert ops.normalize(x, sums).abs().max() == 0
