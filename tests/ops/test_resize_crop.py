"""resize_crop against torch.nn.functional.interpolate of each box."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from helpers.layouts import between_guards
from helpers.oracle import random_crops
from helpers.oracle import resize_crop as interpolate_each
from helpers.tolerances import assert_close
from hypothesis import given, settings
from hypothesis import strategies as st

from byola_fast import ops

INTERPOLATIONS = ["bilinear", "bicubic"]
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(64, 96), (63, 97), (5, 7), (1, 1), (1, 9), (9, 1)])
def test_equals_interpolate(shape, dtype, interpolation, device):
    x = 3 * torch.randn(6, *shape, device=device).to(dtype)
    canvas = (shape[0], int(1.5 * shape[1]))
    crop = random_crops(6, canvas)
    before = x.clone()
    y = ops.resize_crop(x, crop.to(device), interpolation=interpolation)
    assert y.is_contiguous()
    assert y.dtype == dtype
    assert_close(y, interpolate_each(x, crop, shape, canvas, interpolation))
    assert torch.equal(x, before)


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
@pytest.mark.parametrize(
    ("shape", "size", "canvas"),
    [
        ((64, 600), (64, 600), (64, 900)),  # ATST: 6 s segments
        ((64, 600), (64, 600), (64, 600)),  # ATST-Frame: canvas (1, 1)
        ((64, 96), (64, 48), (64, 144)),  # short local crops
        ((63, 97), (1, 1), (80, 97)),
        ((5, 7), (13, 31), (9, 21)),
        ((1, 1), (4, 5), (3, 3)),
    ],
)
def test_other_sizes_and_canvases(shape, size, canvas, interpolation, device):
    x = torch.randn(5, *shape, dtype=torch.float64, device=device)
    crop = random_crops(5, canvas)
    y = ops.resize_crop(x, crop.to(device, torch.int64), size=size, interpolation=interpolation, canvas=canvas)
    assert_close(y, interpolate_each(x, crop, size, canvas, interpolation))


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
@pytest.mark.parametrize("frames", [1, 16, 97])
def test_every_width_at_every_edge(frames, interpolation, device):
    """One after another: a crop leaves nothing behind for the next, in the margins neither."""
    shape, canvas = (5, frames), (7, frames + 2 * (frames // 3) + 1)
    left = (canvas[1] - frames) // 2
    boxes = []
    for w in range(1, canvas[1] + 1):
        last = canvas[1] - w
        starts = {0, last, *(min(max(j, 0), last) for j in (left, left + 1, left + frames - w, left + frames - w - 1))}
        boxes += [(w % 3, j, 1 + (w + j) % 5, w) for j in sorted(starts)]
    crop = torch.tensor(boxes)
    x = torch.randn(len(boxes), *shape, device=device)
    for size in (shape, (4, 60)):
        y = ops.resize_crop(x, crop.to(device), size, interpolation, canvas)
        assert_close(y, interpolate_each(x, crop, size, canvas, interpolation))


@pytest.mark.parametrize("shape", [(1, 1), (3, 16), (63, 97), (64, 96)])
def test_nothing_beyond_the_memory_is_read(shape):
    """Inputs end, or begin, at a page that cannot be read."""
    x = torch.randn(3, *shape)
    canvas = (shape[0] + 2, shape[1] + shape[1] // 2)
    crop = torch.stack([random_crops(3, canvas, torch.Generator().manual_seed(k)) for k in range(2)])
    lam, index, fader = torch.rand(2, 3), torch.tensor([[1, 2, 0], [2, 2, 1]]), torch.zeros(2, 3, 2)
    for at_end in (False, True):
        with between_guards(x, at_end) as guarded:
            for interpolation in INTERPOLATIONS:
                ops.resize_crop(guarded, crop[0], interpolation=interpolation, canvas=canvas)
                for given in ({}, {"pool": guarded[1:]}, {"mixup": "linear"}, {"mixup": "none"}):
                    settings = {"interpolation": interpolation, "canvas": canvas, "rng": torch.tensor([1, 2])}
                    ops.augment_views(guarded, lam, index.clamp_max(1), crop, fader, **settings, **given)
            ops.log_mixup_exp(guarded, guarded, lam[0])


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
def test_crops_of_one_row_one_column_and_only_margin(interpolation, device):
    canvas = (20, 30)
    boxes = [(3, 0, 1, 30), (0, 7, 20, 1), (9, 9, 1, 1), (0, 0, 2, 30), (0, 0, 20, 3), (19, 29, 1, 1), (4, 4, 13, 22)]
    crop = torch.tensor(boxes)
    x = torch.randn(len(boxes), 12, 22, dtype=torch.float64, device=device)
    y = ops.resize_crop(x, crop.to(device), interpolation=interpolation, canvas=canvas)
    assert_close(y, interpolate_each(x, crop, (12, 22), canvas, interpolation))
    assert (y[3] == 0).all()
    assert (y[4] == 0).all()


def test_a_crop_of_the_whole_input_returns_it_unchanged(device):
    x = torch.randn(2, 63, 97, device=device)
    crop = torch.tensor([[0, 24, 63, 97]] * 2, device=device)
    for interpolation in INTERPOLATIONS:
        assert torch.equal(ops.resize_crop(x, crop, interpolation=interpolation), x)


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_any_shape_stride_canvas_and_dtype(data):
    shape = data.draw(st.tuples(st.integers(0, 4), st.integers(1, 40), st.integers(1, 50)))
    stride = data.draw(st.tuples(*[st.integers(1, 3)] * 3))
    swap = data.draw(st.booleans())
    dtype = data.draw(st.sampled_from(DTYPES))
    interpolation = data.draw(st.sampled_from(INTERPOLATIONS))
    base = torch.randn(*[n * s for n, s in zip(shape, stride, strict=True)]).to(dtype)
    x = base[:: stride[0], :: stride[1], :: stride[2]]
    x = x.transpose(1, 2) if swap else x
    canvas = tuple(n + data.draw(st.integers(0, 30)) for n in x.shape[1:])
    size = data.draw(st.tuples(st.integers(1, 45), st.integers(1, 45)))
    crop = random_crops(x.shape[0], canvas, torch.Generator().manual_seed(data.draw(st.integers(0, 999))))
    y = ops.resize_crop(x, crop, size=size, interpolation=interpolation, canvas=canvas)
    assert_close(y, interpolate_each(x, crop, size, canvas, interpolation))


def test_nan_outside_the_box_does_not_bleed_in(device):
    x = torch.randn(2, 8, 12, device=device)
    x[0, :2] = math.nan
    x[0, :, :3] = math.inf
    crop = torch.tensor([[2, 3, 5, 8], [0, 0, 8, 12]], device=device)
    for interpolation in INTERPOLATIONS:
        y = ops.resize_crop(x, crop, interpolation=interpolation, canvas=(8, 12))
        assert y.isfinite().all()


@pytest.mark.slow
@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
def test_gradcheck(interpolation, device):
    x = torch.randn(4, 5, 7, dtype=torch.float64, device=device, requires_grad=True)
    crop = random_crops(4, (6, 10)).to(device)
    assert torch.autograd.gradcheck(lambda x: ops.resize_crop(x, crop, (4, 9), interpolation, (6, 10)), (x,))


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_of_each_dtype(dtype, interpolation, device):
    x = torch.randn(3, 63, 97, device=device).to(dtype).requires_grad_()
    crop = random_crops(3, (63, 145))
    grad = torch.randn(3, 63, 97, device=device).to(dtype)
    (got,) = torch.autograd.grad(ops.resize_crop(x, crop.to(device), interpolation=interpolation), x, grad)
    wide = x.detach().double().cpu().requires_grad_()
    views = []
    for sample, (i, j, h, w) in zip(F.pad(wide, (24, 24)), crop.tolist(), strict=True):
        views.append(
            F.interpolate(sample[None, None, i : i + h, j : j + w], (63, 97), mode=interpolation, align_corners=True)[0]
        )
    (expected,) = torch.autograd.grad(torch.cat(views), wide, grad.double().cpu())
    assert_close(got, expected, factor=8)  # in a small crop one input gathers dozens of outputs


def test_channel_axis_is_kept(device):
    x = torch.randn(2, 1, 8, 12, device=device)
    crop = torch.tensor([[0, 0, 8, 18], [1, 1, 3, 4]], device=device)
    assert torch.equal(ops.resize_crop(x, crop)[:, 0], ops.resize_crop(x[:, 0], crop))


def test_the_old_name_of_interpolation_works_and_warns():
    x, crop = torch.randn(1, 5, 7), torch.tensor([[0, 0, 3, 4]])
    with pytest.warns(FutureWarning, match="mode= is now called interpolation="):
        y = ops.resize_crop(x, crop, mode="bicubic")
    assert torch.equal(y, ops.resize_crop(x, crop, interpolation="bicubic"))
