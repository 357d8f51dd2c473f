"""Worker processes: items in order, bounded read-ahead, errors, and ends of every kind."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.layouts import threads

from byola_fast.runtime.workers import WORKER_AHEAD, num_workers, read_in_processes

LARGE = 1 << 21  # bytes: more than a socket holds


@pytest.fixture(autouse=True)
def no_process_is_left() -> Generator[None]:
    yield
    assert not multiprocessing.active_children()


def read_both(key: int) -> tuple[int, torch.Tensor, Any]:
    time.sleep(random.uniform(0, 0.01))
    return key, torch.full((3, key), key, dtype=torch.int16), np.arange(key, dtype=np.float32)


@pytest.mark.parametrize("workers", [0, 1, 2, 5])
@pytest.mark.parametrize("count", [0, 1, 3, 20])
def test_items_come_in_order(workers: int, count: int) -> None:
    keys = list(range(100, 100 + count))
    found = list(read_in_processes(read_both, keys, workers))
    assert [key for key, _tensor, _array in found] == keys
    for key, tensor, array in found:
        assert torch.equal(tensor, torch.full((3, key), key, dtype=torch.int16))
        assert np.array_equal(array, np.arange(key, dtype=np.float32))
        assert not tensor.is_shared()  # containers often have 64 MB of shared memory
        tensor += 1
        array += 1


def test_read_ahead_is_bounded(tmp_path: Path) -> None:
    def read(key: int) -> bytes:
        (tmp_path / str(key)).touch()
        return bytes(LARGE)

    reading = read_in_processes(read, range(1000), 2)
    next(reading)
    time.sleep(0.5)
    each = WORKER_AHEAD + 2  # one that is being sent, and one that is being read
    assert set(os.listdir(tmp_path)) <= set(map(str, range(2 * each + 2)))
    assert len(os.listdir(tmp_path)) >= 4
    reading.close()


@pytest.mark.parametrize("workers", [1, 2])
def test_a_worker_killed_at_any_moment_is_an_error(workers: int) -> None:
    """Also while it sends: a queue that workers share then waits forever."""
    draw = random.Random(workers)

    def read(_key: int) -> Any:
        time.sleep(0.002)
        return np.zeros(LARGE)

    for _ in range(8):
        reading = read_in_processes(read, range(1000), workers)
        next(reading)
        victim = draw.choice(multiprocessing.active_children())
        timer = threading.Timer(draw.uniform(0, 0.05), victim.kill)
        timer.start()
        with pytest.raises(ChildProcessError, match=r"was killed \(out of memory\?\): exit code -9"):
            list(reading)
        timer.join()


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_an_error_comes_through_in_its_place(workers: int) -> None:
    def read(key: int) -> int:
        if key == 5:
            raise FileNotFoundError(2, "gone", "x.wav")
        return key

    reading = read_in_processes(read, range(100), workers)
    assert [next(reading) for _ in range(5)] == list(range(5))
    with pytest.raises(FileNotFoundError) as raised:
        next(reading)
    assert (raised.value.errno, raised.value.filename) == (2, "x.wav")
    if workers and sys.version_info >= (3, 11):
        assert "in read\n" in raised.value.__notes__[0]  # its own traceback


def test_closing_does_not_wait_for_what_is_being_read() -> None:
    def read(key: int) -> int:
        time.sleep(60 * min(key, 1))
        return key

    reading = read_in_processes(read, range(100), 2)
    assert next(reading) == 0
    before = time.monotonic()
    reading.close()
    assert time.monotonic() - before < 5


def test_workers_compute_after_threads_in_the_parent() -> None:
    """A fork has its parent's OpenMP state without its threads."""

    def read(key: int) -> float:
        return float((torch.ones(300, 300) @ torch.ones(300, 300)).sum()) + key

    with threads(2):
        wanted = [read(key) for key in range(4)]
        assert list(read_in_processes(read, range(4), 2)) == wanted


def test_a_signal_to_the_group_reaches_the_main_process_alone() -> None:
    """Ctrl-C in a terminal."""
    code = (
        "import os, signal, time\n"
        "from byola_fast.runtime.workers import read_in_processes\n"
        "def read(key):\n"
        "    time.sleep(0.01)\n"
        "    return key\n"
        "seen = []\n"
        "for number in (signal.SIGINT, signal.SIGTERM):\n"
        "    signal.signal(number, lambda number, _frame: seen.append(number))\n"
        "found = []\n"
        "for key in read_in_processes(read, range(60), 2):\n"
        "    found.append(key)\n"
        "    if key in (1, 20):\n"
        "        os.killpg(0, signal.SIGINT if key == 1 else signal.SIGTERM)\n"
        "assert found == list(range(60)) and seen == [2, 15], (found, seen)"
    )
    subprocess.run([sys.executable, "-c", code], start_new_session=True, check=True, timeout=120)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["forkserver", "spawn"])
def test_other_start_methods(tmp_path: Path, method: str) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import multiprocessing, os, signal, sys\n"
        "import torch\n"
        "from byola_fast.runtime.workers import read_in_processes\n"
        "if __name__ == '__main__':\n"
        "    multiprocessing.set_start_method(sys.argv[1])\n"
        "    found = list(read_in_processes(torch.arange, range(9), 2))\n"
        "    assert [len(item) for item in found] == list(range(9))\n"
        "    reading = read_in_processes(torch.zeros, [1 << 20] * 9, 2)\n"
        "    next(reading)\n"
        "    print(*(process.pid for process in multiprocessing.active_children()), flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, str(script), method], capture_output=True, text=True, timeout=300)
    assert done.returncode == -signal.SIGKILL, done.stderr
    pids = [int(pid) for pid in done.stdout.split()]
    assert len(pids) == 2
    deadline = time.monotonic() + 30
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize("method", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_workers_die_at_once_with_a_parent_that_was_killed(tmp_path: Path, method: str) -> None:
    """Also in the middle of code that no thread of theirs can interrupt: they have their parent's locks."""
    script = tmp_path / "script.py"
    script.write_text(
        "import multiprocessing, os, re, signal, sys\n"
        "from byola_fast.runtime.workers import read_in_processes\n"
        "def read(key):\n"
        "    return key if key < 2 else re.match('(a+)+$', 'a' * 60 + 'b')  # takes years, holding the GIL\n"
        "if __name__ == '__main__':\n"
        "    multiprocessing.set_start_method(sys.argv[1])\n"
        "    reading = read_in_processes(read, range(9), 2)\n"
        "    assert [next(reading), next(reading)] == [0, 1]\n"
        "    print(*(process.pid for process in multiprocessing.active_children()), flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)"
    )
    with open(tmp_path / "pids", "w") as pids:  # no pipe, which the workers would hold open
        assert subprocess.run([sys.executable, str(script), method], stdout=pids).returncode == -signal.SIGKILL
    left, deadline = (tmp_path / "pids").read_text().split(), time.monotonic() + 5
    while left and time.monotonic() < deadline:
        left = [pid for pid in left if Path(f"/proc/{pid}/cmdline").exists() and _state(pid) != "Z"]
        time.sleep(0.05)
    for pid in left:
        os.kill(int(pid), signal.SIGKILL)
    assert not left


def _state(pid: str) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def test_num_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    assert num_workers(3) == 3
    cores: Callable[[int], range] = lambda _pid: range(1)  # noqa: E731
    monkeypatch.setattr(os, "sched_getaffinity", cores)
    assert num_workers(None) == 0
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: range(64))
    assert num_workers(None) == 8
    with pytest.raises(ValueError, match="workers: expected at least 0, got -1"):
        num_workers(-1)
