# mypy: ignore-errors
# ruff: noqa: RUF005, SIM102, because Triton adds tuples but does not support (*x, y), and decides constant ifs alone
"""A call without gradients in two launches: draw and make both views, then normalise, push and advance.

The first kernel draws each view's parameters where they are used, makes the view (see ``augment_views.py``), flags the
samples that the memory will take, and leaves one row of sums per program. The second adds up these rows, which takes
less time than a launch, and normalises; other programs of it write the samples to the memory. The memory, its cursor
and the step change in the second kernel alone, and only after the first, which reads them, has ended. All counts stay
on the GPU, so that a replayed CUDA graph draws afresh. ``exact_views.py`` does the same faster for sizes that fill
blocks.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from byola_fast.ops._triton import augment_views as views_file
from byola_fast.ops._triton import exact_views
from byola_fast.ops._triton.augment_views import RUNTIME, clear_margins, make_view, moments
from byola_fast.ops._triton.bank_push import is_flat, push_sample
from byola_fast.ops._triton.draw_params import draw_scalars, parameters
from byola_fast.ops._triton.normalize import (
    NORMALIZED,
    PROGRAMS_PER_SM,
    REGISTERS,
    WARPS,
    moments_of_sums,
    write_normalized,
)
from byola_fast.ops._triton.shared import EPS, compute_type, indexable, launch, on_device, resident_programs

SPILLING = 10, 0  # from this compute capability on, 64 registers would spill: 80, 3 programs per SM
DRAWN = ["pool_offset", "mel_base", "mel_slope", "frame_base", "frame_slope", "canvas_mels", "canvas_frames"]


@triton.jit
def takes(
    source, mels, frames, stride_f, stride_t, stats, held,
    HAS_STATS: tl.constexpr, COMPUTE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Return 1 if a sample, pre-normalised, is finite in the dtype ``held``, else 0.

    The largest distance from the mean decides for all; multiplied by 0, a value that is not finite leaves NaN.
    """
    mean = tl.full((), 0, COMPUTE)
    std = tl.full((), 1, COMPUTE)
    if HAS_STATS:
        mean = tl.load(stats).to(COMPUTE)
        std = tl.load(stats + 1).to(COMPUTE)
        std = tl.where(std < EPS, EPS, std)
    largest = tl.zeros((ROWS, COLUMNS), COMPUTE)
    spoiled = tl.zeros((ROWS, COLUMNS), COMPUTE)
    for start in range(0, mels, ROWS):
        f = (start + tl.arange(0, ROWS))[:, None]
        for group in range(0, tl.cdiv(frames, BLOCKS * COLUMNS)):
            values = ()
            for block in tl.static_range(BLOCKS):
                c = ((group * BLOCKS + block) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
                inside = (f < mels) & (c < frames)
                value = tl.load(source + f * stride_f + c * stride_t, inside, other=0).to(COMPUTE)
                values = values + (tl.where(inside, value, mean),)
            for block in tl.static_range(BLOCKS):
                distance = values[block] - mean
                largest = tl.maximum(largest, tl.abs(distance))
                spoiled += distance * 0
    value = (largest / std).to(held).to(tl.float32)
    bad = (value - value != 0) | (spoiled != 0)
    return (tl.sum(bad.to(tl.int32)) == 0).to(tl.int32)


@triton.jit(do_not_specialize=RUNTIME + DRAWN)
def two_views_kernel(
    x,  # (B, F, T), any strides
    pool,  # (P, F, T), any strides: partners while the bank is empty; x if there is no other pool
    bank,  # (N, F, T), or absent
    bank_count,  # () int64, or absent
    stats,  # (2,) mean and std, or absent
    rng,  # (2,) int64
    out,  # (2, B, out_mels, out_frames)
    sums,  # (2, programs): sum, sum of squares
    finite,  # (B,) int32: whether the memory takes the sample, or absent
    done,  # (1,) int32, set to 0 for the second kernel, or absent
    scratch,  # (programs, F + 1, stride [+ resized_stride])
    sample_offset,
    batch,
    pool_rows,
    bank_rows,
    pool_offset,
    mel_base,
    mel_slope,
    frame_base,
    frame_slope,
    mixup_ratio,
    fader_gain,
    mels,
    frames,
    x_b,
    x_f,
    x_t,
    pool_b,
    pool_f,
    pool_t,
    out_mels,
    out_frames,
    canvas_mels,
    canvas_frames,
    mel_magic,
    mel_shift,
    frame_magic,
    frame_shift,
    stride,
    resized_stride,
    PUSH: tl.constexpr,
    HAS_BANK: tl.constexpr,
    HAS_STATS: tl.constexpr,
    MIXUP: tl.constexpr,
    TAPS: tl.constexpr,
    COMPUTE: tl.constexpr,
    APPROXIMATE: tl.constexpr,
    WIDE: tl.constexpr,
    EXACT: tl.constexpr,
    STAGED_ROWS: tl.constexpr,
    MIX_BLOCKS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    COLUMN_BLOCKS: tl.constexpr,
    RUN: tl.constexpr,
    BLOCKS_AT_ONCE: tl.constexpr,
    TURNS_AT_ONCE: tl.constexpr,
    PREFETCH: tl.constexpr,
):
    mean, scale = moments(stats, HAS_STATS, COMPUTE)
    from_bank = False
    if HAS_BANK:
        from_bank = tl.load(bank_count) > 0
    if PUSH:
        if tl.program_id(0) == 0:
            tl.store(done, 0)
    tile = scratch + tl.program_id(0).to(tl.int64) * (mels + 1) * (stride + resized_stride)
    clear_margins(tile, mels, frames, stride, resized_stride, COMPUTE, STAGED_ROWS, COLUMNS)
    own_sums = sums + tl.program_id(0)  # in memory, because registers are short
    tl.store(own_sums, tl.full((), 0, tl.float64))
    tl.store(own_sums + tl.num_programs(0), tl.full((), 0, tl.float64))
    for unit in range(tl.program_id(0), 2 * batch, tl.num_programs(0)):
        view = unit % 2
        sample = unit // 2
        size_h, size_w, place_h, place_w, ratio, other, begin, end = draw_scalars(rng, sample + sample_offset, view)
        i, j, h, w, weight, partner, head, tail = parameters(
            size_h, size_w, place_h, place_w, ratio, other, begin, end,
            sample.to(tl.int64), pool_rows, pool_offset, mel_base, mel_slope, frame_base, frame_slope,
            canvas_mels, canvas_frames, mixup_ratio, fader_gain, bank_count, HAS_BANK,
        )  # fmt: skip
        if PUSH:
            if view == 0:
                taken = takes(
                    x + sample.to(tl.int64) * x_b, mels, frames, x_f, x_t, stats, bank.dtype.element_ty,
                    HAS_STATS, COMPUTE, STAGED_ROWS, COLUMNS, MIX_BLOCKS,
                )  # fmt: skip
                tl.store(finite + sample, taken)
        total, squares = make_view(
            x, pool, bank, from_bank, mean, scale, rng, tile,
            out + (view.to(tl.int64) * batch + sample) * out_mels * out_frames,
            sample, sample + sample_offset, view, partner, weight.to(COMPUTE),
            h, i - (canvas_mels - mels) // 2, w, j - (canvas_frames - frames) // 2,
            head.to(COMPUTE), tail.to(COMPUTE),
            pool_rows, bank_rows, mels, frames, x_b, x_f, x_t, pool_b, pool_f, pool_t, out_mels, out_frames,
            mel_magic, mel_shift, frame_magic, frame_shift, stride, resized_stride,
            HAS_BANK, MIXUP, TAPS, COMPUTE, APPROXIMATE, WIDE, EXACT, STAGED_ROWS, MIX_BLOCKS, ROWS, COLUMNS,
            COLUMN_BLOCKS, RUN, BLOCKS_AT_ONCE, TURNS_AT_ONCE, PREFETCH,
        )  # fmt: skip
        tl.atomic_add(own_sums, total, sem="relaxed")  # by one thread, so always in this order
        tl.atomic_add(own_sums + tl.num_programs(0), squares, sem="relaxed")


@triton.jit(do_not_specialize=["rows_of_sums", "batch", "n_memory", "pushing"])
def finish_views_kernel(
    views,  # all values of both views
    sums,  # (2, rows_of_sums)
    x,  # (B, F, T), any strides
    stats,  # (2,) or absent
    finite,  # (B,) int32
    done,  # (1,) int32, 0
    rows,  # (N, F, T)
    cursor,  # (3,) int64
    rng,  # (2,) int64
    views_numel,
    rows_of_sums,
    batch,
    n_memory,
    pushing,  # programs that push; the others normalise
    numel,
    frames,
    x_b,
    x_f,
    x_t,
    NORMALIZE: tl.constexpr,
    PUSH: tl.constexpr,
    ADVANCE: tl.constexpr,
    HAS_STATS: tl.constexpr,
    FLAT: tl.constexpr,
    COMPUTE: tl.constexpr,
    SUMS: tl.constexpr,
    FLAGS: tl.constexpr,
    PUSH_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    if ADVANCE:
        if program == 0:
            tl.atomic_add(rng + 1, tl.full((), 1, tl.int64), sem="relaxed")  # by one thread
    if PUSH:
        if program < pushing:
            push_sample(
                program.to(tl.int64), x, stats, finite, done, rows, cursor, batch, n_memory, numel, frames,
                x_b, x_f, x_t, HAS_STATS, FLAT, COMPUTE, FLAGS, PUSH_BLOCK,
            )  # fmt: skip
    if NORMALIZE:
        if program >= pushing:
            step = (tl.num_programs(0) - pushing).to(tl.int64) * BLOCK
            start = (program - pushing).to(tl.int64) * BLOCK
            own = start + tl.arange(0, BLOCK)
            value = tl.load(views + own, own < views_numel, other=0)  # on its way during the sums
            total = tl.zeros((SUMS,), tl.float64)
            squares = tl.zeros((SUMS,), tl.float64)
            for first in range(0, rows_of_sums, SUMS):
                n = first + tl.arange(0, SUMS)
                total += tl.load(sums + n, n < rows_of_sums, other=0)
                squares += tl.load(sums + rows_of_sums + n, n < rows_of_sums, other=0)
            mean, std = moments_of_sums(tl.full((), views_numel, tl.float64), tl.sum(total), tl.sum(squares))
            write_normalized(value, views, views, start, step, views_numel, mean, std, COMPUTE, BLOCK)


def of_device(x: Tensor) -> dict[str, int]:
    """Return the options of the first launch that depend on the GPU."""
    spills = x.dtype != torch.float64 and x.is_cuda and torch.cuda.get_device_capability(x.device) >= SPILLING
    return {"maxnreg": 80} if spills else {}


def two_views_(
    x: Tensor,
    pool: Tensor | None,
    bank: Tensor | None,
    cursor: Tensor | None,
    stats: Tensor | None,
    rng: Tensor,
    pool_offset: int,
    sample_offset: int,
    mel_range: list[int],
    frame_range: list[int],
    canvas: list[int],
    mixup_ratio: float,
    fader_gain: float,
    interpolation: str,
    mixup: str,
    post_norm: bool,
    advance: bool,
    out: Tensor,
) -> None:
    """Write both views of ``x (B, F, T)`` to ``out (2, B, F', T')``; with ``advance``, push x and count the step."""
    if not len(x):
        return
    push = advance and bank is not None
    x = indexable(x)
    pool = x if pool is None else indexable(pool)
    if exact_views.fits(x, pool, out, canvas, mixup):
        with on_device(x):
            exact_views.exact_views_(
                x, pool, bank, cursor, stats, rng, pool_offset, sample_offset, mel_range, frame_range, canvas,
                mixup_ratio, fader_gain, interpolation, post_norm, advance, out,
            )  # fmt: skip
        return
    shape = views_file.shape_of_launch(x, out, canvas, interpolation)
    sums = x.new_empty(2, shape.programs, dtype=torch.float64)
    finite = x.new_empty(len(x) + 1 if push else 1, dtype=torch.int32)  # and the counter of programs
    moments_or_none = rng if stats is None else stats.contiguous()
    bank_or_none = x if bank is None else bank
    with on_device(x):
        launch(
            two_views_kernel,
            shape.programs,
            x,
            pool,
            bank_or_none,
            rng if cursor is None else cursor[1],
            moments_or_none,
            rng,
            out,
            sums,
            finite[1:] if push else finite,
            finite,
            shape.scratch,
            sample_offset,
            len(x),
            len(pool),
            0 if bank is None else len(bank),
            pool_offset,
            *mel_range,
            *frame_range,
            mixup_ratio,
            fader_gain,
            *shape.sizes,
            *x.stride(),
            *pool.stride(),
            *shape.geometry,
            PUSH=push,
            HAS_BANK=bank is not None,
            HAS_STATS=stats is not None,
            MIXUP=mixup,
            **(shape.constants | of_device(x)),
        )
        if post_norm or advance:
            finish_views(x, out, sums, stats, finite, bank_or_none, cursor, rng, post_norm, push, advance)


def finish_views(x, out, sums, stats, finite, rows, cursor, rng, post_norm, push, advance):
    numel = out.numel()
    most = resident_programs(x, PROGRAMS_PER_SM)
    normalizing = min(triton.cdiv(numel, NORMALIZED), most) if post_norm else 0
    pushing = len(x) if push else 0
    launch(
        finish_views_kernel,
        max(normalizing + pushing, 1),
        out,
        sums,
        x,
        rng if stats is None else stats.contiguous(),
        finite[1:] if push else finite,
        finite,
        rows,
        rng if cursor is None else cursor,
        rng,
        numel,
        sums.shape[1],
        len(x),
        max(len(rows), 1),
        pushing,
        x.shape[1] * x.shape[2],
        x.shape[2],
        *x.stride(),
        NORMALIZE=post_norm,
        PUSH=push,
        ADVANCE=advance,
        HAS_STATS=stats is not None,
        FLAT=is_flat(x),
        COMPUTE=compute_type(x.dtype),
        SUMS=1024,
        FLAGS=1024,
        PUSH_BLOCK=2048,
        BLOCK=NORMALIZED,
        num_warps=WARPS,
        maxnreg=None if x.dtype == torch.float64 else REGISTERS,
    )
