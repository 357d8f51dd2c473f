"""Bad input to the ops and the augmentation: an error that names the argument, what was given and what is wanted."""

from __future__ import annotations

import math
import re

import pytest
import torch

from byola_fast import EMA, AudioNTT2020, Augment, Embedder, augment, ops
from byola_fast.spectrograms.statistics import RunningStats

X = torch.randn(3, 8, 12)
LAM = torch.tensor([0.1, 0.2, 0.3])
CROP = torch.tensor([[0, 0, 8, 18]] * 3)


def crop_with(*box):
    return torch.cat([CROP[:2], torch.tensor([box])])


CALLS = {
    "rank 2": (lambda: augment(X[0]), ValueError, "lms: expected shape (B, F, T) or (B, 1, F, T), got (8, 12)"),
    "waveforms": (lambda: augment(torch.randn(2, 999)), ValueError, "waveforms go through byola_fast.LogMel first"),
    "three channels": (lambda: augment(torch.randn(2, 3, 8, 12)), ValueError, "got (2, 3, 8, 12)"),
    "no frames": (lambda: augment(torch.randn(2, 8, 0)), ValueError, "lms: expected at least one mel and one frame"),
    "no mels": (lambda: Augment()(torch.randn(2, 0, 9)), ValueError, "lms: expected at least one mel and one frame"),
    "integers": (lambda: augment(X.long()), TypeError, "lms: expected a floating-point tensor (float32, float64"),
    "complex": (lambda: augment(torch.complex(X, X)), TypeError, "got torch.complex64"),
    "array": (lambda: augment(X.numpy()), TypeError, "lms: expected a torch.Tensor, got ndarray"),
    "unknown keyword": (lambda: augment(X, mixup_alpha=1), TypeError, "unknown setting 'mixup_alpha'; known"),
    "unknown keyword of the module": (lambda: Augment(alpha=0.4), TypeError, "unknown setting 'alpha'"),
    "unknown preset": (lambda: augment(X, preset="v3"), ValueError, "preset: expected one of 'byola-v1', 'byola-v2'"),
    "unknown interpolation": (lambda: augment(X, interpolation="cubic"), ValueError, "interpolation: expected one of"),
    "unknown mixer": (lambda: augment(X, mixup="exp"), ValueError, "mixup: expected one of 'log', 'linear'"),
    "ratio above 1": (lambda: augment(X, mixup_ratio=1.5), ValueError, "mixup_ratio: expected a weight in [0, 1]"),
    "ratio NaN": (lambda: augment(X, mixup_ratio=math.nan), ValueError, "mixup_ratio"),
    "scales reversed": (lambda: augment(X, time_scale=(1.5, 0.6)), ValueError, "time_scale: expected (min, max)"),
    "one scale": (lambda: augment(X, freq_scale=(0.6,)), ValueError, "freq_scale: expected (min, max)"),
    "small canvas": (lambda: augment(X, virtual_crop_scale=(1, 0.5)), ValueError, "virtual_crop_scale"),
    "infinite gain": (lambda: augment(X, fader_gain=math.inf), ValueError, "fader_gain: expected a finite gain"),
    "size 0": (lambda: augment(X, size=(0, 12)), ValueError, "size: expected (mels, frames) of at least (1, 1)"),
    "negative seed": (lambda: augment(X, seed=-1), ValueError, "seed: expected an integer in [0, 2^63), got -1"),
    "float seed": (lambda: augment(X, seed=1.5), ValueError, "seed: expected an integer"),
    "large step": (lambda: augment(X, seed=1, step=2**32), ValueError, "step: expected an integer in [0, 2^32)"),
    "stats of three": (lambda: augment(X, stats=(0, 1, 2)), ValueError, "stats: expected (mean, std)"),
    "stats of one": (lambda: augment(X, stats=-7.1), ValueError, "stats: expected (mean, std)"),
    "a lone scale": (lambda: augment(X, time_scale=0.6), ValueError, "time_scale: expected (min, max)"),
    "a lone canvas": (lambda: augment(X, virtual_crop_scale=1.5), ValueError, "virtual_crop_scale: expected two"),
    "tensor for a list": (lambda: ops.ema_update_(X, X, 0.9), TypeError, "target: expected a list of tensors, got"),
    "EMA of a list": (lambda: EMA([X]), TypeError, "online: expected a torch.nn.Module, got list"),
    "encoder's stats": (lambda: Embedder(AudioNTT2020(d=8), stats=-7.1), ValueError, "stats: expected (mean, std)"),
    "negative std": (lambda: augment(X, stats=(0, -1)), ValueError, "stats: expected (mean, std)"),
    "stats NaN": (lambda: Augment(stats=(math.nan, 1)), ValueError, "stats: expected (mean, std)"),
    "out of another shape": (lambda: augment(X, out=torch.empty(2, 3, 8, 11)), ValueError, "out: expected shape"),
    "out without channel": (lambda: augment(X[:, None], out=torch.empty(2, 3, 8, 12)), ValueError, "(2, B, 1, F, T)"),
    "out of another dtype": (lambda: augment(X, out=torch.empty(2, 3, 8, 12).half()), TypeError, "out: expected"),
    "out with strides": (
        lambda: augment(X, out=torch.empty(2, 3, 12, 8).transpose(2, 3)),
        ValueError,
        "out: expected a contiguous tensor",
    ),
    "out that is the input": (
        lambda: (b := torch.randn(2, 3, 8, 12)) is not None and augment(b[0], out=b),
        ValueError,
        "of its own",
    ),
    "updates": (lambda: RunningStats(max_updates=0), ValueError, "max_updates: expected at least 1"),
    "lam of another length": (
        lambda: ops.log_mixup_exp(X, X, LAM[:2]),
        ValueError,
        "lam: expected shape (3,), got (2,)",
    ),
    "lam above 1": (lambda: ops.log_mixup_exp(X, X, LAM + 0.8), ValueError, "lam: expected weights in [0, 1], got 1.1"),
    "lam NaN": (
        lambda: ops.log_mixup_exp(X, X, LAM * math.nan),
        ValueError,
        "lam: expected weights in [0, 1], got nan",
    ),
    "z of another shape": (lambda: ops.log_mixup_exp(X, X[:2], LAM), ValueError, "z: expected shape (3, 8, 12)"),
    "z of another dtype": (lambda: ops.log_mixup_exp(X, X.double(), LAM), TypeError, "z: expected the dtype of x"),
    "z elsewhere": (
        lambda: ops.log_mixup_exp(X, X.to("meta"), LAM),
        ValueError,
        "z: expected on the device of x (cpu)",
    ),
    "lam with gradient": (
        lambda: ops.log_mixup_exp(X, X, LAM.clone().requires_grad_()),
        RuntimeError,
        "log_mixup_exp: gives no gradient to lam",
    ),
    "a cursor of int32": (
        lambda: ops.bank_push_(X.clone(), torch.zeros(3, dtype=torch.int32), X),
        TypeError,
        "cursor: expected int64, got torch.int32",
    ),
    "a seed of int32, which the reference would take for other numbers": (
        lambda: ops.draw_params(torch.ones(2, dtype=torch.int32), 3, (8, 12)),
        TypeError,
        "rng: expected int64, got torch.int32",
    ),
    "parameters that are no tensor": (
        lambda: ops.augment_views(X, [0.1], None, None, None, None),
        TypeError,
        "lam: expected a torch.Tensor, got list",
    ),
    "a cursor with gaps": (
        lambda: ops.bank_push_(X.clone(), torch.zeros(6, dtype=torch.int64)[::2], X),
        ValueError,
        "cursor: expected a contiguous tensor",
    ),
    "float crop": (lambda: ops.resize_crop(X, CROP.float()), TypeError, "crop: expected int32 or int64"),
    "crop of three": (lambda: ops.resize_crop(X, CROP[:, :3]), ValueError, "crop: expected shape (3, 4), got (3, 3)"),
    "crop too wide": (
        lambda: ops.resize_crop(X, crop_with(0, 1, 8, 18)),
        ValueError,
        "crop: expected boxes (i, j, h, w) inside the canvas (8, 18), got (0, 1, 8, 18) at 2",
    ),
    "crop before the canvas": (lambda: ops.resize_crop(X, crop_with(-1, 0, 2, 2)), ValueError, "at 2"),
    "empty crop": (lambda: ops.resize_crop(X, crop_with(0, 0, 0, 2)), ValueError, "at 2"),
    "small op canvas": (
        lambda: ops.resize_crop(X, CROP, canvas=(7, 18)),
        ValueError,
        "canvas: expected (mels, frames)",
    ),
    "unknown interpolation of the op": (
        lambda: ops.resize_crop(X, CROP, interpolation="nearest"),
        ValueError,
        "interpolation: expected one of 'bilinear'",
    ),
    "bank_count elsewhere": (
        lambda: ops.draw_params(torch.tensor([1, 2]), 3, (8, 12), bank_count=torch.zeros((), device="meta").long()),
        ValueError,
        "bank_count: expected on the device of rng (cpu), got meta",
    ),
    "bank_count of floats": (
        lambda: ops.draw_params(torch.tensor([1, 2]), 3, (8, 12), bank_count=torch.zeros(())),
        TypeError,
        "bank_count: expected int32 or int64, got torch.float32",
    ),
    "sums": (lambda: ops.normalize(X, torch.zeros(2)), ValueError, "sums: expected shape (..., 3), got (2,)"),
    "bank of another shape": (
        lambda: ops.bank_push_(torch.zeros(4, 8, 11), torch.zeros(3, dtype=torch.int64), X),
        ValueError,
        "x: expected shape (B, 8, 11), got (3, 8, 12)",
    ),
}


