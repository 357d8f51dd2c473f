"""Every example runs on tiny data and does what its docstring says."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch
from helpers.runs import TINY, write_recordings

from byola_fast import cli
from byola_fast.audio.demo_corpus import write_demo_corpus
from examples import byol_in_fifty_lines, own_encoder, own_loop

EXAMPLES = Path(__file__).parents[2] / "examples"
DATA = {"hugging_face_datasets.py", "webdataset_shards.py"}  # tests/training/test_own_data.py runs them
CHECKED = {"own_loop.py", "byol_in_fifty_lines.py", "own_encoder.py"} | DATA


def test_every_example_fits_on_a_page_and_runs_here():
    files = {path.name: path.read_text() for path in EXAMPLES.glob("*.py")}
    assert set(files) == CHECKED
    for name, text in files.items():
        assert len(text.splitlines()) <= 80, name
        assert f"python examples/{name}" in (ast.get_docstring(ast.parse(text)) or ""), name


def test_views_in_your_own_loop(tmp_path):
    write_demo_corpus(tmp_path)
    losses = own_loop.main(str(tmp_path), steps=6, batch_size=16, feature_d=32)
    assert len(losses) == 6
    assert losses[-1] < losses[0]
    with pytest.raises(SystemExit, match=r"expected 999 \.wav files"):
        own_loop.main(str(tmp_path), batch_size=999)


@pytest.mark.slow
def test_byol_in_fifty_lines_learns():
    losses = byol_in_fifty_lines.main(steps=12, batch_size=16, feature_d=32)
    assert sum(losses[-3:]) < sum(losses[:3])


def test_your_own_encoder(tmp_path, monkeypatch, capsys):
    recordings = write_recordings(tmp_path / "audio")
    settings = {name: value for name, value in TINY.items() if name != "feature_d"} | {"unit_sec": 0.3}
    embedding = own_encoder.main(str(recordings), str(tmp_path / "run"), **settings)
    assert embedding.shape == (2, 128)
    weights = str(tmp_path / "run" / "encoder.pth")
    monkeypatch.chdir(tmp_path)
    named = ["--encoder", "examples.own_encoder:SmallNet", "--workers=0"]
    assert cli.main(["embed", weights, str(recordings / "a.wav"), "--out", "a.npz", *named]) == 0
    assert cli.main(["embed", weights, str(recordings / "a.wav"), "--out", "b.npz", "--workers=0"]) == 2
    assert "holds weights of the class examples.own_encoder:SmallNet; give that class" in capsys.readouterr().err
    assert torch.is_tensor(embedding)
