"""Processes that read audio: deaf to the signals that stop a run, ended with their parent, an error when killed."""

from __future__ import annotations

import atexit
import multiprocessing
import os
import re
import signal
import threading
import time
import weakref
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from functools import partial
from types import FrameType
from typing import Any

import torch
from torch.utils.data import DataLoader

MOST_WORKERS = 8
STOPPING = (signal.SIGINT, signal.SIGTERM)  # which the main process alone heeds
GRACE_SEC = 30  # that a process lives on after SIGTERM, for the main process to end its step and save

_END = object()

_running: weakref.WeakSet[Any] = weakref.WeakSet()
_waiting: weakref.WeakSet[Any] = weakref.WeakSet()  # for their data, at this moment
_deaths: weakref.WeakKeyDictionary[Any, RuntimeError] = weakref.WeakKeyDictionary()  # that nobody waited for yet


def num_workers(asked: int | None) -> int:
    """Return how many processes read audio: as many as asked for, or one fewer than there are CPU cores, at most 8.

    Raises:
        ValueError: fewer than 0 are asked for.
    """
    if asked is not None:
        if asked < 0:
            raise ValueError(f"workers: expected at least 0, got {asked}")
        return asked
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
        worker_init_fn=partial(_begin, os.getpid()),
        generator=torch.Generator(),  # seeds workers: no draw that matters may share it
    )
    with _held_back(STOPPING):  # by the new processes too, until they are ready for them
        iterator = iter(loader)
    _running.add(iterator)
    _leave_deaths_to_reading()
    try:
        while (item := _next(iterator)) is not _END:
            yield item
    except RuntimeError as error:
        if not re.match(r"DataLoader worker \(pid", str(error)):
            raise
        raise ChildProcessError(f"a process that reads audio was killed (out of memory?): {error}") from error
    finally:
        _end(iterator)


@contextmanager
def _held_back(signals: Sequence[signal.Signals]) -> Generator[None]:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _end(iterator: Any) -> None:
    """End the processes now; DataLoader does once the iterator is collected, which a traceback delays."""
    if hasattr(iterator, "_shutdown_workers"):
        iterator._shutdown_workers()


@atexit.register
def _end_all() -> None:
    """End processes whose iterator is still in some frame: Python would send them SIGTERM and wait."""
    for iterator in list(_running):
        _end(iterator)


def _next(iterator: Any) -> Any:
    """Return the next item, or ``_END``; raise what is known of a killed process."""
    if iterator in _deaths:
        raise _deaths.pop(iterator)
    _waiting.add(iterator)
    try:
        return next(iterator, _END)
    finally:
        _waiting.discard(iterator)


def _leave_deaths_to_reading() -> None:
    """Have a killed process raise where its data are waited for, and not wherever the main thread is.

    That is what torch's handler of SIGCHLD does, also in the middle of a step or a save, which would be taken for a
    failure of that.
    """
    torchs = signal.getsignal(signal.SIGCHLD)
    if threading.current_thread() is not threading.main_thread() or not callable(torchs) or hasattr(torchs, "ours"):
        return

    def handler(number: int, frame: FrameType | None) -> None:
        try:
            torchs(number, frame)
        except RuntimeError as error:
            killed = re.search(r"worker \(pid (\d+)\)", str(error))
            pid = int(killed[1]) if killed else None
            for iterator in list(_running):
                own = [process.pid for process in getattr(iterator, "_workers", ())]
                if pid in own and iterator not in _waiting:
                    _deaths[iterator] = error
                    return
            raise

    handler.ours = True  # type: ignore[attr-defined]
    signal.signal(signal.SIGCHLD, handler)


def _same(item: Any) -> Any:
    return item


def _begin(main: int, _worker: int) -> None:
    """Leave Ctrl-C and SIGTERM to the main process, which they reach too, and end with it, whatever ends it.

    torch's workers look for their parent as well, but then wait for it to take what they have read.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(GRACE_SEC))
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)
    forked = multiprocessing.get_start_method() == "fork"
    parent = main if forked else os.getppid()  # or a server of forks, which ends with the main process
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.2)
    os._exit(1)
