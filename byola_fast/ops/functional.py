"""The public ops: contract and checks here, arithmetic in the backends."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from byola_fast.ops import _checks as check
from byola_fast.ops._ema_checks import ema_decay, require_matching_lists
from byola_fast.ops._route import ema_update_without_grad, is_without_autograd, needs_reference, op
from byola_fast.ops.reference import SIZE_SHIFT, ema_update__reference, sums_dtype

__all__ = [
    "augment_views",
    "bank_push_",
    "canvas_size",
    "draw_params",
    "ema_update_",
    "log_mixup_exp",
    "normalize",
    "resize_crop",
    "sample_sums",
]

VIRTUAL_CROP_SCALE = (1.0, 1.5)  # mels, frames
MAX_ROWS = 2**24  # a 24-bit draw chooses the partner
FAR_MEAN = 1e6  # in units of std: float64 sums of squares then lose the std of float64 values
MAX_SIDE = 2**31 - 1  # of a canvas or an output: kernels count along an axis in int32


def log_mixup_exp(x: Tensor, z: Tensor, lam: Tensor) -> Tensor:
    """Mix two log-mel spectrograms as sounds mix: on the linear scale.

    ``y = log((1 - lam) exp(x) + lam exp(z) + eps)``, natural logarithm, eps = 1.19e-7 (float32's, for every dtype).

    Args:
        x: log-mel spectrograms (or other values in the log domain).
        z: spectrograms to mix in, of the same shape, dtype and device.
        lam: weight of ``z`` for each sample, in [0, 1].

    Shape:
        x, z ``(B, ...)`` with any strides, lam ``(B,)`` float; a new contiguous ``(B, ...)`` tensor in the dtype of x.

    Raises:
        TypeError: wrong dtypes. ValueError: shapes or devices that do not match, weights outside [0, 1] (checked on
        the CPU only; elsewhere a precondition). RuntimeError: lam requires a gradient, because it would get none.

    Numerics:
        Half precision is computed in float32 and rounded once. Like the formula, exp overflows to inf above 88.7 (709.7
        in float64), and a weight of 0 turns that into NaN; -inf counts as silence. NaN and inf stay in their own
        sample. Deterministic.

    Autograd:
        To x and z, once differentiable.

    Backends:
        C++ on the CPU, Triton on CUDA, plain PyTorch elsewhere; ``byola_fast.doctor()`` reports it.

    Source:
        The log-mixup-exp of BYOL-A, arXiv:2103.06695.

    >>> x, z = torch.zeros(2, 1, 3), torch.full((2, 1, 3), 2.0)
    >>> log_mixup_exp(x, z, torch.tensor([0.0, 0.5]))[:, 0, 0]
    tensor([1.1921e-07, 1.4338e+00])
    """
    check.require_float("x", x)
    check.require_float("z", z)
    check.require_float("lam", lam)
    if x.dim() < 1:
        raise ValueError("x: expected shape (B, ...), got a 0-d tensor")
    check.require_same_dtype("z", z, "x", x)
    check.require_shape("z", z, tuple(x.shape))
    check.require_shape("lam", lam, (x.shape[0],))
    check.require_same_device("z", z, "x", x)
    check.require_same_device("lam", lam, "x", x)
    check.require_no_grad("log_mixup_exp", lam=lam)
    check.require_lam_in_range("lam", lam)
    return op("log_mixup_exp", x, z)(x, z, lam)


def canvas_size(mels: int, frames: int, scale: Sequence[float] = VIRTUAL_CROP_SCALE) -> tuple[int, int]:
    """Return the virtual canvas of an input: ``(int(F * scale[0]), int(T * scale[1]))``.

    >>> canvas_size(64, 96)
    (64, 144)
    """
    if not check.is_pair(scale) or not all(1 <= s < math.inf for s in scale):
        raise ValueError(f"virtual_crop_scale: expected two finite factors (mels, frames) of at least 1, got {scale}")
    canvas = int(mels * scale[0]), int(frames * scale[1])
    if max(canvas) > MAX_SIDE:
        raise ValueError(f"virtual_crop_scale: expected a canvas of fewer than 2^31 mels and frames, got {canvas}")
    return canvas


def resize_crop(
    x: Tensor,
    crop: Tensor,
    size: tuple[int, int] | None = None,
    interpolation: str = "bilinear",
    canvas: tuple[int, int] | None = None,
    *,
    mode: str | None = None,
) -> Tensor:
    """Cut one box per sample from a zero canvas with the input at its centre, and resize it.

    Equals ``F.interpolate(box, size, mode=interpolation, align_corners=True)`` of each box: output o along an axis is
    at ``o (extent - 1) / (size - 1)`` of the box. Taps are clamped to the box's edge, so that values outside the box
    have no effect. Zeros of the canvas inside the box do count.

    Args:
        x: log-mel spectrograms.
        crop: boxes ``(i, j, h, w)`` on the canvas: first mel, first frame, mels, frames; int32 or int64.
        size: (mels, frames) of the output; the input's by default.
        interpolation: "bilinear", or "bicubic" (a = -0.75).
        canvas: (mels, frames) of the canvas, at least the input's; ``(F, int(1.5 T))`` by default. The input starts at
            ``(canvas - input) // 2``.
        mode: old name of ``interpolation``; warns, and will be removed in 0.3.

    Shape:
        x ``(B, F, T)`` or ``(B, 1, F, T)`` with any strides, crop ``(B, 4)``; a new contiguous tensor of the same rank.

    Raises:
        TypeError: wrong dtypes. ValueError: wrong shapes, devices or sizes, an unknown interpolation, boxes that leave
        the canvas (checked on the CPU; other devices move them inside and never read out of bounds).

    Numerics:
        Tap positions are exact integer fractions, more accurate than ``F.interpolate``'s float32 positions. Half
        precision is computed in float32 and rounded once. NaN and inf stay in their own sample. Deterministic.

    Autograd:
        To x, once differentiable.

    Source:
        The random resize crop of BYOL-A, arXiv:2103.06695. Differs: bilinear by default (published: bicubic).

    >>> x = torch.arange(6.0).view(1, 2, 3)
    >>> resize_crop(x, torch.tensor([[0, 0, 2, 2]]), size=(3, 3), canvas=(2, 3))
    tensor([[[0.0000, 0.5000, 1.0000],
             [1.5000, 2.0000, 2.5000],
             [3.0000, 3.5000, 4.0000]]])
    """
    check.require_float("x", x)
    flat = without_channel("x", x)
    check.require_spectrogram("x", flat)
    check.require_integer("crop", crop)
    check.require_shape("crop", crop, (x.shape[0], 4))
    check.require_same_device("crop", crop, "x", x)
    interpolation = _renamed_mode(interpolation, mode)
    check.require_one_of("interpolation", interpolation, check.INTERPOLATIONS)
    mels, frames = flat.shape[1:]
    size = (mels, frames) if size is None else pair("size", size, (1, 1))
    canvas = canvas_size(mels, frames) if canvas is None else pair("canvas", canvas, (mels, frames))
    check.require_crop_in_canvas("crop", crop, canvas)
    y = op("resize_crop", flat)(flat, crop, size, canvas, interpolation)
    return y[:, None] if x.dim() == 4 else y


def _renamed_mode(interpolation: str, mode: str | None) -> str:
    if mode is None:
        return interpolation
    warnings.warn("mode= is now called interpolation=", FutureWarning, stacklevel=3)
    return mode


def without_channel(name: str, x: Tensor) -> Tensor:
    """Return ``(B, F, T)`` for ``(B, F, T)`` or ``(B, 1, F, T)``."""
    if x.dim() == 3:
        return x
    if x.dim() == 4 and x.shape[1] == 1:
        return x[:, 0]
    hint = f"; one spectrogram is {name}[None], waveforms go through byola_fast.LogMel first" if x.dim() == 2 else ""
    raise ValueError(f"{name}: expected shape (B, F, T) or (B, 1, F, T), got {tuple(x.shape)}{hint}")


def pair(name: str, value: Sequence[int], minimum: tuple[int, int]) -> tuple[int, int]:
    """Return two integers (mels, frames), each at least its minimum and below 2^31."""
    # int first: torch 2.11 traces a SymInt as an int and cannot trace its hasattr
    known = (int, torch.SymInt)
    whole = isinstance(value, Sequence) and all(isinstance(v, known) or hasattr(v, "__index__") for v in value)
    if not whole or len(value) != 2 or not all(v >= n for v, n in zip(value, minimum, strict=True)):
        raise ValueError(f"{name}: expected (mels, frames) of at least {minimum}, integers, got {value!r}")
    if not all(v <= MAX_SIDE for v in value):
        raise ValueError(f"{name}: expected fewer than 2^31 mels and frames, got {value!r}")
    return value[0], value[1]


def size_range(name: str, length: int, scale: Sequence[float]) -> tuple[int, int]:
    """Return (base, slope) such that ``(base + slope * u24) >> 40`` is ``int(U(*scale) * length)``.

    The largest draw stays below ``scale[1] * length``, like a half-open uniform. Each size's probability differs from
    the exact one by less than 2^-16 of a bin.
    """
    if not check.is_pair(scale) or not 0 <= scale[0] <= scale[1] < math.inf or scale[1] == 0:
        raise ValueError(f"{name}: expected (min, max) with 0 <= min <= max, max > 0 and finite, got {scale}")
    if scale[1] * length >= 2**22:
        raise ValueError(f"{name}: expected crops of fewer than 2^22 rows or frames, got {scale[1]} times {length}")
    base = math.floor(scale[0] * length * 2**SIZE_SHIFT)
    slope = math.floor((scale[1] - scale[0]) * length * 2 ** (SIZE_SHIFT - 24))
    return base, slope


def weights_in_range(mixup_ratio: float, fader_gain: float) -> None:
    """Require a mixup_ratio in [0, 1] and a finite fader_gain of at least 0."""
    if not 0 <= mixup_ratio <= 1:
        raise ValueError(f"mixup_ratio: expected a weight in [0, 1], got {mixup_ratio}")
    if not 0 <= fader_gain < math.inf:
        raise ValueError(f"fader_gain: expected a finite gain of at least 0, got {fader_gain}")


def draw_params(
    rng: Tensor,
    batch: int,
    input_size: tuple[int, int],
    *,
    mixup_ratio: float = 0.4,
    freq_scale: Sequence[float] = (0.6, 1.5),
    time_scale: Sequence[float] = (0.6, 1.5),
    virtual_crop_scale: Sequence[float] = VIRTUAL_CROP_SCALE,
    fader_gain: float = 0.0,
    bank_count: Tensor | None = None,
    pool: int | None = None,
    pool_offset: int = 0,
    sample_offset: int = 0,
    views: int = 2,
    first_view: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Draw the parameters of V views of a batch, bit-identical on every device and backend.

    ``lam = mixup_ratio U(0, 1)``; ``h = clip(int(U(*freq_scale) F), 1, canvas)``, ``w`` likewise with T; ``i`` and
    ``j`` uniform over all positions that fit; ``head, tail = fader_gain U(-1, 1)``; the partner uniform over the bank's
    filled rows or, while there are none, over the pool's rows except the sample's.

    Args:
        rng: seed and step, on the device of the result.
        batch: B.
        input_size: (F, T).
        bank_count: number of filled rows in the bank, on the device; None without a bank.
        pool: number of rows in the pool, which partners come from while the bank is empty; B by default.
        pool_offset: row of the batch's first sample in the pool.
        sample_offset: number of the batch's first sample in the global batch, in [0, 2^63) and taken modulo 2^32.
        views: V. What a view draws does not depend on it.
        first_view: number of the first view.

    Shape:
        rng ``(2,)`` int64, bank_count ``()`` int64; returns lam ``(V, B)`` float32, bank_index ``(V, B)`` int64 (-1:
        no partner), crop ``(V, B, 4)`` int32 and fader ``(V, B, 2)`` float32.

    Raises:
        TypeError, ValueError: arguments out of range; bank_count, at most 2^24, is checked on the CPU only.

    Numerics:
        Philox4x32-10 with key seed and counter (step, sample, view, slot), each modulo 2^32; 24-bit draws; sizes and
        positions in integer arithmetic, lam and fader with one float32 rounding each.

    Source:
        BYOL-A, arXiv:2103.06695, for the parameters; Salmon et al., SC 2011, for the generator.
    """
    check.require_integer("rng", rng, (torch.int64,))
    check.require_shape("rng", rng, (2,))
    weights_in_range(mixup_ratio, fader_gain)
    check.require_count("bank_count", bank_count, "rng", rng)
    if bank_count is not None and check.is_readable(bank_count) and not 0 <= int(bank_count) <= MAX_ROWS:
        raise ValueError(f"bank_count: expected 0 to 2^24 rows, got {int(bank_count)}")
    batch = check.whole("batch", batch, 0, 2**32)
    sample_offset = check.whole("sample_offset", sample_offset, 0, 2**63)
    pool = batch if pool is None else check.whole("pool", pool, 0, 2**63)
    if pool > MAX_ROWS:
        raise ValueError(f"pool: expected 0 to 2^24 rows, got {pool}")
    pool_offset = check.whole("pool_offset", pool_offset, 0, 2**63)
    mels, frames = pair("input_size", input_size, (1, 1))
    return op("draw_params")(
        rng,
        bank_count,
        batch,
        pool,
        pool_offset,
        sample_offset,
        size_range("freq_scale", mels, freq_scale),
        size_range("time_scale", frames, time_scale),
        canvas_size(mels, frames, virtual_crop_scale),
        mixup_ratio,
        fader_gain,
        check.whole("views", views, 1, 2**32),
        check.whole("first_view", first_view, 0, 2**32),
    )


def augment_views(
    x: Tensor,
    lam: Tensor,
    bank_index: Tensor,
    crop: Tensor,
    fader: Tensor,
    rng: Tensor,
    *,
    pool: Tensor | None = None,
    bank: Tensor | None = None,
    bank_count: Tensor | None = None,
    stats: Tensor | None = None,
    sample_offset: int = 0,
    first_view: int = 0,
    size: tuple[int, int] | None = None,
    canvas: tuple[int, int] | None = None,
    interpolation: str = "bilinear",
    mixup: str = "log",
    out: Tensor | None = None,
    mode: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Make V views of a batch in one pass (pre-normalise, mix, crop and resize, fade), and their sums.

    Args:
        x: log-mel spectrograms.
        lam, bank_index, crop, fader, rng: from ``draw_params``, or replayed.
        pool: rows to mix in while the bank is empty; x by default.
        bank: past pre-normalised inputs, float32 or float16.
        bank_count: number of filled rows in the bank; at 0 the pool is used.
        stats: mean and std of the pre-normalisation; None for none.
        sample_offset, first_view: as in ``draw_params``; Gaussian noise needs them.
        size, canvas, interpolation, mode: as in ``resize_crop``.
        mixup: "log" (log-mixup-exp), "linear", "gaussian" or "none".
        out: a contiguous tensor to write the views to, with memory of its own.

    Shape:
        x ``(B, F, T)``, pool ``(P, F, T)``, bank ``(N, F, T)``, stats ``(2,)``; views ``(V, B, *size)`` in the dtype of
        x, sums ``(V, B, 3)`` float64: count, sum and sum of squares of each view of each sample, for ``normalize``.

    Raises:
        TypeError, ValueError: arguments that do not match. RuntimeError: ``out=`` while x, stats or out requires a
        gradient.

    Numerics:
        Like the single ops; rounded once, to the dtype of x. Sums are right to 1e-5, however far from zero a view's
        mean is; float32 values more than 1e18 apart overflow them. A partner of -1 leaves its sample unmixed. Bank rows
        without an index in ``bank_index`` have no effect. Deterministic, and independent of the number of threads.
        Out of range, a crop is moved inside the canvas, a bank_index reads the last row, and lam is used unchanged;
        nothing is read out of bounds. ``augment`` checks replayed parameters on the CPU; on a GPU that needs a sync.

    Autograd:
        To x (also through partners that are rows of x) and stats; not to the bank.

    Source:
        BYOL-A, arXiv:2103.06695; the fader, arXiv:2204.07402.
    """
    check.require_spectrogram("x", x)
    interpolation = _renamed_mode(interpolation, mode)
    check.require_one_of("interpolation", interpolation, check.INTERPOLATIONS)
    check.require_one_of("mixup", mixup, check.MIXERS)
    batch, mels, frames = x.shape
    check.require_float("lam", lam)
    views = max([1, *lam.shape[:1]])
    for name, tensor, shape in (
        ("lam", lam, (views, batch)),
        ("bank_index", bank_index, (views, batch)),
        ("crop", crop, (views, batch, 4)),
        ("fader", fader, (views, batch, 2)),
        ("rng", rng, (2,)),
    ):
        check.require_shape(name, tensor, shape)
        check.require_same_device(name, tensor, "x", x)
    check.require_integer("rng", rng, (torch.int64,))
    check.require_float("fader", fader)
    check.require_integer("bank_index", bank_index)
    check.require_integer("crop", crop)
    sample_offset = check.whole("sample_offset", sample_offset, 0, 2**63)
    first_view = check.whole("first_view", first_view, 0, 2**32)
    for name, rows in (("pool", pool), ("bank", bank)):
        if rows is not None:
            check.require_float(name, rows)
            if batch and not rows.shape[0]:
                raise ValueError(f"{name}: expected at least one row, got shape {tuple(rows.shape)}")
            check.require_shape(name, rows, ("N", mels, frames))
            check.require_same_device(name, rows, "x", x)
    if pool is not None:
        check.require_same_dtype("pool", pool, "x", x)
    if (bank is None) != (bank_count is None):
        raise ValueError("bank, bank_count: expected both or neither")
    check.require_count("bank_count", bank_count, "x", x)
    if stats is not None:
        check.require_float("stats", stats)
        check.require_shape("stats", stats, (2,))
        check.require_same_device("stats", stats, "x", x)
    check.require_no_grad("augment_views", bank=bank, pool=pool, lam=lam, fader=fader)
    size = (mels, frames) if size is None else pair("size", size, (1, 1))
    canvas = canvas_size(mels, frames) if canvas is None else pair("canvas", canvas, (mels, frames))
    parameters = (x, pool, bank, bank_count, stats, lam, bank_index, crop, fader, rng, sample_offset, first_view)
    if out is None:
        made = op("augment_views", x, stats)
        if not is_without_autograd(made):
            return made(*parameters, size, canvas, interpolation, mixup)
        out = x.new_empty((views, batch, *size))  # as the op does, but without its Python
        return out, op("augment_views_out")(*parameters, canvas, interpolation, mixup, out)
    check_out(out, x, size, views)
    parameters_read = dict(lam=lam, bank_index=bank_index, crop=crop, fader=fader, rng=rng, bank_count=bank_count)
    check.require_own_memory("out", out, x=x, pool=pool, bank=bank, stats=stats, **parameters_read)
    check.require_no_grad("augment_views with out=", x=x, stats=stats, out=out)
    sums = op("augment_views_out")(*parameters, canvas, interpolation, mixup, out)
    increment_version(out)  # autograd does not see the kernels' writes
    return out, sums


def check_out(out: Tensor, x: Tensor, size: tuple[int, int], views: int = 2) -> None:
    """Require an ``out`` that can hold the views of ``x (B, F, T)``."""
    check.require_shape("out", out, (views, x.shape[0], *size))
    check.require_same_dtype("out", out, "x", x)
    check.require_same_device("out", out, "x", x)
    if not out.is_contiguous():
        raise ValueError(f"out: expected a contiguous tensor, got strides {out.stride()}")


def sample_sums(x: Tensor) -> Tensor:
    """Return count, sum and sum of squares of each sample, the input of ``normalize`` and of statistics.

    Args:
        x: spectrograms or other values, samples along the first axis.

    Shape:
        x ``(B, ...)`` with any strides; ``(B, 3)`` float64 (float32 on MPS).

    Numerics:
        Each sum is right to 1e-6 of its terms' magnitudes, 1e-13 for float64, also if the first value is an outlier.
        Sums of squares of a mean far from zero drown a small std: see ``normalize``. NaN and inf stay in their own
        sample. The same for any number of threads.

    Autograd:
        To x.

    >>> sample_sums(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    tensor([[ 2.,  3.,  5.],
            [ 2.,  7., 25.]], dtype=torch.float64)
    """
    check.require_float("x", x)
    if x.dim() < 2:
        raise ValueError(f"x: expected shape (B, ...), got {tuple(x.shape)}")
    return op("sample_sums", x)(x)


def normalize(x: Tensor, sums: Tensor, *, inplace: bool = False) -> Tensor:
    """Shift and scale by one joint mean and one unbiased std: ``(x - mean) / max(std, eps)``.

    Args:
        x: views of any shape.
        sums: counts, sums and sums of squares from ``sample_sums`` or ``augment_views``; all leading axes are summed.
        inplace: write to x instead of a new tensor.

    Shape:
        x any, sums ``(..., 3)`` float64; returns the shape and dtype of x.

    Raises:
        TypeError, ValueError: arguments that do not match; on the CPU, float64 values with ``|mean| >= 1e6 std`` if
        sums are not those of x alone. RuntimeError: ``inplace`` while x or sums requires a gradient.

    Numerics:
        Statistics in float64, the result in float32 (float64 for float64) and rounded once. One NaN makes all NaN.
        std is right to 1e-16 of ``(mean / std)^2``, which is enough for float32. For float64 values with ``|mean| >=
        1e6 std``, x itself gives std on the CPU; elsewhere, and while compiling, subtract their mean first.

    Autograd:
        To x and sums; with ``inplace=True`` an error if they require a gradient.

    Source:
        The post-normalisation of BYOL-A, arXiv:2103.06695.

    >>> x = torch.tensor([1.0, 2.0, 3.0])
    >>> normalize(x, torch.tensor([3.0, 6.0, 14.0], dtype=torch.float64))
    tensor([-1.,  0.,  1.])
    """
    check.require_float("x", x)
    check.require_float("sums", sums)
    if sums.dim() < 1 or sums.shape[-1] != 3:
        raise ValueError(f"sums: expected shape (..., 3), got {tuple(sums.shape)}")
    check.require_same_device("sums", sums, "x", x)
    if sums.dtype is not torch.float64 and sums.dtype != sums_dtype(x.device):
        raise TypeError(f"sums: expected {sums_dtype(x.device)}, got {sums.dtype}")
    if x.numel() and not sums.numel():
        raise ValueError(f"sums: expected those of x, got none, in shape {tuple(sums.shape)}")
    if inplace:
        check.require_no_grad("normalize in place", x=x, sums=sums)
        check.require_own_memory("x", x, sums=sums)
    if x.dtype == torch.float64 and check.is_readable(sums) and x.numel():
        count, mean, std = _readable_statistics(sums)
        if abs(mean) >= FAR_MEAN * std and math.isfinite(mean):
            if count != x.numel():
                raise ValueError(f"x: expected |mean| below 1e6 std, got mean {mean:g}; subtract it and sum again")
            centred = x - mean
            y = op("normalize", centred, sums)(centred, op("sample_sums", centred)(centred.reshape(1, -1)))
            return x.copy_(y) if inplace else y
    if not inplace:
        return op("normalize", x, sums)(x, sums)
    op("normalize_")(x, sums)
    increment_version(x)
    return x


def _readable_statistics(sums: Tensor) -> tuple[float, float, float]:
    count, total, squares = sums.detach().reshape(-1, 3).sum(0).tolist()
    mean = total / max(count, 1)
    return count, mean, math.sqrt(max(squares - total * mean, 0) / max(count, 1))


def bank_push_(rows: Tensor, cursor: Tensor, x: Tensor, stats: Tensor | None = None) -> None:
    """Append a batch to a ring of past inputs, in place: clean (unmixed), pre-normalised, finite samples only.

    Args:
        rows: the ring, float32 or float16 (or any float dtype).
        cursor: next row to write, rows filled, number of samples refused as not finite; int64, on the device of rows.
        x: log-mel spectrograms. Of a batch larger than the ring, the last N finite samples remain.
        stats: mean and std of the pre-normalisation; None for none.

    Shape:
        rows ``(N, F, T)`` and cursor ``(3,)`` contiguous, x ``(B, F, T)`` with any strides, stats ``(2,)``.

    Raises:
        TypeError, ValueError: arguments that do not match, shared memory. RuntimeError: rows requires a gradient.

    Numerics:
        Never syncs: the count of finite samples stays on the device, and no shape depends on it.

    Autograd:
        None; the bank holds data.
    """
    check.require_float("rows", rows)
    check.require_shape("rows", rows, ("N", "F", "T"))
    if not 1 <= rows.shape[0] <= MAX_ROWS or not rows.is_contiguous():
        raise ValueError(f"rows: expected 1 to 2^24 rows, contiguous, got {tuple(rows.shape)}, {rows.stride()}")
    check.require_integer("cursor", cursor, (torch.int64,))
    check.require_shape("cursor", cursor, (3,))
    if not cursor.is_contiguous():  # kernels write to it
        raise ValueError(f"cursor: expected a contiguous tensor, got strides {cursor.stride()}")
    check.require_float("x", x)
    check.require_shape("x", x, ("B", *rows.shape[1:]))
    if stats is not None:
        check.require_float("stats", stats)
        check.require_shape("stats", stats, (2,))
    for name, tensor in (("cursor", cursor), ("x", x), ("stats", stats)):
        if tensor is not None:
            check.require_same_device(name, tensor, "rows", rows)
    check.require_own_memory("rows", rows, x=x, cursor=cursor, stats=stats)
    check.require_own_memory("cursor", cursor, x=x, stats=stats)
    check.require_no_grad("bank_push_", rows=rows)
    op("bank_push_")(rows, cursor, x.detach(), None if stats is None else stats.detach())
    increment_version((rows, cursor))


def ema_update_(target: Sequence[Tensor], online: Sequence[Tensor], decay: float | Tensor) -> None:
    """Move a list of tensors towards another, in place: ``target <- decay * target + (1 - decay) * online``.

    Args:
        target: tensors to update, all on one device; none may share memory with another tensor of either list.
        online: as many tensors of the same shapes; of the target's dtype, or float16 or bfloat16 for float32 targets.
        decay: in [0, 1]; a number, or a 0-d tensor on the CPU or on the targets' device. A tensor on a GPU is neither
            synced nor checked, and a replayed CUDA graph reads its current value; a number is fixed at capture.

    Shape:
        Any mix of shapes, strides and alignments, empty tensors and lists included. Tensors with gaps between their
        elements, or with another order of elements than their twin, are copied first.

    Raises:
        TypeError: other dtypes than above (keep half-precision networks' targets in float32: updates this small round
        to zero in bfloat16). ValueError: lists, shapes or devices that do not match, shared memory, a freed storage, a
        decay outside [0, 1]. Everything is checked before anything is written.

    Numerics:
        With w = 1 - decay: ``t + w (o - t)`` if w < 1/2, else ``o - (1 - w) (o - t)``, in the target's dtype; three
        roundings, never fused, the same on every backend. ``decay`` 0 copies and 1 keeps, exactly.

    Autograd:
        None; in place on data. A backward pass that saved a target raises an error.

    Backends:
        C++ on the CPU, CUDA C++ or Triton on a GPU: one launch for up to 1120 tensors. Shared memory is searched for
        at the first call, and again only if an address, dtype, shape or stride has changed.

    Source:
        BYOL, arXiv:2006.07733, eq. (1).

    >>> target, online = [torch.zeros(2)], [torch.ones(2)]
    >>> ema_update_(target, online, 0.75)
    >>> target
    [tensor([0.2500, 0.2500])]
    """
    try:
        weight = ema_decay(decay, target)
        with torch.no_grad():
            if needs_reference():
                require_matching_lists(target, online)
                ema_update__reference(target, [o.detach() for o in online], weight)  # no_grad lets forward mode pass
            else:
                ema_update_without_grad(target, online, weight)
    except (RuntimeError, TypeError):
        for name, tensors in (("target", target), ("online", online)):
            if not isinstance(tensors, Sequence):
                raise TypeError(f"{name}: expected a list of tensors, got {type(tensors).__name__}") from None
            for number, tensor in enumerate(tensors):
                check.require_tensor(f"{name}[{number}]", tensor)
        raise
