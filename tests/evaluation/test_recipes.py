"""Task files from tiny trees of folders of classes, and of the layouts that five data sets are published in."""

from __future__ import annotations

import csv
import os

import pytest
from helpers.data_sets import TREES, write

from byola_fast import cli
from byola_fast.evaluation.recipes import RECIPES, write_task
from byola_fast.evaluation.tasks import read_task

WANTED = {
    "folders": {
        "kick/a.wav": ("kick", "1"),
        "kick/b/b.wav": ("kick", "2"),
        "kick/c.wav": ("kick", "3"),
        "snare/a.wav": ("snare", "1"),
    },
    "speech_commands": {
        "yes/aa_nohash_0.wav": ("yes", "train"),
        "no/aa_nohash_0.wav": ("no", "train"),
        "yes/bb_nohash_0.wav": ("yes", "valid"),
        "no/bb_nohash_0.wav": ("no", "valid"),
        "yes/cc_nohash_0.wav": ("yes", "test"),
        "no/cc_nohash_0.wav": ("no", "train"),
    },
    "urbansound8k": {
        "audio/fold5/1-3-0-0.wav": ("dog_bark", "5"),
        "audio/fold10/2-2-0-0.wav": ("children_playing", "10"),
    },
    "esc50": {"audio/1-1-A-0.wav": ("dog", "1"), "audio/5-2-A-40.wav": ("helicopter", "5")},
    "nsynth": {
        f"nsynth-{part}/audio/{family}_acoustic_00{n}-060-100.wav": (family, part)
        for n, part in enumerate(("train", "valid", "test"))
        for family in ("bass", "reed")
    },
    "fsd50k": {
        "FSD50K.dev_audio/64760.wav": ("Electric_guitar,Guitar,Music", "train"),
        "FSD50K.dev_audio/16399.wav": ("Dog", "valid"),
        "FSD50K.eval_audio/37199.wav": ("Guitar,Music", "test"),
    },
}


@pytest.mark.parametrize("dataset", RECIPES)
def test_layouts(tmp_path, dataset, capsys):
    write(tmp_path / "data", TREES[dataset])
    out = tmp_path / "tasks" / "task.csv"
    assert cli.main(["recipes", dataset, str(tmp_path / "data"), str(out)]) == 0
    assert capsys.readouterr().out == f"{out}: {len(WANTED[dataset])} clips\n"
    kind = "fold" if dataset in ("folders", "urbansound8k", "esc50") else "split"
    with open(out, newline="") as file:
        found = {line["file_name"]: (line["label"], line[kind]) for line in csv.DictReader(file)}
    assert found == WANTED[dataset]
    listed = [name for name in TREES[dataset] if name.endswith(".wav") and not name.startswith("_")]
    assert set(listed) <= set(found)
    task, left_out = read_task(out)
    assert (task.multi_label, left_out) == (dataset == "fsd50k", [])


