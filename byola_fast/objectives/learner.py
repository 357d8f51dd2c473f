"""The base class of learners, their heads and their output."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from byola_fast.ops.reference import compute_dtype


class Output(NamedTuple):
    """The result of one step.

    Attributes:
        loss: 0-d.
        projection: ``(B, proj_size)``, the online projection of the first view, detached, at least float32; for
            ``spread`` and ``effective_rank``.
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


class Learner(nn.Module):
    """An encoder with its loss: the interface of the trainer.

    ``learner(view1, view2)`` returns an ``Output``; a learner that takes local views is also called as ``learner(view1,
    view2, local_views)``. ``update_target()`` is called after each step of the optimiser. All parameters that require a
    gradient are trained. ``state_dict`` holds everything that a resumed run needs.

    Args:
        encoder: any module that maps a view to ``(B, feature_d)`` and has an attribute ``feature_d``.
        projector: from the embedding to the compared projection.
        joint_batch: pass both views through a network as one batch of 2 B instead of two of B.

    Attributes:
        online: encoder and projector.
        loss_name: title of the loss in pictures.
        segments: segments per clip and step: 1 for both views, or 2, one for each view.
        takes_local_views: whether ``forward`` takes a list of local views too, small crops of the same samples.
    """

    loss_name = "loss"
    segments = 1
    takes_local_views = False

    def __init__(self, encoder: nn.Module, projector: nn.Module, joint_batch: bool = False) -> None:
        super().__init__()
        self.joint_batch = joint_batch
        self.online = nn.Sequential(OrderedDict(encoder=encoder, projector=projector))

    @property
    def encoder(self) -> nn.Module:
        """The online encoder."""
        return self.online.get_submodule("encoder")

    def forward(self, view1: Tensor, view2: Tensor) -> Output:
        """Return the loss and the projection of the first view."""
        raise NotImplementedError

    def update_target(self) -> None:
        """Move the target after a step of the optimiser; does nothing without a target network."""

    def _check_views(self, view1: Tensor, view2: Tensor, local_views: Sequence[Tensor] = ()) -> None:
        if len(view1) != len(view2):
            raise ValueError(f"view2: expected as many samples as in view1 ({len(view1)}), got {len(view2)}")
        if self.training and len(view1) < 2:
            raise ValueError(f"view1: expected at least 2 samples in training (BatchNorm), got {len(view1)}")
        if self.joint_batch and view1.shape != view2.shape:
            raise ValueError(
                f"view2: expected the shape of view1 {tuple(view1.shape)} with joint_batch, got {tuple(view2.shape)}"
            )

        for number, view in enumerate(local_views):
            if len(view) != len(view1):
                wanted = f"as many samples as in view1 ({len(view1)})"
                raise ValueError(f"local_views[{number}]: expected {wanted}, got {len(view)}")
            if self.joint_batch and view.shape != local_views[0].shape:
                wanted = f"the shape of the first {tuple(local_views[0].shape)} with joint_batch"
                raise ValueError(f"local_views[{number}]: expected {wanted}, got {tuple(view.shape)}")

    def _each(self, network: Callable[[Tensor], Tensor], views: Sequence[Tensor]) -> list[Tensor]:
        """Pass batches of one shape through a network."""
        if not self.joint_batch or not views:
            return [network(x) for x in views]
        return list(network(torch.cat(list(views))).chunk(len(views)))


def detached(projection: Tensor) -> Tensor:
    """Return a projection for an ``Output``."""
    return projection.detach().to(compute_dtype(projection.dtype))
