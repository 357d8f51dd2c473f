"""The GPU check on a machine that may have none: every stage in miniature, failures kept apart, no table of nothing."""

from __future__ import annotations

import json

import pytest

from benchmarks import gpu_check, readme_table

QUICK = [name for name in gpu_check.STAGES if name not in ("tests", "sanitizers")]


def test_a_dry_run_exercises_every_stage_and_says_what_it_left_out(tmp_path, capsys):
    assert gpu_check.main(["--device", "cpu", "--out", str(tmp_path), "--only", *QUICK]) == 0
    whole = json.loads((tmp_path / "gpu.json").read_text())
    assert whole["dry_run"]
    for name in QUICK:
        alone = json.loads((tmp_path / f"{name}.json").read_text())
        assert alone == whole["stages"][name]
        assert "error" not in alone
    goals = [row["goal"] for found in whole["stages"].values() for row in found.get("rows", [])]
    assert len(goals) == 13
    told = capsys.readouterr().out
    assert "left out: capturing a CUDA graph" in told
    assert "dry run: nothing was measured" in told
    with pytest.raises(ValueError, match="a dry run measures nothing"):
        gpu_check.table(whole)


def test_the_stage_of_tests_finds_the_tests(tmp_path):
    found = gpu_check.run(["tests"], tmp_path, "cpu")["stages"]["tests"]
    assert found["returncode"] == 0
    assert "tests collected" in found["summary"]
    assert (tmp_path / "tests.log").exists()


def test_a_stage_that_fails_stops_no_other(tmp_path, monkeypatch, capsys):
    def broken(context):
        raise RuntimeError("no such kernel")

    monkeypatch.setitem(gpu_check.STAGES, "ceilings", broken)
    assert gpu_check.main(["--device", "cpu", "--out", str(tmp_path), "--only", "ceilings", "environment"]) == 1
    whole = json.loads((tmp_path / "gpu.json").read_text())["stages"]
    assert whole["ceilings"]["error"] == "RuntimeError: no such kernel"
    assert "doctor" in whole["environment"]
    assert "failed: ceilings" in capsys.readouterr().err


def test_readme_tells_of_a_gpu_only_what_was_measured(tmp_path):
    text = "<!-- benchmarks:gpu/goals begin -->\n<!-- benchmarks:gpu/goals end -->"
    assert readme_table.NOT_MEASURED in readme_table.regenerate(text, tmp_path)
    row = {"work": "two views", "measured": "12.0 us", "goal": "< 11 us"}
    (tmp_path / "gpu.json").write_text(json.dumps({"dry_run": False, "stages": {"views": {"rows": [row]}}}))
    assert "| two views | 12.0 us | < 11 us |" in readme_table.regenerate(text, tmp_path)


def test_files_whose_packages_are_missing_are_left_out_with_those_that_import_them():
    names = {path.name for path in gpu_check.files_that_import(["soundfile"])}
    assert {"test_pretrain.py", "test_cli.py"} <= names  # the second imports the first
    assert "test_resize_crop.py" not in names
    assert gpu_check.files_that_import([]) == []