def test_a_full_disk_leaves_the_old_task(tmp_path, monkeypatch):
    """Half a task file reads as a smaller task."""
    write(tmp_path, TREES["esc50"] | {"t.csv": "old"})

    def full(_descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert cli.main(["recipes", "esc50", str(tmp_path), str(tmp_path / "t.csv")]) == 2
    assert (tmp_path / "t.csv").read_text() == "old"


def test_folders_that_are_split_already(tmp_path):
    root, out = tmp_path / "data", tmp_path / "t.csv"
    write(root, {f"{part}/{label}/a.wav": "" for part in ("train", "val", "Test") for label in "xy"})
    assert write_task("folders", root, out) == 6
    assert read_task(out)[0].counts() == {"train": 2, "valid": 2, "test": 2}
    write(root, {"train/stray.wav": ""})
    with pytest.raises(ValueError, match=r"stray\.wav: lies in no folder of a class; expected SPLIT/CLASS/stray\.wav"):
        write_task("folders", root, out)
    write(tmp_path / "commas", {"a,b/c.wav": ""})
    with pytest.raises(ValueError, match="a comma in the name of a class"):
        write_task("folders", tmp_path / "commas", out)


def test_what_lies_beside_splits(tmp_path):
    """Without the check train and test themselves are the classes."""
    root, out = tmp_path / "data", tmp_path / "t.csv"
    write(root, {f"{part}/{label}/a.wav": "" for part in ("train", "test") for label in "xy"})
    write(root, {".cache/x/a.wav": "", ".git/HEAD": "", "notes/read.me": ""})
    (root / ".ipynb_checkpoints").mkdir()
    (root / "empty").mkdir()
    assert write_task("folders", root, out) == 4
    task, _ = read_task(out)
    assert (task.classes, task.counts()) == (["x", "y"], {"train": 2, "valid": 0, "test": 2})
    write(root, {"extra/x/a.wav": ""})
    with pytest.raises(ValueError, match=r"expected folders train, valid and test alone, .* got also extra"):
        write_task("folders", root, out)


def test_names_that_are_not_utf8(tmp_path):
    for label, name in ((b"caf\xe9", b"a.wav"), (b"x", b"\xff.wav"), (b"x", b"b.wav")):
        folder = os.path.join(os.fsencode(tmp_path), b"data", label)
        os.makedirs(folder, exist_ok=True)
        with open(os.path.join(folder, name), "w"):
            pass
    assert write_task("folders", tmp_path / "data", tmp_path / "t.csv") == 3
    task, _ = read_task(tmp_path / "t.csv")
    assert all((tmp_path / "data" / name).is_file() for name in task.file_names)


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["x/a.wav", "x/b.wav"], "expected at least two labels, got x"),
        (["x/a.wav", "y/b.wav"], "expected at least two folds, got 1"),
        (["train/x/a.wav", "valid/y/b.wav"], "no clip of split test"),
        (["x/a.wav", "x/b.wav", " x/a.wav", "y/b.wav"], "a space at the end of the name of a class"),
        (["x/a\nb.wav", "x/b.wav", "y/b.wav"], "a line break inside a cell"),
    ],
)
def test_a_task_that_eval_refuses_is_not_written(tmp_path, names, words):
    write(tmp_path, {f"data/{name}": "" for name in names} | {"t.csv": "old"})
    with pytest.raises(ValueError, match=words):
        write_task("folders", tmp_path / "data", tmp_path / "t.csv")
    assert (tmp_path / "t.csv").read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "t.csv"]


@pytest.mark.parametrize(
    ("dataset", "files", "words"),
    [
        ("esc50", {"meta/esc50.csv": "filename,fold,category\na.wav,1\n"}, r"esc50\.csv: line 2: expected filename"),
        ("esc50", {"meta/esc50.csv": 'filename,fold,category\na.wav,1,"x\n'}, r"esc50\.csv: line 1: not a CSV file"),
        ("nsynth", {"nsynth-train/examples.json": "{"}, r"nsynth-train/examples\.json: not a JSON file"),
        ("nsynth", {"nsynth-train/examples.json": '{"a": {}}'}, "KeyError.*instrument_family_str.*expected: NSynth"),
        ("nsynth", {"nsynth-train/examples.json": "[]"}, "expected: NSynth"),
        ("fsd50k", {"FSD50K.ground_truth/dev.csv": "fname,labels,split\n1,x,dev\n"}, "KeyError.*dev.*expected: FSD50K"),
    ],
)
def test_damaged_data_sets(tmp_path, dataset, files, words):
    write(tmp_path, files)
    with pytest.raises(ValueError, match=words):
        write_task(dataset, tmp_path, tmp_path / "t.csv")


def test_refused(tmp_path, capsys):
    with pytest.raises(ValueError, match=r"dataset: expected one of folders, .*, fsd50k, got 'mnist'"):
        write_task("mnist", tmp_path, tmp_path / "t.csv")
    assert cli.main(["recipes", "esc50", str(tmp_path), str(tmp_path / "t.csv")]) == 2
    assert "esc50.csv: missing; expected: ESC-50: meta/esc50.csv, audio/*.wav" in capsys.readouterr().err
    with pytest.raises(FileNotFoundError, match="no such folder"):
        write_task("esc50", tmp_path / "nowhere", tmp_path / "t.csv")
    write(tmp_path, {"meta/esc50.csv": "file,fold\n"})
    with pytest.raises(ValueError, match="no column filename, category"):
        write_task("esc50", tmp_path, tmp_path / "t.csv")
    write(tmp_path, {"validation_list.txt": "", "testing_list.txt": ""})
    with pytest.raises(ValueError, match="no clip of speech_commands"):
        write_task("speech_commands", tmp_path, tmp_path / "t.csv")
    assert not (tmp_path / "t.csv").exists()
    assert cli.main(["recipes", "esc50"]) == 2
    assert "required: FOLDER, TASK" in capsys.readouterr().err
