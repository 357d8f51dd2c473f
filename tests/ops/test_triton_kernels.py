"""Features of the Triton kernels alone: tiles, guards against bad parameters, wide indices. On CUDA or interpreted.

Without either, ``test_triton_interpreted.py`` runs this file under the interpreter. The ops' tests also run on both.
"""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from helpers import oracle
from helpers.tolerances import assert_close
from hypothesis import given
from hypothesis import strategies as st

from byola_fast import AugmentParams, ops
from byola_fast.ops import _triton
from byola_fast.ops._dispatch import backend_in_use
from byola_fast.ops._triton import augment_views, log_mel, log_mixup_exp, resize_crop, shared
from byola_fast.ops.reference import log_mel_reference

if not (torch.cuda.is_available() or _triton.interpreted()):
    reason = "kernels need a GPU or TRITON_INTERPRET=1; test_triton_interpreted.py runs this file under the interpreter"
    pytest.skip(reason, allow_module_level=True)

INTERPOLATIONS = ["bilinear", "bicubic"]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
RNG = torch.tensor([11, 5], device=DEVICE)


@pytest.fixture
def small_tiles(monkeypatch):
    """Small blocks and two programs, so that small inputs take many iterations of every loop."""
    for module in (augment_views, resize_crop):
        monkeypatch.setattr(module, "ROWS", 4)
        monkeypatch.setattr(module, "COLUMNS", 8)
    monkeypatch.setattr(augment_views, "STAGED_ROWS", 4)
    monkeypatch.setattr(augment_views, "resident_programs", lambda x, per_sm: 2)


def draw(batch, shape, **kwargs):
    return AugmentParams(*ops.draw_params(RNG, batch, shape, fader_gain=1.0, **kwargs), RNG)


def run(x, params, **kwargs):
    return ops.augment_views(x, params.lam, params.bank_index, params.crop, params.fader, params.rng, **kwargs)


def test_the_kernels_are_in_use():
    key = "CUDA" if DEVICE.type == "cuda" else "CPU"
    assert {backend_in_use(key, op)[0] for op in ("augment_views_out", "draw_params", "bank_push_", "log_mel")} == {
        "triton"
    }


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
def test_views_of_many_tiles(interpolation, small_tiles):
    x = torch.randn(3, 11, 19, device=DEVICE)
    canvas = (15, 30)
    params = draw(3, (11, 19), virtual_crop_scale=(1.4, 1.6))
    views, sums = run(x, params, interpolation=interpolation, canvas=canvas, size=(9, 21))
    expected = oracle.views(x, params, interpolation=interpolation, canvas=canvas, size=(9, 21))
    assert_close(views, expected)
    assert_close(sums[..., 1], expected.sum((2, 3)), factor=1e7)  # added up in float32 along a thread


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
def test_resize_of_many_tiles_and_its_gradient(interpolation, small_tiles):
    x = torch.randn(2, 11, 19, device=DEVICE, dtype=torch.float64, requires_grad=True)
    crop = torch.tensor([[0, 3, 11, 20], [2, 0, 5, 28]], device=DEVICE)
    y = ops.resize_crop(x, crop, (9, 21), interpolation)
    assert_close(y, oracle.resize_crop(x.detach(), crop, (9, 21), (11, 28), interpolation))
    grad = torch.randn_like(y)
    (of_kernel,) = torch.autograd.grad(y, x, grad)
    copy = x.detach().cpu().requires_grad_()
    (expected,) = torch.autograd.grad(oracle_graph(copy, crop, (9, 21), (11, 28), interpolation), copy, grad.cpu())
    assert_close(of_kernel, expected)


