"""The weights that come with the package: what takes them, what it says, and that their card is true."""

from __future__ import annotations

import csv
import json
import shutil

import numpy as np
import pytest
import torch
from helpers.tasks import PITCHES, make_task

import byola_fast
from benchmarks.quality import ship
from benchmarks.quality.runs import AUDIOSET
from byola_fast import cli
from byola_fast.embedding.export import ExportConfig, run_export
from byola_fast.networks import encoder_file
from byola_fast.networks.checkpoint import CheckpointError
from byola_fast.networks.encoder_file import IN_THE_BOX, find_weights, names_weights


@pytest.fixture
def task(tmp_path):
    labels = [name for _ in range(8) for name in PITCHES]
    return make_task(tmp_path / "task", labels, lambda n: ("train", "train", "valid", "test")[n // 3 % 4], HEADER)


HEADER = "file_name,label,split"


def rows(path) -> np.ndarray:
    with np.load(path) as written:
        return written["embeddings"]


def test_python(caplog):
    caplog.set_level("INFO", "byola_fast")
    encoder = byola_fast.load_encoder()
    assert encoder(torch.randn(2, 16000)).shape == (2, encoder.feature_d)
    assert f"no weights given: taking those that come with byola_fast, {IN_THE_BOX}" in caplog.text


def test_embed(task, tmp_path, capsys, monkeypatch):
    clips, out = str(task.parent / "audio"), str(tmp_path / "e.npz")
    small = byola_fast.AudioNTT2020(d=32)
    (tmp_path / "run").mkdir()
    config = byola_fast.describe_encoder(small, byola_fast.LogMel())
    byola_fast.save_encoder(tmp_path / "run" / "encoder.pth", small, config=config, stats=(-7.1, 4.2))
    run, given = str(tmp_path / "run"), str(tmp_path / "run" / "encoder.pth")
    widths = {
        (clips,): 512,
        (clips + "/0.wav", clips): 512,
        (given, clips): 32,
        (run, clips): 32,
        ("--weights", given, clips): 32,
        ("--weights", run, clips, clips + "/0.wav"): 32,
    }
    for arguments, width in widths.items():
        assert cli.main(["embed", *arguments, "--out", out, "--workers=0"]) == 0
        assert rows(out).shape == (24, width)
        assert ("no weights given" in capsys.readouterr().err) == (width == 512)
    assert cli.main(["embed", given, "--out", out]) == 2
    assert "paths: expected audio files or a folder of them, got none" in capsys.readouterr().err
    assert cli.main(["embed", str(tmp_path / "typo.pth"), clips, "--out", out]) == 2
    assert "typo.pth" in capsys.readouterr().err
    assert cli.main(["embed", "--weights", run, given, clips, "--out", out]) == 2
    assert f"weights: expected one file of them, got {given} and {run}" in capsys.readouterr().err
    shutil.copy(given, clips)  # a folder alone is audio, whatever lies there
    assert cli.main(["embed", clips, "--out", out, "--workers=0"]) == 0
    assert rows(out).shape == (24, 512)


@pytest.mark.slow
def test_eval_and_export(task, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("byola_fast.evaluation.evaluate.STATS_SEGMENTS", 40)
    out = str(tmp_path / "out")
    assert cli.main(["eval", str(task), "--out", out, "--workers=0"]) == 0
    seen = capsys.readouterr()
    assert "no weights given" in seen.err
    assert f"encoder     {IN_THE_BOX}" in seen.out
    assert cli.main(["eval", "--weights", str(IN_THE_BOX), str(task), "--out", out, "--workers=0"]) == 0
    assert "no weights given" not in capsys.readouterr().err
    assert cli.main(["eval", "--weights", "a.pth", "b.pth", str(task), "--out", out]) == 2
    assert "weights: expected one file of them, got b.pth and a.pth" in capsys.readouterr().err
    assert run_export(ExportConfig(out=str(tmp_path / "e.pt2"))).stat().st_size > 1_000_000


def test_a_copy_without_them_says_so(task, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(encoder_file, "IN_THE_BOX", tmp_path / "none.safetensors")
    with pytest.raises(CheckpointError, match=r"comes without .*none\.safetensors; give some"):
        byola_fast.load_encoder()
    for command in (["embed", str(task.parent / "audio")], ["eval", str(task), "--out", str(tmp_path / "out")]):
        assert cli.main(command) == 2
        message = capsys.readouterr().err
        assert "error: no weights given, and this copy of byola_fast comes without" in message
        assert message.count("\n") == 1


def test_folders(tmp_path):
    with pytest.raises(CheckpointError, match=r"expected a file of weights, or a folder with model\.safetensors"):
        find_weights(tmp_path)
    (tmp_path / "checkpoint.pt").touch()
    assert find_weights(tmp_path) == tmp_path / "checkpoint.pt"
    (tmp_path / "encoder.pth").touch()
    assert find_weights(tmp_path) == tmp_path / "encoder.pth"
    assert names_weights(tmp_path)
    assert not names_weights(tmp_path, folders=False)


def test_the_card_and_the_list_are_of_these_weights():
    text = IN_THE_BOX.with_name("README.md").read_text(encoding="utf-8")
    encoder = byola_fast.load_encoder()
    parameters = sum(x.numel() for x in encoder.encoder.parameters())
    assert f"{type(encoder.encoder).__name__}, {encoder.feature_d}-d, {parameters:,} parameters" in text
    assert IN_THE_BOX.stat().st_size < 2.1 * parameters
    measured = json.loads((ship.RESULTS / "in_the_box.json").read_text(encoding="utf-8"))
    assert measured
    for name, scores in measured.items():
        assert f"| {name} | {' | '.join(f'{scores[task]:.1f}' for task in AUDIOSET)} |" in text
    assert "one seed" in text
    with open(IN_THE_BOX.with_name("heard.tsv"), newline="", encoding="utf-8") as file:
        packages = list(csv.DictReader(file, delimiter="\t"))
    assert len(packages) > 100
    assert all(package["version"] and package["licences"] and int(package["files"]) for package in packages)
    assert not any(package["licences"].startswith("see ") for package in packages)


def test_one_command_replaces_them(tmp_path):
    encoder = byola_fast.AudioNTT2020(d=24)
    config = byola_fast.describe_encoder(encoder, byola_fast.LogMel())
    byola_fast.save_encoder(tmp_path / "a.pth", encoder, config=config, stats=(-7.1, 4.2))
    record = json.loads((ship.RESULTS / "gpu" / "s-recon5-new-0.json").read_text())
    record["settings"]["feature_d"] = 24
    (tmp_path / "record.json").write_text(json.dumps(record))
    words = [str(tmp_path / "a.pth"), str(tmp_path / "record.json"), f"--folder={tmp_path / 'w'}"]
    assert ship.main(words) == 0
    wav = torch.randn(2, 16000)
    before, after = (byola_fast.load_encoder(tmp_path / name)(wav) for name in ("a.pth", "w/encoder.safetensors"))
    assert (before - after).norm() / before.norm() < 2e-3  # float16
    text = (tmp_path / "w" / "README.md").read_text()
    assert "AudioNTT2020, 24-d" in text
    assert "28.7 hours of 202 " in text
    assert f"| {record['curve'][-1]['mean']:.1f} |" in text
    assert len((tmp_path / "w" / "heard.tsv").read_text().splitlines()) == 203
    (tmp_path / "scores.json").write_text(json.dumps({"measured": dict.fromkeys(AUDIOSET, 12.5)}))
    assert ship.main([*words, f"--scores={tmp_path / 'scores.json'}"]) == 0
    text = (tmp_path / "w" / "README.md").read_text()
    assert "| measured | 12.5 | 12.5 | 12.5 | 12.5 | 12.5 |" in text
    assert "this encoder" not in text
    assert ship.main([*words, f"--heard={IN_THE_BOX.with_name('heard.tsv')}"]) == 0
    assert (tmp_path / "w" / "heard.tsv").read_bytes() == IN_THE_BOX.with_name("heard.tsv").read_bytes()
