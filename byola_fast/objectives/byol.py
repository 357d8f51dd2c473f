"""BYOL: the online network predicts its moving average's projection of the other view."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from byola_fast.networks.ema import EMA
from byola_fast.networks.encoders import feature_width
from byola_fast.objectives.learner import MLP, Learner, Output, detached
from byola_fast.objectives.losses import byol_loss


class BYOL(Learner):
    """Learn an encoder from pairs of views: ``2 - 2 cos(predictor(online(view)), target(other view))``, both ways.

        view -> encoder -> projector -> predictor -> q
        other view -> target (moving average of encoder and projector) -> z

    With L local views, small crops of the same samples (multi-crop), the online network also predicts from each of them
    the target's projections of both views. The target never sees local views. The loss is twice the mean over all
    ``2 + 2 L`` predictions, so that its range stays.

    Args:
        encoder: any module that maps a view to ``(B, feature_d)`` and has an attribute ``feature_d``.
        proj_size: width of the projection.
        proj_dim: hidden width of projector and predictor.
        ema_decay: of the target: a number in [0, 1], or what else ``EMA`` takes.
        ema_buffers: "none" (published), "copy" or "ema"; see ``EMA``.
        joint_batch: pass both views through each network as one batch of 2 B. This changes the method: BatchNorm then
            computes its statistics over both views and updates its running ones once. Local views make another batch.

    Attributes:
        online: encoder and projector. predictor: the MLP after them. target: their ``EMA``.

    Shape:
        Views as the encoder takes them, ``(B, 1, F, T)``, with B of at least 2 in training. Local views are a list of
        such tensors, of another size.

    Raises:
        ValueError: views of different batch sizes (with ``joint_batch``, shapes), or of one sample in training.
        TypeError: no ``feature_d``.

    Numerics:
        Each view passes the networks separately, so that BatchNorm's statistics cover one view. Its running statistics
        follow local views too. In training mode the target's BatchNorm uses the batch and its dropout is on, as
        published. Under autocast the loss is computed in float32.

    Autograd:
        To the online network and the predictor; the target gets no gradient.

    Source:
        BYOL, arXiv:2006.07733; BYOL-A, arXiv:2103.06695. Local views: SwAV, arXiv:2006.09882; DINO, arXiv:2104.14294,
        eq. (3), whose sum is a mean here.

    >>> from byola_fast.networks.encoders import AudioNTT2020
    >>> byol = BYOL(AudioNTT2020(d=32), proj_size=16, proj_dim=64)
    >>> loss, projection = byol(torch.randn(4, 1, 64, 96), torch.randn(4, 1, 64, 96))
    >>> loss.backward()
    >>> byol.update_target()
    >>> projection.shape
    torch.Size([4, 16])
    """

    loss_name = "BYOL loss, both directions (0 to 8)"
    takes_local_views = True

    def __init__(
        self,
        encoder: nn.Module,
        proj_size: int = 256,
        proj_dim: int = 4096,
        ema_decay: Any = 0.99,
        ema_buffers: str = "none",
        *,
        joint_batch: bool = False,
    ) -> None:
        super().__init__(encoder, MLP(feature_width(encoder), proj_dim, proj_size), joint_batch)
        self.predictor = MLP(proj_size, proj_dim, proj_size)
        self.target = EMA(self.online, ema_decay, ema_buffers)

    def forward(self, view1: Tensor, view2: Tensor, local_views: Sequence[Tensor] = ()) -> Output:
        """Return the loss of both directions summed, and the projection of the first view."""
        self._check_views(view1, view2, local_views)
        # Local views first, so that BatchNorm's running statistics follow the last, whole views most.
        local_predictions = self._each(self.predictor, self._each(self.online, local_views))
        projection1, projection2 = self._each(self.online, [view1, view2])
        with torch.no_grad():
            target1, target2 = self._each(self.target, [view1, view2])
        prediction1, prediction2 = self._each(self.predictor, [projection1, projection2])
        loss = byol_loss(prediction1, target2) + byol_loss(prediction2, target1)
        for prediction in local_predictions:
            loss = loss + byol_loss(prediction, target1) + byol_loss(prediction, target2)
        return Output(loss / (1 + len(local_predictions)), detached(projection1))

    def update_target(self) -> None:
        """Move the target towards the online network, after each step of the optimiser."""
        self.target.update()
