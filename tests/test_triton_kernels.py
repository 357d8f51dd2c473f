"""What only the Triton kernels have: tiles, guards against bad parameters, wide indices. On CUDA or the interpreter.

Without either, ``test_triton.py`` runs this file under the interpreter; the ops' own tests run on both as well.
"""

from __future__ import annotations

import math

import oracle
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tolerances import assert_close

from byola_fast import AugmentParams, ops
from byola_fast.ops import _triton_augment_views, _triton_device, _triton_resize_crop
from byola_fast.ops._backends import backend_in_use

MODES = ["bilinear", "bicubic"]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
RNG = torch.tensor([11, 5], device=DEVICE)


@pytest.fixture
def small_tiles(monkeypatch):
    """Blocks of few rows and columns, and two programs, so that small inputs take many turns of every loop."""
    for module in (_triton_augment_views, _triton_resize_crop):
        monkeypatch.setattr(module, "ROWS", 4)
        monkeypatch.setattr(module, "COLUMNS", 8)
    monkeypatch.setattr(_triton_augment_views, "STAGED_ROWS", 4)
    monkeypatch.setattr(_triton_augment_views, "resident_programs", lambda x, per_sm: 2)


def draw(batch, shape, **kwargs):
    return AugmentParams(*ops.draw_params(RNG, batch, shape, fader_gain=1.0, **kwargs), RNG)


def run(x, params, **kwargs):
    return ops.augment_views(x, params.lam, params.bank_index, params.crop, params.fader, params.rng, **kwargs)


def test_the_kernels_are_in_use():
    key = "CUDA" if DEVICE.type == "cuda" else "CPU"
    assert {backend_in_use(key, op)[0] for op in ("augment_views_out", "draw_params", "bank_push_")} == {"triton"}


@pytest.mark.parametrize("most_column_blocks", [0, 8])
@pytest.mark.parametrize("mode", MODES)
def test_views_of_many_tiles(mode, most_column_blocks, small_tiles, monkeypatch):
    monkeypatch.setattr(_triton_augment_views, "MOST_COLUMN_BLOCKS", most_column_blocks)
    x = torch.randn(3, 11, 19, device=DEVICE)
    canvas = (15, 30)
    params = draw(3, (11, 19), virtual_crop_scale=(1.4, 1.6))
    views, sums = run(x, params, mode=mode, canvas=canvas, size=(9, 21))
    expected = oracle.views(x, params, mode=mode, canvas=canvas, size=(9, 21))
    assert_close(views, expected)
    assert_close(sums[..., 1], expected.sum((2, 3)), factor=1e7)  # added up in float32 along a thread


@pytest.mark.parametrize("mode", MODES)
def test_resize_of_many_tiles_and_its_gradient(mode, small_tiles):
    x = torch.randn(2, 11, 19, device=DEVICE, dtype=torch.float64, requires_grad=True)
    crop = torch.tensor([[0, 3, 11, 20], [2, 0, 5, 28]], device=DEVICE)
    y = ops.resize_crop(x, crop, (9, 21), mode)
    assert_close(y, oracle.resize_crop(x.detach(), crop, (9, 21), (11, 28), mode))
    grad = torch.randn_like(y)
    (of_kernel,) = torch.autograd.grad(y, x, grad)
    copy = x.detach().cpu().requires_grad_()
    (expected,) = torch.autograd.grad(oracle_graph(copy, crop, (9, 21), (11, 28), mode), copy, grad.cpu())
    assert_close(of_kernel, expected)


