"""Both views of a call without gradients in two launches of Triton's kernels; see ``_triton/two_views.py``."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.autograd.graph import increment_version

from byola_fast.ops import _checks as check
from byola_fast.ops.functional import MAX_ROWS, canvas_size, pair, size_range, weights_in_range


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
