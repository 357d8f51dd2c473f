"""The study of representations: it runs, resumes, shares its work, and makes its tables."""

from __future__ import annotations

import errno
import json

import pytest
from helpers.tasks import PITCHES, make_task

from benchmarks import readme_table
from benchmarks.quality import __main__ as quality
from benchmarks.quality import compare
from benchmarks.quality import tables as quality_tables
from benchmarks.quality.runs import STUDIES, Study
from byola_fast.training.config import PretrainConfig

pytestmark = pytest.mark.slow

TINY = {"feature_d": 16, "proj_size": 8, "proj_dim": 32, "batch_size": 6, "n_memory": 16, "workers": 0}
KNOWN = {"tones": 75.0}


@pytest.fixture
def study(tmp_path, monkeypatch):
    """Return a function that runs a study of two rows and three steps on one task of tones, also used as corpus."""
    labels = [name for _ in range(5) for name in PITCHES]
    make_task(tmp_path / "tasks" / "tones", labels, lambda n: ("train", "train", "valid", "test")[n // 3 % 4], HEADER)
    rows = [Study("byol-v1", "BYOL-A", scored=(1, 3), seeds=2), Study("simclr", "SimCLR", scored=(1,), settings=SIMCLR)]
    monkeypatch.setattr(quality, "STUDIES", {row.name: row for row in rows})
    monkeypatch.setattr(quality, "COMMON", quality.COMMON | TINY)
    monkeypatch.setattr(quality, "TASKS", tuple(KNOWN))
    for name, value in {
        "AUDIOSET": KNOWN,
        "SHORT": 1,
        "ABLATIONS": [],
        "OBJECTIVES": rows[1:],
        "BYOL": rows[0],
        "CURVES": rows[:1],
        "START": rows[1],
    }.items():
        monkeypatch.setattr(quality_tables, name, value)
    folders = [str(tmp_path / "tasks" / "tones" / "audio"), str(tmp_path / "tasks")]
    options = ["--work", str(tmp_path / "work"), "--results", str(tmp_path / "quality")]
    return lambda *more: quality.main([*folders, *options, *more])


HEADER = "file_name,label,split"
SIMCLR = (("objective", "simclr"),)


def test_every_run_writes_its_scores_and_none_is_repeated(study, tmp_path, monkeypatch):
    assert study("--only", "byol*", "--seeds", "0") == 0
    results = tmp_path / "quality"
    first = json.loads((results / "byol-v1-0.json").read_text())
    assert [point["step"] for point in first["curve"]] == [1, 3]
    assert [point["samples"] for point in first["curve"]] == [6, 18]
    assert first["settings"]["audio_dir"] == "corpus"
    cut = first | {"curve": first["curve"][:1]}  # as after a stop between two evaluations
    (results / "byol-v1-0.json").write_text(json.dumps(cut))
    assert study() == 0
    assert sorted(path.stem for path in results.iterdir()) == [
        "byol-v1-0",
        "byol-v1-1",
        "melstats",
        "random",
        "simclr-0",
    ]
    again = json.loads((results / "byol-v1-0.json").read_text())
    assert again["curve"][0] == first["curve"][0]
    assert again["curve"][1]["scores"] == first["curve"][1]["scores"]

    monkeypatch.setattr(quality, "pretrain", None)  # no training may be left
    assert study() == 0

    table = quality_tables.study_table(results)
    assert table.count("\n| SimCLR |  |  |  | 1 |") == 1  # the row for the start of training
    assert table.count("\n| BYOL-A | 3 | 0 | 0 | 2 |") == 1
    assert "| BYOL-A, AudioSet |  | 5,000 per epoch |  | 1 | 75.0 | 75.0 |" in table
    assert table.count("±") >= 3  # random, and both steps of byol-v1
    (results / "byol-v1-1.json").write_text(json.dumps(cut | {"seed": 1}))  # the other seed is not as far
    summary = quality_tables.summary_table(results)
    assert "\n| BYOL-A | 1 | 0 | 0 | 2 |" in summary
    assert "\n| BYOL-A | 3 | 0 | 0 | 1 |" in summary
    (results / "byol-v1-1.json").write_text(json.dumps(again | {"seed": 1}))
    assert "\n| BYOL-A | 1 |" not in quality_tables.summary_table(results)
    page = tmp_path / "page.md"
    page.write_text("<!-- benchmarks:quality/ablations begin -->\n<!-- benchmarks:quality/ablations end -->\n")
    assert readme_table.main(["--readme", str(page), "--results", str(tmp_path)]) == 0
    assert "| SimCLR | 1 |" in page.read_text()


def test_training_and_scoring_on_different_machines(study, tmp_path, monkeypatch):
    corpus = str(tmp_path / "tasks" / "tones" / "audio")
    alone = ["--work", str(tmp_path / "work"), "--results", str(tmp_path / "quality"), "--only", "simclr"]
    assert quality.main([corpus, *alone]) == 0
    assert not (tmp_path / "quality").exists()
    (tmp_path / "work" / "runs" / "simclr-0" / "checkpoint.pt").unlink()  # stays on the machine that trained
    monkeypatch.setattr(quality, "pretrain", None)
    assert study("--only", "simclr") == 0
    assert (tmp_path / "quality" / "simclr-0.json").exists()


def test_rows_for_a_gpu_are_skipped_without_one():
    names = [row.name for row, _seed in quality._chosen([], None, gpu=False)]
    assert "byol-v1-2048" not in names
    assert names.count("byol-v1") == 3
    assert ("byol-v1-2048", 0) in [(row.name, seed) for row, seed in quality._chosen([], None, gpu=True)]
    assert [row.name for row, _seed in quality._chosen(["*2048"], [1], gpu=False)] == ["byol-v1-2048"]


def test_a_run_of_another_process_is_left_alone(study, tmp_path, monkeypatch):
    busy_error = OSError(errno.EBUSY, "another run is writing there")

    def busy(config):
        raise quality.CheckpointError(f"{config.out}: cannot be written: another run is writing there") from busy_error

    monkeypatch.setattr(quality, "pretrain", busy)
    assert study("--only", "simclr") == 1
    assert not (tmp_path / "quality").exists()


def test_every_row_has_valid_settings():
    for row in STUDIES.values():
        PretrainConfig(audio_dir="x", **quality.COMMON | dict(row.settings)).resolved("cpu").check()
        assert list(row.scored) == sorted(set(row.scored))


def test_without_runs_the_tables_say_so(tmp_path):
    assert quality_tables.study_table(tmp_path) == quality_tables.NO_RUNS
    assert quality_tables.ablation_table(tmp_path) == quality_tables.NO_RUNS


def test_poolings_are_ranked_within_a_width(tmp_path):
    def scores(value):
        return dict.fromkeys(quality_tables.AUDIOSET, value)

    (tmp_path / "gpu").mkdir()
    found = [
        {"feature_d": 512, "pooling": "mean", "valid": scores(60.0)},
        {"feature_d": 512, "pooling": "max", "valid": scores(61.0), "whitened_logistic": scores(59.0)},
        {"feature_d": 512, "pooling": "max", "valid": scores(63.0), "whitened_logistic": scores(58.0)},
    ]
    (tmp_path / "gpu" / "poolings.json").write_text(json.dumps(found))
    rows = quality_tables.pooling_table(tmp_path).splitlines()[2:]
    assert [row.split(" | ")[1:3] for row in rows] == [["max", "2"], ["mean", "1"]]
    assert rows[0].endswith("| 62.0 ± 1.4 | 58.5 ± 0.7 |")
    assert rows[1].endswith("| 60.0 |  |")


def test_encoders_are_compared_without_their_tests_and_with_them(tmp_path, capsys):
    labels = [name for _ in range(8) for name in PITCHES]
    make_task(tmp_path / "tones", labels, lambda n: ("a", "b", "c", "d")[n // 3 % 4], "file_name,label,fold")
    for more in ([], ["--test"]):
        assert compare.main([str(tmp_path), "random:0", "--only", "tones", *more]) == 0
        line = json.loads(capsys.readouterr().out)
        assert line["encoder"] == "random:0"
        assert 50 < line["mean"] <= 100
