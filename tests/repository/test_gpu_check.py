"""The GPU check without a GPU: every stage in miniature, isolated failures, no table from a dry run."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import gpu_check, readme_table
from benchmarks.gpu import stages
from benchmarks.gpu.missing import unloadable_tests

pytestmark = pytest.mark.slow

QUICK = [name for name in gpu_check.STAGES if name not in ("tests", "sanitizers")]
ROOT = gpu_check.ROOT


def waiting_for_a_gpu():
    """Return file and name of every test that is skipped without a GPU, alone or with its file."""
    found = []
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        module = ast.parse(path.read_text())
        whole = any(isinstance(node, ast.If) and "cuda.is_available" in ast.unparse(node.test) for node in module.body)
        for node in ast.walk(module):
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                marks = " ".join(ast.unparse(mark) for mark in node.decorator_list)
                if whole or "needs_gpu" in marks or "cuda.is_available" in marks:
                    found.append((str(path.relative_to(ROOT)), node.name))
    return found


def test_a_dry_run_exercises_every_stage_and_lists_what_it_skipped(tmp_path, capsys):
    assert gpu_check.main(["--device", "cpu", "--out", str(tmp_path), "--only", *QUICK]) == 0
    whole = json.loads((tmp_path / "gpu.json").read_text())
    assert whole["dry_run"]
    for name in QUICK:
        alone = json.loads((tmp_path / f"{name}.json").read_text())
        assert alone == whole["stages"][name]
        assert "error" not in alone
    goals = [row["goal"] for found in whole["stages"].values() for row in found.get("rows", [])]
    assert len(goals) == 14  # 14 on a GPU, with the trainer's
    message = capsys.readouterr().out
    assert "skipped without a GPU: capturing a CUDA graph" in message
    assert "dry run: nothing was measured" in message
    with pytest.raises(ValueError, match="a dry run measures nothing"):
        gpu_check.table(whole)


def test_the_stage_of_tests_finds_the_tests(tmp_path):
    found = gpu_check.run(["tests"], tmp_path, "cpu")["stages"]["tests"]
    assert found["returncode"] == 0
    assert "tests collected" in found["summary"]
    assert (tmp_path / "tests.log").exists()


def test_the_stage_of_tests_takes_every_test_that_waits_for_a_gpu():
    """pytest -k selects them by a word in the name of the file or the test."""
    wanted = re.findall(r"\w+", gpu_check.ON_CUDA.partition(")")[0].replace(" or ", " "))
    assert "cuda" in wanted
    found = [f"{Path(path).name}::{name}" for path, name in waiting_for_a_gpu()]
    assert len(found) >= 4
    assert [name for name in found if not any(word in name for word in wanted)] == []
    assert all((ROOT / "tests" / "ops" / f"test_{name}.py").exists() for name in gpu_check.SANITIZED)


def test_stages_of_several_commands_are_joined(tmp_path, capsys):
    for stage in ("ceilings", "environment"):
        assert gpu_check.main(["--device", "cpu", "--out", str(tmp_path), "--only", stage]) == 0
    (tmp_path / "gpu.json").unlink()
    assert gpu_check.main(["--device", "cpu", "--out", str(tmp_path), "--only"]) == 0
    assert list(json.loads((tmp_path / "gpu.json").read_text())["stages"]) == ["environment", "ceilings"]
    with pytest.raises(SystemExit):
        gpu_check.main(["--device", "cpu", "--out", str(tmp_path), "--only", "colours"])
    assert "expected stages of" in capsys.readouterr().err


def test_a_stage_in_its_own_process_is_stopped_at_its_limit_or_dies_alone(tmp_path, monkeypatch):
    found = gpu_check.run(["ceilings"], tmp_path, "cpu", apart=True)["stages"]["ceilings"]
    assert "error" not in found
    assert found["copy_gb_s"] > 0

    sleeping = "import pathlib, sys, time; print('so far', flush=True); "
    sleeping += (
        f'pathlib.Path({str(tmp_path / "views.json")!r}).write_text(\'{{"dry_run": true, "part": 1}}\'); time.sleep(60)'
    )
    codes = {"views": sleeping, "ema": "import os; print('illegal memory access', flush=True); os._exit(7)"}
    monkeypatch.setattr(gpu_check, "_command", lambda context: [sys.executable, "-c", codes[context.stage]])
    monkeypatch.setitem(gpu_check.LIMITS_S, "views", 2.0)
    whole = gpu_check.run(["views", "ema"], tmp_path, "cpu", apart=True)["stages"]
    assert set(whole) == {"ceilings", "views", "ema"}
    assert whole["views"]["error"] == "stopped after 2 s"
    assert whole["views"]["part"] == 1  # partial results
    assert whole["views"]["output"] == "so far\n"
    assert whole["ema"]["error"] == "its process ended with exit code 7"
    assert "illegal memory access" in whole["ema"]["output"]
    whole = gpu_check.run(["views"], tmp_path, "cpu", apart=True, limit_s=1.0)["stages"]
    assert whole["views"]["error"] == "stopped after 1 s"  # the limit of the command


def test_the_groups_are_all_stages_but_those_run_by_hand(tmp_path, monkeypatch):
    grouped = [stage for group in gpu_check.GROUPS.values() for stage in group]
    assert sorted(grouped) == sorted(set(gpu_check.STAGES) - set(gpu_check.BY_HAND))
    asked = []

    def run(stages, *_, limit_s, **_more):
        asked.append((stages, limit_s))
        return {"dry_run": True, "stages": {}}

    monkeypatch.setattr(gpu_check, "run", run)
    gpu_check.main(["--device", "cpu", "--out", str(tmp_path), "--only", "steps"])
    assert asked == [(list(gpu_check.GROUPS["steps"]), gpu_check.GROUP_S)]
    assert gpu_check.GROUP_S < 540


def test_a_command_over_its_limit_leaves_its_log_and_no_process(tmp_path):
    child = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(61.5)'])"
    found = gpu_check._logged([sys.executable, "-c", f"print('begun', flush=True); {child}"], tmp_path / "log", 2.0)
    assert found == {"returncode": 124, "summary": "begun", "stopped_after_s": 2.0}
    processes = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout
    assert "time.sleep(61.5)" not in processes


def test_a_failed_stage_stops_no_other(tmp_path, monkeypatch, capsys):
    def broken(context):
        raise RuntimeError("no such kernel")

    monkeypatch.setitem(gpu_check.STAGES, "ceilings", broken)
    assert gpu_check.main(["--device", "cpu", "--out", str(tmp_path), "--only", "ceilings", "environment"]) == 1
    whole = json.loads((tmp_path / "gpu.json").read_text())["stages"]
    assert whole["ceilings"]["error"] == "RuntimeError: no such kernel"
    assert "doctor" in whole["environment"]
    assert "failed: ceilings" in capsys.readouterr().err


def test_readme_has_only_measured_gpu_figures(tmp_path):
    text, short = (
        f"<!-- benchmarks:gpu/{op} begin -->\n<!-- benchmarks:gpu/{op} end -->" for op in ("goals", "summary")
    )
    assert readme_table.regenerate(text + short, tmp_path).count(readme_table.NOT_MEASURED) == 2
    rows = [stages.row("two views", "12.0 us", {"< 11 us": False, "< 13 us": True}), stages.row("EMA", "3 us", {})]
    machine = {"gpu": "NVIDIA H200", "versions": {"torch": "2.11.0", "triton": "3.6.0"}, "date": "2026-11-26"}
    found = {"environment": machine, "views": {"rows": rows}, "ranks": {"error": "stopped after 180 s"}}
    (tmp_path / "gpu.json").write_text(json.dumps({"dry_run": False, "stages": found}))
    made = readme_table.regenerate(text, tmp_path)
    assert "| two views | 12.0 us | < 11 us, < 13 us |" in made
    assert "Goals missed:\n\n- two views: < 11 us\n" in made
    assert "Stages that failed: ranks." in made
    assert "Stages not run: compilation, properties," in made
    assert "NVIDIA H200, torch 2.11.0, triton 3.6.0, 2026-11-26." in made
    made = readme_table.regenerate(short, tmp_path)
    assert "| two views | 12.0 us |" in made
    assert "EMA" not in made  # the first row of a stage alone


def test_files_without_their_packages_are_left_out_with_their_importers():
    names = {path.name for path in unloadable_tests(["soundfile"])}
    assert {"runs.py", "test_cli.py"} <= names  # the second imports the first
    assert "test_quality.py" in names  # imports benchmarks.quality.__main__
    assert "test_resize_crop.py" not in names
    assert unloadable_tests(["soxr"]) == unloadable_tests(["soundfile"])  # imported later, as files are read
    assert unloadable_tests([]) == []


def test_the_stage_of_tests_selects_its_tests_without_audio_packages(tmp_path, monkeypatch, capsys):
    """A GPU machine may lack soundfile, soxr and jsonargparse; files that need them must not stop the others."""
    lacking = ["jsonargparse", "soundfile", "soxr"]
    plugin = f"import sys; sys.modules.update(dict.fromkeys({lacking}))"
    (tmp_path / "without_packages.py").write_text(plugin)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    monkeypatch.setenv("PYTEST_PLUGINS", "without_packages")
    for name in lacking:
        monkeypatch.setitem(sys.modules, name, None)
    found = gpu_check.run(["tests"], tmp_path, "cpu")["stages"]["tests"]
    assert found["missing_packages"] == ["soundfile", "soxr"]  # jsonargparse is imported inside functions alone
    assert "tests/training/test_pretrain.py" in found["files_left_out"]
    assert "skipped without a GPU: tests/training/test_pretrain.py: needs soundfile or soxr" in capsys.readouterr().out
    assert found["returncode"] == 0, (tmp_path / "tests.log").read_text()
    collected = (tmp_path / "tests.log").read_text()
    for path, name in waiting_for_a_gpu():
        assert f"{path}::{name}" in collected or f"SKIPPED [2] {path}" in collected


def test_the_trials_of_the_views_change_constants_of_the_kernel():
    from benchmarks.gpu.designs import TRIALS
    from byola_fast.ops._triton import augment_views

    assert all(hasattr(augment_views, name) for trial in TRIALS for name in trial)
