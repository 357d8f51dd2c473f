# mypy: ignore-errors
"""Sums of samples, statistics of sums, and normalisation (pre- and post-normalisation of BYOL-A, arXiv:2103.06695).

``sample_sums`` reads its input once. ``normalize`` reads sums and input and writes its output, 8 bytes per element in
float32, mostly in the L2 cache, because the views were written just before. Every program adds up all sums, in the same
order and while its first block is on its way, because few sums take less time than another launch. More than
``FEW_SUMS`` rows are added up once, beforehand.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from byola_fast.ops._triton.shared import compute_type, launch, on_device, resident_programs
from byola_fast.ops.reference import sums_dtype

EPS = tl.constexpr(2.0**-23)
BLOCK = 1024
WARPS = 8  # of a program that normalises
NORMALIZED = 2048  # values that it normalises at a time
PROGRAMS_PER_SM = 4  # each of them reads all sums, so not more
REGISTERS = 65536 // (32 * WARPS * PROGRAMS_PER_SM)  # asked for, or the compiler saves some and waits for each sum
FEW_SUMS = 2048  # maximum number of rows of sums that every program adds up itself


@triton.jit
def sample_sums_kernel(x, sums, count, BLOCK: tl.constexpr):
    """Write sums (B, 3) of x (B, count): count, sum and sum of squares in float64; one program per sample."""
    sample = tl.program_id(0).to(tl.int64)
    total = tl.zeros((BLOCK,), tl.float64)
    squares = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, count, BLOCK):
        n = start + tl.arange(0, BLOCK)
        value = tl.load(x + sample * count + n, n < count, other=0).to(tl.float64)
        total += value
        squares += value * value
    tl.store(sums + 3 * sample, tl.full((), count, tl.float64))
    tl.store(sums + 3 * sample + 1, tl.sum(total))
    tl.store(sums + 3 * sample + 2, tl.sum(squares))


@triton.jit
def moments_of_sums(count, total, squares):
    """Return mean and unbiased std, at least eps."""
    mean = total / tl.maximum(count, 1)
    variance = (squares - total * mean) / tl.maximum(count - 1, 1)
    variance = tl.where(variance < 0, 0, variance)  # not tl.maximum, which would lose NaN
    std = tl.sqrt(variance)
    return mean, tl.where(std < EPS, EPS, std)


@triton.jit
def mean_and_std(sums, rows, BLOCK: tl.constexpr):
    """Return mean, unbiased std (at least eps) and count from ``rows`` counts, sums and sums of squares."""
    count = tl.zeros((BLOCK,), tl.float64)
    total = tl.zeros((BLOCK,), tl.float64)
    squares = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, rows, BLOCK):
        n = start + tl.arange(0, BLOCK)
        count += tl.load(sums + 3 * n, n < rows, other=0)
        total += tl.load(sums + 3 * n + 1, n < rows, other=0)
        squares += tl.load(sums + 3 * n + 2, n < rows, other=0)
    count_all = tl.sum(count)
    mean, std = moments_of_sums(count_all, tl.sum(total), tl.sum(squares))
    return mean, std, count_all


@triton.jit
def write_normalized(value, x, y, start, step, numel, mean, std, COMPUTE: tl.constexpr, BLOCK: tl.constexpr):
    """Write y = (x - mean) / std in blocks from ``start`` on, ``step`` apart; ``value`` is the first block of x."""
    mean = mean.to(COMPUTE)
    scale = 1 / std.to(COMPUTE)
    lane = tl.arange(0, BLOCK)
    for first in range(start, numel, step):
        n = first + lane
        tl.store(y + n, (value.to(COMPUTE) - mean) * scale, n < numel)
        value = tl.load(x + n + step, n + step < numel, other=0)


@triton.jit
def normalize_kernel(x, sums, y, numel, rows, COMPUTE: tl.constexpr, SUMS: tl.constexpr, BLOCK: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * BLOCK
    n = start + tl.arange(0, BLOCK)
    value = tl.load(x + n, n < numel, other=0)
    mean, std, _count = mean_and_std(sums, rows, SUMS)
    step = tl.num_programs(0).to(tl.int64) * BLOCK
    write_normalized(value, x, y, start, step, numel, mean, std, COMPUTE, BLOCK)


@triton.jit
def batch_stats_kernel(sums, rows, stats, SUMS: tl.constexpr):
    mean, std, count = mean_and_std(sums, rows, SUMS)
    tl.store(stats, mean)
    tl.store(stats + 1, tl.where(count > 0, std, 1))


@triton.jit
def running_stats_kernel(
    mean, variance, count, updates, sums, rows, max_updates, stats, COMPUTE: tl.constexpr, SUMS: tl.constexpr
):
    """Merge a batch into running statistics (all 0-d) by Chan's formula; one program. See the reference."""
    counts = tl.zeros((SUMS,), tl.float64)
    totals = tl.zeros((SUMS,), tl.float64)
    squares = tl.zeros((SUMS,), tl.float64)
    for start in range(0, rows, SUMS):
        n = start + tl.arange(0, SUMS)
        total = tl.load(sums + 3 * n + 1, n < rows, other=0)
        square = tl.load(sums + 3 * n + 2, n < rows, other=0)
        finite = (total - total == 0) & (square - square == 0)
        counts += tl.where(finite, tl.load(sums + 3 * n, n < rows, other=0), 0)
        totals += tl.where(finite, total, 0)
        squares += tl.where(finite, square, 0)
    batch_count = tl.sum(counts)
    batch_mean = tl.sum(totals) / tl.maximum(batch_count, 1)
    batch_variance = tl.maximum(tl.sum(squares) / tl.maximum(batch_count, 1) - batch_mean * batch_mean, 0)

    number = tl.load(updates)
    added = tl.where((max_updates < 0) | (number < max_updates), batch_count.to(tl.int64), 0)
    before = tl.load(count)
    merged = before + added
    # The GPU's division is approximate: 1 - weight would not be 0 at the first update, and n / n not 1 after the last.
    weight = added.to(COMPUTE) / tl.maximum(merged, 1).to(COMPUTE)
    rest = tl.where(added > 0, before.to(COMPUTE) / tl.maximum(merged, 1).to(COMPUTE), 1)
    old_mean = tl.load(mean)
    distance = batch_mean.to(COMPUTE) - old_mean
    new_mean = old_mean + weight * distance
    spread = weight * rest * distance * distance
    new_variance = rest * tl.load(variance) + weight * batch_variance.to(COMPUTE) + spread
    tl.store(mean, new_mean)
    tl.store(variance, new_variance)
    tl.store(count, merged)
    tl.store(updates, number + 1)
    unbiased = new_variance * merged.to(COMPUTE) / tl.maximum(merged - 1, 1).to(COMPUTE)
    tl.store(stats, tl.where(merged > 0, new_mean, 0))
    tl.store(stats + 1, tl.where(merged > 0, tl.sqrt(unbiased), 1))


