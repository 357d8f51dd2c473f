"""Encoders and learners of a user's own, on the command line and from Python, from training to evaluation."""

from __future__ import annotations

import json

import pytest
import torch
from helpers.own import Distance, Flat, Framed
from helpers.runs import TINY, read_log
from helpers.tasks import PITCHES, make_task

from byola_fast import (
    AudioNTT2020,
    Embedder,
    LogMel,
    cli,
    describe_encoder,
    load_encoder,
    make_encoder,
    make_learner,
    read_audio,
    save_encoder,
)
from byola_fast.embedding.export import export_encoder
from byola_fast.evaluation.config import EvalConfig
from byola_fast.evaluation.evaluate import run_eval
from byola_fast.networks.checkpoint import CheckpointError
from byola_fast.runtime.plugins import find_class
from byola_fast.training import pretrain as trainer
from byola_fast.training.config import PretrainConfig
from byola_fast.training.pretrain import pretrain


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    """Drawing takes longer than the training here."""
    monkeypatch.setattr(trainer, "draw_training", lambda *_, **__: None)
    monkeypatch.setattr(trainer, "draw_views", lambda *_, **__: None)


def config(recordings, out, **changes):
    return PretrainConfig(**{"audio_dir": str(recordings), "out": str(out)} | TINY | changes)


@pytest.mark.parametrize(("name", "kind"), [("helpers.own:Flat", Flat), ("helpers.own:Framed", Framed)])
def test_your_own_encoder_trains_resumes_loads_and_embeds(recordings, tmp_path, name, kind):
    result = pretrain(config(recordings, tmp_path / "run", encoder=name, feature_d=None, steps=2))
    assert result.steps == 2
    assert pretrain(config(recordings, tmp_path / "run", encoder=name, feature_d=None, steps=3)).steps == 3
    for file in ("encoder.pth", "checkpoint.pt"):
        path = tmp_path / "run" / file
        with pytest.raises(CheckpointError, match=f"holds weights of the class {name}; give that class as encoder="):
            load_encoder(path)
        by_class, by_name = load_encoder(path, encoder=kind), load_encoder(path, encoder=name)
        into = load_encoder(path, encoder=kind(64, 12))
        wav = torch.randn(3, 16000)
        assert by_class.feature_d == 12
        assert by_class(wav).shape == (3, 12)
        assert torch.equal(by_class(wav), by_name(wav))
        assert torch.equal(by_class(wav), into(wav))
        if kind is Framed:
            frames, times = by_class(wav, frames=True)
            assert frames.shape == (3, 50, 12)
            assert times[1] - times[0] == 20
        else:
            with pytest.raises(ValueError, match="frames: Flat has no forward_frames and frame_stride"):
                by_class(wav, frames=True)
        with pytest.raises(CheckpointError, match="not the weights of this AudioNTT2020"):
            load_encoder(path, encoder="AudioNTT2020")


def test_long_files_of_an_encoder_without_frames_are_embedded_whole(recordings, tmp_path):
    from byola_fast.embedding.streaming import embed_clips

    embedder = Embedder(Flat(), stats=(-7.0, 4.0)).eval()
    files = [recordings / "a.wav", recordings / "b.flac"]
    pieces = list(embed_clips(embedder, files, batch_sec=0.2, workers=0))
    for piece in pieces:
        with torch.no_grad():
            whole = embedder(read_audio(files[piece.number]))
        torch.testing.assert_close(piece.rows[0], whole)
    assert sorted(piece.number for piece in pieces if piece.last) == [0, 1]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"encoder": "helpers.own:WrongShape"},
            r"encoder: expected embeddings of shape \(2, 16\) for .*, got \(2, 15\)",
        ),
        ({"encoder": "helpers.own:Failing"}, r"encoder: fails on an input \(2, 1, 64, 26\)"),
        ({"encoder": "helpers.own:Nameless"}, "feature_d"),
        ({"encoder": "helpers.own:None_such"}, "cannot be imported: module 'helpers.own' has no attribute"),
        ({"encoder": "helpers.none:Flat"}, "cannot be imported: No module named 'helpers.none'"),
        ({"encoder": "helpers.own:torch"}, "expected a class"),
        ({"encoder": "VGG"}, "encoder: expected one of .* or 'package.module:Class', got 'VGG'"),
        ({"objective": "helpers.own:Barren"}, "objective: expected a subclass of byola_fast.Learner, got Barren"),
        ({"objective": "helpers.own:Distance", "queue_size": 3}, "queue_size: objective .* has no use for it"),
    ],
)
def test_what_does_not_fit_costs_no_hours(recordings, tmp_path, changes, words):
    with pytest.raises(ValueError, match=words):
        pretrain(config(recordings, tmp_path / "run", **changes))
    assert not (tmp_path / "run" / "checkpoint.pt").exists()


