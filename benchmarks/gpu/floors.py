# mypy: ignore-errors
"""A plain pass over memory in Triton: a copy, or an update in place that reads two tensors and writes one.

It is a floor that other times are compared with, beside torch's own kernels and memcpy.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from byola_fast.ops._triton.shared import on_device

SHAPES = ((1024, 4), (4096, 8))  # elements and warps of a program


@triton.jit
def pass_kernel(source, target, count, UPDATE: tl.constexpr, BLOCK: tl.constexpr):
    n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(source + n, n < count)
    if UPDATE:
        old = tl.load(target + n, n < count)
        value = old + 0.01 * (value - old)
    tl.store(target + n, value, n < count)


def run_pass(source: Tensor, target: Tensor, update: bool, block: int, warps: int) -> None:
    """Copy ``source`` to ``target``, or move ``target`` towards it; both contiguous, of one size and dtype."""
    count = source.numel()
    with on_device(source):
        pass_kernel[(triton.cdiv(count, block),)](source, target, count, update, block, num_warps=warps)
