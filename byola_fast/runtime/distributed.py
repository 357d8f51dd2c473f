"""Several processes that train together, as torchrun starts them; or one, for which all of this does nothing."""

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
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

T = TypeVar("T")

# How gloo and NCCL put it that the other side is gone.
LOST = re.compile(r"gloo|nccl|connection|peer|timed? ?out|socket|broken pipe", re.IGNORECASE)


class RankError(RuntimeError):
    """A process of the group died or does not answer."""


@dataclass(frozen=True)
class World:
    """This process among those that train together.

    Attributes:
        device: of this process.
        rank: its number; rank 0 writes the files.
        size: how many there are; 1 without torchrun.
    """

    device: torch.device
    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the process that writes and prints."""
        return self.rank == 0

    def most(self, *values: int) -> list[int]:
        """Return each value's greatest over all processes; on the CPU, so that gloo notices the dead at once."""
        if self.size == 1:
            return list(values)
        told = torch.tensor(values, dtype=torch.int64)
        distributed.all_reduce(told, distributed.ReduceOp.MAX)
        return told.tolist()

    def mean(self, *values: float) -> list[float]:
        """Return the means over all processes."""
        if self.size == 1:
            return list(values)
        told = torch.tensor(values, dtype=torch.float64)
        distributed.all_reduce(told)
        return (told / self.size).tolist()

    def gather(self, value: T) -> list[T]:
        """Return every process's value, in the order of ranks."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        distributed.all_gather_object(values, value)
        return values

    def from_first(self, make: Callable[[], T]) -> T:
        """Let rank 0 make a value and give it to all; where it raises, all do."""
        if self.size == 1:
            return make()
        told: list[Any] = [None, None]
        if self.first:
            try:
                told[0] = make()
            except Exception as error:
                distributed.broadcast_object_list([None, str(error)])
                raise
        distributed.broadcast_object_list(told)
        if told[1] is not None:
            raise RankError(f"rank 0 stopped: {told[1]}")
        return told[0]

    def wrap(self, learner: nn.Module) -> nn.Module:
        """Return the module to call: the learner, or DistributedDataParallel around it.

        Buffers are not broadcast: BatchNorm's running ones serve after training only, when rank 0's are saved.
        """
        if self.size == 1:
            return learner
        devices = [self.device] if self.device.type == "cuda" else None
        names = ("forward_sync_buffers", "broadcast_buffers")  # since torch 2.14, and before
        known = inspect.signature(DistributedDataParallel).parameters
        settings: dict[str, Any] = {next(name for name in names if name in known): False}
        return DistributedDataParallel(learner, devices, gradient_as_bucket_view=True, **settings)


def pick_device(name: str) -> torch.device:
    """Return the device of this process: with "auto" and "cuda" its own of several GPUs.

    Raises:
        ValueError: no device of that name, or not here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device: expected auto, cpu, cuda or cuda:N, got {name!r}") from error
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ValueError(f"device: expected one that is here, got {name!r} where torch finds no CUDA")
        if device.index is None:
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        if device.index >= torch.cuda.device_count():
            raise ValueError(f"device: expected one of {torch.cuda.device_count()} GPUs, got {device}")
        return device
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # as this build of torch puts it
        raise ValueError(f"device: expected one that is here, got {name!r}: {str(error).splitlines()[0]}") from error
    return device


@contextmanager
def join(device: torch.device, timeout_min: float = 15.0) -> Iterator[World]:
    """Join the processes that torchrun started (it sets RANK and WORLD_SIZE), and leave them at the end.

    A group that the caller has initialised already is used and left alone.

    Args:
        device: of this process; NCCL serves its tensors where it is a GPU, gloo those on the CPU.
        timeout_min: minutes to wait for other processes.
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
        with explain_loss(joining, lambda: "nothing was begun"):
            distributed.init_process_group(backend, timeout=timedelta(minutes=timeout_min))
        try:
            yield World(device, distributed.get_rank(), distributed.get_world_size())
        except RankError:
            raise  # leaving in good order would wait for the dead
        except BaseException:
            distributed.destroy_process_group()
            raise
        distributed.destroy_process_group()


@contextmanager
def explain_loss(world: World, told: Callable[[], str]) -> Iterator[None]:
    """Turn what gloo and NCCL raise when a process is gone into one clear error.

    Args:
        world: nothing is done where it is one process.
        told: returns what is safe, and how to go on.

    Raises:
        RankError: in place of an error of the connection between processes.
    """
    try:
        yield
    except RuntimeError as error:
        lost = isinstance(error, distributed.DistError) or LOST.search(str(error))
        if world.size == 1 or isinstance(error, RankError) or not lost:
            raise
        why = re.sub(r"^\[\S*\] ", "", str(error).strip().splitlines()[0]).split(". ")[0]  # without the place in gloo
        raise RankError(f"rank {world.rank} lost another rank, which died or hangs: {why}; {told()}") from error