@pytest.mark.parametrize("case", CALLS)
def test_the_error_names_what_was_given_and_what_is_wanted(case):
    call, error, words = CALLS[case]
    with pytest.raises(error, match=re.escape(words)):
        call()


@pytest.mark.parametrize(
    ("field", "change", "words"),
    [
        ("lam", lambda t: t + 1, "params.lam: expected weights in [0, 1]"),
        ("lam", lambda t: t[:, :2], "params.lam: expected shape (2, 3), got (2, 2)"),
        ("crop", lambda t: t + 9, "params.crop: expected boxes"),
        ("bank_index", lambda t: t + 3, "params.bank_index: expected rows in [0, 3), or -1"),
        ("bank_index", lambda t: t - 9, "params.bank_index: expected rows in [0, 3), or -1"),
        ("fader", lambda t: t.to("meta"), "params.fader: expected on cpu, got meta"),
    ],
)
def test_replayed_parameters_are_checked(field, change, words):
    from dataclasses import replace

    params = augment(X, seed=1, return_params=True)[2]
    broken = replace(params, **{field: change(getattr(params, field))})
    with pytest.raises(ValueError, match=re.escape(words)):
        augment(X, params=broken)
    with pytest.raises(ValueError, match=re.escape(words)):
        Augment(seed=1)(X, params=replace(broken, bank_count=torch.tensor(0)))


