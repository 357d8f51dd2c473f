"""The command line: commands, one-line errors, exit codes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import fields

import pytest
from test_pretrain import TINY, write_recordings

import byola_fast
from byola_fast import cli
from byola_fast.cli import main
from byola_fast.pretrain import PretrainConfig

FLAGS = [f"--{name}={value}" for name, value in TINY.items()]


@pytest.fixture(scope="module")
def recordings(tmp_path_factory):
    return write_recordings(tmp_path_factory.mktemp("audio") / "corpus")


@pytest.fixture
def fails(capsys):
    """Run a command that must fail with exit code 2 and one line on stderr, and return the line."""

    def fails(*argv: str) -> str:
        assert main(argv) == 2
        lines = capsys.readouterr().err.splitlines()
        errors = [line for line in lines if line.startswith("byola-fast: error: ")]
        assert lines[-1:] == errors
        return errors[0]

    return fails


def test_pretrain_and_show(recordings, tmp_path, capsys):
    assert main(["pretrain", str(recordings), f"--out={tmp_path / 'run'}", *FLAGS, "--steps=2"]) == 0
    printed = capsys.readouterr()
    assert "2 steps: loss " in printed.out
    assert printed.err.count("text.wav") == 1
    assert (tmp_path / "run" / "encoder.pth").stat().st_size > 10_000
    for path in (recordings, recordings / "a.wav"):
        assert main(["show", str(path), f"--out={tmp_path / 'views.png'}", "--unit_sec=0.25", "--samples=1"]) == 0
        assert (tmp_path / "views.png").stat().st_size > 20_000
        (tmp_path / "views.png").unlink()


def test_doctor_and_version(capsys):
    assert main(["doctor"]) == 0
    assert "log_mixup_exp" in capsys.readouterr().out
    answer = subprocess.run(
        [sys.executable, "-m", "byola_fast", "--version"], capture_output=True, text=True, check=True
    )
    assert answer.stdout.strip() == f"byola-fast {byola_fast.__version__}"


def test_config_file_and_what_overrides_it(recordings, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(cli, "pretrain", lambda config: seen.append(config) or pytest.fail("stop"))
    (tmp_path / "a.yaml").write_text(f"audio_dir: {recordings}\nepochs: 7\nlr: 0.002\nsteps: 3\n")
    for argv in (
        ["--config", str(tmp_path / "a.yaml"), "--steps=5"],
        ["elsewhere", "--config", str(tmp_path / "a.yaml")],
        ["--demo"],
        ["--demo", "--steps=9"],
    ):
        with pytest.raises(pytest.fail.Exception):
            main(["pretrain", *argv])
    assert seen[0] == PretrainConfig(audio_dir=str(recordings), epochs=7, lr=0.002, steps=5)
    assert (seen[1].audio_dir, seen[1].steps) == ("elsewhere", 3)
    assert (seen[2].demo, seen[2].batch_size, seen[2].feature_d) == (True, 32, 512)
    assert (seen[3].steps, seen[3].batch_size) == (9, 32)


def test_errors_are_one_line(fails, recordings, tmp_path):
    (tmp_path / "bad.yaml").write_text("epoch: 7\n")
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "a.wav").write_text("no audio")
    out = f"--out={tmp_path / 'run'}"
    assert "No such file" in fails("show", str(tmp_path / "nowhere")) or "no such file" in fails("show", "nowhere")
    assert "nowhere" in fails("pretrain", str(tmp_path / "nowhere"), out)
    assert "cannot be read, nor can any other of 1 files" in fails("pretrain", str(broken), out, *FLAGS)
    assert "audio_dir: expected a folder" in fails("pretrain", out)
    assert "--bogus" in fails("pretrain", str(recordings), "--bogus=1")
    assert "--epoch" in fails("pretrain", str(recordings), "--epoch=1")
    assert "epochs" in fails("pretrain", str(recordings), "--epochs=many")
    assert "preset" in fails("show", str(recordings), "--preset=v3", out)
    assert "epoch" in fails("pretrain", "--config", str(tmp_path / "bad.yaml"))
    assert "missing.yaml" in fails("pretrain", "--config", str(tmp_path / "missing.yaml"))
    assert "command" in fails()
    assert "frobnicate" in fails("frobnicate")


def test_help_explains_every_flag(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["pretrain", "--help"])
    assert ended.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for field in fields(PretrainConfig):
        flag = text[text.rindex(f"--{field.name}") :]
        words = flag.split()[1:12]
        assert not words[0].startswith("(type"), f"--{field.name} has no explanation"
        assert len(words) > 3
    assert "length of a segment, in seconds" in text
    assert "rate that audio is resampled to, in Hz" in text


def test_ctrl_c_from_outside_still_writes_the_checkpoint(recordings, tmp_path):
    out = tmp_path / "run"
    flags = [*FLAGS, "--steps=100000", "--epochs=100000", "--workers=1"]
    command = [sys.executable, "-m", "byola_fast", "pretrain", str(recordings), f"--out={out}", *flags]
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        deadline = time.monotonic() + 50
        while not (out / "log.jsonl").exists() or (out / "log.jsonl").stat().st_size < 1000:
            assert time.monotonic() < deadline, "no step was logged"
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the workers too
        _, errors = process.communicate(timeout=50)
    assert process.returncode == 130
    assert "Traceback" not in errors
    assert "interrupted after" in errors
    assert byola_fast.checkpoint.load_checkpoint(out / "checkpoint.pt")["step"] > 5


@pytest.mark.parametrize(
    ("given", "taken"),
    [
        ("--batch-size", "--batch_size"),
        ("--out=my-runs/a-b", "--out=my-runs/a-b"),
        ("--batch-size=8", "--batch_size=8"),
        ("some-file", "some-file"),
        ("-h", "-h"),
        ("--", "--"),
    ],
)
def test_flags_may_be_written_with_dashes(given, taken):
    assert cli._with_underscores(given) == taken
