"""Reading ahead, by a thread or by worker processes. Workers ignore SIGINT and SIGTERM and die with their parent."""

from __future__ import annotations

import atexit
import copyreg
import ctypes
import logging
import multiprocessing
import os
import pickle
import signal
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from itertools import cycle
from multiprocessing.process import BaseProcess
from traceback import format_exc
from typing import BinaryIO, TypeVar

import torch
from torch import Tensor

MAX_WORKERS = 8
WORKER_AHEAD = 2  # items that a worker has ready, besides the one that it reads; 1 is up to 15 % slower
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
HAS_MASK = hasattr(signal, "pthread_sigmask")  # not on Windows
POLL_SEC = 0.2
PR_SET_PDEATHSIG = 1  # of <sys/prctl.h>

K = TypeVar("K")
T = TypeVar("T")

logger = logging.getLogger("byola_fast")
_warned: set[str] = set()
_unsent: list[str] | None = None  # in a worker: warnings that the main process has yet to log


def warn_once(message: str) -> None:
    """Log a warning, unless this process has logged it; a worker leaves that to the main process."""
    if message not in _warned:
        _warned.add(message)
        if _unsent is None:
            logger.warning("%s", message)
        else:
            _unsent.append(message)


def num_workers(asked: int | None) -> int:
    """Return the number of worker processes: the number asked for, or one fewer than the CPU cores, at most 8.

    Raises:
        ValueError: ``asked`` is below 0.
    """
    if asked is not None:
        if asked < 0:
            raise ValueError(f"workers: expected at least 0, got {asked}")
        return asked
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(MAX_WORKERS, cores - 1)


def read_in_thread(read: Callable[[K], T], keys: Iterable[K], ahead: int) -> Generator[T]:
    """Yield ``read(key)`` for every key, in order; a thread reads up to ``ahead`` items before they are asked for.

    Closing the generator ends the thread.
    """
    waiting: deque[Future[T]] = deque()
    with ThreadPoolExecutor(1, thread_name_prefix="byola_fast reader") as thread:
        try:
            for key in keys:
                waiting.append(thread.submit(read, key))
                if len(waiting) > ahead:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def read_in_processes(read: Callable[[K], T], keys: Sequence[K], workers: int) -> Generator[T]:
    """Yield ``read(key)`` for every key, in order, read ahead by worker processes; closing the generator ends them.

    Worker i reads keys i, i + workers, ... and sends the items through a socket of its own. If it is killed, even while
    it sends, its socket ends and nothing waits. (A queue shared by workers, as in ``ProcessPoolExecutor``, waits
    forever for the rest of the item.) Sockets need no shared memory. On Linux the kernel kills workers with the thread
    that asked for the first item.

    Args:
        read: called in a worker, where torch has one thread. An error that it raises is raised here.
        keys: arguments of ``read``.
        workers: number of processes; 0 reads in this one.

    Raises:
        ChildProcessError: a worker was killed. Raised when its item is asked for.
    """
    if workers == 0:
        yield from map(read, keys)
        return
    main = os.getpid()
    team: list[tuple[BaseProcess, BinaryIO]] = []

    def end() -> None:
        while team and os.getpid() == main:  # a fork of this process has a copy of the team
            process, items = team.pop()  # once: later, while Python ends, there may be no module signal
            process.kill()
            process.join()
            items.close()

    try:
        for first in range(min(workers, len(keys))):
            _start(read, keys[first::workers], team)
        atexit.register(end)  # multiprocessing would send SIGTERM and wait
        for _key, (process, items) in zip(keys, cycle(team), strict=False):
            try:
                item, error, warnings = pickle.load(items)
            except (EOFError, pickle.UnpicklingError) as cut:
                process.join()
                message = f"a process that reads audio was killed (out of memory?): exit code {process.exitcode}"
                raise ChildProcessError(message) from cut
            for warning in warnings:
                warn_once(warning)
            if error is not None:
                raise error
            yield item
    finally:
        atexit.unregister(end)
        end()


def _start(read: Callable[[K], T], keys: Sequence[K], team: list[tuple[BaseProcess, BinaryIO]]) -> None:
    """Start a worker; add it and the file that its items are read from to the team."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        process = multiprocessing.Process(target=_work, args=(read, keys, theirs, os.getpid()), daemon=True)
        with _signals_wait():  # a worker outside the team would never be ended
            process.start()
            team.append((process, ours.makefile("rb")))


@contextmanager
def _signals_wait() -> Iterator[None]:
    """Hold SIGINT and SIGTERM back while a process starts.

    The mask holds them back from the worker, until it ignores them. A signal may still reach another thread of this
    process; Python then runs its handler here, in a callback of ``os.fork`` perhaps, which drops a KeyboardInterrupt.
    """
    held: list[int] = []
    handlers = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    main = threading.current_thread() is threading.main_thread()  # no other thread may set handlers, or runs them
    for number, handler in handlers.items() if main else ():
        if handler is not None:  # else it is not Python's
            signal.signal(number, lambda number, _frame: held.append(number))
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS) if HAS_MASK else None
    try:
        yield
    finally:
        for number, handler in handlers.items() if main else ():
            if handler is not None:
                signal.signal(number, handler)
        if mask is not None:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for caught in dict.fromkeys(held):
            signal.raise_signal(caught)


def _work(read: Callable[[K], T], keys: Sequence[K], theirs: socket.socket, main: int) -> None:
    """Read and send every item, or the first error."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    if HAS_MASK:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    _die_with(main)
    global _unsent
    _unsent = []
    torch.set_num_threads(1)  # OpenMP's threads do not survive a fork
    with suppress(BrokenPipeError), theirs, theirs.makefile("wb") as items:
        try:
            for item in read_in_thread(read, keys, WORKER_AHEAD):
                _send(items, (item, None, _taken(_unsent)))
        except Exception as error:
            if hasattr(error, "add_note"):  # since Python 3.11
                error.add_note(f"in a process that reads audio:\n{format_exc()}")
            _send(items, (None, error, _taken(_unsent)))


def _taken(warnings: list[str]) -> list[str]:
    return [warnings.pop(0) for _ in range(len(warnings))]  # the reading thread may add to it meanwhile


def _die_with(main: int) -> None:
    """End this process with the main one, also in the middle of a long decode: a fork has the main one's locks."""
    prctl = getattr(ctypes.CDLL(None), "prctl", None) if sys.platform == "linux" else None
    if prctl is not None and os.getppid() == main:
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    threading.Thread(target=_exit_without, args=(main,), daemon=True).start()  # for a child of a fork server


def _exit_without(main: int) -> None:
    parent = multiprocessing.parent_process()
    if sys.platform == "win32" and parent is not None:
        parent.join()  # os.kill would end it there
        os._exit(1)
    with suppress(ProcessLookupError):
        while True:
            os.kill(main, 0)
            time.sleep(POLL_SEC)
    os._exit(1)


class _Pickler(pickle.Pickler):
    """Pickles tensors as arrays, which protocol 5 writes without a copy."""

    dispatch_table = copyreg.dispatch_table | {Tensor: lambda tensor: (torch.from_numpy, (tensor.numpy(),))}


def _send(items: BinaryIO, message: object) -> None:
    _Pickler(items, protocol=5).dump(message)
    items.flush()
