"""The command line: commands, one-line errors, exit codes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path

import pytest
import yaml
from helpers.runs import TINY, write_recordings

import byola_fast
from byola_fast import cli
from byola_fast.cli import main
from byola_fast.training import pretrain as trainer
from byola_fast.training.config import PretrainConfig
from byola_fast.training.published import from_published

FLAGS = [f"--{name}={value}" if value is not False else f"--no-{name}" for name, value in TINY.items()]


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


@pytest.fixture
def no_pictures(monkeypatch):
    monkeypatch.setattr(trainer, "draw_training", lambda *_, **__: None)
    monkeypatch.setattr(trainer, "draw_views", lambda *_, **__: None)


@pytest.mark.slow
def test_pretrain_and_show(recordings, tmp_path, capsys):
    assert main(["pretrain", str(recordings), f"--out={tmp_path / 'run'}", *FLAGS, "--steps=3"]) == 0
    printed = capsys.readouterr()
    assert "3 steps: loss " in printed.out
    assert printed.err.count("text.wav") == 1
    assert (tmp_path / "run" / "encoder.pth").stat().st_size > 10_000
    for path in (recordings, recordings / "a.wav"):
        assert main(["show", str(path), f"--out={tmp_path / 'views.png'}", "--unit_sec=0.25", "--samples=1"]) == 0
        assert (tmp_path / "views.png").stat().st_size > 20_000
        (tmp_path / "views.png").unlink()


@pytest.mark.slow
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
    (tmp_path / "torn.yaml").write_text("epochs: [\n")
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "a.wav").write_text("no audio")
    out = f"--out={tmp_path / 'run'}"
    assert "No such file" in fails("show", str(tmp_path / "nowhere")) or "no such file" in fails("show", "nowhere")
    assert "nowhere" in fails("pretrain", str(tmp_path / "nowhere"), out)
    assert "a.wav: not audio that can be decoded" in fails("pretrain", str(broken), out, *FLAGS)
    assert fails("show", str(broken), "--unit-sec=0.001").count("unit_sec") == 1
    assert "audio_dir: expected a folder" in fails("pretrain", out)
    both = "audio_dir: expected the argument or the option, got both"
    assert both in fails("pretrain", str(recordings), "--audio-dir", str(broken), out)
    assert "demo: expected none beside audio_dir" in fails("pretrain", str(recordings), "--demo", out)
    assert "--bogus" in fails("pretrain", str(recordings), "--bogus=1")
    assert "--epoch" in fails("pretrain", str(recordings), "--epoch=1")
    assert "epochs" in fails("pretrain", str(recordings), "--epochs=many")
    assert "preset" in fails("show", str(recordings), "--preset=v3", out)
    assert "epoch" in fails("pretrain", "--config", str(tmp_path / "bad.yaml"))
    assert "torn.yaml: not a YAML file" in fails("pretrain", "--config", str(tmp_path / "torn.yaml"))
    assert "missing.yaml" in fails("pretrain", "--config", str(tmp_path / "missing.yaml"))
    assert "frobnicate" in fails("frobnicate")
    assert "unit_sec: expected" in fails("show", str(recordings), "--unit-sec=1e11", f"--out={tmp_path / 'a.png'}")


def test_pack_stats_and_a_run_on_what_they_wrote(recordings, tmp_path, capsys, no_pictures):
    store, stats = str(tmp_path / "store"), str(tmp_path / "stats.json")
    assert main(["pack", str(recordings), store, "--workers=0"]) == 0
    assert f"{store}: 12 files" in capsys.readouterr().out
    assert main(["pack", str(recordings), store, "--workers=0"]) == 0
    assert "unchanged since it was packed" in capsys.readouterr().out
    assert main(["stats", store, f"--out={stats}", "--segments=8", "--unit-sec=0.25", "--workers=0"]) == 0
    assert "(of 8 segments)" in capsys.readouterr().out
    out = f"--out={tmp_path / 'run'}"
    assert main(["pretrain", store, out, *FLAGS, "--steps=1", f"--stats={stats}"]) == 0


def test_settings_of_a_run_continue_it(recordings, tmp_path, fails, capsys, no_pictures):
    out = tmp_path / "run"
    assert main(["pretrain", str(recordings), f"--out={out}", *FLAGS, "--steps=1"]) == 0
    assert main(["pretrain", f"--config={out / 'config.yaml'}", "--steps=2", "--resume"]) == 0
    assert "resuming at step 1 of 2" in capsys.readouterr().err
    assert "other settings (seed: 0 there, 3 now)" in fails("pretrain", f"--config={out / 'config.yaml'}", "--seed=3")


PUBLISHED = {
    "shape": [64, 26],
    "sample_rate": 16000,
    "n_fft": 1024,
    "win_length": 1024,
    "hop_length": 160,
    "n_mels": 64,
}
PUBLISHED |= {"f_min": 60, "f_max": 7800, "feature_d": 2048, "bs": 128, "epochs": 10, "ema_decay": 0.98, "lr": 0.0005}
PUBLISHED |= {"seed": 42, "proj_size": 256, "proj_dim": 4096, "num_workers": 3, "resume": None}


def test_published_keys_are_taken_and_printed(recordings, tmp_path, capsys, fails):
    path = tmp_path / "published.yaml"
    path.write_text(yaml.safe_dump(PUBLISHED))
    with pytest.raises(SystemExit) as ended:
        main(["pretrain", str(recordings), "--config", str(path), "--steps=3", "--print_config"])
    assert ended.value.code == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert (printed["batch_size"], printed["workers"], printed["unit_sec"]) == (128, 3, 0.25)
    assert (printed["lr"], printed["ema_decay"], printed["seed"], printed["steps"]) == (0.0005, 0.98, 42, 3)
    again = tmp_path / "again.yaml"
    again.write_text(yaml.safe_dump(printed))
    with pytest.raises(SystemExit):
        main(["pretrain", "--config", str(again), "--print_config"])
    place = {"AUDIO_DIR": [], "audio_dir": str(recordings)}
    assert yaml.safe_load(capsys.readouterr().out) == printed | place

    for key, value, words in (
        ("tau", 0.99, "tau: not a setting; byola-fast pretrain --help lists all"),
        ("batchsize", 9, "batchsize: not a setting; like it are batch_size; "),
        ("shape", [64], "shape: expected [mels, frames], got [64]"),
        ("batch_size", 64, "expected one value of batch_size"),
        ("n_mels", 128, "shape: expected [n_mels, frames]"),
        ("unit_sec", 0.95, "expected the 96 frames of unit_sec 0.95"),
    ):
        path.write_text(yaml.safe_dump(PUBLISHED | {key: value}))
        assert words in fails("pretrain", str(recordings), f"--config={path}")


def test_names_of_both_kinds_agree():
    assert from_published({"bs": 8, "batch_size": 8}) == {"batch_size": 8}
    assert from_published({"shape": [64, 96], "unit_sec": 0.95}) == {"unit_sec": 0.95, "n_mels": 64}
    assert from_published({"resume": None}) == {"resume": False}


def test_help_explains_every_flag(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["pretrain", "--help"])
    assert ended.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for field in fields(PretrainConfig):
        flag = text[text.rindex(f"--{field.name}" + (", --no_" if field.type == "bool" else " ")) :]
        words = [word for word in flag.split()[1:14] if not word.startswith(("--no_", "{"))]
        assert not words[0].startswith("(type"), f"--{field.name} has no explanation"
        assert len(words) > 3
    assert "length of a segment, in seconds" in text
    assert "rate that audio is resampled to, in Hz" in text


@pytest.mark.slow
def test_ctrl_c_from_outside_still_writes_the_checkpoint(recordings, tmp_path):
    out = tmp_path / "run"
    flags = [*FLAGS, "--steps=100000", "--epochs=100000", "--workers=1"]
    command = [sys.executable, "-m", "byola_fast", "pretrain", str(recordings), f"--out={out}", *flags]
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        deadline = time.monotonic() + 50
        while not (out / "log.jsonl").exists() or (out / "log.jsonl").read_text().count('"loss"') < 7:
            assert time.monotonic() < deadline, "no step was logged"
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the workers too
        _, errors = process.communicate(timeout=50)
    assert process.returncode == 130
    assert "Traceback" not in errors
    message = [errors.index(words) for words in ("stopping after this step", "stopped by a signal after step")]
    assert message == sorted(message)
    assert errors.count("stopping after this step") == 1
    assert byola_fast.networks.checkpoint.load_checkpoint(out / "checkpoint.pt")["step"] > 5


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


@pytest.mark.parametrize(
    ("given", "options", "others"),
    [
        ("eval W --seeds 1 T.csv", ["--seeds=1"], ["W", "T.csv"]),
        ("eval --keep-going W --seeds=1 T.csv", ["--keep_going", "--seeds=1"], ["W", "T.csv"]),
        ("embed W --out x.npz a.wav b.wav", ["--out=x.npz"], ["W", "a.wav", "b.wav"]),
        ("embed W a.wav --frames b.wav --workers 0", ["--frames", "--workers=0"], ["W", "a.wav", "b.wav"]),
        ("embed W --frames -- --a-b.wav -c.wav", ["--frames"], ["W", "--a-b.wav", "-c.wav"]),
        ("export --out x.onnx W", ["--out=x.onnx"], ["W"]),
        ("pack D --workers 2 OUT", ["--workers=2"], ["D", "OUT"]),
        ("stats --n-mels 32 D", ["--n_mels=32"], ["D"]),
        ("show --seed 3 D --out v.png", ["--seed=3", "--out=v.png"], ["D"]),
        ("pretrain --config c.yaml D --lr 1e-3", ["--config=c.yaml", "--lr=1e-3"], ["D"]),
        ("pretrain --demo --steps 3", ["--demo", "--steps=3"], []),
        ("eval W T.csv --out --seeds 1", ["--out", "--seeds=1"], ["W", "T.csv"]),  # --out lacks its value
    ],
)
def test_options_stand_anywhere(given, options, others):
    assert cli._split(given.split()) == (options, others)


def test_options_between_arguments_reach_the_command(monkeypatch):
    seen = []
    for name in ("run_eval", "run_embed", "run_pack"):
        monkeypatch.setattr(cli, name, lambda config: seen.append(config) or pytest.fail("stop"))
    for given in ("eval W --seeds 1 T.csv", "embed W.pth --out x.npz a.wav -- --b.wav", "pack D --workers 2 OUT"):
        with pytest.raises(pytest.fail.Exception):
            main(given.split())
    assert (seen[0].weights, seen[0].task, seen[0].seeds) == ("W", "T.csv", 1)
    assert (seen[1].paths, seen[1].out) == (["a.wav", "--b.wav"], "x.npz")
    assert (seen[2].audio_dir, seen[2].out, seen[2].workers) == ("D", "OUT", 2)


def test_arguments_are_named_as_they_are_given(fails):
    assert fails("embed").endswith("the following arguments are required: PATHS")
    assert fails("eval", "W", "T.csv", "U.csv").endswith("unrecognized arguments: U.csv")
    assert fails("doctor", "x").endswith("unrecognized arguments: x")
    assert "argument --out: expected one argument" in fails("eval", "T.csv", "--features=random", "--out")


@pytest.mark.parametrize("command", ["doctor", "pretrain --help"])
def test_a_reader_that_has_left_is_no_error(command):
    reader, writer = os.pipe()
    os.close(reader)
    ran = subprocess.run(
        [sys.executable, "-m", "byola_fast", *command.split()], stdout=writer, stderr=subprocess.PIPE, text=True
    )
    os.close(writer)
    assert (ran.returncode, ran.stderr) == (0, "")


def test_names_that_are_not_utf8_are_printed(monkeypatch, capsys):
    monkeypatch.setattr(cli, "show", lambda *_, **__: Path("/x/a\udcff.png"))
    assert main(["show", "x"]) == 0
    assert capsys.readouterr().out == "/x/a\\udcff.png\n"
