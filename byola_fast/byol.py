"""Two networks and a step: the online one predicts what its moving average makes of the other view."""

from __future__ import annotations

from collections import OrderedDict
from typing import NamedTuple

import torch
from torch import Tensor, nn

from byola_fast.ema import EMA
from byola_fast.objectives import byol_loss


class BYOLOutput(NamedTuple):
    """What one step gives.

    Attributes:
        loss: 0-d, to be minimised.
        projection: ``(B, proj_size)``, the online projection of the first view, without gradient; for ``collapse_std``.
    """

    loss: Tensor
    projection: Tensor


class MLP(nn.Sequential):
    """A projector or predictor: Linear, BatchNorm, ReLU, Linear.

    Args:
        in_size, hidden, out: widths.

    Shape:
        ``(B, in_size)`` to ``(B, out)``; in training B of at least 2, which BatchNorm needs.

    >>> MLP(8, hidden=16, out=4)(torch.randn(3, 8)).shape
    torch.Size([3, 4])
    """

    def __init__(self, in_size: int, hidden: int = 4096, out: int = 256) -> None:
        super().__init__(nn.Linear(in_size, hidden), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, out))


class BYOL(nn.Module):
    """Learn an encoder from pairs of views: ``2 - 2 cos(predictor(online(view)), target(other view))``, both ways.

        view -> encoder -> projector -> predictor -> q
        other view -> target (moving average of encoder and projector) -> z

    Args:
        encoder: any module that maps a view to ``(B, feature_d)`` and has an attribute ``feature_d``.
        proj_size: width of the projection.
        proj_dim: hidden width of projector and predictor.
        ema_decay: of the target, in [0, 1].
        ema_buffers: "none" (published), "copy" or "ema"; see ``EMA``.

    Attributes:
        online: encoder and projector. predictor: the MLP behind them. target: their ``EMA``.

    Shape:
        Views as the encoder takes them, ``(B, 1, F, T)``, with B of at least 2 in training.

    Raises:
        ValueError: views of different batch sizes, or of one sample in training. TypeError: no ``feature_d``.

    Numerics:
        Each view passes the networks by itself, so that BatchNorm takes its statistics over one view. The target is in
        the mode of the whole: in training its BatchNorm uses the batch and its dropout is on, as published.

    Autograd:
        To the online network and the predictor; the target gets no gradient.

    Source:
        BYOL, arXiv:2006.07733; BYOL-A, arXiv:2103.06695.

    >>> from byola_fast.encoders import AudioNTT2020
    >>> byol = BYOL(AudioNTT2020(d=32), proj_size=16, proj_dim=64)
    >>> loss, projection = byol(torch.randn(4, 1, 64, 96), torch.randn(4, 1, 64, 96))
    >>> loss.backward()
    >>> byol.update_target()
    >>> projection.shape
    torch.Size([4, 16])
    """

    def __init__(
        self,
        encoder: nn.Module,
        proj_size: int = 256,
        proj_dim: int = 4096,
        ema_decay: float = 0.99,
        ema_buffers: str = "none",
    ) -> None:
        super().__init__()
        feature_d = getattr(encoder, "feature_d", None)
        if not isinstance(feature_d, int):
            raise TypeError(f"encoder: expected an attribute feature_d, the width of its output, got {feature_d!r}")
        projector = MLP(feature_d, proj_dim, proj_size)
        self.online = nn.Sequential(OrderedDict(encoder=encoder, projector=projector))
        self.predictor = MLP(proj_size, proj_dim, proj_size)
        self.target = EMA(self.online, ema_decay, ema_buffers)

    @property
    def encoder(self) -> nn.Module:
        """The online encoder: what training is for."""
        return self.online.get_submodule("encoder")

    def forward(self, view1: Tensor, view2: Tensor) -> BYOLOutput:
        """Return the loss of both directions summed, and the projection of the first view."""
        if len(view1) != len(view2):
            raise ValueError(f"view2: expected as many samples as in view1 ({len(view1)}), got {len(view2)}")
        if self.training and len(view1) < 2:
            raise ValueError(f"view1: expected at least 2 samples in training (BatchNorm), got {len(view1)}")
        projection1, projection2 = self.online(view1), self.online(view2)
        with torch.no_grad():
            target1, target2 = self.target(view1), self.target(view2)
        loss = byol_loss(self.predictor(projection1), target2) + byol_loss(self.predictor(projection2), target1)
        return BYOLOutput(loss, projection1.detach())

    def update_target(self) -> None:
        """Move the target towards the online network; to be called after each step of the optimiser."""
        self.target.update()
