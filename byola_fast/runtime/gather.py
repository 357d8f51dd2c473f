"""The batch of all ranks together, with gradients (negatives of contrastive objectives) and without."""

from __future__ import annotations

import torch
from torch import Tensor


def gather_rows(x: Tensor) -> tuple[Tensor, int]:
    """Return the rows of all ranks, in the order of ranks, and the number of this rank's first row among them.

    The rows themselves and 0 where torch.distributed is not initialised or has one rank.

    Args:
        x: this rank's rows; every rank gives equally many.

    Shape:
        x ``(B, size)`` to ``(world_size * B, size)``.

    Autograd:
        To x, on every rank: the sum over ranks of the gradients of its rows. So where each rank's loss is the mean over
        its own rows, DistributedDataParallel's mean over ranks is the gradient of the mean over all.

    >>> gather_rows(torch.ones(2, 3))[0].shape
    torch.Size([2, 3])
    """
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()) or distributed.get_world_size() == 1:
        return x, 0
    from torch.distributed import _functional_collectives as collectives  # what torch.compile traces, backward too

    names = ("all_gather_single_autograd", "all_gather_tensor_autograd")  # since torch 2.14, and before
    all_gather = next(getattr(collectives, name) for name in names if hasattr(collectives, name))
    rows: Tensor = all_gather(x.contiguous(), 0, distributed.group.WORLD)
    return rows, distributed.get_rank() * x.shape[0]


def concat_ranks(x: Tensor) -> Tensor:
    """Return the rows of all ranks, in order and without gradients: ``(B, ...)`` to ``(world_size * B, ...)``.

    torch.distributed is initialised, and every rank calls this with one shape.
    """
    distributed = torch.distributed
    names = ("all_gather_single", "all_gather_into_tensor")  # since torch 2.14, and before
    all_gather = next(getattr(distributed, name) for name in names if hasattr(distributed, name))
    rows = x.new_empty(distributed.get_world_size() * x.shape[0], *x.shape[1:])
    all_gather(rows, x.detach().contiguous())
    return rows
