"""Bad input to the ops and the augmentation: an error that names the argument, what was given and what is wanted."""

from __future__ import annotations

import math
import re
from dataclasses import replace

import pytest
import torch

from byola_fast import EMA, AudioNTT2020, Augment, Embedder, augment, ops
from byola_fast.ops.frontend import log_mel
from byola_fast.spectrograms.statistics import RunningStats
from byola_fast.views.explain import explain_views

X = torch.randn(3, 8, 12)
LAM = torch.tensor([0.1, 0.2, 0.3])
CROP = torch.tensor([[0, 0, 8, 18]] * 3)


CURSOR = torch.zeros(3, dtype=torch.int64)
RNG = torch.tensor([1, 2])
SUMS = ops.sample_sums(X)


class Subclass(torch.Tensor):
    pass


def drawn_with(**changes):
    return replace(augment(X, seed=1, return_params=True)[2], **changes)


def drawn(**changes):
    names = ("lam", "bank_index", "crop", "fader", "rng")
    return {name: getattr(drawn_with(**changes), name) for name in names}


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
    "out that overlaps the input": (
        lambda: augment((b := torch.randn(700))[412:].view(3, 8, 12), out=b[:576].view(2, 3, 8, 12)),
        ValueError,
        "out: expected memory of its own, got that of x",
    ),
    "out that is the partners": (
        lambda: ops.augment_views(X, **drawn(), pool=(b := torch.randn(6, 8, 12)), out=b.view(2, 3, 8, 12)),
        ValueError,
        "out: expected memory of its own, got that of pool",
    ),
    "out that is a parameter": (
        lambda: augment(X, params=drawn_with(lam=(b := torch.rand(576))[9:15].view(2, 3)), out=b.view(2, 3, 8, 12)),
        ValueError,
        "out: expected memory of its own, got that of lam",
    ),
    "out that is the memory bank": (
        lambda: (a := Augment(n_memory=6, shape=(8, 12)))(X, out=a.bank.rows.view(2, 3, 8, 12)),
        ValueError,
        "out: expected memory of its own, got that of bank.rows",
    ),
    "out of one element": (
        lambda: augment(X, out=torch.zeros(1).expand(2, 3, 8, 12)),
        ValueError,
        "out: expected a contiguous tensor",
    ),
    "out with gradient": (
        lambda: augment(X, out=torch.zeros(2, 3, 8, 12, requires_grad=True)),
        RuntimeError,
        "augment with out=: gives no gradient to out",
    ),
    "rows that are pushed": (
        lambda: ops.bank_push_(r := torch.randn(4, 8, 12), CURSOR.clone(), r[1:3]),
        ValueError,
        "rows: expected memory of its own, got that of x",
    ),
    "rows that hold the statistics": (
        lambda: ops.bank_push_(r := torch.randn(4, 8, 12), CURSOR.clone(), X, r[0, 0, :2]),
        ValueError,
        "rows: expected memory of its own, got that of stats",
    ),
    "rows that hold the cursor": (
        lambda: ops.bank_push_(r := torch.zeros(4, 8, 12), r.view(torch.int64).flatten()[:3], X),
        ValueError,
        "rows: expected memory of its own, got that of cursor",
    ),
    "rows with gradient": (
        lambda: ops.bank_push_(torch.zeros(4, 8, 12, requires_grad=True), CURSOR.clone(), X),
        RuntimeError,
        "bank_push_: gives no gradient to rows",
    ),
    "statistics of three for the bank": (
        lambda: ops.bank_push_(X.clone(), CURSOR.clone(), X, torch.ones(3)),
        ValueError,
        "stats: expected shape (2,), got (3,)",
    ),
    "normalize in place of an expanded tensor": (
        lambda: ops.normalize(X[:1].expand(3, 8, 12), SUMS, inplace=True),
        ValueError,
        "x: expected elements with memory of their own, got strides (0, 12, 1)",
    ),
    "normalize in place of overlapping windows": (
        lambda: ops.normalize(torch.randn(20).unfold(0, 5, 1), SUMS, inplace=True),
        ValueError,
        "x: expected elements with memory of their own, got strides (1, 1)",
    ),
    "normalize in place of its own sums": (
        lambda: ops.normalize(s := SUMS.clone(), s, inplace=True),
        ValueError,
        "x: expected memory of its own, got that of sums",
    ),
    "sums of float32": (lambda: ops.normalize(X, SUMS.float()), TypeError, "sums: expected torch.float64, got"),
    "sums of nothing": (lambda: ops.normalize(X, SUMS[:0]), ValueError, "sums: expected those of x, got none"),
    "a batch below 0": (lambda: ops.draw_params(RNG, -1, (8, 12)), ValueError, "batch: expected an integer in [0, "),
    "no views to draw": (lambda: ops.draw_params(RNG, 3, (8, 12), views=0), ValueError, "views: expected an integer"),
    "a view below 0": (lambda: ops.draw_params(RNG, 3, (8, 12), first_view=-1), ValueError, "first_view: expected"),
    "no views": (lambda: ops.augment_views(X, **drawn(lam=LAM[None][:0])), ValueError, "lam: expected shape (1, 3), g"),
    "no mels to draw for": (lambda: ops.draw_params(RNG, 3, (0, 12)), ValueError, "input_size: expected (mels, fra"),
    "a pool below 0": (lambda: ops.draw_params(RNG, 3, (8, 12), pool=-3), ValueError, "pool: expected an int"),
    "bank_count beyond rows": (
        lambda: ops.draw_params(RNG, 3, (8, 12), bank_count=torch.tensor(2**50)),
        ValueError,
        "bank_count: expected 0 to 2^24 rows, got 1125899906842624",
    ),
    "sample_offset below 0": (
        lambda: augment(X, sample_offset=-5),
        ValueError,
        "sample_offset: expected an integer in [0, 2^63), got -5",
    ),
    "sample_offset of a half": (
        lambda: augment(X, sample_offset=0.5),
        ValueError,
        "sample_offset: expected an integer in [0, 2^63), got 0.5",
    ),
    "a canvas of half mels": (
        lambda: ops.resize_crop(X, CROP, canvas=(8.5, 18)),
        ValueError,
        "canvas: expected (mels, frames) of at least (8, 12), integers, got (8.5, 18)",
    ),
    "a box whose end overflows": (
        lambda: ops.resize_crop(X, crop_with(2**62, 0, 2**62, 2)),
        ValueError,
        "crop: expected boxes (i, j, h, w) inside the canvas (8, 18)",
    ),
    "integer weights": (lambda: ops.augment_views(X, **drawn(lam=LAM.long().expand(2, 3))), TypeError, "lam: expected"),
    "float rows": (
        lambda: ops.augment_views(X, **drawn(bank_index=torch.zeros(2, 3))),
        TypeError,
        "bank_index: expected int32 or int64, got torch.float32",
    ),
    "float boxes": (
        lambda: ops.augment_views(X, **drawn(crop=torch.zeros(2, 3, 4))),
        TypeError,
        "crop: expected int32 or int64, got torch.float32",
    ),
    "complex fader": (
        lambda: augment(X, params=drawn_with(fader=torch.zeros(2, 3, 2, dtype=torch.complex64))),
        TypeError,
        "params.fader: expected a floating-point tensor",
    ),
    "a bank without rows": (
        lambda: ops.augment_views(X, **drawn(), bank=torch.zeros(0, 8, 12), bank_count=torch.tensor(3)),
        ValueError,
        "bank: expected at least one row, got shape (0, 8, 12)",
    ),
    "negative std in a tensor": (
        lambda: augment(X, stats=torch.tensor([0.0, -1.0])),
        ValueError,
        "stats: expected (mean, std), finite, std at least 0",
    ),
    "sparse": (lambda: augment(X.to_sparse()), TypeError, "lms: expected a dense tensor (torch.strided), got torch.sp"),
    "lam of a subclass above 1": (
        lambda: ops.log_mixup_exp(X, X, (LAM + 0.8).as_subclass(Subclass)),
        ValueError,
        "lam: expected weights in [0, 1]",
    ),
    "a seed beside parameters": (
        lambda: augment(X, seed=1, params=drawn_with()),
        ValueError,
        "params: expected neither seed nor generator beside them",
    ),
    "parameters of a bank for a batch": (
        lambda: augment(X, params=drawn_with(bank_count=torch.tensor(5))),
        ValueError,
        "params: expected partners from the batch, got rows of a bank of 5",
    ),
    "bands beyond int32": (
        lambda: log_mel(
            X[0], torch.ones(8), torch.ones(1, 5), torch.tensor([[2**32, 2**32 + 5]]), n_fft=8, hop_length=4
        ),
        RuntimeError,
        "bands: expected 0 <= first <= last <= n_fft // 2 + 1",
    ),
    "a picture of another mixer": (
        lambda: explain_views(X[:, None], "abc", samples=1, preset="byola-v1", seed=1, mixup="linear"),
        ValueError,
        "mixup: expected one of 'log', got 'linear'",
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
    params = augment(X, seed=1, return_params=True)[2]
    broken = replace(params, **{field: change(getattr(params, field))})
    with pytest.raises(ValueError, match=re.escape(words)):
        augment(X, params=broken)
    with pytest.raises(ValueError, match=re.escape(words)):
        Augment(seed=1)(X, params=replace(broken, bank_count=torch.tensor(0)))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"bank_count": torch.tensor(4)}, "params.bank_count: expected at most the bank's 3 rows, got 4"),
        ({"bank_count": torch.tensor(-1)}, "params.bank_count: expected at most the bank's 3 rows, got -1"),
        (
            {"bank_index": torch.full((2, 3), 4)},
            "params.bank_index: expected rows in [0, 3), or -1 for no partner, got 4",
        ),
        ({"sample_offset": -1}, "params.sample_offset: expected an integer in [0, 2^63), got -1"),
    ],
)
def test_rows_of_the_bank_that_are_still_empty_are_no_partners(changes, words):
    aug = Augment(seed=1, n_memory=5)
    aug(X)
    with pytest.raises(ValueError, match=re.escape(words)):
        aug(X, params=drawn_with(**changes))


