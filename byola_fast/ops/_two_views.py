"""Both views of a call without gradients at once: in two launches of Triton's kernels, or in one C++ op on the CPU.

See ``_triton/two_views.py`` and ``csrc/two_views_cpu.cpp``.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from byola_fast.ops import _checks as check
from byola_fast.ops._native import cpu
from byola_fast.ops._route import needs_reference
from byola_fast.ops.functional import MAX_ROWS, canvas_size, pair, size_range, weights_in_range

POST_NORM, ADVANCE, BATCH_STATS = 1, 2, 4

Running = tuple[Tensor, Tensor, Tensor, Tensor] | tuple[None, None, None, None]


def two_views(
    x: Tensor,
    rng: Tensor,
    stats: Tensor | None,
    *,
    mixup: str,
    mixup_ratio: float,
    freq_scale: Sequence[float],
    time_scale: Sequence[float],
    virtual_crop_scale: Sequence[float],
    interpolation: str,
    fader_gain: float,
    size: tuple[int, int] | None,
    post_norm: bool,
    sample_offset: int,
    out: Tensor | None,
    rows: Tensor | None = None,
    cursor: Tensor | None = None,
    advance: bool = False,
) -> Tensor:
    """Return what ``draw_params``, ``augment_views`` and ``normalize`` give one after another, up to rounding.

    Args:
        x, rng, stats, out: as in ``augment_views``; x is not empty.
        rows, cursor: of a memory, or None.
        advance: push x to the memory, and count the step in ``rng``.
    """
    from byola_fast.ops._triton.two_views import two_views_

    batch, mels, frames = x.shape
    for name, count in (("x", batch), ("rows", 0 if rows is None else len(rows))):
        if count > MAX_ROWS:
            raise ValueError(f"{name}: expected at most 2^24 samples to choose partners from, got {count}")
    weights_in_range(mixup_ratio, fader_gain)
    size = (mels, frames) if size is None else pair("size", size, (1, 1))
    canvas = canvas_size(mels, frames, virtual_crop_scale)
    for name, tensor in (("rng", rng), ("stats", stats), ("rows", rows), ("cursor", cursor), ("out", out)):
        if tensor is not None:
            check.require_same_device(name, tensor, "x", x)
    if advance and rows is not None:
        check.require_own_memory("rows", rows, x=x, stats=stats)
    views = x.new_empty(2, batch, *size) if out is None else out
    two_views_(
        x,
        None,
        rows,
        cursor,
        stats,
        rng,
        0,
        sample_offset,
        list(size_range("freq_scale", mels, freq_scale)),
        list(size_range("time_scale", frames, time_scale)),
        list(canvas),
        mixup_ratio,
        fader_gain,
        interpolation,
        mixup,
        post_norm,
        advance,
        views,
    )
    changed = [x for x in (out, *((rng, rows, cursor) if advance else ())) if x is not None]
    if changed:
        increment_version(changed)  # autograd does not see the kernels' writes
    return views


def has_cpu_op(x: object) -> bool:
    """Return whether the C++ op may serve x: it is loaded, no gradient is asked for, and nothing must see its parts.

    The composite path loads it, at the first call. float64 needs steps that depend on values.
    """
    if torch.compiler.is_compiling() or type(x) is not Tensor or not x.is_cpu or cpu.library() is None:
        return False
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16) or x.layout is not torch.strided:
        return False
    if x.requires_grad and torch.is_grad_enabled():
        return False
    return not (needs_reference() or torch._C._len_torch_dispatch_stack())


@functools.lru_cache(maxsize=256)
def pack(
    flags: int,
    rank: int,
    mels: int,
    frames: int,
    mixup: str,
    mixup_ratio: float,
    freq_scale: tuple[float, float],
    time_scale: tuple[float, float],
    virtual_crop_scale: tuple[float, float],
    interpolation: str,
    fader_gain: float,
    size: tuple[int, int] | None,
    max_updates: int = -1,
) -> tuple[Tensor, tuple[int, int]]:
    """Check settings, and return them as the C++ op takes them, with the size of the views.

    Raises:
        TypeError, ValueError: a setting out of range, or unhashable.
    """
    weights_in_range(mixup_ratio, fader_gain)
    ranges = *size_range("freq_scale", mels, freq_scale), *size_range("time_scale", frames, time_scale)
    canvas = canvas_size(mels, frames, virtual_crop_scale)
    size = (mels, frames) if size is None else pair("size", size, (1, 1))
    words = [
        flags,
        rank,
        check.INTERPOLATIONS.index(interpolation),
        check.MIXERS.index(mixup),
        *ranges,
        *canvas,
        max_updates,
    ]
    with torch.inference_mode(False):
        bits = struct.unpack("2q", struct.pack("2d", mixup_ratio, fader_gain))
        return torch.tensor([*words, *bits], dtype=torch.int64, device="cpu"), size


def two_views_on_cpu(
    x: Tensor,
    packed: tuple[Tensor, tuple[int, int]],
    rng: Tensor,
    stats: Tensor | None,
    out: Tensor | None,
    rows: Tensor | None = None,
    cursor: Tensor | None = None,
    running: Running = (None, None, None, None),
) -> Tensor:
    """Return what ``draw_params``, ``augment_views`` and ``normalize`` give one after another, up to rounding.

    Args:
        x: not empty, at most 2^24 samples.
        packed: from ``pack``, for the size of x.
        rng: seed, or seed and step.
        stats: mean and std; None for none, for the batch's own or for running ones.
        out: checked; or None.
        rows, cursor: of a memory, or None.
        running: mean, variance, count and updates of running statistics to update, or None.
    """
    settings, size = packed
    views = x.new_empty((2, x.shape[0], *size)) if out is None else out
    _op(x, settings, rng, stats, rows, cursor, *running, views)
    return views


_op = torch.ops.byola_fast._two_views_.default
