"""Every example runs on tiny data and does what its docstring says."""

from __future__ import annotations

import ast
import base64
import io
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from helpers.runs import TINY, write_recordings
from helpers.tasks import PITCHES, make_task

import byola_fast
from byola_fast import cli
from byola_fast.audio.demo_corpus import write_demo_corpus
from examples import (
    atst_views,
    byol_in_fifty_lines,
    dataset_transforms,
    event_detection,
    fine_tune,
    lightning_module,
    multi_crop,
    own_encoder,
    own_loop,
    similar_sounds,
    sound_map,
)

EXAMPLES = Path(__file__).parents[2] / "examples"
CHECKED = {"own_loop.py", "byol_in_fifty_lines.py", "own_encoder.py"}
CHECKED |= {"atst_views.py", "dataset_transforms.py", "lightning_module.py", "multi_crop.py"}
CHECKED |= {"similar_sounds.py", "sound_map.py", "fine_tune.py", "event_detection.py"}  # with an encoder that is there
CHECKED |= {"hugging_face_datasets.py", "webdataset_shards.py"}  # tests/training/test_own_data.py runs them


def test_every_example_fits_on_a_page_and_runs_here():
    files = {path.name: path.read_text() for path in EXAMPLES.glob("*.py")}
    assert set(files) == CHECKED
    for name, text in files.items():
        assert len(text.splitlines()) <= 110, name
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


@pytest.fixture(scope="module")
def small_demo(tmp_path_factory):
    """Eight sounds of each kind of the demo's corpus."""
    whole, folder = tmp_path_factory.mktemp("demo"), tmp_path_factory.mktemp("sounds")
    write_demo_corpus(whole)
    for kind in whole.iterdir():
        (folder / kind.name).mkdir()
        for path in sorted(kind.iterdir())[:8]:
            shutil.copy(path, folder / kind.name)
    return folder


def test_frames_of_atst_frames_views_stay_in_step(small_demo):
    clip, frame = atst_views.main(str(small_demo), seconds=2.0, batch_size=16)
    assert clip < 0.5
    assert frame > 0.7
    plain, _mixed = atst_views.frame_views()
    lms = torch.randn(4, 64, 1).expand(4, 64, 201).clone()
    lms[:, :, 90] += 5  # an event in one frame
    assert plain(lms).mean(1).argmax(1).tolist() == [90] * 4


def test_transforms_in_a_dataset(small_demo):
    batches = dataset_transforms.main(str(small_demo), batch_size=8)
    assert len(batches) == 2 * 4
    views = torch.cat([torch.cat(pair) for pair in batches])
    assert views.shape == (2 * 2 * 32, 64, 96)
    assert views.isfinite().all()
    assert len(views.flatten(1).unique(dim=0)) == len(views)
    again = dataset_transforms.main(str(small_demo), batch_size=8)
    assert torch.equal(views, torch.cat([torch.cat(pair) for pair in again]))


def test_multi_crop(small_demo):
    losses = multi_crop.main(str(small_demo), steps=20, batch_size=8)
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])


@pytest.mark.slow
def test_a_module_of_lightning(small_demo, tmp_path):
    model = lightning_module.main(str(small_demo), str(tmp_path), epochs=3, feature_d=16)
    assert len(model.aug.bank) == 3 * 32
    again = lightning_module.BYOLA.load_from_checkpoint(tmp_path / "last.ckpt")
    assert again.aug.rng.tolist() == [0, 3]
    assert torch.equal(again.aug.bank.rows, model.aug.bank.rows)
    wav = torch.randn(2, 15200)
    assert byola_fast.load_encoder(tmp_path / "encoder.pth")(wav).shape == (2, 16)


@pytest.fixture(scope="module")
def embedded(small_demo):
    """Sounds of the demo's corpus, and the table of their embeddings."""
    folder = small_demo
    table = folder.parent / "table.npz"
    assert cli.main(["embed", str(folder), "--normalize", "--out", str(table), "--workers=0"]) == 0
    return folder, table


def test_similar_sounds(embedded, capsys):
    folder, table = embedded
    query = sorted((folder / "drums").iterdir())[3]
    found = similar_sounds.main(str(table), str(query), count=5)
    assert found[0] == (f"drums/{query.name}", pytest.approx(1, abs=1e-4))
    assert [cosine for _name, cosine in found] == sorted((cosine for _name, cosine in found), reverse=True)
    share = re.search(r"same folder for (\d+) %", capsys.readouterr().out)
    assert int(share[1]) > 60  # a quarter by chance
    np.savez(folder.parent / "raw.npz", file_names=["a"], embeddings=np.ones((1, 512), np.float32))
    with pytest.raises(SystemExit, match=r"expected a table of byola-fast embed --normalize, got one without mean"):
        similar_sounds.main(str(folder.parent / "raw.npz"), str(query))


def test_a_map_is_one_page_that_plays(embedded, tmp_path):
    folder, table = embedded
    page = tmp_path / "map.html"
    sound_map.main(str(table), str(folder), str(page), seconds=0.5)
    text = page.read_text()
    assert text.count("<circle ") == 32
    assert len(set(re.findall(r'fill="([^"]+)"', text))) == 4
    assert not re.search(r"https?://|src=|href=", text)  # nothing from elsewhere
    sounds = json.loads(re.search(r"const sounds = (.*);", text)[1])
    wav, rate = soundfile.read(io.BytesIO(base64.b64decode(sounds[5])))
    assert (rate, len(sounds)) == (16000, 32)
    assert 8000 <= len(wav) < 12000
    names = re.findall(r'data-n="(\d+)"><title>([^<]+)', text)
    assert [int(number) for number, _name in names] == list(range(32))
    assert all((folder / name).is_file() for _number, name in names)


@pytest.mark.slow
def test_fine_tuning_and_the_probe(tmp_path):
    labels = [name for _ in range(15) for name in PITCHES]
    part = lambda n: ("train", "train", "train", "valid", "test")[n // 3 % 5]  # noqa: E731
    task = make_task(tmp_path, labels, part, "file_name,label,split")
    probe, tuned = fine_tune.main(str(task), str(tmp_path / "audio"), epochs=2, seeds=2)
    assert probe > 0.8
    assert min(tuned) > 0.5  # a third by chance


def test_too_few_sounds_to_mix_are_named(tmp_path):
    (tmp_path / "kick").mkdir()
    with pytest.raises(SystemExit, match=r"expected three \.wav files or more in each folder, got fewer in kick"):
        event_detection.main(str(tmp_path))


@pytest.mark.slow
def test_events_are_detected_in_time(embedded, tmp_path):
    score = event_detection.main(str(embedded[0]), str(tmp_path / "events.png"), scenes=16)
    assert score > 0.25
    assert (tmp_path / "events.png").stat().st_size > 5000
    assert event_detection.hits([(0, 1.0), (0, 5.0), (1, 1.0)], [(0, 1.15), (0, 0.9), (1, 1.5)]) == 1
