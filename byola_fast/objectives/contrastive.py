"""Contrastive learners: SimCLR, MoCo and COLA, on the encoder and the views of BYOL-A."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from byola_fast.networks.ema import EMA
from byola_fast.networks.encoders import AudioNTT, feature_width
from byola_fast.objectives.learner import MLP, Learner, Output, detached
from byola_fast.objectives.losses import bilinear_loss, directions, info_nce_loss, nt_xent_loss
from byola_fast.runtime.distributed import gather_rows


class SimCLR(Learner):
    """Learn an encoder by matching the two views of each sample among all views of the batch (NT-Xent).

    With L local views, small crops of the same samples (multi-crop), the loss is the mean of NT-Xent over ``1 + 2 L``
    pairs of views: both whole ones, and each local one with each whole one. The negatives of a pair are its own.

    Args:
        encoder: any module that maps a view to ``(B, feature_d)`` and has an attribute ``feature_d``.
        proj_size: width of the projection.
        proj_dim: hidden width of the projector.
        temperature: of the softmax over cosines, above 0.
        reconstruction: weight of a second loss, the mean squared error of a linear decoder from each frame-level
            feature to its own patch of the view. It keeps what the first loss lets the encoder drop. Local views are
            not reconstructed.
        joint_batch: as ``BYOL``.
        gather: under torch.distributed, use the batches of all ranks as negatives; they must be equally large.

    Shape:
        As ``BYOL``, B of at least 2.

    Raises:
        As ``BYOL``; ValueError: a temperature that is not above 0; ``reconstruction`` below 0, or with an encoder that
        is not the library's.

    Numerics:
        Under autocast the loss is computed in float32. With ``gather``, the mean over ranks of losses and gradients
        equals that of the whole batch in one process, up to BatchNorm.

    Source:
        SimCLR, arXiv:2002.05709. Differs: the projector is BYOL's, with BatchNorm, so that only objectives differ; each
        view passes the networks separately unless ``joint_batch``. It has no reconstruction. Local views: SwAV,
        arXiv:2006.09882; DINO, arXiv:2104.14294.

    >>> from byola_fast.networks.encoders import AudioNTT2020
    >>> simclr = SimCLR(AudioNTT2020(d=32), proj_size=16, proj_dim=64)
    >>> loss, projection = simclr(torch.randn(4, 1, 64, 96), torch.randn(4, 1, 64, 96))
    >>> loss.backward()
    """

    loss_name = "NT-Xent"
    takes_local_views = True

    def __init__(
        self,
        encoder: nn.Module,
        proj_size: int = 256,
        proj_dim: int = 4096,
        temperature: float = 0.1,
        *,
        reconstruction: float = 0.0,
        joint_batch: bool = False,
        gather: bool = True,
    ) -> None:
        super().__init__(encoder, MLP(feature_width(encoder), proj_dim, proj_size), joint_batch)
        self.temperature, self.gather = _positive("temperature", temperature), gather
        self.reconstruction = reconstruction
        if not 0 <= reconstruction < float("inf"):
            raise ValueError(f"reconstruction: expected a number of at least 0, got {reconstruction}")
        if reconstruction:
            if not isinstance(encoder, AudioNTT):
                kind = type(encoder).__name__
                raise ValueError(f"reconstruction: expected AudioNTT2020 or AudioNTT2022 as the encoder, got {kind}")
            self.decoder = nn.Linear(feature_width(encoder), encoder.frame_stride * encoder.n_mels)

    def forward(self, view1: Tensor, view2: Tensor, local_views: Sequence[Tensor] = ()) -> Output:
        views = [view1, view2]
        self._check_views(view1, view2, local_views)
        local_projections = self._each(self.online, local_views)  # first, as in BYOL
        if not self.reconstruction:
            projections = self._each(self.online, views)
            return Output(self._loss(projections, local_projections), detached(projections[0]))
        encoder: Any = self.encoder
        frames = self._each(encoder.forward_frames, views)
        projections = self._each(self.online.get_submodule("projector"), [encoder.pool(x) for x in frames])
        errors = self._error(view1, frames[0]) + self._error(view2, frames[1])
        loss = self._loss(projections, local_projections) + self.reconstruction / 2 * errors
        return Output(loss, detached(projections[0]))

    def _loss(self, whole: Sequence[Tensor], local: Sequence[Tensor]) -> Tensor:
        """Return the mean over all pairs of views."""
        pairs = [(whole[0], whole[1]), *((z, other) for z in local for other in whole)]
        return torch.stack([nt_xent_loss(*pair, self.temperature, gather=self.gather) for pair in pairs]).mean()

    def _error(self, view: Tensor, frames: Tensor) -> Tensor:
        """Return the mean squared error of the decoder: views ``(B, 1, F, T)``, frames ``(B, T // stride, d)``."""
        count = frames.shape[1]
        stride = self.decoder.out_features // view.shape[2]
        cut = view[:, 0, :, : count * stride].unflatten(2, (count, stride))
        return F.mse_loss(self.decoder(frames).float(), cut.permute(0, 2, 1, 3).flatten(2).float())

    def extra_repr(self) -> str:
        more = f", reconstruction={self.reconstruction:g}" if self.reconstruction else ""
        return f"temperature={self.temperature:g}{more}"


class MoCo(Learner):
    """Learn an encoder by matching each query to its key among the keys of past batches (InfoNCE, momentum queue).

        view1 -> encoder -> projector -> query
        view2 -> target (moving average of encoder and projector) -> key, queued after the loss

    Args:
        encoder: any module that maps a view to ``(B, feature_d)`` and has an attribute ``feature_d``.
        proj_size: width of the projection.
        proj_dim: hidden width of the projector.
        temperature: of the softmax over cosines, above 0.
        queue_size: past keys kept, at least 1. With more keys than clips, a clip's own past keys become negatives.
        ema_decay: of the target: a number in [0, 1], or what else ``EMA`` takes.
        ema_buffers: "none", "copy" or "ema"; see ``EMA``.
        gather: under torch.distributed, every rank queues the keys of all ranks, so that queues are equal; batches must
            be equally large.

    Attributes:
        queue: ``(queue_size, proj_size)`` float32, keys of length 1. cursor: ``(2,)`` int64, next row and rows filled.
            Both are buffers on the device, so that no step syncs, and in ``state_dict``.

    Shape:
        Views ``(B, 1, F, T)``, B of at least 2 in training.

    Raises:
        As ``BYOL``; ValueError: ``temperature`` or ``queue_size`` out of range.

    Numerics:
        Empty rows are left out, so that the loss starts at 0 and rises while the queue fills. The queue is read before
        the batch joins it; in eval mode nothing joins. Under autocast the loss is computed in float32.
        DistributedDataParallel does not broadcast the queue.

    Source:
        MoCo, arXiv:1911.05722, algorithm 1. Differs: the projector is BYOL's (published: one Linear), so that only
        objectives differ; the queue starts empty, not random; BatchNorm is not shuffled, which needs several devices
        with small batches.

    >>> from byola_fast.networks.encoders import AudioNTT2020
    >>> moco = MoCo(AudioNTT2020(d=32), proj_size=16, proj_dim=64, queue_size=8)
    >>> loss, projection = moco(torch.randn(4, 1, 64, 96), torch.randn(4, 1, 64, 96))
    >>> loss.backward()
    >>> moco.update_target()
    >>> moco.cursor
    tensor([4, 4])
    """

    loss_name = "InfoNCE"
    queue: Tensor
    cursor: Tensor

    def __init__(
        self,
        encoder: nn.Module,
        proj_size: int = 256,
        proj_dim: int = 4096,
        temperature: float = 0.07,
        queue_size: int = 65536,
        ema_decay: Any = 0.999,
        ema_buffers: str = "none",
        *,
        gather: bool = True,
    ) -> None:
        super().__init__(encoder, MLP(feature_width(encoder), proj_dim, proj_size))
        if queue_size < 1:
            raise ValueError(f"queue_size: expected at least 1, got {queue_size}")
        self.temperature, self.gather = _positive("temperature", temperature), gather
        self.target = EMA(self.online, ema_decay, ema_buffers)
        self.register_buffer("queue", torch.zeros(queue_size, proj_size, dtype=torch.float32))
        self.register_buffer("cursor", torch.zeros(2, dtype=torch.int64))
        self._ddp_params_and_buffers_to_ignore = ["queue", "cursor"]  # equal on all ranks, and 64 MB

    def forward(self, view1: Tensor, view2: Tensor) -> Output:
        self._check_views(view1, view2)
        projection = self.online(view1)
        with torch.no_grad():
            keys = directions(self.target(view2))
        queue = self.queue.clone() if self.training else self.queue  # the push overwrites rows
        loss = info_nce_loss(projection, keys, queue, self.temperature, count=self.cursor[1].clone())
        if self.training:
            self._push(gather_rows(keys)[0] if self.gather else keys)
        return Output(loss, detached(projection))

    def update_target(self) -> None:
        """Move the target towards the online network; to be called after each step of the optimiser."""
        self.target.update()

    @torch.no_grad()
    def _push(self, keys: Tensor) -> None:
        """Overwrite the oldest rows; with more keys than rows, keep the last."""
        size = self.queue.shape[0]
        start, filled = self.cursor.unbind()
        skipped = max(0, len(keys) - size)
        rows = (start + skipped + torch.arange(len(keys) - skipped, device=keys.device)) % size
        self.queue.index_copy_(0, rows, keys[skipped:].to(self.queue.dtype))
        self.cursor.copy_(torch.stack([(start + len(keys)) % size, (filled + len(keys)).clamp(max=size)]))

    def extra_repr(self) -> str:
        return f"temperature={self.temperature:g}, queue_size={len(self.queue)}"


class COLA(Learner):
    """Learn an encoder by matching the two segments of each clip within the batch, by a bilinear similarity.

        segment -> encoder -> projector: Linear, LayerNorm, tanh -> g;  similarity of two segments: g W g'

    Args:
        encoder: any module that maps a view to ``(B, feature_d)`` and has an attribute ``feature_d``.
        proj_size: width of the projection.
        joint_batch: as ``BYOL``; here BatchNorm is in the encoder alone.
        gather: as ``SimCLR``.

    Attributes:
        similarity: ``nn.Linear`` without bias that holds W.

    Shape:
        Views ``(B, 1, F, T)``, B of at least 2: two segments of the same clips, augmented or not. Two views of one
        segment work too.

    Raises:
        As ``BYOL``.

    Numerics:
        As ``SimCLR``.

    Source:
        COLA, arXiv:2010.10915, with its bilinear similarity and a projection of 512.

    >>> from byola_fast.networks.encoders import AudioNTT2020
    >>> cola = COLA(AudioNTT2020(d=32), proj_size=16)
    >>> loss, projection = cola(torch.randn(4, 1, 64, 96), torch.randn(4, 1, 64, 96))
    >>> loss.backward()
    """

    loss_name, segments = "COLA loss", 2

    def __init__(
        self, encoder: nn.Module, proj_size: int = 512, *, joint_batch: bool = False, gather: bool = True
    ) -> None:
        projector = nn.Sequential(nn.Linear(feature_width(encoder), proj_size), nn.LayerNorm(proj_size), nn.Tanh())
        super().__init__(encoder, projector, joint_batch)
        self.similarity = nn.Linear(proj_size, proj_size, bias=False)
        self.gather = gather

    def forward(self, view1: Tensor, view2: Tensor) -> Output:
        self._check_views(view1, view2)
        projection1, projection2 = self._each(self.online, [view1, view2])
        loss = bilinear_loss(projection1, projection2, self.similarity.weight, gather=self.gather)
        return Output(loss, detached(projection1))


def _positive(name: str, value: float) -> float:
    if not 0 < value < float("inf"):
        raise ValueError(f"{name}: expected a number above 0, got {value}")
    return value
