"""The trainer on tiny recordings: what it writes, what it survives, and that it repeats itself."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from byola_fast import AudioNTT2020, Augment, byol
from byola_fast import pretrain as trainer
from byola_fast.audio import AudioError
from byola_fast.checkpoint import load_checkpoint, load_encoder_weights
from byola_fast.pretrain import PretrainConfig, pretrain

BROKEN = ("empty.flac", "text.wav", "headless.mp3")
TINY = {"feature_d": 16, "proj_size": 8, "proj_dim": 32, "n_memory": 16, "unit_sec": 0.25, "workers": 0}
TINY |= {"batch_size": 4, "steps": 4, "stats_segments": 8, "device": "cpu"}


def write_recordings(folder: Path) -> Path:
    """Write nine usable recordings, of five formats, several rates and channel counts, and three broken ones."""
    rng = np.random.default_rng(0)

    def noise(seconds: float, rate: int, channels: int) -> np.ndarray:
        return rng.normal(0, 0.1, (round(seconds * rate), channels)).cumsum(0).clip(-1, 1) * 0.5

    (folder / "deeper").mkdir(parents=True)
    for name, seconds, rate, channels, subtype in (
        ("a.wav", 0.6, 44100, 2, "PCM_24"),
        ("b.flac", 0.5, 22050, 1, None),
        ("c.ogg", 0.7, 48000, 2, "VORBIS"),
        ("deeper/d.opus", 0.6, 48000, 1, "OPUS"),
        ("deeper/e.mp3", 0.8, 32000, 1, None),
        ("f.wav", 0.6, 8000, 6, None),
        ("ten_ms.wav", 0.01, 16000, 1, None),
        ("silent.wav", 0.5, 16000, 1, None),
        ("truncated.wav", 1.0, 16000, 1, None),
    ):
        wav = noise(seconds, rate, channels) * (name != "silent.wav")
        with soundfile.SoundFile(
            folder / name, "w", rate, channels, subtype, format="OGG" if name.endswith("opus") else None
        ) as file:
            file.write(wav)
    data = (folder / "truncated.wav").read_bytes()
    (folder / "truncated.wav").write_bytes(data[: len(data) // 2])
    (folder / "empty.flac").touch()
    (folder / "text.wav").write_text("this is no audio")
    (folder / "headless.mp3").write_bytes(bytes(3000))
    (folder / "notes.txt").write_text("not looked at")
    return folder


@pytest.fixture(scope="module")
def recordings(tmp_path_factory):
    return write_recordings(tmp_path_factory.mktemp("audio") / "corpus")


@pytest.fixture
def run(recordings, tmp_path, monkeypatch):
    def run(name: str = "run", pictures: bool = False, **changes):
        if not pictures:  # which take longer than the training here
            monkeypatch.setattr(trainer, "draw_training", lambda *_, **__: None)
            monkeypatch.setattr(trainer, "draw_views", lambda *_, **__: None)
        return pretrain(
            PretrainConfig(**({"audio_dir": str(recordings), "out": str(tmp_path / name)} | TINY | changes))
        )

    return run


def read_log(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("preset", ["byola-v1", "byola-v2"])
def test_a_run_writes_everything_and_names_broken_files_once(run, caplog, preset):
    result = run(pictures=True, preset=preset, steps=5)
    assert (result.steps, result.interrupted) == (5, False)
    assert {path.name for path in result.out.iterdir()} == {
        *("log.jsonl", "checkpoint.pt", "encoder.pth", "training.png", "views.png"),
    }
    log = read_log(result.out)
    assert [line["step"] for line in log] == [1, 2, 3, 4, 5]
    assert [line["epoch"] for line in log] == [0, 0, 1, 1, 2]  # nine files, batches of four
    assert all(set(line) == {"step", "epoch", "loss", "collapse", "samples_per_s", "refused", "lr"} for line in log)
    assert all(0 < line["loss"] < 8 and 0.2 < line["collapse"] < 1.2 and line["refused"] == 0 for line in log)
    assert log[-1]["lr"] == {"byola-v1": 3e-4, "byola-v2": 1e-4}[preset]
    assert (result.loss, result.collapse) == (log[-1]["loss"], log[-1]["collapse"])
    skipped = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert sorted(next(name for name in BROKEN if name in line) for line in skipped) == sorted(BROKEN)


def test_what_is_written_can_be_loaded(run):
    out = run().out
    content = load_checkpoint(out / "encoder.pth")
    assert content["config"]["feature_d"] == 16
    assert content["config"]["f_max"] == 7800
    assert -16 < content["stats"][0] < 5
    assert 0.1 < content["stats"][1] < 10
    encoder = AudioNTT2020(d=16)
    load_encoder_weights(encoder, out / "encoder.pth")
    whole = load_checkpoint(out / "checkpoint.pt")
    assert torch.equal(encoder.fc[0].weight, whole["model"]["online.encoder.fc.0.weight"])
    assert whole["step"] == 4
    assert whole["config"]["preset"] == "byola-v1"
    assert whole["optimizer"]["state"][0]["step"] == 4
    aug = Augment(n_memory=16, stats=(0.0, 1.0))
    aug.load_state_dict(whole["augment"])
    assert len(aug.bank) == 16
    assert aug.rng.tolist() == [0, 4]


def test_the_same_seed_gives_the_same_losses_whatever_the_workers(run):
    losses = [
        [line["loss"] for line in read_log(run(name, steps=3, seed=seed, workers=workers).out)]
        for name, seed, workers in (("a", 1, 0), ("b", 1, 2), ("c", 2, 0))
    ]
    assert losses[0] == losses[1]
    assert losses[0] != losses[2]


def test_training_learns_and_moves_the_target(run):
    result = run(steps=25, lr=3e-3)
    log = read_log(result.out)
    assert sum(line["loss"] for line in log[-5:]) < 0.7 * sum(line["loss"] for line in log[:5])
    state = load_checkpoint(result.out / "checkpoint.pt")["model"]
    weights = state["online.encoder.fc.0.weight"], state["target.target.encoder.fc.0.weight"]
    assert not torch.equal(*weights)


def test_running_statistics_and_few_clips(run, caplog):
    caplog.set_level("INFO", logger="byola_fast")
    result = run(stats_segments=0, batch_size=16, steps=3)
    assert result.steps == 3
    text = caplog.text
    assert "9 readable files are fewer than batch_size 16: each gives 2 segments an epoch" in text
    assert all(text.count(name) == 1 for name in BROKEN)
    mean, std = load_checkpoint(result.out / "encoder.pth")["stats"]
    assert -16 < mean < 5
    assert 0.1 < std < 10


def test_epochs_end_a_run_and_lines_are_as_rare_as_asked_for(run):
    result = run(steps=None, epochs=2, log_every=3)
    assert [line["step"] for line in read_log(result.out)] == [3, 4]


def test_one_file_alone_trains(run, recordings):
    assert run(audio_dir=str(recordings / "deeper" / "d.opus"), steps=2).steps == 2


def test_an_interrupt_still_writes_the_results(run, monkeypatch):
    forward, calls = byol.BYOL.forward, []

    def interrupted(self, *views):
        calls.append(views)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return forward(self, *views)

    monkeypatch.setattr(byol.BYOL, "forward", interrupted)
    result = run(steps=10)
    assert (result.steps, result.interrupted) == (2, True)
    assert load_checkpoint(result.out / "checkpoint.pt")["step"] == 2
    assert (result.out / "encoder.pth").exists()


def test_without_matplotlib_one_line_says_so(run, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    out = run(pictures=True).out
    assert not list(out.glob("*.png"))
    assert caplog.text.count('pip install "byola_fast[eval]"') == 1
    assert (out / "encoder.pth").exists()


@pytest.mark.parametrize("stats_segments", [0, 8])
def test_all_broken_is_an_error(run, tmp_path, stats_segments):
    folder = tmp_path / "broken"
    folder.mkdir()
    for name in "abcde":
        (folder / f"{name}.wav").write_text("no audio")
    with pytest.raises(AudioError, match=r"cannot be read, nor can .* 5 files"):
        run(audio_dir=str(folder), stats_segments=stats_segments)


def test_a_loss_that_is_not_finite_stops_the_run(run):
    with pytest.raises(ValueError, match="lr: the loss became nan at step"):
        run(lr=1e30, steps=20)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"audio_dir": None}, "audio_dir"),
        ({"preset": "byola-v3"}, "preset: expected one of byola-v1, byola-v2"),
        ({"batch_size": 1}, "batch_size: expected at least 2, got 1"),
        ({"steps": 0}, "steps: expected at least 1"),
        ({"lr": -1.0}, "lr"),
        ({"ema_decay": 2.0}, "decay"),
        ({"unit_sec": 0.04}, "8 frames"),
        ({"interpolation": "nearest"}, "interpolation"),
    ],
)
def test_settings_out_of_range_are_named(run, changes, words):
    with pytest.raises(ValueError, match=words):
        run(**changes)
