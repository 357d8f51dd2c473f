"""Multi-process training under torchrun. With one process everything here is a no-op."""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data._utils import worker

T = TypeVar("T")

# Words of gloo's and NCCL's errors when another process is gone.
LOST = re.compile(r"gloo|nccl|connection|peer|timed? ?out|socket|broken pipe", re.IGNORECASE)


MAX_MIN = 1e6  # two years; timedelta has a limit


class RankError(RuntimeError):
    """Another process of the group died or hangs."""


@dataclass(frozen=True)
class World:
    """The group of training processes, seen from this one.

    Attributes:
        device: device of this process.
        rank: number of this process; rank 0 writes the files.
        size: number of processes; 1 without torchrun.
    """

    device: torch.device
    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Whether this process writes files and prints."""
        return self.rank == 0

    def all_max(self, *values: int) -> list[int]:
        """Return the maximum of each value over all processes; on the CPU, as gloo notices a dead process at once."""
        if self.size == 1:
            return list(values)
        message = torch.tensor(values, dtype=torch.int64, device="cpu")
        distributed.all_reduce(message, distributed.ReduceOp.MAX)
        return message.tolist()

    def mean(self, *values: float) -> list[float]:
        """Return the mean of each value over all processes."""
        if self.size == 1:
            return list(values)
        message = torch.tensor(values, dtype=torch.float64, device="cpu")
        distributed.all_reduce(message)
        return (message / self.size).tolist()

    def gather(self, value: T) -> list[T]:
        """Return the values of all processes, in the order of ranks."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        distributed.all_gather_object(values, value)
        return values

    def broadcast(self, make: Callable[[], T]) -> T:
        """Return rank 0's value in all processes. If rank 0 raises, all do."""
        if self.size == 1:
            return make()
        message: list[Any] = [None, None]
        if self.first:
            try:
                message[0] = make()
            except Exception as error:
                distributed.broadcast_object_list([None, str(error)])
                raise
        distributed.broadcast_object_list(message)
        if message[1] is not None:
            raise RankError(f"rank 0 stopped: {message[1]}")
        return message[0]

    def wrap(self, learner: nn.Module) -> nn.Module:
        """Return the learner, or DistributedDataParallel around it.

        Buffers are not broadcast: BatchNorm's running statistics are used only after training, and rank 0's are saved.
        """
        if self.size == 1:
            return learner
        devices = [self.device] if self.device.type == "cuda" else None
        names = ("forward_sync_buffers", "broadcast_buffers")  # since torch 2.14, and before
        known = inspect.signature(DistributedDataParallel).parameters
        settings: dict[str, Any] = {next(name for name in names if name in known): False}
        return DistributedDataParallel(learner, devices, gradient_as_bucket_view=True, **settings)


@contextmanager
def join(device: torch.device, timeout_min: float = 15.0) -> Iterator[World]:
    """Join the processes started by torchrun (which sets RANK and WORLD_SIZE), and leave them at the end.

    If the caller has already initialised a group, it is used and not destroyed.

    Args:
        device: device of this process; NCCL handles tensors on a GPU, gloo those on the CPU.
        timeout_min: time to wait for other processes, in minutes.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if distributed.is_available() and distributed.is_initialized():
        yield World(device, distributed.get_rank(), distributed.get_world_size())
    elif int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield World(device)
    else:
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        joining = World(device, int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))
        with name_lost_rank(joining, lambda: "nothing was started"):
            distributed.init_process_group(backend, timeout=timedelta(minutes=min(timeout_min, MAX_MIN)))
        try:
            yield World(device, distributed.get_rank(), distributed.get_world_size())
        except RankError:
            raise  # destroying the group would wait for the dead process
        except BaseException:
            distributed.destroy_process_group()
            raise
        distributed.destroy_process_group()


@contextmanager
def name_lost_rank(world: World, message: Callable[[], str]) -> Iterator[None]:
    """Turn gloo's and NCCL's errors about a lost process into one clear error.

    Args:
        world: with one process, errors are not changed.
        message: returns what is saved and how to resume.

    Raises:
        RankError: in place of a connection error.
    """
    try:
        yield
    except RuntimeError as error:
        lost = isinstance(error, distributed.DistError) or LOST.search(str(error))
        if world.size == 1 or isinstance(error, RankError) or not lost:
            raise
        # without gloo's source location
        why = re.sub(r"^\[\S*\] ", "", str(error).strip().splitlines()[0]).split(". ")[0]
        raise RankError(f"rank {world.rank} lost another rank, which died or hangs: {why}; {message()}") from error


def loader_worker() -> worker.WorkerInfo | None:
    """Return what ``get_worker_info`` returns, which torch.compile refuses to trace."""
    return worker._worker_info


def own_rank() -> int:
    """Return the rank in torch.distributed; 0 without. A worker of a data loader has the rank of its main process."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank()
    if loader_worker() is None:
        return 0
    return int(os.environ.get("RANK", 0))  # started by spawn or forkserver, where nothing is initialised


def gather_rows(x: Tensor) -> tuple[Tensor, int]:
    """Return the rows of all ranks, in the order of ranks, and the number of this rank's first row among them.

    Without an initialised torch.distributed, or with one rank, returns ``x`` and 0.

    Args:
        x: this rank's rows; their number is the same on all ranks.

    Shape:
        x ``(B, size)`` to ``(world_size * B, size)``.

    Autograd:
        To x, on every rank: the sum over ranks of the gradients of its rows. So if each rank's loss is the mean over
        its own rows, DistributedDataParallel's mean over ranks is the gradient of the mean over all rows.

    >>> gather_rows(torch.ones(2, 3))[0].shape
    torch.Size([2, 3])
    """
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()) or distributed.get_world_size() == 1:
        return x, 0
    # torch.compile traces these, and their backward
    from torch.distributed import _functional_collectives as collectives

    names = ("all_gather_single_autograd", "all_gather_tensor_autograd")  # since torch 2.14, and before
    all_gather = next(getattr(collectives, name) for name in names if hasattr(collectives, name))
    rows: Tensor = all_gather(x.contiguous(), 0, distributed.group.WORLD)
    return rows, distributed.get_rank() * x.shape[0]


def concat_ranks(x: Tensor) -> Tensor:
    """Return the rows of all ranks, in order and without gradients: ``(B, ...)`` to ``(world_size * B, ...)``.

    torch.distributed must be initialised, and the shape must be the same on all ranks.
    """
    distributed = torch.distributed
    names = ("all_gather_single", "all_gather_into_tensor")  # since torch 2.14, and before
    all_gather = next(getattr(distributed, name) for name in names if hasattr(distributed, name))
    rows = x.new_empty(distributed.get_world_size() * x.shape[0], *x.shape[1:])
    all_gather(rows, x.detach().contiguous())
    return rows
