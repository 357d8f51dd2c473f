"""Errors of the command line: in one line, in words, with what was probably meant."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import soundfile
import torch

from byola_fast import cli
from byola_fast.cli import main, read_yaml


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["pretrain", "x", "--lr=fast"], "lr: expected a number or null, got fast"),
        (["pretrain", "x", "--steps=1.5"], "steps: expected a whole number or null, got 1.5"),
        (["pretrain", "x", "--freq-scale", "0.6", "1.5"], "freq_scale: expected two numbers, as 0.6,1.5, got 0.6"),
        (["pretrain", "x", "--local-size", "64,a"], "local_size: expected a whole number or null, got a\n"),
        (["pretrain", "x", "--freq-scale=[a,1]"], "freq_scale: expected a number, got a"),
        (["show", "x", "--seed=a b"], "seed: expected a whole number, got a b"),
        (["pretrain", "x", "--batch-sz=3"], "--batch_sz=3; did you mean --batch-size?"),
        (["eval", "t.csv", "--encodr", "random"], "; did you mean --encoder?"),
        (["doctor", "--verbose"], "error: unrecognized arguments: --verbose"),
        (["pretrain", "--config=nowhere.yaml"], "error: config: File does not exist:"),
        (["pretrain", "x", "--device=gpu"], "device: expected auto, cpu, cuda, cuda:N or mps, got 'gpu'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_errors_say_what_was_given_and_what_is_wanted(argv, words, capsys):
    assert main(argv) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert words in message
    assert "class '" not in message
    assert "Parser" not in message


def test_no_command_shows_all(capsys):
    assert main([]) == 2
    assert "pretrain --demo" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"a: [", "not a YAML file"),
        (b"\xff", "not a YAML file"),
        (b"- a", "expected lines of 'name: value', got list"),
        (b"lr: 1\nseed: 2\nlr: 3", "expected each name once, got lr more"),
    ],
)
def test_files_of_settings_are_named(tmp_path, content, words, capsys):
    path = tmp_path / "a.yaml"
    path.write_bytes(content)
    assert main(["pretrain", "x", "--config", str(path)]) == 2
    assert f"error: {path}: {words}" in capsys.readouterr().err


def test_an_empty_file_holds_no_settings(tmp_path):
    (tmp_path / "a.yaml").touch()
    assert read_yaml(tmp_path / "a.yaml") == {}


@pytest.mark.parametrize("name", ["#1.json", "~"])
def test_names_that_yaml_takes_for_nothing(tmp_path, name, monkeypatch):
    monkeypatch.chdir(tmp_path)
    soundfile.write("a.wav", 0.1 * torch.randn(16000).numpy(), 16000)
    for flags in ([f"--out={name}"], ["--out", name]):
        assert main(["stats", "a.wav", "--segments", "1", "--workers", "0", *flags]) == 0
        (tmp_path / name).unlink()


ABSURD = [
    ["stats", "a.wav", "--unit-sec", "1e300"],
    ["stats", "a.wav", "--unit-sec", ".inf"],
    ["stats", "a.wav", "--n-fft", "9223372036854775807"],
    ["stats", "a.wav", "--hop-length", "99999999999999999999"],
    ["show", "a.wav", "--unit-sec", "1e300"],
    ["show", "a.wav", "--sample-rate", "99999999999999999999"],
    ["eval", "--features", "melstats", "t.csv", "--pad-sec", "1e300"],
]


@pytest.mark.parametrize("argv", ABSURD, ids=" ".join)
def test_settings_out_of_all_proportion_are_named(tmp_path, argv, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    soundfile.write("a.wav", 0.1 * torch.randn(16000).numpy(), 16000)
    Path("t.csv").write_text("file_name,label,split\na.wav,x,train\nb.wav,y,test\n")
    assert main(argv) == 2
    assert f"error: {argv[-2][2:].replace('-', '_')}: expected" in capsys.readouterr().err.splitlines()[-1]


def test_too_little_memory_is_an_error_of_one_line(monkeypatch, capsys):
    def fail(_config):
        torch.empty(1 << 60, dtype=torch.uint8)

    monkeypatch.setattr(cli, "run_stats", fail)
    assert main(["stats", "x"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("byola-fast: error: out of memory")


def test_a_log_on_a_full_disk_ends_no_run(tmp_path):
    soundfile.write(tmp_path / "a.wav", 0.1 * torch.randn(16000).numpy(), 16000)
    command = [sys.executable, "-m", "byola_fast", "stats", str(tmp_path / "a.wav"), "--segments=1", "--workers=0"]
    with open("/dev/full", "w") as full:
        assert "mean" in subprocess.run(command, stdout=subprocess.PIPE, stderr=full, text=True, check=True).stdout