def sample_sums(x: Tensor) -> Tensor:
    sums = x.new_empty(x.shape[0], 3, dtype=sums_dtype(x.device))
    if len(x):
        with on_device(x):
            launch(sample_sums_kernel, len(x), x.contiguous(), sums, x.numel() // len(x), BLOCK=BLOCK)
    return sums


def batch_stats(sums: Tensor, dtype: torch.dtype) -> Tensor:
    stats = sums.new_empty(2, dtype=dtype)
    rows = _rows(sums)
    with on_device(sums):
        launch(batch_stats_kernel, 1, rows, len(rows), stats, SUMS=_block_of(rows))
    return stats


def running_stats_(
    mean: Tensor, variance: Tensor, count: Tensor, updates: Tensor, sums: Tensor, max_updates: int
) -> Tensor:
    stats = mean.new_empty(2)
    rows = _rows(sums)
    with on_device(mean):
        launch(
            running_stats_kernel,
            1,
            mean,
            variance,
            count,
            updates,
            rows,
            len(rows),
            max_updates,
            stats,
            COMPUTE=compute_type(mean.dtype),
            SUMS=_block_of(rows),
        )
    return stats


def normalize(x: Tensor, sums: Tensor) -> Tensor:
    y = x.new_empty(x.shape)
    _normalize(x.contiguous(), sums, y)
    return y


def normalize_(x: Tensor, sums: Tensor) -> None:
    if x.is_contiguous():
        _normalize(x, sums, x)
    else:
        x.copy_(normalize(x, sums))


def _normalize(x: Tensor, sums: Tensor, y: Tensor) -> None:
    if not x.numel():
        return
    rows = _rows(sums)
    if len(rows) > FEW_SUMS:
        rows = rows.sum(0, keepdim=True)
    programs = min(triton.cdiv(x.numel(), NORMALIZED), resident_programs(x, PROGRAMS_PER_SM))
    with on_device(x):
        launch(
            normalize_kernel,
            programs,
            x,
            rows,
            y,
            x.numel(),
            len(rows),
            COMPUTE=compute_type(x.dtype),
            SUMS=_block_of(rows),
            BLOCK=NORMALIZED,
            num_warps=WARPS,
            maxnreg=None if x.dtype == torch.float64 else REGISTERS,
        )


def _rows(sums: Tensor) -> Tensor:
    return sums.reshape(-1, 3).double().contiguous()


def _block_of(rows: Tensor) -> int:
    return min(1024, triton.next_power_of_2(max(len(rows), 1)))
