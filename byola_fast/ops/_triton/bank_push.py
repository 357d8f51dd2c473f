# mypy: ignore-errors
"""Pre-normalise a batch and append its finite samples to the ring of past inputs, without a sync.

Two launches. The first flags the finite samples, because a sample's place depends on all samples before it. In the
second, each program counts the finite samples before its own and writes its row of the ring; the last program to
arrive moves the cursor, after all programs have read it. Reads x twice (the second time mostly from the cache), writes
one row per sample.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from byola_fast.ops._triton.shared import EPS, compute_type, indexable, launch, on_device

BLOCK = 1024
FLAGS = 1024


@triton.jit
def clean_value(
    x, n, frames, stride_f, stride_t, inside, stats, HAS_STATS: tl.constexpr, FLAT: tl.constexpr, COMPUTE: tl.constexpr
):
    place = n if FLAT else (n // frames) * stride_f + (n % frames) * stride_t
    value = tl.load(x + place, inside, other=0).to(COMPUTE)
    if HAS_STATS:
        std = tl.load(stats + 1).to(COMPUTE)
        value = (value - tl.load(stats).to(COMPUTE)) / tl.where(std < EPS, EPS, std)  # NaN stays NaN
    return value


@triton.jit
def find_finite_kernel(
    x, stats, finite, done, rows, numel, frames, stride_b, stride_f, stride_t,
    HAS_STATS: tl.constexpr, FLAT: tl.constexpr, COMPUTE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Flag in finite (B,) the samples with only finite values in the ring's dtype, and set done (1,) to 0."""
    sample = tl.program_id(0).to(tl.int64)
    bad = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, numel, BLOCK):
        n = start + tl.arange(0, BLOCK)
        value = clean_value(
            x + sample * stride_b, n, frames, stride_f, stride_t, n < numel, stats, HAS_STATS, FLAT, COMPUTE
        )
        held = value.to(rows.dtype.element_ty).to(tl.float32)
        bad += ((held - held) != 0).to(tl.int32)
    tl.store(finite + sample, (tl.sum(bad) == 0).to(tl.int32))
    if tl.program_id(0) == 0:
        tl.store(done, 0)


@triton.jit
def push_sample(
    sample, x, stats, finite, done, rows, cursor, batch, n_memory, numel, frames, stride_b, stride_f, stride_t,
    HAS_STATS: tl.constexpr, FLAT: tl.constexpr, COMPUTE: tl.constexpr, FLAGS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write one sample's row of the ring; the last of ``batch`` programs that arrives moves the cursor."""
    before = tl.zeros((FLAGS,), tl.int32)
    count = tl.zeros((FLAGS,), tl.int32)
    for start in range(0, batch, FLAGS):
        n = start + tl.arange(0, FLAGS)
        flag = tl.load(finite + n, n < batch, other=0)
        count += flag
        before += tl.where(n < sample, flag, 0)
    place = tl.sum(before)
    total = tl.sum(count)
    next_row = (tl.load(cursor) % n_memory).to(tl.int32)
    next_row = tl.where(next_row < 0, next_row + n_memory, next_row)  # a damaged checkpoint may hold any value
    filled = tl.load(cursor + 1)
    refused = tl.load(cursor + 2)
    tl.debug_barrier()  # every warp has read the cursor
    if tl.atomic_add(done, 1) == batch - 1:
        tl.store(cursor, ((next_row + total % n_memory) % n_memory).to(tl.int64))
        tl.store(cursor + 1, tl.minimum(filled + total, n_memory))
        tl.store(cursor + 2, refused + batch - total)
    if (tl.load(finite + sample) != 0) & (total - place <= n_memory):  # a batch larger than the ring: its last samples
        target = rows + ((next_row + place % n_memory) % n_memory).to(tl.int64) * numel
        for start in range(0, numel, BLOCK):
            n = start + tl.arange(0, BLOCK)
            source = x + sample * stride_b
            value = clean_value(source, n, frames, stride_f, stride_t, n < numel, stats, HAS_STATS, FLAT, COMPUTE)
            tl.store(target + n, value, n < numel)


@triton.jit(do_not_specialize=["batch", "n_memory"])  # one variant for all values
def bank_push_kernel(
    x, stats, finite, done, rows, cursor, batch, n_memory, numel, frames, stride_b, stride_f, stride_t,
    HAS_STATS: tl.constexpr, FLAT: tl.constexpr, COMPUTE: tl.constexpr, FLAGS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    sample = tl.program_id(0).to(tl.int64)
    push_sample(
        sample, x, stats, finite, done, rows, cursor, batch, n_memory, numel, frames, stride_b, stride_f, stride_t,
        HAS_STATS, FLAT, COMPUTE, FLAGS, BLOCK,
    )  # fmt: skip


def is_flat(x: Tensor) -> bool:
    """Return whether each sample of ``x (B, F, T)`` is contiguous."""
    return x.stride(2) == 1 and x.stride(1) == x.shape[2]


def bank_push_(rows: Tensor, cursor: Tensor, x: Tensor, stats: Tensor | None) -> None:
    if not len(x):
        return
    x = indexable(x)
    numel, frames = x.shape[1] * x.shape[2], x.shape[2]
    finite = torch.empty(len(x), dtype=torch.int32, device=x.device)
    done = torch.empty(1, dtype=torch.int32, device=x.device)
    moments = x if stats is None else stats.contiguous()
    shared = {"HAS_STATS": stats is not None, "FLAT": is_flat(x), "COMPUTE": compute_type(x.dtype), "BLOCK": BLOCK}
    with on_device(x):
        launch(find_finite_kernel, len(x), x, moments, finite, done, rows, numel, frames, *x.stride(), **shared)
        launch(
            bank_push_kernel,
            len(x),
            x,
            moments,
            finite,
            done,
            rows,
            cursor,
            len(x),
            len(rows),
            numel,
            frames,
            *x.stride(),
            FLAGS=FLAGS,
            **shared,
        )
