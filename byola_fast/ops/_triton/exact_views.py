# mypy: ignore-errors
# ruff: noqa: RUF005, SIM102, because Triton adds tuples but does not support (*x, y), and decides constant ifs alone
"""The two launches of ``two_views.py`` for sizes that fill blocks and a tile that fits in shared memory.

As in ``augment_views.py``, a program mixes a view into a tile and resizes from it, but with half of the instructions.
Sizes are constants, so that offsets are part of an instruction, divisions are products and nothing needs a mask. The
tile lies in shared memory, whose addresses have 32 bits (under the interpreter in scratch memory). It holds logarithms
to base 2, as the GPU computes them; adding the fader converts them. A lane draws one slot of a view's parameters and
asks other lanes for the rest. Each view searches half of its sample's rows for values that the memory refuses: these
loads are on their way while the view is drawn, and one reduction takes the maximum and the sums. In the second launch
the view is on its way during the sums. benchmarks/gpu/NOTES.md has the counts.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from byola_fast.ops._triton.augment_views import REGISTERS, TAPS, ask, moments
from byola_fast.ops._triton.draw_params import (
    SLOT_CROP,
    SLOT_FADER,
    SLOT_PARTNER,
    SLOT_RATIO,
    draw_scalars,
    parameters,
)
from byola_fast.ops._triton.shared import EPS, approximate, launch, round_up, tap_weight

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
WARPS = 8
ROWS, COLUMNS = tl.constexpr(8), tl.constexpr(32)  # at the taps a warp makes a row, and a lane one of its columns
STAGED_ROWS = tl.constexpr(32)
MARGIN = 4  # columns behind the tile: one of zeros, and stores of 16 bytes stay aligned
MOST_SHARED = 48 * 1024  # bytes that a kernel can declare
MOST_OUTPUTS = 32  # of a lane, because its loops are unrolled
SUMS, MOST_SUMS = 512, 2048  # sums that each program of the second launch adds up: at least, at most
RUNTIME = ["sample_offset", "batch", "pool_rows", "bank_rows", "pool_offset", "mel_base", "mel_slope", "frame_base"]
RUNTIME += ["frame_slope"]


@triton.constexpr_function
def shuffle(lane):
    return f"shfl.sync.idx.b32 $0, $1, {lane}, 31, -1;"


@triton.constexpr_function
def declaration(size):
    return f"{{\n.shared .align 16 .b8 mixed_tile[{size}];\nmov.u32 $0, mixed_tile;\n}}"


@triton.jit
def word(bits, SLOT: tl.constexpr):
    """Return 24 bits of the lane that drew ``SLOT``, as int64."""
    mine = (bits >> 8).to(tl.int32)
    drawn = tl.inline_asm_elementwise(shuffle(SLOT), "=r,r", [mine], dtype=tl.int32, is_pure=False, pack=1)
    return drawn.to(tl.uint32).to(tl.int64)


@triton.jit
def draw_by_lane(rng, sample, view):
    """Return what ``draw_scalars`` does. The scalars of this function differ between lanes until ``word`` asks."""
    LANE: tl.constexpr = "{\n.reg .u32 lane;\nmov.u32 lane, %laneid;\nand.b32 $0, lane, 3;\n}"
    slot = tl.inline_asm_elementwise(LANE, "=r,r", [sample], dtype=tl.int32, is_pure=False, pack=1).to(tl.uint32)
    step = tl.load(rng + 1).to(tl.uint32)
    a, b, c, d = tl.philox(tl.load(rng), step, sample.to(tl.uint32), view.to(tl.uint32), slot)
    return (
        word(a, SLOT_CROP), word(b, SLOT_CROP), word(c, SLOT_CROP), word(d, SLOT_CROP),
        word(a, SLOT_RATIO), word(a, SLOT_PARTNER), word(a, SLOT_FADER), word(b, SLOT_FADER),
    )  # fmt: skip


@triton.jit
def put(place, value, inside, SHARED: tl.constexpr):
    """Write to the tile where ``inside``."""
    if SHARED:
        CODE: tl.constexpr = "{\n.reg .pred p;\nsetp.ne.s32 p, $3, 0;\n@p st.shared.f32 [$1], $2;\nmov.u32 $0, 0;\n}"
        given = [place, value, inside.to(tl.int32)]
        tl.inline_asm_elementwise(CODE, "=r,r,f,r", given, dtype=tl.int32, is_pure=False, pack=1)
    else:
        tl.store(place, value, inside)


@triton.jit
def put_four(place, value, SHARED: tl.constexpr):
    """Write to the tile: four values of a thread at once, if they are neighbours, as they are in all known layouts."""
    if SHARED:
        CODE: tl.constexpr = (
            "{\n.reg .pred p;\n.reg .u32 next;\nadd.u32 next, $4, 4;\nsetp.eq.u32 p, next, $5;\n"
            "add.u32 next, $4, 8;\nsetp.eq.and.u32 p, next, $6, p;\n"
            "add.u32 next, $4, 12;\nsetp.eq.and.u32 p, next, $7, p;\n"
            "@p st.shared.v4.f32 [$4], {$8, $9, $10, $11};\n@!p st.shared.f32 [$4], $8;\n@!p st.shared.f32 [$5], $9;\n"
            "@!p st.shared.f32 [$6], $10;\n@!p st.shared.f32 [$7], $11;\n"
            "mov.u32 $0, 0;\nmov.u32 $1, 0;\nmov.u32 $2, 0;\nmov.u32 $3, 0;\n}"
        )
        registers: tl.constexpr = "=r,=r,=r,=r,r,r,r,r,f,f,f,f"
        tl.inline_asm_elementwise(CODE, registers, [place, value], dtype=tl.int32, is_pure=False, pack=4)
    else:
        tl.store(place, value)


@triton.jit
def get(place, SHARED: tl.constexpr):
    """Read from the tile."""
    if SHARED:
        CODE: tl.constexpr = "ld.shared.f32 $0, [$1];"
        return tl.inline_asm_elementwise(CODE, "=f,r", [place], dtype=tl.float32, is_pure=False, pack=1)
    else:
        return tl.load(place)


@triton.jit
def exp2(x, SHARED: tl.constexpr):
    if SHARED:
        CODE: tl.constexpr = "ex2.approx.ftz.f32 $0, $1;"
        return tl.inline_asm_elementwise(CODE, "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    else:
        return tl.exp2(x)


@triton.jit
def log2(x, SHARED: tl.constexpr):
    if SHARED:
        CODE: tl.constexpr = "lg2.approx.ftz.f32 $0, $1;"
        return tl.inline_asm_elementwise(CODE, "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    else:
        return tl.log2(x)


@triton.jit
def tap(base, extent, K: tl.constexpr, TAPS: tl.constexpr):
    """Return the place in a crop of tap ``K``; places before the crop need no check where no tap comes before."""
    OFFSET: tl.constexpr = K - (TAPS // 2 - 1)
    place = base + OFFSET
    if OFFSET < 0:
        place = tl.maximum(place, 0)
    if OFFSET > 0:
        place = tl.minimum(place, extent - 1)
    return place


@triton.jit
def column_of(base, w, left, K: tl.constexpr, TAPS: tl.constexpr, frames: tl.constexpr):
    """Return the column of the tile of tap ``K``; behind the input lies one of zeros."""
    column = left + tap(base, w, K, TAPS)
    return tl.minimum(column.to(tl.uint32, bitcast=True), frames).to(tl.int32)  # negative ones become large


@triton.jit
def row_of(base, h, top, first, K: tl.constexpr, TAPS: tl.constexpr, mels: tl.constexpr, zeros: tl.constexpr):
    """Return the tile's row of tap ``K``: the input's row ``first`` is row 0; one of zeros, if any, is ``zeros``."""
    row = tap(base, h, K, TAPS)
    if zeros is not None:
        row += top
        row = tl.where((row >= 0) & (row < mels), row - first, zeros)
    return row


@triton.jit
def largest_of(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def add(a, b, c, d):
    return a + c, b + d


@triton.jit
def add_and_largest(a, b, c, d, e, f):
    return a + d, b + e, tl.maximum(c, f, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def load_half(source, view, stride_f: tl.constexpr, mels: tl.constexpr, frames: tl.constexpr):
    """Return blocks of a view's half of a sample: 32 of every 64 rows. Rows past the end are the last one again."""
    values = ()
    for start in tl.static_range(0, mels, 2 * STAGED_ROWS):
        f = tl.minimum(start + view * STAGED_ROWS + tl.arange(0, STAGED_ROWS), mels - 1)[:, None]
        for first in tl.static_range(0, frames, COLUMNS):
            values = values + (tl.load(source + f * stride_f + (first + tl.arange(0, COLUMNS))[None, :]),)
    return values


