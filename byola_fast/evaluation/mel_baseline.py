"""The baseline without a network: statistics of log-mels over time."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from byola_fast.networks.encoders import RunningMaxMean
from byola_fast.ops.reference import sums_dtype


class MelStats(nn.Module):
    """Stand in for an encoder with the log-mels themselves: mean, standard deviation and maximum over time.

    The baseline that an encoder has to beat. ``Embedder`` and ``embed_clips`` take it in place of one.

    Shape:
        ``(B, 1, F, T)`` to ``(B, 3 F)``; ``forward_frames`` gives ``(B, T, F)``.

    >>> MelStats(64)(torch.zeros(2, 1, 64, 96)).shape
    torch.Size([2, 192])
    """

    frame_stride = 1

    def __init__(self, n_mels: int = 64) -> None:
        super().__init__()
        self.n_mels, self.feature_d = n_mels, 3 * n_mels

    def forward_frames(self, x: Tensor) -> Tensor:
        return x[:, 0].transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        frames = self.forward_frames(x)
        return torch.cat([frames.mean(1), frames.std(1, correction=0), frames.amax(1)], dim=1)

    def running_pool(self) -> _RunningStats:
        return _RunningStats()


class _RunningStats(RunningMaxMean):
    """Mean, standard deviation and maximum of frames that come in pieces."""

    squares: Tensor

    def add(self, frames: Tensor) -> None:
        squares = frames.to(sums_dtype(frames.device)).square().sum(0)
        self.squares = self.squares + squares if self.count else squares
        super().add(frames)

    def result(self) -> Tensor:
        mean = self.total / self.count
        std = (self.squares / self.count - mean.square()).clamp_min(0).sqrt()
        return torch.cat([mean.float(), std.float(), self.largest])
