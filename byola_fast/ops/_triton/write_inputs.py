# mypy: ignore-errors
"""Write a seed, a step and statistics that the host knows into the tensors that the kernels read, in one launch."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from byola_fast.ops._triton.shared import launch, on_device


@triton.jit(do_not_specialize=["low", "high", "step"])
def write_inputs_kernel(rng, stats, low, high, step, mean, std, HAS_STATS: tl.constexpr):
    """Words of 32 bits, so that any seed and step have one type."""
    word = 0xFFFFFFFF
    tl.store(rng, (high.to(tl.int64) << 32) | (low.to(tl.int64) & word))
    tl.store(rng + 1, step.to(tl.int64) & word)
    if HAS_STATS:
        tl.store(stats, mean)
        tl.store(stats + 1, std)


def write_inputs(rng: Tensor, stats: Tensor | None, numbers: tuple[int, int, int, float, float]) -> None:
    """Write seed and step ``(2,)`` int64, and mean and std ``(2,)`` float32 if asked for."""
    with on_device(rng):
        launch(write_inputs_kernel, 1, rng, rng if stats is None else stats, *numbers, HAS_STATS=stats is not None)
