"""Learners that the study tries beside the library's own: ``--objective benchmarks.quality.learners:Reconstruct``."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from byola_fast.networks.encoders import feature_width, pool_frames
from byola_fast.objectives.learner import MLP, Learner, Output, detached
from byola_fast.objectives.losses import nt_xent_loss


class Reconstruct(Learner):
    """SimCLR's loss, plus the error of a linear decoder from each frame-level feature to its patch of the view.

    A contrastive loss alone lets the encoder drop what both views share by chance; the decoder keeps it.

    Args:
        encoder: one of the library's.
        proj_size, proj_dim, temperature: as for "simclr".
    """

    loss_name = "NT-Xent + reconstruction"
    weight = 5.0

    def __init__(self, encoder: Any, proj_size: int = 256, proj_dim: int = 4096, temperature: float = 0.1) -> None:
        super().__init__(encoder, MLP(feature_width(encoder), proj_dim, proj_size))
        self.temperature, self.stride = temperature, encoder.frame_stride
        self.decoder = nn.Linear(feature_width(encoder), self.stride * encoder.n_mels)

    def forward(self, view1: Tensor, view2: Tensor) -> Output:
        """Return the loss and the projection of the first view."""
        encoder: Any = self.encoder
        projections, errors = [], []
        for view in (view1, view2):
            frames = encoder.forward_frames(view)
            projections.append(self.online.get_submodule("projector")(pool_frames(frames)))
            errors.append(F.mse_loss(self.decoder(frames).float(), self._patches(view, frames.shape[1]).float()))
        loss = nt_xent_loss(projections[0], projections[1], self.temperature)
        return Output(loss + self.weight / 2 * (errors[0] + errors[1]), detached(projections[0]))

    def _patches(self, view: Tensor, count: int) -> Tensor:
        """``(B, 1, F, T)`` to ``(B, count, F * stride)``."""
        cut = view[:, 0, :, : count * self.stride]
        return cut.unflatten(2, (count, self.stride)).permute(0, 2, 1, 3).flatten(2)


class Reconstruct1(Reconstruct):
    """The same with a weight of 1."""

    weight = 1.0


class Reconstruct20(Reconstruct):
    """The same with a weight of 20."""

    weight = 20.0