def oracle_graph(x, crop, size, canvas, interpolation):
    """The oracle's resize with a gradient; makes the canvas by padding."""
    top, left = ((c - n) // 2 for c, n in zip(canvas, x.shape[1:], strict=True))
    pad = (left, canvas[1] - x.shape[2] - left, top, canvas[0] - x.shape[1] - top)
    full = torch.nn.functional.pad(x, pad)
    boxes = [full[b, i : i + h, j : j + w][None, None] for b, (i, j, h, w) in enumerate(crop.tolist())]
    resized = [
        torch.nn.functional.interpolate(box, size, mode=interpolation, align_corners=True)[0, 0] for box in boxes
    ]
    return torch.stack(resized)


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
def test_positions_beyond_32_bits(interpolation, monkeypatch):
    """The wide variant serves sizes too large for a test; it must equal the narrow one."""
    x = torch.randn(2, 7, 9, device=DEVICE)
    crop = torch.tensor([[0, 1, 7, 12], [1, 0, 5, 3]], device=DEVICE)
    narrow = ops.resize_crop(x, crop, (8, 8), interpolation)
    for module in (resize_crop, augment_views):
        monkeypatch.setattr(module, "is_wide", lambda *products: True)
    assert torch.equal(ops.resize_crop(x, crop, (8, 8), interpolation), narrow)
    assert shared.is_wide(2**31)
    assert not shared.is_wide(2**31 - 1, 5)


def test_samples_beyond_32_bit_offsets_are_copied():
    x = torch.empty(1).expand(2, 3, 4)
    assert shared.indexable(x) is x
    far = torch.empty(0).as_strided((0, 3, 4), (1, 2**30, 2**29))
    assert shared.indexable(far).is_contiguous()


def test_the_interpreter_uses_no_gpu_instructions():
    on_a_gpu = SimpleNamespace(is_cuda=True, dtype=torch.float32)
    assert shared.approximate(on_a_gpu) is not shared.INTERPRETED


class Recorder:
    """Replace a kernel and record the grids of its launches."""

    pre_run_hooks = True  # its launches are Triton's own

    def __init__(self):
        self.grids = []

    def __getitem__(self, grid):
        self.grids.append(grid)
        return lambda *args, **kwargs: None


def test_grids_of_any_size_fit_a_gpu(monkeypatch):
    """The second and third axes of a grid are limited to 65,535 programs."""
    seen = Recorder()
    for module, name in (
        (log_mixup_exp, "log_mixup_exp_kernel"),
        (log_mixup_exp, "log_mixup_exp_backward_kernel"),
        (resize_crop, "resize_crop_kernel"),
        (resize_crop, "resize_axis_backward_kernel"),
    ):
        monkeypatch.setattr(module, name, seen)
    long, many = (torch.empty(shape, device="meta") for shape in ((1, 2**28), (2**18, 5)))
    for x in (long, many):
        log_mixup_exp.log_mixup_exp(x, x, x[:, 0])
        log_mixup_exp.log_mixup_exp_backward(x, x, x, x[:, 0])
    for shape in ((1, 2**22, 2), (1, 2, 2**22), (2**18, 1, 1)):
        x, crop = torch.empty(shape, device="meta"), torch.empty(shape[0], 4, device="meta")
        resize_crop.resize_crop(x, crop, shape[1:], shape[1:], "bilinear")
        resize_crop.resize_crop_backward(x, crop, shape[1:], shape[1:], "bilinear")
    assert len(seen.grids) == 13
    for first, *others in seen.grids:
        assert first < 2**31
        assert all(number <= 65535 for number in others)


@given(size=st.integers(1, 2**20), n=st.integers(0, 2**31 - 1))
def test_division_by_multiplication(size, n):
    magic, shift = shared.division_magic(size)
    divisor = max(size - 1, 1)
    for number in {n, n // divisor * divisor, max(n // divisor * divisor - 1, 0), 2**31 - 1}:
        assert (number * magic) >> shift == number // divisor
    assert magic < 2**33
    assert (2**31 - 1) * magic < 2**63


def test_parameters_out_of_range_read_nothing_out_of_bounds():
    """The kernels clamp them; the public checks cannot read replayed parameters on a GPU without a sync."""
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
        0, 0, [8, 12], [8, 18], "bilinear", "log",
    )  # fmt: skip
    tame = AugmentParams(
        lam=params.lam,
        bank_index=torch.tensor([[2, -1, 2], [2, -1, 0]], device=DEVICE),
        crop=torch.tensor([[[0, 0, 8, 18]] * 3] * 2, device=DEVICE).int(),
        fader=params.fader,
        rng=RNG,
    )
    assert_close(views, oracle.views(x, tame))


def test_boxes_beyond_32_bits_are_moved_inside():
    x, size = torch.randn(1, 8, 12, device=DEVICE), [8, 12]
    params = draw(1, (8, 12))
    for wild, tame in (([2**32 + 2, 2**32 + 3, 4, 5], [4, 13, 4, 5]), ([0, 0, 2**32 + 2, 2**40], [0, 0, 8, 18])):
        made = []
        for box in (wild, tame):
            crop = torch.tensor([[box]] * 2, device=DEVICE)
            given = (params.lam, params.bank_index, crop, params.fader, RNG, 0, 0, size, [8, 18], "bilinear", "log")
            made.append(torch.ops.byola_fast.augment_views(x, None, None, None, None, *given)[0])
            made.append(torch.ops.byola_fast.resize_crop(x, crop[0], size, [8, 18], "bilinear"))
        assert torch.equal(made[0], made[2])
        assert torch.equal(made[1], made[3])


@pytest.mark.parametrize("count", [41, 47, 55, 61, 82, 83])
def test_the_first_update_of_running_statistics_takes_the_batch(count):
    """On a GPU n / n need not be 1; the old mean, 0, must have no weight all the same."""
    x = 20 + 0.1 * torch.randn(1, count, device=DEVICE)
    mean, variance = torch.zeros(2, device=DEVICE).unbind()
    number, updates = torch.zeros(2, dtype=torch.int64, device=DEVICE).unbind()
    state = mean.clone(), variance.clone(), number.clone(), updates.clone()
    stats = torch.ops.byola_fast.running_stats_(*state, ops.sample_sums(x), 1)
    expected = torch.stack([x.double().mean(), x.double().std()]).cpu()
    torch.testing.assert_close(stats.cpu().double(), expected, rtol=1e-6, atol=0)
    for _ in range(100):  # later batches have no weight, and nothing may fade
        later = torch.ops.byola_fast.running_stats_(*state, ops.sample_sums(x + 1), 1)
    assert torch.equal(later, stats)


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
def test_many_rows_a_warp(interpolation, small_tiles):
    """Outputs as tall as the canvas: each row reuses the rows before it."""
    x = torch.randn(3, 13, 19, device=DEVICE)
    for size in ((13, 24), (14, 21), (32, 8)):
        params = draw(3, (13, 19))
        views, _sums = run(x, params, interpolation=interpolation, size=size)
        assert_close(views, oracle.views(x, params, interpolation=interpolation, size=size))


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
def test_a_crop_inside_the_margin_gives_the_fader_alone(interpolation):
    x = torch.full((1, 4, 6), math.nan, device=DEVICE)
    crop = torch.tensor([[[0, 0, 3, 4]], [[9, 14, 3, 4]]], device=DEVICE, dtype=torch.int32)
    params = draw(1, (4, 6))
    params = AugmentParams(params.lam, params.bank_index, crop, params.fader, RNG)
    views, _ = run(x, params, interpolation=interpolation, canvas=(12, 18))
    assert_close(views, oracle.views(torch.zeros(1, 4, 6), params, canvas=(12, 18), mixup="none"))


def test_sums_of_many_views_are_added_up_first(monkeypatch):
    from byola_fast.ops._triton import normalize

    x = torch.randn(50, 3, device=DEVICE)
    sums = ops.sample_sums(x)
    at_once = ops.normalize(x, sums)
    monkeypatch.setattr(normalize, "FEW_SUMS", 10)
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


def log_mel_case(n_fft, hop_length, samples, dtype=torch.float32, batch=2, window=None, n_mels=21, stats=None):
    """Arguments of ``ops.log_mel`` with bands of random widths, and one empty and one full band."""
    bins = n_fft // 2 + 1
    bands = torch.randint(bins + 1, (n_mels, 2)).sort(1).values
    bands[:2] = torch.tensor([[0, bins], [bins, bins]])
    place = torch.arange(bins)
    bank = (torch.rand(n_mels, bins) + 0.1) * ((place >= bands[:, :1]) & (place < bands[:, 1:]))
    wav = 0.1 * torch.randn(batch, samples)
    wav = (32768 * wav).short() if dtype == torch.int16 else wav.to(dtype)
    window = torch.rand(window or n_fft, dtype=torch.float64) + 0.1
    return wav.to(DEVICE), window.to(DEVICE), bank.to(DEVICE), bands.to(DEVICE), stats, n_fft, hop_length


def log_mel_exact(wav, window, bank, bands, stats, n_fft, hop_length, center):
    plain = wav.double() / 32768 if wav.dtype == torch.int16 else wav.double()
    return log_mel_reference(plain, window, bank, bands, stats, n_fft, hop_length, center)


@pytest.mark.parametrize(
    ("n_fft", "hop_length", "samples", "dtype", "window", "center"),
    [
        (64, 17, 1201, torch.float32, None, True),
        (128, 256, 2001, torch.int16, 100, False),
        (256, 100, 2311, torch.bfloat16, 255, False),
        (512, 160, 1999, torch.float16, 400, True),
        (1024, 160, 2803, torch.float32, 1023, True),
        (2048, 441, 4100, torch.int16, None, False),
    ],
)
def test_log_mel_of_every_length(n_fft, hop_length, samples, dtype, window, center):
    assert log_mel.takes(dtype, samples, n_fft, hop_length)
    stats = torch.tensor([-3.0, 2.0], device=DEVICE)
    arguments = (*log_mel_case(n_fft, hop_length, samples, dtype, 2, window, stats=stats), center)
    lms = torch.ops.byola_fast.log_mel(*arguments)
    assert lms.dtype == (torch.float32 if dtype == torch.int16 else dtype)
    assert lms.is_contiguous()
    assert_close(lms, log_mel_exact(*arguments))


def test_log_mel_falls_back_to_the_reference_if_the_kernel_does_not_take_it(monkeypatch):
    monkeypatch.setattr(log_mel, "log_mel_kernel", None)
    for n_fft, hop_length, dtype in ((100, 30, torch.float32), (64, 129, torch.float32), (64, 30, torch.float64)):
        assert not log_mel.takes(dtype, 500, n_fft, hop_length)
        arguments = (*log_mel_case(n_fft, hop_length, 500, dtype), True)
        assert torch.equal(log_mel.log_mel(*arguments), log_mel_reference(*arguments))
    assert not log_mel.takes(torch.int16, 2**31 - 1, 64, 30)
    empty = log_mel.log_mel(*log_mel_case(64, 30, 500, batch=0), True)
    assert empty.shape == (0, 21, 17)


def test_log_mel_of_hard_waveforms_strides_and_neighbours():
    """NaN and inf stay in their frames, silence and denormals give eps, and strides change nothing."""
    *_, window, bank, bands, stats, n_fft, hop_length = log_mel_case(64, 20, 900)
    settings = (window, bank, bands, stats, n_fft, hop_length, True)
    wav = 0.1 * torch.randn(6, 900, device=DEVICE)
    clean = torch.ops.byola_fast.log_mel(wav, *settings)
    assert_close(clean, log_mel_exact(wav, *settings))
    assert torch.equal(torch.ops.byola_fast.log_mel(wav.T.contiguous().T, *settings), clean)
    assert torch.equal(torch.ops.byola_fast.log_mel(wav.repeat_interleave(2, 0)[::2], *settings), clean)
    wav[0, 450], wav[1, 450], wav[2], wav[3] = math.nan, math.inf, 0, 1e-40 * wav[3]
    wav[4] = 1e15 * wav[4]
    lms = torch.ops.byola_fast.log_mel(wav, *settings)
    touched = torch.tensor([abs(450 - 20 * t) < 32 for t in range(lms.shape[2])], device=DEVICE)
    assert not lms[:2, 0, touched].isfinite().any()
    assert torch.equal(lms[:2, :, ~touched], clean[:2, :, ~touched])
    assert_close(lms[2:], log_mel_exact(wav[2:], *settings))
    assert torch.equal(lms[5], clean[5])


def test_bands_outside_the_spectrum_read_nothing_outside_it():
    wav, window, *_bank, stats, n_fft, hop_length = log_mel_case(64, 20, 300, n_mels=3)
    wild = torch.tensor([[-5, 99], [40, 3], [30, 2**30]], device=DEVICE)
    tame = torch.tensor([[0, 33], [0, 0], [30, 33]], device=DEVICE)
    bank = torch.rand(3, 33, device=DEVICE)
    lms = torch.ops.byola_fast.log_mel(wav, window, bank, wild, stats, n_fft, hop_length, True)
    assert torch.equal(lms, torch.ops.byola_fast.log_mel(wav, window, bank, tame, stats, n_fft, hop_length, True))


def test_log_mel_tables_are_made_once():
    table = log_mel.turns(256, DEVICE)
    assert log_mel.turns(256, DEVICE) is table
    angle = -2 * math.pi / 256 * torch.arange(8)[:, None].double() * torch.arange(16)
    torch.testing.assert_close(table.cpu().double(), torch.stack([angle.cos(), angle.sin()], 1), rtol=0, atol=6e-8)