def test_boxes_and_rows_out_of_range_are_moved_inside_below_the_checks(device):
    """The dispatcher's ops do not check values on a GPU; what is out of range is clamped, never read out of bounds."""
    x = torch.randn(4, 8, 12, device=device)
    wild = torch.tensor([[-50, 10**6, 3, 4], [0, 0, -7, 10**8], [7, 17, 8, 18], [2**30, -(2**30), 1, 1]], device=device)
    tame = torch.tensor([[0, 14, 3, 4], [0, 0, 1, 18], [0, 0, 8, 18], [7, 0, 1, 1]], device=device)
    for interpolation in ("bilinear", "bicubic"):
        got = torch.ops.byola_fast.resize_crop(x, wild, [8, 12], [8, 18], interpolation)
        torch.testing.assert_close(got, ops.resize_crop(x, tame, interpolation=interpolation), rtol=0, atol=0)
        back = torch.ops.byola_fast.resize_crop_backward(x, wild, [8, 12], [8, 18], interpolation)
        expected = torch.ops.byola_fast.resize_crop_backward(x, tame, [8, 12], [8, 18], interpolation)
        torch.testing.assert_close(back, expected, rtol=0, atol=0)
    params = augment(x, seed=1, return_params=True)[2]
    far, last = params.bank_index + 10**9, torch.full_like(params.bank_index, 3)
    rest = (params.crop, params.fader, params.rng.to(device), 0, [8, 12], [8, 18], "bilinear", "log")
    got, _ = torch.ops.byola_fast.augment_views(x, None, None, None, None, params.lam, far, *rest)
    expected, _ = torch.ops.byola_fast.augment_views(x, None, None, None, None, params.lam, last, *rest)
    assert torch.equal(got, expected)


def test_nothing_is_lost_after_an_error():
    """A refused batch advances neither the step nor the bank."""
    aug = Augment(seed=1, n_memory=5)
    aug(X)
    before = {k: v.clone() for k, v in aug.state_dict().items()}
    for bad in (X[:, :5], X.long(), X[0]):
        with pytest.raises((ValueError, TypeError)):
            aug(bad)
    with pytest.raises(ValueError, match="out"):
        aug(X, out=torch.empty(1))
    for key, value in aug.state_dict().items():
        assert torch.equal(value, before[key]), key


def test_params_slices():
    params = augment(X, seed=1, return_params=True)[2]
    with pytest.raises(TypeError, match="expected a slice of samples"):
        params[1]
    with pytest.raises(ValueError, match="slice of neighbours"):
        params[::2]
    assert "3 samples from number 0, seed 1, step 0" in str(params)
