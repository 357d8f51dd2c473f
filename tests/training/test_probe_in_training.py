"""The probe of a run: which clips it may see, what it leaves, and that it changes nothing else."""

from __future__ import annotations

import pytest
import torch
from helpers.runs import TINY, read_log, same_run
from helpers.tasks import PITCHES, make_task

from byola_fast import LogMel, PretrainConfig, make_encoder, pretrain
from byola_fast.embedding import streaming
from byola_fast.evaluation.tasks import TaskError, read_task
from byola_fast.networks.checkpoint import load_checkpoint
from byola_fast.training import pretrain as trainer
from byola_fast.training import probe as module
from byola_fast.training.probe import Probe

LABELS = [name for _ in range(8) for name in PITCHES]
HEADERS = {"split": "file_name,label,split", "fold": "file_name,label,fold"}
PARTS = {
    "valid": ("split", lambda n: ("train", "train", "valid", "test")[n // 6]),
    "no valid": ("split", lambda n: ("train", "train", "train", "test")[n // 6]),
    "folds": ("fold", lambda n: 1 + n // 6),
}


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    monkeypatch.setattr(trainer, "draw_training", lambda *_, **__: None)
    monkeypatch.setattr(trainer, "draw_views", lambda *_, **__: None)


@pytest.fixture(params=PARTS)
def task(request, tmp_path):
    kind, part_of = PARTS[request.param]
    return make_task(tmp_path / "task", LABELS, part_of, HEADERS[kind]), request.param


def test_test_clips_are_never_read(task):
    path, kind = task
    probe = Probe(path, 5, workers=0)
    whole = read_task(path)[0]
    test = {name for name, split in zip(whole.file_names, whole.splits, strict=True) if split == "test"}
    assert len(test) == (0 if kind == "folds" else 6)
    assert not test & {file.name for file in probe.files}
    split_of = dict(zip(whole.file_names, whole.splits, strict=True))
    parts = [{split_of[probe.task.file_names[number]] for number in numbers} for numbers in probe.plan]
    learnt, scored = {
        "valid": ({"train"}, {"valid"}),
        "no valid": ({"train"}, {"train"}),
        "folds": ({"2", "3", "4"}, {"1"}),
    }[kind]
    assert parts[0] | parts[1] == learnt
    assert parts[2] == scored
    numbers = [number for part in probe.plan for number in part]
    assert len(numbers) == len(set(numbers))
    torch.manual_seed(0)
    before = torch.get_rng_state()
    encoder = make_encoder("AudioNTT2020", feature_d=32).train()
    after = torch.get_rng_state()
    assert 0.3 < probe(encoder, (-7.0, 4.0), LogMel()) <= 1
    assert encoder.training
    assert torch.equal(torch.get_rng_state(), after)
    assert not torch.equal(before, after)


def settings(recordings, out, **changes):
    return PretrainConfig(**TINY | {"audio_dir": str(recordings), "out": str(out), "steps": 6} | changes)


def test_a_run_logs_scores_keeps_the_best_and_trains_as_without(recordings, tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO", logger="byola_fast")
    task = str(make_task(tmp_path / "task", LABELS, PARTS["valid"][1], HEADERS["split"]))
    scores = iter([0.5, 0.9, 0.7])
    monkeypatch.setattr(Probe, "__call__", lambda *_: next(scores))
    asked = {"probe": task, "probe_every": 2, "log_every": 3}
    pretrain(settings(recordings, tmp_path / "whole", **asked))
    log = read_log(tmp_path / "whole")
    assert [(line["step"], line.get("probe")) for line in log] == [(2, 0.5), (3, None), (4, 0.9), (6, 0.7)]
    best, last = (load_checkpoint(tmp_path / "whole" / name) for name in ("encoder-best.pth", "encoder.pth"))
    assert not torch.equal(best["state_dict"]["fc.0.weight"], last["state_dict"]["fc.0.weight"])
    assert [each["config"]["provenance"]["step"] for each in (best, last)] == [4, 6]
    assert "best score of the probe: 90.0 %, at step 4" in caplog.text
    assert load_checkpoint(tmp_path / "whole" / "checkpoint.pt")["best"] == (4, 0.9)
    pretrain(settings(recordings, tmp_path / "without"))
    weights = [load_checkpoint(tmp_path / name / "encoder.pth")["state_dict"] for name in ("whole", "without")]
    assert all(torch.equal(x, weights[1][name]) for name, x in weights[0].items())


def test_a_run_with_a_probe_resumes_bit_for_bit(recordings, tmp_path):
    task = str(make_task(tmp_path / "task", LABELS, PARTS["folds"][1], HEADERS["fold"]))
    asked = {"probe": task, "probe_every": 2}
    pretrain(settings(recordings, tmp_path / "whole", **asked))
    for steps in (4, 6):
        pretrain(settings(recordings, tmp_path / "parts", **asked | {"steps": steps}))
    same_run(tmp_path / "whole", tmp_path / "parts")
    assert all("probe" in line for line in read_log(tmp_path / "whole")[1::2])
    best = [load_checkpoint(tmp_path / name / "encoder-best.pth")["state_dict"] for name in ("whole", "parts")]
    assert all(torch.equal(x, best[1][name]) for name, x in best[0].items())


def test_a_score_that_fails_ends_no_run(recordings, tmp_path, monkeypatch, caplog):
    task = make_task(tmp_path / "task", LABELS, PARTS["valid"][1], HEADERS["split"])
    assert module.embed_clips is streaming.embed_clips
    monkeypatch.setattr(module, "embed_clips", lambda *_, **__: 1 / 0)
    assert pretrain(settings(recordings, tmp_path / "run", probe=str(task), steps=2)).steps == 2
    assert "no score of the probe: ZeroDivisionError: division by zero" in caplog.text
    assert not (tmp_path / "run" / "encoder-best.pth").exists()


def test_a_faulty_task_costs_no_training(recordings, tmp_path):
    task = make_task(tmp_path / "task", LABELS, PARTS["valid"][1], HEADERS["split"])
    (tmp_path / "task" / "audio" / "3.wav").unlink()
    with pytest.raises(TaskError, match=r"1 of 18 clips missing, first .*3\.wav"):
        pretrain(settings(recordings, tmp_path / "run", probe=str(task)))
    with pytest.raises(FileNotFoundError):
        pretrain(settings(recordings, tmp_path / "run", probe=str(tmp_path / "none.csv")))
    with pytest.raises(ValueError, match="probe_every: expected at least 1, got 0"):
        pretrain(settings(recordings, tmp_path / "run", probe=str(task), probe_every=0))
    assert not (tmp_path / "run").exists()
