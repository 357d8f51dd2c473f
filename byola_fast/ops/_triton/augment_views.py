# mypy: ignore-errors
# ruff: noqa: RUF005, SIM102, because Triton adds tuples but does not support (*x, y), and decides constant ifs alone
"""V views of every sample in one launch: pre-norm, mix, crop and resize, fader, sums (BYOL-A, arXiv:2103.06695).

y = resize(crop(log((1 - lam) exp(x) + lam exp(z) + eps))) + fader, and the sum and sum of squares of every view.
Reads x and a partner for each view, writes the views and 24 bytes of sums for each.

Mixing is expensive, so each element is mixed once, although two to sixteen taps read it. A program processes one view
of one sample at a time: it mixes only the elements that the crop reads into its scratch tile, waits at a barrier, and
resizes from the tile. The number of programs is the number that the GPU runs at once, so the few tiles are reused for
all samples and stay in the cache. A row and a column of zeros behind each tile stand for the margin of the canvas, so
that no tap needs a mask. While mixing, a thread handles four neighbours in accesses of 16 bytes, and all blocks of
columns are on their way before the first is mixed. At the taps, a warp makes neighbouring rows, 32 frames at a time,
one per thread, and touches two or three cache lines instead of eight. Where the canvas is no taller than the view, each
row needs at most one new row of the tile, resized along time; the others stay in registers. Taller canvases go through
a second tile. Blocks are 1-D there: with two axes, Triton 3.6 lays the mels along a warp.
benchmarks/gpu/NOTES.md compares the designs, with figures.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from byola_fast.ops import philox
from byola_fast.ops._triton.resize_crop import TAPS
from byola_fast.ops._triton.shared import (
    COLUMNS,
    EPS,
    INTERPRETED,
    approximate,
    box_side,
    compute_type,
    cosine,
    division_magic,
    exponential,
    indexable,
    is_wide,
    launch,
    logarithm,
    mix_log,
    on_device,
    resident_programs,
    round_up,
    tap_base,
    tap_fraction,
    tap_row,
    tap_weight,
)
from byola_fast.ops.reference import compute_dtype, sums_dtype

SLOT_NOISE = tl.constexpr(philox.SLOT_NOISE)

# Block shapes, chosen ahead of time from registers and occupancy (benchmarks/gpu/NOTES.md).
WARPS, PROGRAMS_PER_SM = 8, 4
REGISTERS = 65536 // (32 * WARPS * PROGRAMS_PER_SM)  # per thread, so that PROGRAMS_PER_SM fit on an SM
STAGED_ROWS = 64 if INTERPRETED else 32
ROWS = 64 if INTERPRETED else WARPS  # at the taps: one per warp
MOST_MIX_BLOCKS = 3  # 24 values a thread wait for memory at once
PREFETCH = True
AT_ONCE = {
    "bilinear": (3, 2),
    "bicubic": (1, 2),
}  # blocks of columns, and rows, whose taps are read before any is written
# one variant for all values, so that a smaller last batch compiles nothing
RUNTIME = ["sample_offset", "batch", "pool_rows", "bank_rows"]


@triton.jit
def standard_normal(rng, sample, view, element, COMPUTE: tl.constexpr, APPROXIMATE: tl.constexpr):
    """Return elements of one view's noise by the Box-Muller transform; four share a Philox call."""
    slot = (element // 4 + SLOT_NOISE).to(tl.uint32)
    zero = tl.zeros_like(slot)
    step = tl.load(rng + 1).to(tl.uint32)
    a, b, c, d = tl.philox(tl.load(rng), zero + step, zero + sample.to(tl.uint32), zero + view.to(tl.uint32), slot)
    second = element % 4 >= 2
    radius = (tl.where(second, c, a) >> 8).to(COMPUTE) * 2.0**-24
    turns = (tl.where(second, d, b) >> 8).to(COMPUTE) * 2.0**-24
    turns -= tl.where(element % 2 == 0, 0.0, 0.25)  # a sine is a cosine a quarter turn later
    return tl.sqrt(-2 * tl.log(radius + 2.0**-24)) * cosine(turns, APPROXIMATE)


@triton.jit
def row_place(base, k: tl.constexpr, top, h, mels, stride, TAPS: tl.constexpr):
    """Return the offset in a tile of the row of tap ``k``; rows in the margin map to the row of zeros."""
    row = top + tap_row(base, h, k, TAPS)
    return tl.where((row >= 0) & (row < mels), row, mels) * stride


@triton.jit
def resize_along_time(
    tile, places, t, left, w, frames, out_frames, magic, shift,
    TAPS: tl.constexpr, COMPUTE: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Return outputs ``t`` of the tile's rows that start at ``places``."""
    base, rest = tap_base(t, w, out_frames, magic, shift, WIDE)
    fraction = tap_fraction(rest, out_frames, COMPUTE)
    y = tl.zeros((places.shape[0],), COMPUTE)
    for k in tl.static_range(TAPS):
        column = left + tap_row(base, w, k, TAPS)
        column = tl.where((column >= 0) & (column < frames), column, frames)
        y += tap_weight(fraction, k, TAPS) * tl.load(tile + places + column)
    return y


@triton.jit
def finish(y, target, place, t, written, head, step, pivot, COMPUTE: tl.constexpr, EXACT: tl.constexpr):
    """Add the fader to outputs of columns ``t``, write them where ``written``; return them less ``pivot``, else 0."""
    y += head + step * t.to(COMPUTE)
    if EXACT:
        tl.store(target + place, y)
        return y - pivot
    tl.store(target + place, y, written)
    return tl.where(written, y - pivot, 0)


@triton.jit
def ask(table, turn):
    """Return entry (row, ``turn``) of a table (ROWS, COLUMNS) to all lanes of the row."""
    ROWS: tl.constexpr = table.shape[0]
    COLUMNS: tl.constexpr = table.shape[1]
    return tl.gather(table, tl.full((ROWS, COLUMNS), 0, tl.int32) + turn, 1).reshape(ROWS * COLUMNS)


@triton.jit
def clear_margins(
    tile, mels, frames, stride, resized_stride, COMPUTE: tl.constexpr, STAGED_ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """Write the column of zeros behind the mixed tile, and the rows of zeros behind both tiles."""
    for start in range(0, mels, STAGED_ROWS):
        f = start + tl.arange(0, STAGED_ROWS)
        tl.store(tile + f * stride + frames, tl.zeros((STAGED_ROWS,), COMPUTE), f < mels)
    resized = tile + (mels + 1) * stride
    for start in range(0, stride + resized_stride, COLUMNS):
        c = start + tl.arange(0, COLUMNS)
        last = tl.where(c < stride, tile + mels * stride + c, resized + mels * resized_stride + (c - stride))
        tl.store(last, tl.zeros((COLUMNS,), COMPUTE), c < stride + resized_stride)


@triton.jit
def prefetch(source, first, last, lane):
    """Ask for a cache line of 128 bytes per lane, from element ``first`` to ``last``; only a hint."""
    line: tl.constexpr = 1024 // source.dtype.element_ty.primitive_bitwidth
    place = (source + tl.minimum(first + lane * line, last)).to(tl.int64)
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [place], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def make_view(
    x, pool, bank, from_bank, mean, scale, rng, tile, target,  # tensors; target: the view
    sample, noise_sample, view,
    partner, weight, h, top, w, left, head, tail,  # the view's parameters
    pool_rows, bank_rows, mels, frames, x_b, x_f, x_t, pool_b, pool_f, pool_t, out_mels, out_frames,
    mel_magic, mel_shift, frame_magic, frame_shift, stride, resized_stride,
    HAS_BANK: tl.constexpr, MIXUP: tl.constexpr, TAPS: tl.constexpr, COMPUTE: tl.constexpr, APPROXIMATE: tl.constexpr,
    WIDE: tl.constexpr, EXACT: tl.constexpr, STAGED_ROWS: tl.constexpr, MIX_BLOCKS: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, COLUMN_BLOCKS: tl.constexpr, RUN: tl.constexpr,
    BLOCKS_AT_ONCE: tl.constexpr, TURNS_AT_ONCE: tl.constexpr, PREFETCH: tl.constexpr,
):  # fmt: skip
    """Write one view of one sample; return its sum and sum of squares in float64."""
    lane = tl.arange(0, ROWS * COLUMNS)  # at the taps: output (lane // COLUMNS, lane % COLUMNS) of a block
    if APPROXIMATE:  # the compiler may not keep what follows from it in registers from one view to the next
        lane = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [lane], dtype=tl.int32, is_pure=False, pack=1)
    resized = tile + (mels + 1) * stride
    alone = partner < 0
    partner = tl.maximum(partner, 0)
    source = x + sample.to(tl.int64) * x_b
    pool_row = pool + tl.minimum(partner, pool_rows - 1) * pool_b
    other_row, other_f, other_t, other_mean, other_scale = pool_row, pool_f, pool_t, mean, scale
    # Rows of the bank are normalised already. A partner is chosen by its pointer if both kinds have one dtype.
    SELECT: tl.constexpr = HAS_BANK and bank.dtype == pool.dtype
    BRANCH: tl.constexpr = HAS_BANK and bank.dtype != pool.dtype
    if HAS_BANK:
        bank_row = bank + tl.minimum(partner, bank_rows - 1) * mels * frames
        if SELECT:
            other_row = tl.where(from_bank, bank_row, pool_row)
            other_f = tl.where(from_bank, frames, pool_f)
            other_t = tl.where(from_bank, 1, pool_t)
        else:
            other_row, other_f, other_t = bank_row, frames, 1
        other_mean = tl.where(from_bank, 0, mean)
        other_scale = tl.where(from_bank, 1, scale)

    first_f = tl.maximum(top, 0)
    end_f = tl.minimum(top + h, mels)
    first_block = tl.maximum(left, 0) // COLUMNS
    end_c = tl.minimum(left + w, frames)
    groups = tl.cdiv(tl.cdiv(end_c, COLUMNS) - first_block, MIX_BLOCKS)
    if PREFETCH:
        if (first_f < end_f) & (groups > 0):
            prefetch(source, first_f * x_f, (end_f - 1) * x_f + (frames - 1) * x_t, lane)
            if MIXUP == "log" or MIXUP == "linear":
                prefetch(other_row, first_f * other_f, (end_f - 1) * other_f + (frames - 1) * other_t, lane)
    for start in range(first_f, end_f, STAGED_ROWS):
        f = (start + tl.arange(0, STAGED_ROWS))[:, None]
        for group in range(0, groups):
            # every block is loaded before any arithmetic: one wait for memory in place of one a block
            values, others = (), ()
            for block in tl.static_range(MIX_BLOCKS):
                c = ((first_block + group * MIX_BLOCKS + block) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
                inside = (f < end_f) & (c < frames)
                values = values + (tl.load(source + f * x_f + c * x_t, inside, other=0),)
                if MIXUP == "log" or MIXUP == "linear":
                    if BRANCH:
                        inside = inside & from_bank
                    others = others + (tl.load(other_row + f * other_f + c * other_t, inside, other=0),)
            for block in tl.static_range(MIX_BLOCKS):
                first_c = (first_block + group * MIX_BLOCKS + block) * COLUMNS
                if first_c < end_c:
                    c = (first_c + tl.arange(0, COLUMNS))[None, :]
                    value = (values[block].to(COMPUTE) - mean) * scale
                    mixed = value
                    if MIXUP == "gaussian":
                        noise = standard_normal(rng, noise_sample, view, f * frames + c, COMPUTE, APPROXIMATE)
                        of_noise = exponential(weight * noise, APPROXIMATE)
                        mixed = (1 - weight) * exponential(value, APPROXIMATE) + of_noise
                        mixed = logarithm(mixed + EPS, APPROXIMATE)
                    elif MIXUP != "none":
                        other = others[block].to(COMPUTE)
                        if BRANCH:
                            if not from_bank:  # the first batches
                                inside = (f < end_f) & (c < frames)
                                other = tl.load(pool_row + f * pool_f + c * pool_t, inside, other=0).to(COMPUTE)
                        other = (other - other_mean) * other_scale
                        if MIXUP == "log":
                            mixed = mix_log(value, other, weight, APPROXIMATE)
                        else:
                            mixed = (1 - weight) * value + weight * other
                        mixed = tl.where(alone, value, mixed)
                    tl.store(tile + f * stride + c, mixed, (f < end_f) & (c < frames))
    tl.debug_barrier()

    step = (tail - head) * (1 / tl.maximum(out_frames - 1, 1).to(COMPUTE))
    # The first output. Sums are taken around it, because in float32 the squares of a large mean would drown a small
    # variance.
    corner = tl.where((top >= 0) & (top < mels), top, mels) * stride
    corner += tl.where((left >= 0) & (left < frames), left, frames)
    pivot = tl.load(tile + corner) + head
    if RUN:
        # Warp n makes RUN rows from n RUN. Each lane finds the taps of one of them, which cost as much as four outputs,
        # and the warp then asks that lane. A row's taps are those of the row before, or one further (h <= out_mels):
        # one new row of the tile is resized along time, and the others are still in registers.
        first = lane // COLUMNS * RUN
        own = (first + tl.minimum(lane % COLUMNS, RUN - 1)).reshape(ROWS, COLUMNS)
        base, rest = tap_base(own, h, out_mels, mel_magic, mel_shift, WIDE)
        base_before, _rest = tap_base(tl.maximum(own - 1, 0), h, out_mels, mel_magic, mel_shift, WIDE)
        moves = ((base != base_before) & (own % RUN != 0)).to(tl.int32)
        fractions = tap_fraction(rest, out_mels, COMPUTE)
        newest = row_place(base, TAPS - 1, top, h, mels, stride, TAPS)
        total = tl.zeros((ROWS * COLUMNS,), COMPUTE)
        squares = tl.zeros((ROWS * COLUMNS,), COMPUTE)
        for first_block in range(0, COLUMN_BLOCKS, BLOCKS_AT_ONCE):
            window = ()  # TAPS rows of each block, resized along time
            for block in tl.static_range(BLOCKS_AT_ONCE):
                t = (first_block + block) * COLUMNS + lane % COLUMNS
                for k in tl.static_range(TAPS - 1):
                    places = ask(row_place(base, k, top, h, mels, stride, TAPS), 0)
                    tap = resize_along_time(
                        tile, places, t, left, w, frames, out_frames, frame_magic, frame_shift, TAPS, COMPUTE, WIDE
                    )
                    window = window + (tap,)
                window = window + (tl.zeros((ROWS * COLUMNS,), COMPUTE),)  # the newest row is always read
            for turn in range(0, RUN, TURNS_AT_ONCE):
                ys = ()  # taps of several rows are read before one is written, because the compiler keeps that order
                for later in tl.static_range(TURNS_AT_ONCE):
                    place = ask(newest, turn + later)
                    moved = ask(moves, turn + later) != 0
                    weights = ()
                    for k in tl.static_range(TAPS):
                        weights = weights + (ask(tap_weight(fractions, k, TAPS), turn + later),)
                    kept = ()
                    for block in tl.static_range(BLOCKS_AT_ONCE):
                        t = (first_block + block) * COLUMNS + lane % COLUMNS
                        y = tl.zeros((ROWS * COLUMNS,), COMPUTE)
                        for k in tl.static_range(TAPS):
                            if k < TAPS - 1:
                                tap = tl.where(moved, window[block * TAPS + k + 1], window[block * TAPS + k])
                            else:
                                tap = resize_along_time(
                                    tile, place, t, left, w, frames, out_frames, frame_magic, frame_shift,
                                    TAPS, COMPUTE, WIDE,
                                )  # fmt: skip
                            kept = kept + (tap,)
                            y += weights[k] * tap
                        ys = ys + (y,)
                    window = kept
                for later in tl.static_range(TURNS_AT_ONCE):
                    for block in tl.static_range(BLOCKS_AT_ONCE):
                        t = (first_block + block) * COLUMNS + lane % COLUMNS
                        written = (turn + later < RUN) & (first + turn + later < out_mels) & (t < out_frames)
                        y = finish(
                            ys[later * BLOCKS_AT_ONCE + block], target + (turn + later) * out_frames,
                            first * out_frames + t, t, written, head, step, pivot, COMPUTE, EXACT,
                        )  # fmt: skip
                        total += y
                        squares += y * y
    else:
        for block in range(0, tl.cdiv(out_frames, COLUMNS)):
            t = block * COLUMNS + lane % COLUMNS
            for start in range(first_f, end_f, ROWS):
                f = start + lane // COLUMNS
                y = resize_along_time(
                    tile, tl.minimum(f, end_f - 1) * stride, t, left, w, frames, out_frames, frame_magic,
                    frame_shift, TAPS, COMPUTE, WIDE,
                )  # fmt: skip
                tl.store(resized + f * resized_stride + t, y, f < end_f)
        tl.debug_barrier()
        total = tl.zeros((STAGED_ROWS, COLUMNS), COMPUTE)
        squares = tl.zeros((STAGED_ROWS, COLUMNS), COMPUTE)
        for start in range(0, out_mels, STAGED_ROWS):
            o = (start + tl.arange(0, STAGED_ROWS))[:, None]
            base, rest = tap_base(o, h, out_mels, mel_magic, mel_shift, WIDE)
            fraction = tap_fraction(rest, out_mels, COMPUTE)
            for block in range(0, tl.cdiv(out_frames, COLUMNS)):
                t = (block * COLUMNS + tl.arange(0, COLUMNS))[None, :]
                y = tl.zeros((STAGED_ROWS, COLUMNS), COMPUTE)
                for k in tl.static_range(TAPS):
                    places = row_place(base, k, top, h, mels, resized_stride, TAPS)
                    y += tap_weight(fraction, k, TAPS) * tl.load(resized + (places + t))
                written = (o < out_mels) & (t < out_frames)
                y = finish(y, target, o * out_frames + t, t, written, head, step, pivot, COMPUTE, EXACT)
                total += y
                squares += y * y
    count = tl.full((), out_mels * out_frames, tl.float64)
    total_all = tl.sum(total.to(tl.float64))
    pivot = pivot.to(tl.float64)
    squares_all = tl.sum(squares.to(tl.float64)) + pivot * (2 * total_all + count * pivot)
    tl.debug_barrier()
    return total_all + count * pivot, squares_all


@triton.jit
def moments(stats, HAS_STATS: tl.constexpr, COMPUTE: tl.constexpr):
    """Return mean and 1 / std of the pre-normalisation."""
    mean = tl.full((), 0, COMPUTE)
    scale = tl.full((), 1, COMPUTE)
    if HAS_STATS:
        mean = tl.load(stats).to(COMPUTE)
        std = tl.load(stats + 1).to(COMPUTE)
        scale = 1 / tl.where(std < EPS, EPS, std)  # NaN stays NaN
    return mean, scale


@triton.jit(do_not_specialize=RUNTIME + ["first_view"])
def augment_views_kernel(
    x,  # (B, F, T), any strides
    pool,  # (P, F, T), any strides: partners while the bank is empty; x if there is no other pool
    bank,  # (N, F, T), or absent
    bank_count,  # () int64, or absent
    stats,  # (2,) mean and std, or absent
    lam,  # (V, B)
    bank_index,  # (V, B)
    crop,  # (V, B, 4)
    fader,  # (V, B, 2)
    rng,  # (2,) int64
    out,  # (V, B, out_mels, out_frames)
    sums,  # (V, B, 3): count, sum, sum of squares
    scratch,  # (programs, F + 1, stride [+ resized_stride])
    sample_offset,
    first_view,
    batch,
    pool_rows,
    bank_rows,
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
    stride,  # of a row of the mixed tile: more than T
    resized_stride,  # of a row of the second tile: at least out_frames, or 0 without one
    VIEWS: tl.constexpr,
    HAS_BANK: tl.constexpr,
    HAS_STATS: tl.constexpr,
    MIXUP: tl.constexpr,
    TAPS: tl.constexpr,
    COMPUTE: tl.constexpr,
    APPROXIMATE: tl.constexpr,
    WIDE: tl.constexpr,
    EXACT: tl.constexpr,  # outputs fill all blocks
    STAGED_ROWS: tl.constexpr,
    MIX_BLOCKS: tl.constexpr,  # columns of blocks that are mixed at a time
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    COLUMN_BLOCKS: tl.constexpr,  # of an output
    RUN: tl.constexpr,  # rows that a warp makes; 0 if outputs go through the second tile
    BLOCKS_AT_ONCE: tl.constexpr,
    TURNS_AT_ONCE: tl.constexpr,
    PREFETCH: tl.constexpr,
):
    mean, scale = moments(stats, HAS_STATS, COMPUTE)
    from_bank = False
    if HAS_BANK:
        from_bank = tl.load(bank_count) > 0
    tile = scratch + tl.program_id(0).to(tl.int64) * (mels + 1) * (stride + resized_stride)
    clear_margins(tile, mels, frames, stride, resized_stride, COMPUTE, STAGED_ROWS, COLUMNS)
    for unit in range(tl.program_id(0), VIEWS * batch, tl.num_programs(0)):
        view = unit % VIEWS  # all views of a sample run at about the same time: all but one read it from the cache
        sample = unit // VIEWS
        row = view.to(tl.int64) * batch + sample
        h, top = box_side(crop + 4 * row, 0, mels, canvas_mels)
        w, left = box_side(crop + 4 * row, 1, frames, canvas_frames)
        total, squares = make_view(
            x, pool, bank, from_bank, mean, scale, rng, tile, out + row * out_mels * out_frames,
            sample, sample + sample_offset, view + first_view,
            tl.load(bank_index + row).to(tl.int64), tl.load(lam + row).to(COMPUTE), h, top, w, left,
            tl.load(fader + 2 * row).to(COMPUTE), tl.load(fader + 2 * row + 1).to(COMPUTE),
            pool_rows, bank_rows, mels, frames, x_b, x_f, x_t, pool_b, pool_f, pool_t, out_mels, out_frames,
            mel_magic, mel_shift, frame_magic, frame_shift, stride, resized_stride,
            HAS_BANK, MIXUP, TAPS, COMPUTE, APPROXIMATE, WIDE, EXACT, STAGED_ROWS, MIX_BLOCKS, ROWS, COLUMNS,
            COLUMN_BLOCKS, RUN, BLOCKS_AT_ONCE, TURNS_AT_ONCE, PREFETCH,
        )  # fmt: skip
        tl.store(sums + 3 * row, tl.full((), out_mels * out_frames, tl.float64))
        tl.store(sums + 3 * row + 1, total)
        tl.store(sums + 3 * row + 2, squares)


class LaunchShape(NamedTuple):
    """What both launchers of ``make_view`` give alike."""

    programs: int
    scratch: Tensor
    sizes: tuple[int, ...]
    geometry: tuple[int, ...]
    constants: dict[str, Any]


def shape_of_launch(x: Tensor, out: Tensor, canvas: list[int], interpolation: str) -> LaunchShape:
    (mels, frames), (out_mels, out_frames) = x.shape[1:], out.shape[2:]
    programs = min(len(out) * len(x), resident_programs(x, PROGRAMS_PER_SM))
    stride = round_up(frames + 1, 16)
    column_blocks = triton.cdiv(out_frames, COLUMNS)
    run = triton.cdiv(out_mels, ROWS)
    if canvas[0] > out_mels or run > COLUMNS:
        run = 0
    blocks_at_once, turns_at_once = AT_ONCE[interpolation]
    resized_stride = 0 if run else round_up(out_frames, COLUMNS)
    scratch = x.new_empty(programs, mels + 1, stride + resized_stride, dtype=compute_dtype(x.dtype))
    constants = dict(
        TAPS=TAPS[interpolation],
        COMPUTE=compute_type(x.dtype),
        APPROXIMATE=approximate(x),
        WIDE=is_wide(out_mels * canvas[0], out_frames * canvas[1]),
        EXACT=out_mels % max(ROWS * turns_at_once, STAGED_ROWS) == 0 and out_frames % COLUMNS == 0,
        STAGED_ROWS=STAGED_ROWS,
        MIX_BLOCKS=min(MOST_MIX_BLOCKS, triton.cdiv(frames, COLUMNS)),
        ROWS=ROWS,
        COLUMNS=COLUMNS,
        COLUMN_BLOCKS=column_blocks,
        RUN=run,
        BLOCKS_AT_ONCE=blocks_at_once if column_blocks % blocks_at_once == 0 else 1,
        TURNS_AT_ONCE=turns_at_once,
        PREFETCH=PREFETCH and approximate(x),
        num_warps=WARPS,
        maxnreg=None if x.dtype == torch.float64 else REGISTERS,
    )
    geometry = out_mels, out_frames, *canvas, *division_magic(out_mels), *division_magic(out_frames)
    return LaunchShape(programs, scratch, (mels, frames), (*geometry, stride, resized_stride), constants)


def augment_views_out(
    x: Tensor,
    pool: Tensor | None,
    bank: Tensor | None,
    bank_count: Tensor | None,
    stats: Tensor | None,
    lam: Tensor,
    bank_index: Tensor,
    crop: Tensor,
    fader: Tensor,
    rng: Tensor,
    sample_offset: int,
    first_view: int,
    canvas: list[int],
    interpolation: str,
    mixup: str,
    out: Tensor,
) -> Tensor:
    batch = len(x)
    sums = x.new_empty(len(out), batch, 3, dtype=sums_dtype(x.device))
    if not batch:
        return sums
    x = indexable(x)
    pool = x if pool is None else indexable(pool)
    if bank is None or bank_count is None:
        bank = bank_count = None
    shape = shape_of_launch(x, out, canvas, interpolation)
    with on_device(x):
        launch(
            augment_views_kernel,
            shape.programs,
            x,
            pool,
            x if bank is None else bank.contiguous(),
            rng if bank_count is None else bank_count,
            lam if stats is None else stats.contiguous(),
            lam.contiguous(),
            bank_index.contiguous(),
            crop.contiguous(),
            fader.contiguous(),
            rng.contiguous(),
            out,
            sums,
            shape.scratch,
            sample_offset,
            first_view,
            batch,
            len(pool),
            0 if bank is None else len(bank),
            *shape.sizes,
            *x.stride(),
            *pool.stride(),
            *shape.geometry,
            VIEWS=len(out),
            HAS_BANK=bank is not None,
            HAS_STATS=stats is not None,
            MIXUP=mixup,
            **shape.constants,
        )
    return sums