@triton.jit(do_not_specialize=RUNTIME)
def exact_views_kernel(
    x,  # (B, F, T)
    pool,  # (P, F, T)
    bank,  # (N, F, T), or absent
    cursor,  # (3,) int64, or absent
    stats,  # (2,) mean and std, or absent
    rng,  # (2,) int64
    out,  # (2, B, out_mels, out_frames)
    sums,  # (2, 2 B): sum, sum of squares
    finite,  # (2, B) int32: whether the memory takes a view's half of the sample, or absent
    start,  # (1,) int32: the memory's next row, for the second kernel, which moves the cursor; or absent
    scratch,  # (2 B, F rounded up + 1, stride) under the interpreter
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
    x_b,
    pool_b,
    x_f: tl.constexpr,
    pool_f: tl.constexpr,
    mels: tl.constexpr,
    frames: tl.constexpr,
    out_mels: tl.constexpr,
    out_frames: tl.constexpr,
    canvas_mels: tl.constexpr,
    canvas_frames: tl.constexpr,
    stride: tl.constexpr,
    PUSH: tl.constexpr,
    HAS_BANK: tl.constexpr,
    HAS_STATS: tl.constexpr,
    TAPS: tl.constexpr,
    SHARED: tl.constexpr,
):
    CELL: tl.constexpr = 4 if SHARED else 1  # places are addresses in shared memory, or pointers
    RUN: tl.constexpr = out_mels // ROWS
    BLOCKS: tl.constexpr = frames // COLUMNS
    OUT_BLOCKS: tl.constexpr = out_frames // COLUMNS
    TALL: tl.constexpr = (mels + STAGED_ROWS - 1) // STAGED_ROWS * STAGED_ROWS  # rows that mixing may write
    ZEROS: tl.constexpr = None if canvas_mels == mels else TALL  # the row of zeros, if crops leave the input's rows
    SELECT: tl.constexpr = HAS_BANK and bank.dtype == pool.dtype
    mean, scale = moments(stats, HAS_STATS, tl.float32)
    unit = tl.program_id(0)
    view = (unit >= batch).to(tl.int32)
    sample = unit - view * batch
    if PUSH:
        if unit == 0:
            row = tl.load(cursor) % bank_rows
            tl.store(start, tl.where(row < 0, row + bank_rows, row).to(tl.int32))  # a damaged checkpoint may hold any
    if SHARED:
        SIZE: tl.constexpr = 4 * ((TALL + 1) * stride)
        tile = tl.inline_asm_elementwise(declaration(SIZE), "=r,r", [unit], dtype=tl.int32, is_pure=False, pack=1)
    else:
        tile = scratch + unit.to(tl.int64) * ((TALL + 1) * stride)
    cells = tl.arange(0, ROWS * COLUMNS)
    for step in tl.static_range(0, mels + stride, ROWS * COLUMNS):  # a column and a row of zeros
        cell = step + cells
        zero = tl.where(cell < mels, cell * stride + frames, TALL * stride + cell - mels)
        put(tile + zero * CELL, tl.zeros((ROWS * COLUMNS,), tl.float32), cell < mels + stride, SHARED)
    source = x + sample.to(tl.int64) * x_b
    largest = tl.zeros((STAGED_ROWS, COLUMNS), tl.float32)
    if PUSH:
        searched = load_half(source, view, x_f, mels, frames)
    if SHARED:
        size_h, size_w, place_h, place_w, ratio, other, begin, end = draw_by_lane(rng, sample + sample_offset, view)
    else:
        size_h, size_w, place_h, place_w, ratio, other, begin, end = draw_scalars(rng, sample + sample_offset, view)
    i, j, h, w, lam, partner, head, tail = parameters(
        size_h, size_w, place_h, place_w, ratio, other, begin, end,
        sample.to(tl.int64), pool_rows, pool_offset, mel_base, mel_slope, frame_base, frame_slope,
        tl.full((), canvas_mels, tl.int32), tl.full((), canvas_frames, tl.int32), mixup_ratio, fader_gain,
        cursor + 1, HAS_BANK,
    )  # fmt: skip
    top = i - (canvas_mels - mels) // 2
    left = j - (canvas_frames - frames) // 2
    alone = partner < 0
    partner = tl.maximum(partner, 0)
    pool_row = pool + tl.minimum(partner, pool_rows - 1) * pool_b
    other_row, other_f, other_mean, other_scale = pool_row, pool_f, mean, scale
    if HAS_BANK:
        from_bank = tl.load(cursor + 1) > 0
        bank_row = bank + tl.minimum(partner, bank_rows - 1) * (mels * frames)
        other_mean = tl.where(from_bank, 0, mean)  # rows of the bank are normalised already
        other_scale = tl.where(from_bank, 1, scale)
        if SELECT:
            other_row = tl.where(from_bank, bank_row, pool_row)
            other_f = tl.where(from_bank, frames, pool_f)
    scale_2 = scale * LOG2_E
    other_scale = other_scale * LOG2_E
    first_f = tl.maximum(top, 0)
    end_f = tl.minimum(top + h, mels)
    first_c = tl.maximum(left, 0)
    end_c = tl.minimum(left + w, frames)
    if PUSH:
        for n in tl.static_range(len(searched)):
            largest = largest_of(largest, tl.abs(searched[n].to(tl.float32) - mean))
    FOURS: tl.constexpr = COLUMNS // 4
    most = tl.reduce(largest.reshape(STAGED_ROWS, FOURS, 4), 2, largest_of).reshape(ROWS, COLUMNS)  # of a thread

    for start in range(first_f, end_f, STAGED_ROWS):
        r = start + tl.arange(0, STAGED_ROWS)[:, None]
        f = tl.minimum(r, end_f - 1)  # no mask: a row past the crop is its last one again
        place = tile + ((r - first_f) * stride + tl.arange(0, COLUMNS)[None, :]) * CELL
        values, others = (), ()
        for block in tl.static_range(BLOCKS):
            c = block * COLUMNS + tl.arange(0, COLUMNS)[None, :]
            values = values + (tl.load(source + f * x_f + c),)
            if SELECT or not HAS_BANK:
                z = tl.load(other_row + f * other_f + c)
            else:
                if from_bank:
                    z = tl.load(bank_row + f * frames + c).to(tl.float32)
                else:
                    z = tl.load(pool_row + f * pool_f + c).to(tl.float32)
            others = others + (z,)
        for block in tl.static_range(BLOCKS):
            if (block * COLUMNS < end_c) & ((block + 1) * COLUMNS > first_c):
                value = (values[block].to(tl.float32) - mean) * scale_2
                partner_value = (others[block].to(tl.float32) - other_mean) * other_scale
                mixed = (exp2(value, SHARED) * (1 - lam) + EPS) + exp2(partner_value, SHARED) * lam
                put_four(place + block * (COLUMNS * CELL), tl.where(alone, value, log2(mixed, SHARED)), SHARED)
    tl.debug_barrier()

    # The first output. Sums are taken around it, because in float32 the squares of a large mean would drown a small
    # variance.
    FIRST: tl.constexpr = TAPS // 2 - 1
    none = tl.full((), 0, tl.int32)
    corner = row_of(none, h, top, first_f, FIRST, TAPS, mels, ZEROS) * stride
    corner += column_of(none, w, left, FIRST, TAPS, frames)
    pivot = get(tile + corner * CELL, SHARED) * LN_2 + head
    slope = (tail - head) * (1 / (out_frames - 1))
    columns, column_weights, faders = (), (), ()
    for block in tl.static_range(OUT_BLOCKS):
        t = block * COLUMNS + cells % COLUMNS
        position = (t * (w - 1)).to(tl.uint32)
        base = (position // (out_frames - 1)).to(tl.int32)
        fraction = (position.to(tl.int32) - base * (out_frames - 1)).to(tl.float32) * (1 / (out_frames - 1))
        for k in tl.static_range(TAPS):
            columns = columns + (tile + column_of(base, w, left, k, TAPS, frames) * CELL,)
            column_weights = column_weights + (tap_weight(fraction, k, TAPS),)
        faders = faders + (head + slope * t.to(tl.float32),)
    # Each lane finds the taps of one of its warp's RUN rows, and the warp asks it. A row's taps are those of the
    # row before, or one further (h <= out_mels).
    first_row = cells // COLUMNS * RUN
    own = (first_row + tl.minimum(cells % COLUMNS, RUN - 1)).reshape(ROWS, COLUMNS)
    position = (own * (h - 1)).to(tl.uint32)
    base = (position // (out_mels - 1)).to(tl.int32)
    rest = position.to(tl.int32) - base * (out_mels - 1)
    fractions = rest.to(tl.float32) * (1 / (out_mels - 1))
    moves = (rest < h - 1).to(tl.int32)
    newest = row_of(base, h, top, first_f, TAPS - 1, TAPS, mels, ZEROS) * (stride * CELL)
    target = (
        out
        + (view.to(tl.int64) * batch + sample) * (out_mels * out_frames)
        + (first_row * out_frames + cells % COLUMNS)
    )
    total = tl.zeros((ROWS * COLUMNS,), tl.float32)
    squares = tl.zeros((ROWS * COLUMNS,), tl.float32)
    window = ()  # rows of each block, resized along time
    for k in tl.static_range(TAPS - 1):
        place = ask(row_of(base, h, top, first_f, k, TAPS, mels, ZEROS) * (stride * CELL), 0)
        for block in tl.static_range(OUT_BLOCKS):
            y = column_weights[block * TAPS] * get(columns[block * TAPS] + place, SHARED)
            for n in tl.static_range(1, TAPS):
                y += column_weights[block * TAPS + n] * get(columns[block * TAPS + n] + place, SHARED)
            window = window + (y,)
    for turn in tl.static_range(RUN):
        place = ask(newest, turn)
        moved = ask(moves, turn) != 0
        weights = ()
        if TAPS == 2:
            fraction = ask(fractions, turn)
            weights = (tap_weight(fraction, 0, TAPS), fraction)
        else:
            for k in tl.static_range(TAPS):
                weights = weights + (ask(tap_weight(fractions, k, TAPS), turn),)
        read = ()
        for n in tl.static_range(OUT_BLOCKS * TAPS):
            read = read + (get(columns[n] + place, SHARED),)
        newer = ()
        for block in tl.static_range(OUT_BLOCKS):
            y = column_weights[block * TAPS] * read[block * TAPS]
            for n in tl.static_range(1, TAPS):
                y += column_weights[block * TAPS + n] * read[block * TAPS + n]
            newer = newer + (y,)
        if turn > 0:
            rolled = ()
            for n in tl.static_range((TAPS - 1) * OUT_BLOCKS):
                rolled = rolled + (tl.where(moved, window[n + OUT_BLOCKS], window[n]),)
            window = rolled
        window = window + newer
        for block in tl.static_range(OUT_BLOCKS):
            y = weights[0] * window[block]
            for k in tl.static_range(1, TAPS):
                y += weights[k] * window[k * OUT_BLOCKS + block]
            y = y * LN_2 + faders[block]
            tl.store(target + (turn * out_frames + block * COLUMNS), y)
            total += y - pivot
            squares += (y - pivot) * (y - pivot)
    rows = total.reshape(ROWS, COLUMNS), squares.reshape(ROWS, COLUMNS), most
    total_row, squares_row, most = tl.reduce(rows, 1, add_and_largest)
    wide = total_row.to(tl.float64), squares_row.to(tl.float64), most
    total_all, squares_all, most = tl.reduce(wide, 0, add_and_largest)
    if PUSH:
        if HAS_STATS:
            std = tl.load(stats + 1).to(tl.float32)
            most = most / tl.where(std < EPS, EPS, std)
        held = most.to(bank.dtype.element_ty).to(tl.float32)
        tl.store(finite + unit, (held - held == 0).to(tl.int32))
    NUMEL: tl.constexpr = out_mels * out_frames
    wide_pivot = pivot.to(tl.float64)
    squares_all += wide_pivot * (2 * total_all + NUMEL * wide_pivot)
    tl.store(sums + unit, total_all + NUMEL * wide_pivot)
    tl.store(sums + 2 * batch + unit, squares_all)


@triton.jit
def reciprocal(count):
    """Return 1 / ``count`` in float64 by Newton's steps, as the compiler calls a function for a division."""
    guess = (1 / count.to(tl.float32)).to(tl.float64)
    guess *= 2 - count * guess
    return guess * (2 - count * guess)


@triton.jit(do_not_specialize=RUNTIME)
def finish_exact_views_kernel(
    views,  # (2 B, views_numel)
    sums,  # (2, 2 B)
    x,  # (B, F, T)
    stats,  # (2,) or absent
    finite,  # (2, B) int32
    start,  # (1,) int32
    bank,  # (N, F, T)
    cursor,  # (3,) int64
    rng,  # (2,) int64
    batch,
    bank_rows,
    x_b,
    x_f: tl.constexpr,
    mels: tl.constexpr,
    frames: tl.constexpr,
    views_numel: tl.constexpr,
    NORMALIZE: tl.constexpr,
    PUSH: tl.constexpr,
    ADVANCE: tl.constexpr,
    HAS_STATS: tl.constexpr,
    BLOCK: tl.constexpr,
    SUMS: tl.constexpr,
):
    unit = tl.program_id(0)
    view = (unit >= batch).to(tl.int32)
    sample = unit - view * batch
    row = tl.arange(0, SUMS)
    if ADVANCE:
        if unit == 0:
            tl.atomic_add(rng + 1, tl.full((), 1, tl.int64), sem="relaxed")  # by one thread
    if NORMALIZE:
        lane = tl.arange(0, BLOCK)
        target = views + unit.to(tl.int64) * views_numel
        values = ()  # on their way during the sums
        for n in tl.static_range(0, views_numel, BLOCK):
            values = values + (tl.load(target + n + lane),)
        total = tl.load(sums + row, row < 2 * batch, other=0)
        squares = tl.load(sums + 2 * batch + row, row < 2 * batch, other=0)
    if PUSH:
        flag = tl.load(finite + row, row < batch, other=0) & tl.load(finite + batch + row, row < batch, other=0)
        accepted, place = tl.reduce((flag, tl.where(row < sample, flag, 0)), 0, add)
        own = tl.load(finite + sample) & tl.load(finite + batch + sample)
        first = tl.load(start)
        mean, std = tl.full((), 0, tl.float32), tl.full((), 1, tl.float32)
        if HAS_STATS:
            mean, std = tl.load(stats).to(tl.float32), tl.load(stats + 1).to(tl.float32)
            std = tl.where(std < EPS, EPS, std)
    if NORMALIZE:
        total_all, squares_all = tl.reduce((total, squares), 0, add)
        count = 2 * views_numel * batch.to(tl.float64)
        mean_all = total_all * reciprocal(count)
        variance = (squares_all - total_all * mean_all) * reciprocal(count - 1)
        std_all = tl.sqrt(tl.where(variance < 0, 0, variance).to(tl.float32))  # tl.maximum would lose NaN
        scale_all = 1 / tl.where(std_all < EPS, EPS, std_all)
        for k in tl.static_range(len(values)):
            y = (values[k].to(tl.float32) - mean_all.to(tl.float32)) * scale_all
            tl.store(target + k * BLOCK + lane, y)
    if PUSH:
        if unit == 0:
            filled, refused = tl.load(cursor + 1), tl.load(cursor + 2)
            tl.debug_barrier()  # every warp has read the cursor
            tl.store(cursor, ((first + accepted) % bank_rows).to(tl.int64))
            tl.store(cursor + 1, tl.minimum(filled + accepted, bank_rows))
            tl.store(cursor + 2, refused + batch - accepted)
        if (own != 0) & (accepted - place <= bank_rows):  # a batch larger than the ring: its last samples
            target_row = bank + ((first + place) % bank_rows).to(tl.int64) * (mels * frames)
            halves = load_half(x + sample.to(tl.int64) * x_b, view, x_f, mels, frames)
            PIECE: tl.constexpr = 2 * STAGED_ROWS
            for step in tl.static_range(0, mels, PIECE):
                f = (step + view * STAGED_ROWS + tl.arange(0, STAGED_ROWS))[:, None]
                for column in tl.static_range(0, frames, COLUMNS):
                    value = halves[step // PIECE * (frames // COLUMNS) + column // COLUMNS].to(tl.float32)
                    to = target_row + f * frames + (column + tl.arange(0, COLUMNS))[None, :]
                    tl.store(to, (value - mean) / std if HAS_STATS else value, f < mels)


def fits(x: Tensor, pool: Tensor, out: Tensor, canvas: list[int], mixup: str) -> bool:
    """Return whether these kernels make the views."""
    (mels, frames), (out_mels, out_frames) = x.shape[1:], out.shape[2:]
    return (
        mixup == "log"
        and 2 * len(x) <= MOST_SUMS
        and x.dtype != torch.float64
        and x.stride(2) == pool.stride(2) == 1
        and frames % COLUMNS.value == out_frames % COLUMNS.value == out_mels % ROWS.value == 0
        and canvas[0] <= out_mels
        # more than one output a lane: one square alone is fused into the sum, and no two lanes add up the same
        and 32 * WARPS < out_mels * out_frames <= MOST_OUTPUTS * 32 * WARPS
        and tile_size(mels, frames) * 4 <= MOST_SHARED
    )


def tile_size(mels: int, frames: int) -> int:
    """Return the number of values in a tile."""
    return (round_up(mels, STAGED_ROWS.value) + 1) * (frames + MARGIN)


def exact_views_(
    x, pool, bank, cursor, stats, rng, pool_offset, sample_offset, mel_range, frame_range, canvas, mixup_ratio,
    fader_gain, interpolation, post_norm, advance, out,
):  # fmt: skip
    batch, mels, frames = x.shape
    out_mels, out_frames = out.shape[2:]
    shared = approximate(x)
    push = advance and bank is not None
    sums = x.new_empty(2, 2 * batch, dtype=torch.float64)
    finite = x.new_empty(2 * batch + 1 if push else 1, dtype=torch.int32)  # and the next row
    scratch = sums if shared else x.new_empty(2 * batch * tile_size(mels, frames), dtype=torch.float32)
    moments_or_none = rng if stats is None else stats.contiguous()
    rows = x if bank is None else bank
    sizes = {"x_f": x.stride(1), "mels": mels, "frames": frames}
    launch(
        exact_views_kernel,
        2 * batch,
        x,
        pool,
        rows,
        rng if cursor is None else cursor,
        moments_or_none,
        rng,
        out,
        sums,
        finite[1:] if push else finite,
        finite,
        scratch,
        sample_offset,
        batch,
        len(pool),
        max(len(rows), 1),
        pool_offset,
        *mel_range,
        *frame_range,
        mixup_ratio,
        fader_gain,
        x.stride(0),
        pool.stride(0),
        **sizes,
        pool_f=pool.stride(1),
        out_mels=out_mels,
        out_frames=out_frames,
        canvas_mels=canvas[0],
        canvas_frames=canvas[1],
        stride=frames + MARGIN,
        PUSH=push,
        HAS_BANK=bank is not None,
        HAS_STATS=stats is not None,
        TAPS=TAPS[interpolation],
        SHARED=shared,
        num_warps=WARPS,
        maxnreg=REGISTERS,
    )
    if post_norm or advance:
        launch(
            finish_exact_views_kernel,
            2 * batch if post_norm or push else 1,
            out,
            sums,
            x,
            moments_or_none,
            finite[1:] if push else finite,
            finite,
            rows,
            rng if cursor is None else cursor,
            rng,
            batch,
            max(len(rows), 1),
            x.stride(0),
            **sizes,
            views_numel=out_mels * out_frames,
            NORMALIZE=post_norm,
            PUSH=push,
            ADVANCE=advance,
            HAS_STATS=stats is not None,
            BLOCK=math.gcd(1024, out_mels * out_frames),
            SUMS=max(SUMS, triton.next_power_of_2(2 * batch)),
            num_warps=WARPS,
            maxnreg=REGISTERS,
        )
