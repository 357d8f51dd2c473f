"""Encoders and learners as a user writes them, found as ``helpers.own:Name``."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from byola_fast import Learner
from byola_fast.objectives import MLP, Output


class Flat(nn.Module):
    """No frames, no mels: a linear map of the mean over time."""

    def __init__(self, n_mels: int = 64, feature_d: int = 12) -> None:
        super().__init__()
        self.feature_d = feature_d
        self.linear = nn.Linear(n_mels, feature_d)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x[:, 0].mean(2))


class Framed(Flat):
    """With frames, whose mean the embedding is."""

    frame_stride = 2

    def forward_frames(self, x: Tensor) -> Tensor:
        pairs = x[:, 0, :, : x.shape[3] // 2 * 2].unflatten(2, (-1, 2)).mean(3)
        return self.linear(pairs.transpose(1, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_frames(x).mean(1)


class WrongShape(Flat):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[:, :-1]


class Failing(Flat):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.transpose(1, 2))


class Nameless(nn.Module):
    """No feature_d."""


class Distance(Learner):
    """Pull both projections together; the simplest learner that there is."""

    loss_name, segments = "distance", 2

    def __init__(self, encoder: nn.Module, proj_size: int = 8) -> None:
        super().__init__(encoder, MLP(encoder.feature_d, 16, proj_size))

    def forward(self, view1: Tensor, view2: Tensor) -> Output:
        first, second = self.online(view1), self.online(view2)
        return Output((first - second).square().mean(), first.detach())


class Barren(nn.Module):
    """No learner."""

    weight = torch.zeros(1)


class Memory:
    """A source of clips in memory: each holds its number everywhere but in its noise."""

    listing = "memory"

    def __init__(self, count: int, num_samples: int = 800) -> None:
        self.count, self.num_samples = count, num_samples

    def __len__(self) -> int:
        return self.count

    def read(self, index: int, epoch: int, draw: int) -> Tensor:
        generator = torch.Generator().manual_seed(index + 1000 * epoch + 1000000 * draw)
        return index + 0.2 * torch.rand(self.num_samples, generator=generator)