def oracle_graph(x, crop, size, canvas, mode):
    """The oracle's resize with a gradient: canvases by padding."""
    top, left = ((c - n) // 2 for c, n in zip(canvas, x.shape[1:], strict=True))
    pad = (left, canvas[1] - x.shape[2] - left, top, canvas[0] - x.shape[1] - top)
    full = torch.nn.functional.pad(x, pad)
    boxes = [full[b, i : i + h, j : j + w][None, None] for b, (i, j, h, w) in enumerate(crop.tolist())]
    resized = [torch.nn.functional.interpolate(box, size, mode=mode, align_corners=True)[0, 0] for box in boxes]
    return torch.stack(resized)


@pytest.mark.parametrize("mode", MODES)
def test_positions_beyond_32_bits(mode, monkeypatch):
    """The wide variant is for sizes nobody can test with; it must give what the narrow one gives."""
    x = torch.randn(2, 7, 9, device=DEVICE)
    crop = torch.tensor([[0, 1, 7, 12], [1, 0, 5, 3]], device=DEVICE)
    narrow = ops.resize_crop(x, crop, (8, 8), mode)
    for module in (_triton_resize_crop, _triton_augment_views):
        monkeypatch.setattr(module, "is_wide", lambda *products: True)
    assert torch.equal(ops.resize_crop(x, crop, (8, 8), mode), narrow)
    assert _triton_device.is_wide(2**31)
    assert not _triton_device.is_wide(2**31 - 1, 5)


def test_what_32_bits_do_not_reach_within_a_sample_is_copied():
    x = torch.empty(1).expand(2, 3, 4)
    assert _triton_device.indexable(x) is x
    far = torch.empty(0).as_strided((0, 3, 4), (1, 2**30, 2**29))
    assert _triton_device.indexable(far).is_contiguous()


@given(size=st.integers(1, 2**20), n=st.integers(0, 2**31 - 1))
def test_division_by_multiplication(size, n):
    magic, shift = _triton_device.division_magic(size)
    divisor = max(size - 1, 1)
    for number in {n, n // divisor * divisor, max(n // divisor * divisor - 1, 0), 2**31 - 1}:
        assert (number * magic) >> shift == number // divisor
    assert magic < 2**33
    assert (2**31 - 1) * magic < 2**63


def test_parameters_out_of_range_read_nothing_out_of_bounds():
    """The kernels move them inside; the public checks of replayed parameters cannot see a GPU's without a sync."""
    x = torch.randn(3, 8, 12, device=DEVICE)
    params = draw(3, (8, 12))
    wild = AugmentParams(
        lam=params.lam,
        bank_index=torch.tensor([[99, -1, 2**40], [3, -(2**40), 0]], device=DEVICE),
        crop=torch.tensor([[[-5, -7, 99, 99], [7, 17, 8, 18], [2**30, 2**30, 2**30, 2**30]]] * 2, device=DEVICE).int(),
        fader=params.fader,
        rng=RNG,
    )
    views, _ = torch.ops.byola_fast.augment_views(
        x, None, None, None, None, *(wild.lam, wild.bank_index, wild.crop, wild.fader, RNG),
        0, [8, 12], [8, 18], "bilinear", "log",
    )  # fmt: skip
    tame = AugmentParams(
        lam=params.lam,
        bank_index=torch.tensor([[2, -1, 2], [2, -1, 0]], device=DEVICE),
        crop=torch.tensor([[[0, 0, 8, 18]] * 3] * 2, device=DEVICE).int(),
        fader=params.fader,
        rng=RNG,
    )
    assert_close(views, oracle.views(x, tame))


@pytest.mark.parametrize("mode", MODES)
def test_a_crop_wholly_in_the_margin_is_the_fader_alone(mode):
    x = torch.full((1, 4, 6), math.nan, device=DEVICE)
    crop = torch.tensor([[[0, 0, 3, 4]], [[9, 14, 3, 4]]], device=DEVICE, dtype=torch.int32)
    params = draw(1, (4, 6))
    params = AugmentParams(params.lam, params.bank_index, crop, params.fader, RNG)
    views, _ = run(x, params, mode=mode, canvas=(12, 18))
    assert_close(views, oracle.views(torch.zeros(1, 4, 6), params, canvas=(12, 18), mixup="none"))


def test_sums_of_many_views_are_added_up_beforehand(monkeypatch):
    from byola_fast.ops import _triton_normalize

    x = torch.randn(50, 3, device=DEVICE)
    sums = ops.sample_sums(x)
    at_once = ops.normalize(x, sums)
    monkeypatch.setattr(_triton_normalize, "FEW_SUMS", 10)
    assert_close(ops.normalize(x, sums), oracle.normalize(x.double()))
    assert_close(at_once, oracle.normalize(x.double()))


def test_gradients_are_the_same_every_time():
    x = torch.randn(4, 8, 12, device=DEVICE, requires_grad=True)
    params = draw(4, (8, 12))
    grads = []
    for _ in range(2):
        views, sums = run(x, params)
        (grad,) = torch.autograd.grad(ops.normalize(views, sums).square().sum(), x)
        grads.append(grad)
    assert torch.equal(*grads)
