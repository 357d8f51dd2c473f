# mypy: ignore-errors
"""Both views of every sample in one launch: pre-norm, mix, crop and resize, fader, sums (BYOL-A, arXiv:2103.06695).

y = resize(crop(log((1 - lam) exp(x) + lam exp(z) + eps))) + fader, and the sum and sum of squares of every view.
Reads x and a partner for each view, writes two views and 48 bytes of sums per sample.

Mixing is expensive, so each element is mixed once, although two to sixteen taps read it. A program processes one view
of one sample at a time: it mixes only the elements that the crop reads into its scratch tile, waits at a barrier, and
resizes from the tile. The number of programs is the number that the GPU runs at once, so the few tiles are reused for
all samples and stay in the cache. A row and a column of zeros behind each tile stand for the margin of the canvas, so
that no tap needs a mask. While mixing, a thread handles four neighbours in accesses of 16 bytes. At the taps, a warp
handles 32 frames of one row, one per thread, and touches two or three cache lines instead of eight. Blocks are 1-D
there: with two axes, Triton 3.6 lays the mels along a warp. Bilinear outputs read their four taps from the tile;
bicubic outputs, with sixteen taps, go through a second tile that is resized along time only.
benchmarks/gpu/NOTES.md compares the designs, with figures.
"""

from __future__ import annotations

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
DIRECT = ("bilinear",)  # interpolations with all taps read from the mixed tile, unless the output is wide
MOST_COLUMN_BLOCKS = 8  # their taps stay in registers; wider outputs go through the second tile
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
        y += tap_weight(fraction, k, TAPS) * tl.load(tile + (places + column))
    return y


@triton.jit
def finish(y, target, o, t, out_mels, out_frames, head, rise, pivot, COMPUTE: tl.constexpr):
    """Add the fader to outputs (o, t), write those inside the view, and return them less ``pivot``, 0 outside."""
    y += head + rise * (t.to(COMPUTE) * (1 / tl.maximum(out_frames - 1, 1).to(COMPUTE)))
    written = (o < out_mels) & (t < out_frames)
    tl.store(target + o * out_frames + t, y, written)
    return tl.where(written, y - pivot, 0)


