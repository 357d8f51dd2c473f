"""Pre-normalisation: scalar mean and std of log-mel spectrograms, fixed or running."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from byola_fast import ops
from byola_fast.ops import _checks as check
from byola_fast.ops._route import op
from byola_fast.ops.reference import compute_dtype, rounded_sqrt
from byola_fast.runtime.buffers import FixedDtype
from byola_fast.runtime.recomputation import refuse_recomputation

logger = logging.getLogger("byola_fast")


def batch_stats(x: Tensor) -> Tensor:
    """Return mean and unbiased std over all of ``x`` as one ``(2,)`` tensor in float32 (float64 for float64).

    std is at least eps; an empty batch has mean 0 and std 1. Differentiable.
    """
    if x.dtype == torch.float64 and x.numel():  # squares of a large mean would drown a small std; float32 has no such
        first = x.detach()[(0,) * x.dim()]
        sums = ops.sample_sums(x - first)
        stats = op("batch_stats", sums)(sums, x.dtype)
        return stats + torch.stack([first, torch.zeros_like(first)])
    sums = ops.sample_sums(x)
    return op("batch_stats", sums)(sums, compute_dtype(x.dtype))


def given_stats(stats: tuple[float, float] | Tensor, device: torch.device) -> Tensor:
    """Return ``(mean, std)`` as a ``(2,)`` tensor on a device, without a sync.

    Raises:
        ValueError: not two finite numbers with std of at least 0 (not checked on a GPU).
    """
    if isinstance(stats, Tensor):
        check.require_float("stats", stats)
        check.require_shape("stats", stats, (2,))
        if check.is_readable(stats):
            mean, std = stats.detach().tolist()
            given_stats((mean, std), device)  # raises
        return stats.to(device, non_blocking=device.type == "cuda")  # a copy to the CPU must wait
    if not check.is_pair(stats) or not math.isfinite(stats[0]) or not 0 <= stats[1] < math.inf:
        raise ValueError(f"stats: expected (mean, std), finite, std at least 0, got {stats}")
    return torch.stack([torch.full((), float(x), dtype=torch.float32, device=device) for x in stats])


class RunningStats(FixedDtype):
    """Mean and std of all batches so far, merged on the device (first version of the paper).

    Args:
        max_updates: stop after so many batches (the first epochs); None for no limit.

    Shape:
        ``update(x)`` takes any shape with samples along the first axis; ``stats()`` returns ``(2,)`` float32.

    Numerics:
        Chan's merge in float32 with an integer count: std is right to 1e-3 after 10^6 updates, if |mean| is below 1e4
        std. Samples that are not finite are left out. Buffers stay in float32, even after ``.half()``.
    """

    def __init__(self, max_updates: int | None = None) -> None:
        super().__init__()
        if max_updates is not None and max_updates < 1:
            raise ValueError(f"max_updates: expected at least 1 or None, got {max_updates}")
        self.max_updates = max_updates
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.register_buffer("mean", torch.zeros((), dtype=torch.float32))
        self.register_buffer("variance", torch.zeros((), dtype=torch.float32))

    updates: Tensor
    count: Tensor
    mean: Tensor
    variance: Tensor

    @torch.no_grad()
    def update(self, x: Tensor) -> Tensor:
        """Merge a batch and return the new ``stats()``; an empty batch does not count."""
        refuse_recomputation("RunningStats.update")
        if x.numel() == 0:
            return self.stats()
        state = (self.mean, self.variance, self.count, self.updates)
        if state[0].dtype not in (torch.float32, torch.float64):
            raise TypeError(f"RunningStats.mean: expected torch.float32, got {self.mean.dtype}, which stops to follow")
        limit = -1 if self.max_updates is None else self.max_updates
        stats = op("running_stats_")(*state, ops.sample_sums(x.detach()), limit)
        increment_version(state)
        return stats

    def stats(self) -> Tensor:
        """Return mean and unbiased std; mean 0 and std 1 before the first update."""
        unbiased = self.variance * self.count / (self.count - 1).clamp_min(1)
        seen = torch.stack([self.mean, rounded_sqrt(unbiased)])
        return torch.where(self.count > 0, seen, torch.stack([torch.zeros_like(self.mean), torch.ones_like(self.mean)]))


def compute_stats(batches: Iterable[Tensor]) -> tuple[float, float]:
    """Return mean and std over all batches, for ``stats=`` and to be stored with weights.

    Samples that are not finite are left out, with a warning.

    >>> [round(value, 4) for value in compute_stats([torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0]])])]
    [2.5, 1.291]
    """
    running, seen = None, 0
    for batch in batches:
        if running is None:
            with batch.device:
                running = RunningStats()
        running.update(batch)
        seen += batch.numel()
    count = int(running.count) if running is not None else 0
    if running is None or count == 0:
        raise ValueError("stats: expected at least one finite log-mel spectrogram, got none")
    if count < seen:
        logger.warning("stats: %.2g %% of the log-mels are not finite and left out", 100 * (1 - count / seen))
    mean, std = running.stats().tolist()
    return mean, std
