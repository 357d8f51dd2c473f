"""Processes that read audio: deaf to the signals that stop a run, ended with their parent, an error when killed."""

from __future__ import annotations

import atexit
import os
import re
import signal
import weakref
from collections.abc import Generator, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader

MOST_WORKERS = 8
GRACE_SEC = 30  # that a process lives on after SIGTERM, for the main process to end its step and save

_running: weakref.WeakSet[Any] = weakref.WeakSet()


def default_workers() -> int:
    """Return how many processes read audio by default: one fewer than this process has CPU cores, at most 8."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(MOST_WORKERS, cores - 1)


def read_in_processes(dataset: Any, numbers: Sequence[int], workers: int, *, pin: bool = False) -> Generator[Any]:
    """Yield ``dataset[number]`` for every number, in order, read ahead by processes; closing the iterator ends them.

    An error that has a message of its own is better returned by the dataset than raised: raised, it arrives with the
    process's traceback as its message.

    Args:
        dataset: anything with ``__getitem__``; tensors travel through shared memory, arrays through a pipe.
        numbers: what to read.
        workers: processes; 0 reads in this one.
        pin: copy tensors to pinned memory.

    Raises:
        ChildProcessError: a process was killed.
    """
    loader: DataLoader[Any] = DataLoader(
        dataset,
        batch_size=None,  # whatever the dataset gives is passed on as it is
        sampler=numbers,
        num_workers=workers,
        collate_fn=_same,
        pin_memory=pin,
        worker_init_fn=_ignore_interrupts,
        generator=torch.Generator(),  # seeds workers: no draw that matters may share it
    )
    iterator = iter(loader)
    _running.add(iterator)
    try:
        yield from iterator
    except RuntimeError as error:
        if not re.match(r"DataLoader worker \(pid", str(error)):
            raise
        raise ChildProcessError(f"a process that reads audio was killed (out of memory?): {error}") from error
    finally:
        _end(iterator)


def _end(iterator: Any) -> None:
    """End the processes now; DataLoader does once the iterator is collected, which a traceback delays."""
    if hasattr(iterator, "_shutdown_workers"):
        iterator._shutdown_workers()


@atexit.register
def _end_all() -> None:
    """End processes whose iterator is still in some frame: Python would send them SIGTERM and wait."""
    for iterator in list(_running):
        _end(iterator)


def _same(item: Any) -> Any:
    return item


def _ignore_interrupts(_worker: int) -> None:
    """Leave Ctrl-C and SIGTERM to the main process: terminals and job schedulers send them to every process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(GRACE_SEC))
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
