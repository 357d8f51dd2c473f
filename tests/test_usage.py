"""Errors of the command line: in one line, in words, with what was probably meant."""

from __future__ import annotations

import pytest

from byola_fast.cli import main, read_yaml


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["pretrain", "x", "--lr=fast"], "lr: expected a number or null, got fast"),
        (["pretrain", "x", "--steps=1.5"], "steps: expected a whole number or null, got 1.5"),
        (["pretrain", "x", "--freq-scale", "0.6", "1.5"], "freq_scale: expected two numbers, as [0.6,1.5], got 0.6"),
        (["pretrain", "x", "--freq-scale=[a,1]"], "freq_scale: expected a number, got a"),
        (["show", "x", "--seed=a b"], "seed: expected a whole number, got a b"),
        (["pretrain", "x", "--batch-sz=3"], "--batch_sz=3; did you mean --batch-size?"),
        (["eval", "t.csv", "--encodr", "random"], "; did you mean --encoder?"),
        (["doctor", "--verbose"], "error: unrecognized arguments: --verbose"),
        (["pretrain", "--config=nowhere.yaml"], "error: config: File does not exist:"),
        (["pretrain", "x", "--device=gpu"], "device: expected auto, cpu, cuda or cuda:N, got 'gpu'"),
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
    [(b"a: [", "not a YAML file"), (b"\xff", "not a YAML file"), (b"- a", "expected lines of 'name: value', got list")],
)
def test_files_of_settings_are_named(tmp_path, content, words, capsys):
    path = tmp_path / "a.yaml"
    path.write_bytes(content)
    assert main(["pretrain", "x", "--config", str(path)]) == 2
    assert f"error: {path}: {words}" in capsys.readouterr().err


def test_an_empty_file_holds_no_settings(tmp_path):
    (tmp_path / "a.yaml").touch()
    assert read_yaml(tmp_path / "a.yaml") == {}
