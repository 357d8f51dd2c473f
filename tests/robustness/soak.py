"""Does memory, or the number of files or threads, grow over many calls or a long run? Run by hand.

    python tests/robustness/soak.py calls --count 10000
    python tests/robustness/soak.py watch --minutes 30 -- byola-fast pretrain my_store/ --out runs/soak
    python tests/robustness/soak.py watch --minutes 30 --pid 1234

Memory is the resident set. The second half is compared with the first, without the warm-up.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path

EVERY_SEC = 5.0
GROWTH = 0.02  # relative growth from one half to the other that sampling alone may show


def sample(pid: int) -> dict[str, float]:
    """Return resident memory in MB, open file descriptors and threads of a process and its descendants."""
    found = {"MB": 0.0, "files": 0.0, "threads": 0.0}
    for each in [pid, *children(pid)]:
        try:
            status = dict(line.split(":", 1) for line in Path(f"/proc/{each}/status").read_text().splitlines())
            found["MB"] += int(status["VmRSS"].split()[0]) / 1024
            found["threads"] += int(status["Threads"])
            found["files"] += len(os.listdir(f"/proc/{each}/fd"))
        except (FileNotFoundError, ProcessLookupError, KeyError):
            continue  # it has just ended
    return found


def children(pid: int) -> list[int]:
    """Return all descendants of a process."""
    path = Path(f"/proc/{pid}/task/{pid}/children")
    direct = [int(word) for word in path.read_text().split()] if path.exists() else []
    return direct + [further for child in direct for further in children(child)]


def report(samples: list[dict[str, float]]) -> int:
    """Print each half's medians, without the first tenth; return 1 if something grew."""
    warm = samples[len(samples) // 10 :]
    halves = warm[: len(warm) // 2], warm[len(warm) // 2 :]
    grew = 0
    for name in samples[0]:
        first, second = (statistics.median(one[name] for one in half) for half in halves)
        flat = second <= first * (1 + GROWTH)
        grew |= not flat
        maximum, message = max(one[name] for one in warm), "flat" if flat else "GREW"
        print(f"{name:<8} {first:.1f} -> {second:.1f}  {message}  (maximum {maximum:.1f})")
    return int(grew)


def calls(count: int) -> int:
    """Make views of random shapes, dtypes and settings; report this process and its compiled kernels."""
    import torch

    import byola_fast
    from byola_fast.ops._native.build import cache_folder

    random.seed(0)
    torch.manual_seed(0)
    samples = []
    built = -1
    for number in range(count):
        batch, mels, frames = random.randint(0, 48), random.randint(1, 80), random.randint(1, 130)
        dtype = random.choice([torch.float32, torch.float16, torch.bfloat16, torch.float64])
        settings = {
            "interpolation": random.choice(["bilinear", "bicubic"]),
            "mixup": random.choice(["log", "linear", "gaussian"]),
        }
        shape = (batch, mels, frames) if random.random() < 0.5 else (batch, 1, mels, frames)
        view1, view2 = byola_fast.augment(
            torch.randn(shape).to(dtype), preset=random.choice(["byola-v1", "byola-v2"]), **settings
        )
        assert view1.shape == view2.shape == shape
        if number == 100:
            built = len(list(cache_folder().rglob("*.so")))
        if number >= 100 and number % 20 == 0:
            samples.append(sample(os.getpid()))
    print(f"{count} calls of augment, {torch.get_num_threads()} threads")
    grew = report(samples)
    now = len(list(cache_folder().rglob("*.so")))
    print(f"compiled libraries in the cache: {built} -> {now}")
    return int(grew or now != built)


def watch(pid: int, minutes: float) -> int:
    """Sample a process for some minutes, or until it ends."""
    samples, ends = [], time.monotonic() + 60 * minutes
    while time.monotonic() < ends and Path(f"/proc/{pid}").exists():
        samples.append(sample(pid))
        time.sleep(EVERY_SEC)
    samples = [one for one in samples if one["MB"]]
    print(f"{len(samples)} samples, {EVERY_SEC:g} s apart")
    return report(samples)


def main() -> int:
    parser = argparse.ArgumentParser(description="Watch memory, files and threads for growth.")
    kinds = parser.add_subparsers(dest="kind", required=True)
    many = kinds.add_parser("calls")
    many.add_argument("--count", type=int, default=10_000)
    long = kinds.add_parser("watch")
    long.add_argument("--minutes", type=float, default=30.0)
    long.add_argument("--pid", type=int)
    long.add_argument("command", nargs="*", help="after --")
    options = parser.parse_args()
    if options.kind == "calls":
        return calls(options.count)
    if options.pid is not None:
        return watch(options.pid, options.minutes)
    with subprocess.Popen(options.command) as process:
        result = watch(process.pid, options.minutes)
        process.terminate()
        return result


if __name__ == "__main__":
    sys.exit(main())
