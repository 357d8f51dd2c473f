"""Several processes on one machine, started as by torchrun."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import socket
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

context = multiprocessing.get_context("forkserver")  # torch is imported once; no thread or GPU is inherited
context.set_forkserver_preload(
    ["byola_fast.training.pretrain", "torchaudio", "soundfile", "soxr", "rich.progress", "torch._dynamo"]
)


def start(count: int, out: Path, function: Callable[..., Any], *args: Any) -> list[Any]:
    """Start processes that call a function of a module, with torchrun's variables set; ``finish`` ends them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = []
    for rank in range(count):
        environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count}
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        process = context.Process(target=_run, args=(environment, out / f"rank{rank}", function, args))
        process.start()
        processes.append(process)
    return processes


def finish(processes: list[Any], seconds: float = 120.0) -> list[int | None]:
    """Wait for processes and return their exit codes; None for one that had to be killed."""
    for process in processes:
        process.join(seconds)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
        process.join()
    return codes


def run(count: int, out: Path, function: Callable[..., Any], *args: Any) -> list[Any]:
    """Call a function in several processes and return the result of each."""
    out.mkdir(parents=True, exist_ok=True)
    codes = finish(start(count, out, function, *args))
    assert codes == [0] * count, [(out / f"rank{rank}.err").read_text() for rank in range(count)]
    return [pickle.loads((out / f"rank{rank}").read_bytes()) for rank in range(count)]


def _run(environment: dict[str, Any], out: Path, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    os.environ.update({name: str(value) for name, value in environment.items()})
    torch.set_num_threads(1)
    warnings.simplefilter("error", FutureWarning)  # torch deprecates parts of torch.distributed
    with open(f"{out}.err", "w", buffering=1) as sys.stderr:
        try:
            out.write_bytes(pickle.dumps(function(*args)))
        except BaseException:
            traceback.print_exc()
            raise
        finally:
            sys.stderr = sys.__stderr__