def test_out_may_lie_beside_the_input_in_one_storage():
    both = torch.randn(3 * 3 * 8 * 12)
    x, out = both[:288].view(3, 8, 12), both[288:].view(2, 3, 8, 12)
    wanted = augment(x, seed=1)
    assert all(map(torch.equal, augment(x, seed=1, out=out), wanted))


def test_ops_work_under_another_default_device():
    """Tensors that the ops make for themselves stay on the CPU, whatever the default device is."""
    target, crop = [X.clone()], torch.tensor([[0, 0, 8, 18]] * 3)
    with torch.device("meta"):
        ops.ema_update_(target, [X], 0.5)
        ops.resize_crop(X, crop)
        augment(X, params=drawn_with())
        assert Augment(seed=1).rng.device.type == "meta"


def test_boxes_and_rows_out_of_range_are_moved_inside_below_the_checks(device):
    """The dispatcher's ops do not check values on a GPU; what is out of range is clamped, never read out of bounds."""
    x = torch.randn(4, 8, 12, device=device)
    wild = torch.tensor([[-50, 10**6, 3, 4], [0, 0, -7, 2**40], [7, 17, 8, 18], [2**33, -(2**32), 1, 1]], device=device)
    tame = torch.tensor([[0, 14, 3, 4], [0, 0, 1, 18], [0, 0, 8, 18], [7, 0, 1, 1]], device=device)
    for interpolation in ("bilinear", "bicubic"):
        got = torch.ops.byola_fast.resize_crop(x, wild, [8, 12], [8, 18], interpolation)
        torch.testing.assert_close(got, ops.resize_crop(x, tame, interpolation=interpolation), rtol=0, atol=0)
        back = torch.ops.byola_fast.resize_crop_backward(x, wild, [8, 12], [8, 18], interpolation)
        expected = torch.ops.byola_fast.resize_crop_backward(x, tame, [8, 12], [8, 18], interpolation)
        torch.testing.assert_close(back, expected, rtol=0, atol=0)
    params = augment(x, seed=1, return_params=True)[2]
    far, last = params.bank_index + 10**9, torch.full_like(params.bank_index, 3)
    rest = (params.crop, params.fader, params.rng.to(device), 0, 0, [8, 12], [8, 18], "bilinear", "log")
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
    for out in (torch.empty(1), aug.bank.rows[:1].expand(2, 3, 8, 12), torch.empty(2, 3, 8, 12, requires_grad=True)):
        with pytest.raises((ValueError, RuntimeError), match="out"):
            aug(X, out=out)
    with pytest.raises(RuntimeError, match="augment with out=: gives no gradient to lms"):
        aug(X.clone().requires_grad_(), out=torch.empty(2, 3, 8, 12))
    for change in (dict(fader=torch.zeros(2, 3, 2).long()), dict(bank_count=torch.tensor(1.5))):
        with pytest.raises(TypeError):
            aug(X, params=drawn_with(**change))
    for key, value in aug.state_dict().items():
        assert torch.equal(value, before[key]), key


def test_params_slices():
    params = augment(X, seed=1, return_params=True)[2]
    with pytest.raises(TypeError, match="expected a slice of samples"):
        params[1]
    with pytest.raises(ValueError, match="slice of neighbours"):
        params[::2]
    assert "3 samples from number 0, seed 1, step 0" in str(params)
