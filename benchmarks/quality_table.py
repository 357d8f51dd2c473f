"""Tables of the study of representations, from the JSON files that ``benchmarks/quality.py`` leaves."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

from benchmarks.quality_runs import ABLATIONS, AUDIOSET, BYOL, OBJECTIVES, SHORT, START

NO_RUNS = "**The study has not been run yet.**"


def study_table(folder: Path) -> str:
    """Return the main table: baselines, the mark to pass, and every seed's last score of BYOL-A, with their spread."""
    runs = _runs(folder, BYOL.name)
    if not runs:
        return NO_RUNS
    rows = [_row("what", "steps of 256", "seeds", *AUDIOSET, "mean"), _row(*["---"] * 3, *["---:"] * 5)]
    for name, told in (("melstats", "mel statistics"), ("random", "random weights")):
        found = _read(folder / f"{name}.json")
        if found is not None:
            rows.append(_row(told, "", found["seeds"], *_scores([found]), _mean_of(found)))
    started = [point for run in _runs(folder, START.name) for point in run["curve"]]
    if started:
        rows.append(_row(START.told, "", len(started), *_scores(started), _spread(started)))
    for step in sorted({point["step"] for run in runs for point in run["curve"]}):
        points = [point for run in runs for point in run["curve"] if point["step"] == step]
        rows.append(_row("BYOL-A, this corpus", step, len(points), *_scores(points), _spread(points)))
    known = [*AUDIOSET.values()]
    marks = [f"{value:.1f}" for value in [*known, statistics.fmean(known)]]
    rows.append(_row("BYOL-A, AudioSet (5,000 h)", "", 1, *marks))
    return "\n".join([*rows, "", _caption(runs)])


def ablation_table(folder: Path) -> str:
    """Return every way to train at equal steps, beside the paper's own comparison where it has one."""
    base = _points(folder, BYOL.name)
    rows = [_row("what", "seeds", *AUDIOSET, "mean", "to BYOL-A", "Table II"), _row("---", *["---:"] * 8)]
    if not base:
        return NO_RUNS
    reference = statistics.fmean(point["mean"] for point in base)
    for study in [BYOL, *ABLATIONS, *OBJECTIVES]:
        points = _points(folder, study.name)
        if points:
            ahead = statistics.fmean(point["mean"] for point in points) - reference
            paper = "" if study.paper is None else f"{study.paper:.1f}"
            own = "" if study is BYOL else f"{ahead:+.1f}"
            rows.append(_row(study.told, len(points), *_scores(points), _spread(points), own, paper))
    return "\n".join(rows)


def _runs(folder: Path, name: str) -> list[dict[str, Any]]:
    """Return the runs of a row, one for each seed."""
    paths = [path for path in sorted(folder.glob(f"{name}-*.json")) if path.stem[len(name) + 1 :].isdigit()]
    return [json.loads(path.read_text(encoding="utf-8")) for path in paths]


def _read(path: Path) -> dict[str, Any] | None:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def _points(folder: Path, name: str) -> list[dict[str, Any]]:
    """Return what each seed of a row had reached at the steps that all rows are compared at."""
    return [point for run in _runs(folder, name) for point in run["curve"] if point["step"] == SHORT]


def _scores(found: list[dict[str, Any]]) -> list[str]:
    return [f"{statistics.fmean(one['scores'][task]['accuracy'] for one in found):.1f}" for task in AUDIOSET]


def _spread(points: list[dict[str, Any]]) -> str:
    means = [point["mean"] for point in points]
    return f"{statistics.fmean(means):.1f}" + (f" ± {statistics.stdev(means):.1f}" if len(means) > 1 else "")


def _mean_of(found: dict[str, Any]) -> str:
    """Return a baseline's mean over tasks, with its spread where all of them have one over seeds."""
    by_seed = [one["by_seed"] for one in found["scores"].values() if len(one.get("by_seed", [])) > 1]
    if len(by_seed) < len(found["scores"]):
        return f"{found['mean']:.1f}"
    means = [statistics.fmean(values) for values in zip(*by_seed, strict=True)]
    return f"{found['mean']:.1f} ± {statistics.stdev(means):.1f}"


def _caption(runs: list[dict[str, Any]]) -> str:
    settings, cpu, torch = runs[0]["settings"], runs[0]["machine"]["cpu"], runs[0]["versions"]["torch"]
    return (
        "Accuracy in %, ± standard deviation over seeds of training. "
        f"AudioNTT2020, {settings['feature_d']}-d, {settings['precision']}, {cpu}, torch {torch}: "
        "`python -m benchmarks.quality CORPUS TASKS`."
    )


def _row(*cells: object) -> str:
    return f"| {' | '.join(str(cell) for cell in cells)} |"
