"""The fused blocks in whole runs of the command line: their losses and their memory."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.runs import read_log

pytestmark = pytest.mark.slow
RUN = "import re; from byola_fast.cli import main; main(); "  # ru_maxrss would count the process that forked this one
RUN += "print(re.search(r'VmHWM:\\s*([0-9]+)', open('/proc/self/status').read())[1])"


def train(out: Path, backend: str = "", **settings: object) -> int:
    """Train on the demo's corpus on the CPU; return the peak of memory in KiB."""
    words = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    command = [sys.executable, "-c", RUN, "pretrain", "--demo", "--device", "cpu", "--workers", "0", "--out", str(out)]
    done = subprocess.run(
        [*command, *words],
        env=os.environ | {"BYOLA_FAST_BACKEND": backend},
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    return int(done.stdout.split()[-1])


def test_losses_of_fifty_steps_differ_by_rounding_from_those_of_plain_pytorch(tmp_path):
    """Training amplifies rounding: plain PyTorch's own, which one and two threads sum otherwise, is the measure."""
    losses = {}
    for name, backend, threads in (("plain", "reference", 1), ("otherwise", "reference", 2), ("ours", "", 1)):
        size = {"batch_size": 16, "feature_d": 64, "unit_sec": 0.25, "stats_segments": 32, "n_memory": 64}
        train(tmp_path / name, backend, threads=threads, steps=50, log_every=1, **size)
        losses[name] = torch.tensor([line["loss"] for line in read_log(tmp_path / name) if "loss" in line])
    assert len(losses["ours"]) == 50
    off = {name: (losses[name] / losses["plain"] - 1).abs() for name in ("otherwise", "ours")}
    assert off["ours"][0] < 1e-4
    assert off["ours"].square().mean().sqrt() <= 5 * off["otherwise"].square().mean().sqrt()


@pytest.mark.skipif(sys.platform != "linux", reason="KiB are Linux's")
def test_a_batch_of_256_takes_less_than_two_gib(tmp_path):
    peak = train(tmp_path / "run", batch_size=256, feature_d=512, steps=2, stats_segments=16, threads=1)
    assert peak < 2 * 2**20
