"""Ctrl-C at any time: one line, no traceback, exit code 130."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers.runs import TINY, write_recordings

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("command", ["module", "script", "library"])
def test_ctrl_c_during_the_imports(tmp_path: Path, command: str) -> None:
    (tmp_path / "torch.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)")
    (tmp_path / "byola-fast").write_text("from byola_fast.cli import main\nmain()")
    arguments = {
        "module": ["-m", "byola_fast", "doctor"],
        "script": [str(tmp_path / "byola-fast"), "doctor"],
        "library": ["-c", "import byola_fast"],  # another program, which may catch it
    }
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}"}
    done = subprocess.run([sys.executable, *arguments[command]], env=environment, stderr=subprocess.PIPE, text=True)
    if command == "library":
        assert done.returncode == -signal.SIGINT
        assert "KeyboardInterrupt" in done.stderr
    else:
        assert (done.returncode, done.stderr) == (130, "byola-fast: interrupted\n")


@pytest.mark.slow
def test_ctrl_c_while_processes_read(tmp_path: Path) -> None:
    audio, out = write_recordings(tmp_path / "audio"), tmp_path / "run"
    settings = TINY | {"out": out, "workers": 2, "stats_segments": 10**6, "batch_size": 2}
    flags = [f"--{name}={value}" for name, value in settings.items() if value is not False]
    command = [sys.executable, "-m", "byola_fast", "pretrain", str(audio), *flags]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    deadline = time.monotonic() + 60
    while not Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    _, message = process.communicate(timeout=60)
    assert process.returncode == 130
    lines = [
        line
        for line in message.splitlines()
        if line.startswith("byola-fast: ") and "skipping" not in line and "left out" not in line
    ]
    assert lines == ["byola-fast: interrupted"]
    assert "Traceback" not in message
    assert not out.exists()