@triton.jit(do_not_specialize=RUNTIME)
def augment_views_kernel(
    x,  # (B, F, T), any strides
    pool,  # (P, F, T), any strides: partners while the bank is empty; x if there is no other pool
    bank,  # (N, F, T), or absent
    bank_count,  # () int64, or absent
    stats,  # (2,) mean and std, or absent
    lam,  # (2, B)
    bank_index,  # (2, B)
    crop,  # (2, B, 4)
    fader,  # (2, B, 2)
    rng,  # (2,) int64
    out,  # (2, B, out_mels, out_frames)
    sums,  # (2, B, 3): count, sum, sum of squares
    scratch,  # (programs, F + 1, stride [+ resized_stride])
    sample_offset,
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
    HAS_BANK: tl.constexpr,
    HAS_STATS: tl.constexpr,
    MIXUP: tl.constexpr,
    TAPS: tl.constexpr,
    COMPUTE: tl.constexpr,
    APPROXIMATE: tl.constexpr,
    WIDE: tl.constexpr,
    STAGED_ROWS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    COLUMN_BLOCKS: tl.constexpr,  # of an output; 0 if outputs go through the second tile
):
    mean = tl.full((), 0, COMPUTE)
    scale = tl.full((), 1, COMPUTE)
    if HAS_STATS:
        mean = tl.load(stats).to(COMPUTE)
        scale = 1 / tl.maximum(tl.load(stats + 1).to(COMPUTE), EPS)
    from_bank = False
    if HAS_BANK:
        from_bank = tl.load(bank_count) > 0

    lane = tl.arange(0, ROWS * COLUMNS)  # at the taps: output (lane // COLUMNS, lane % COLUMNS) of a block
    tile = scratch + tl.program_id(0).to(tl.int64) * (mels + 1) * (stride + resized_stride)
    resized = tile + (mels + 1) * stride
    for start in range(0, mels + 1, STAGED_ROWS):
        f = start + tl.arange(0, STAGED_ROWS)
        tl.store(tile + f * stride + frames, tl.zeros((STAGED_ROWS,), COMPUTE), f <= mels)
    for start in range(0, stride + resized_stride, COLUMNS):
        c = start + tl.arange(0, COLUMNS)
        last = tl.where(c < stride, tile + mels * stride + c, resized + mels * resized_stride + (c - stride))
        tl.store(last, tl.zeros((COLUMNS,), COMPUTE), c < stride + resized_stride)

    for unit in range(tl.program_id(0), 2 * batch, tl.num_programs(0)):
        view = unit % 2  # both views of a sample run at about the same time: the second one reads it from the cache
        sample = unit // 2
        row = view.to(tl.int64) * batch + sample
        weight = tl.load(lam + row).to(COMPUTE)
        h, top = box_side(crop + 4 * row, 0, mels, canvas_mels)
        w, left = box_side(crop + 4 * row, 1, frames, canvas_frames)

        partner = tl.load(bank_index + row).to(tl.int64)
        alone = partner < 0
        partner = tl.maximum(partner, 0)
        source = x + sample.to(tl.int64) * x_b
        pool_row = pool + tl.minimum(partner, pool_rows - 1) * pool_b
        bank_row = bank + tl.minimum(partner, bank_rows - 1) * mels * frames

        first_f = tl.maximum(top, 0)
        end_f = tl.minimum(top + h, mels)
        first_block = tl.maximum(left, 0) // COLUMNS
        end_block = tl.cdiv(tl.minimum(left + w, frames), COLUMNS)
        for start in range(first_f, end_f, STAGED_ROWS):
            f = (start + tl.arange(0, STAGED_ROWS))[:, None]
            for block in range(first_block, end_block):
                c = (block * COLUMNS + tl.arange(0, COLUMNS))[None, :]
                inside = (f < end_f) & (c < frames)
                value = tl.load(source + f * x_f + c * x_t, inside, other=0).to(COMPUTE)
                value = (value - mean) * scale
                if MIXUP == "gaussian":
                    noise = standard_normal(rng, sample + sample_offset, view, f * frames + c, COMPUTE, APPROXIMATE)
                    of_noise = exponential(weight * noise, APPROXIMATE)
                    mixed = (1 - weight) * exponential(value, APPROXIMATE) + of_noise
                    mixed = logarithm(mixed + EPS, APPROXIMATE)
                elif MIXUP == "none":
                    mixed = value
                else:
                    other = tl.load(pool_row + f * pool_f + c * pool_t, inside & (not from_bank), other=0).to(COMPUTE)
                    other = (other - mean) * scale
                    if HAS_BANK:
                        past = tl.load(bank_row + f * frames + c, inside & from_bank, other=0).to(COMPUTE)
                        other = tl.where(from_bank, past, other)
                    if MIXUP == "log":
                        mixed = mix_log(value, other, weight, APPROXIMATE)
                    else:
                        mixed = (1 - weight) * value + weight * other
                    mixed = tl.where(alone, value, mixed)
                tl.store(tile + f * stride + c, mixed, inside)
        tl.debug_barrier()

        head = tl.load(fader + 2 * row).to(COMPUTE)
        rise = tl.load(fader + 2 * row + 1).to(COMPUTE) - head
        target = out + row * out_mels * out_frames
        # The first output. Sums are taken around it, because in float32 the squares of a large mean would drown a small
        # variance.
        corner = tl.where((top >= 0) & (top < mels), top, mels) * stride
        corner += tl.where((left >= 0) & (left < frames), left, frames)
        pivot = tl.load(tile + corner) + head
        if COLUMN_BLOCKS:
            total = tl.zeros((ROWS * COLUMNS,), COMPUTE)
            squares = tl.zeros((ROWS * COLUMNS,), COMPUTE)
            for start in range(0, out_mels, ROWS):
                o = start + lane // COLUMNS
                base, rest = tap_base(o, h, out_mels, mel_magic, mel_shift, WIDE)
                fraction = tap_fraction(rest, out_mels, COMPUTE)
                for block in tl.static_range(COLUMN_BLOCKS):
                    t = block * COLUMNS + lane % COLUMNS
                    y = tl.zeros((ROWS * COLUMNS,), COMPUTE)
                    for k in tl.static_range(TAPS):
                        places = row_place(base, k, top, h, mels, stride, TAPS)
                        y += tap_weight(fraction, k, TAPS) * resize_along_time(
                            tile, places, t, left, w, frames, out_frames, frame_magic, frame_shift,
                            TAPS, COMPUTE, WIDE,
                        )  # fmt: skip
                    y = finish(y, target, o, t, out_mels, out_frames, head, rise, pivot, COMPUTE)
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
                    y = finish(y, target, o, t, out_mels, out_frames, head, rise, pivot, COMPUTE)
                    total += y
                    squares += y * y
        count = tl.full((), out_mels * out_frames, tl.float64)
        total_all = tl.sum(total.to(tl.float64))
        pivot = pivot.to(tl.float64)
        tl.store(sums + 3 * row, count)
        tl.store(sums + 3 * row + 1, total_all + count * pivot)
        tl.store(sums + 3 * row + 2, tl.sum(squares.to(tl.float64)) + pivot * (2 * total_all + count * pivot))
        tl.debug_barrier()


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
    canvas: list[int],
    interpolation: str,
    mixup: str,
    out: Tensor,
) -> Tensor:
    batch, mels, frames = x.shape
    out_mels, out_frames = out.shape[2:]
    sums = x.new_empty(2, batch, 3, dtype=sums_dtype(x.device))
    if not batch:
        return sums
    x = indexable(x)
    pool = x if pool is None else indexable(pool)
    if bank is None or bank_count is None:
        bank = bank_count = None
    programs = min(2 * batch, resident_programs(x, PROGRAMS_PER_SM))
    stride = round_up(frames + 1, 16)
    column_blocks = triton.cdiv(out_frames, COLUMNS)
    if interpolation not in DIRECT or column_blocks > MOST_COLUMN_BLOCKS:
        column_blocks = 0
    resized_stride = 0 if column_blocks else round_up(out_frames, COLUMNS)
    scratch = x.new_empty(programs, mels + 1, stride + resized_stride, dtype=compute_dtype(x.dtype))
    with on_device(x):
        launch(
            augment_views_kernel,
            programs,
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
            scratch,
            sample_offset,
            batch,
            len(pool),
            0 if bank is None else len(bank),
            mels,
            frames,
            *x.stride(),
            *pool.stride(),
            out_mels,
            out_frames,
            *canvas,
            *division_magic(out_mels),
            *division_magic(out_frames),
            stride,
            resized_stride,
            HAS_BANK=bank is not None,
            HAS_STATS=stats is not None,
            MIXUP=mixup,
            TAPS=TAPS[interpolation],
            COMPUTE=compute_type(x.dtype),
            APPROXIMATE=approximate(x),
            WIDE=is_wide(out_mels * canvas[0], out_frames * canvas[1]),
            STAGED_ROWS=STAGED_ROWS,
            ROWS=ROWS,
            COLUMNS=COLUMNS,
            COLUMN_BLOCKS=column_blocks,
            num_warps=WARPS,
            maxnreg=None if x.dtype == torch.float64 else REGISTERS,
        )
    return sums