def test_your_own_learner_gets_two_segments_and_its_settings(recordings, tmp_path):
    result = pretrain(config(recordings, tmp_path / "run", objective="helpers.own:Distance", steps=3))
    assert result.steps == len(read_log(tmp_path / "run")) == 3
    learner = make_learner(Distance, AudioNTT2020(d=16), proj_size=4, ema_decay=0.5)
    assert learner.online.projector[-1].out_features == 4


def test_from_the_command_line_to_an_evaluation(recordings, tmp_path, monkeypatch):
    labels = [name for _ in range(4) for name in PITCHES]
    task = make_task(
        tmp_path / "task", labels, lambda n: ("train", "train", "valid", "test")[n // 3], "file_name,label,split"
    )
    save_encoder(tmp_path / "own.pth", flat := Flat(), config=describe_encoder(flat, LogMel()), stats=(-7.0, 4.0))
    settings = {"task": str(task), "out": str(tmp_path / "out"), "workers": 0, "encoder": "helpers.own:Flat"}
    trained = run_eval(EvalConfig(weights=str(tmp_path / "own.pth"), **settings))
    assert 0 <= trained.score <= 1
    assert "Flat, 12-d" in trained.report
    assert 0 <= run_eval(EvalConfig(features="random", seeds=1, feature_d=5, **settings)).score <= 1
    path = export_encoder(load_encoder(tmp_path / "own.pth", encoder=Flat), tmp_path / "own.pt2")
    wav = torch.randn(2, 4000)
    exported = torch.export.load(path).module()(wav)
    torch.testing.assert_close(exported, load_encoder(tmp_path / "own.pth", encoder=Flat)(wav), rtol=1e-5, atol=1e-5)


def test_a_class_in_the_current_folder_is_found(tmp_path, monkeypatch):
    (tmp_path / "mine_alone.py").write_text("from helpers.own import Flat\nclass Mine(Flat):\n    pass\n")
    monkeypatch.chdir(tmp_path)
    assert make_encoder("mine_alone:Mine", feature_d=3).feature_d == 3
    assert find_class("encoder", "mine_alone:Mine", {}).__name__ == "Mine"


def test_old_spellings_warn_and_hold(recordings, tmp_path, monkeypatch, caplog, capsys):
    seen = []
    monkeypatch.setattr(cli, "pretrain", lambda config: seen.append(config) or pytest.fail("stop"))
    with pytest.raises(pytest.fail.Exception):
        cli.main(["pretrain", str(recordings), "--precision", "bf16"])
    assert seen[0].dtype == "bfloat16"
    assert "--precision bf16 is now called --dtype bfloat16" in capsys.readouterr().err
    (tmp_path / "old.yaml").write_text("precision: bf16\nbatch_size: 8\n")
    with pytest.raises(pytest.fail.Exception):
        cli.main(["pretrain", str(recordings), f"--config={tmp_path / 'old.yaml'}"])
    assert (seen[1].dtype, seen[1].batch_size) == ("bfloat16", 8)
    monkeypatch.setattr(cli, "run_eval", lambda config: seen.append(config) or pytest.fail("stop"))
    with pytest.raises(pytest.fail.Exception):
        cli.main(["eval", "task.csv", "--encoder", "random", "--network=AudioNTT2022"])
    assert (seen[2].features, seen[2].encoder) == ("random", "AudioNTT2022")
    with pytest.raises(pytest.fail.Exception):
        cli.main(["eval", "w.pth", "task.csv", "--encoder", "helpers.own:Flat"])
    assert (seen[3].features, seen[3].encoder) == ("trained", "helpers.own:Flat")


def test_runs_and_logs_of_version_0_1_resume(recordings, tmp_path):
    pretrain(config(recordings, tmp_path / "run", steps=2))
    log, checkpoint = tmp_path / "run" / "log.jsonl", tmp_path / "run" / "checkpoint.pt"
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    old = [{"collapse" if name == "spread" else name: value for name, value in line.items()} for line in lines]
    log.write_text("".join(json.dumps(line) + "\n" for line in old))
    content = torch.load(checkpoint, weights_only=True)
    content["config"]["precision"] = content["config"].pop("dtype")
    torch.save(content, checkpoint)
    assert pretrain(config(recordings, tmp_path / "run", steps=3)).steps == 3
    assert [line["spread"] for line in read_log(tmp_path / "run")][:2] == [line["spread"] for line in lines]
