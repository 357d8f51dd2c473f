"""Tables of the study of representations, from the JSON files that ``benchmarks/quality`` writes."""

from __future__ import annotations

import json
import statistics
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

from benchmarks.quality.runs import ABLATIONS, AUDIOSET, BYOL, CURVES, OBJECTIVES, SHORT, START
from byola_fast.training.config import renamed
from byola_fast.views.params import PRESETS

OLD_PADDING = "\\* Scored before clips were padded at both ends and C chosen within one clip of the best. "
NO_RUNS = "**The study has not been run yet.**"


def summary_table(folder: Path) -> str:
    """Return each curve from the last step that all its seeds reached, between the baselines and the goal."""
    return _study(folder, ends_alone=True)


def study_table(folder: Path) -> str:
    """Return every point of each curve, with mean and spread over seeds, between the baselines and the goal."""
    return _study(folder, ends_alone=False)


def _study(folder: Path, ends_alone: bool) -> str:
    found = {study.name: (study, runs) for study in CURVES if (runs := _runs(folder, study.name))}
    if BYOL.name not in found:
        return NO_RUNS
    rows = [_row("run", "steps of 256", "hours of audio", "minutes", "seeds", *AUDIOSET, "mean")]
    rows.append(_row("---", *["---:"] * 9))
    for name, label in (("melstats", "mel statistics"), ("random", "random weights")):
        baseline = _read(folder / f"{name}.json")
        if baseline is not None:
            rows.append(
                _row(
                    _marked(label, [baseline]), "", "", "", baseline["seeds"], *_scores([baseline]), _mean_of(baseline)
                )
            )
    starts = _runs(folder, START.name)
    started = [point for run in starts for point in run["curve"]]
    if started and not ends_alone:
        rows.append(_row(_marked(START.label, starts), "", "", "", len(started), *_scores(started), _spread(started)))
    for study, runs in found.values():
        seeds = Counter(point["step"] for run in runs for point in run["curve"])
        settled = max(step for step, count in seeds.items() if count == max(seeds.values()))
        for step in sorted(step for step in seeds if step >= settled or not ends_alone):
            points = [point for run in runs for point in run["curve"] if point["step"] == step]
            effort = (step, f"{_hours(runs[0], points[0]):.0f}", f"{min(p['seconds'] for p in points) / 60:.0f}")
            rows.append(_row(_marked(study.label, runs), *effort, len(points), *_scores(points), _spread(points)))
    known = [*AUDIOSET.values()]
    goals = [f"{value:.1f}" for value in [*known, statistics.fmean(known)]]
    rows.append(_row("BYOL-A, AudioSet", "", "5,000 per epoch", "", 1, *goals))
    note = OLD_PADDING if any(" * |" in row for row in rows) else ""
    return "\n".join([*rows, "", note + _caption(found[BYOL.name][1])])


def _marked(label: str, runs: list[dict[str, Any]]) -> str:
    """Mark a row that was scored by the protocol of before."""
    return label if all("padding" in run for run in runs) else f"{label} *"


def _hours(run: dict[str, Any], point: dict[str, Any]) -> float:
    """Return the hours of audio that a run processed, repeated clips included: equal hours, equal work."""
    return float(point["samples"] * run["settings"].get("unit_sec", PRESETS["byola-v1"].unit_sec) / 3600)


def ablation_table(folder: Path) -> str:
    """Return every way to train at equal steps, with the paper's own score if there is one."""
    base = _points(folder, BYOL.name)
    rows = [_row("run", "seeds", *AUDIOSET, "mean", "to BYOL-A", "Table II"), _row("---", *["---:"] * 8)]
    if not base:
        return NO_RUNS
    reference = statistics.fmean(point["mean"] for point in base)
    for study in [BYOL, *ABLATIONS, *OBJECTIVES]:
        points = _points(folder, study.name)
        if points:
            ahead = statistics.fmean(point["mean"] for point in points) - reference
            paper = "" if study.paper is None else f"{study.paper:.1f}"
            difference = "" if study is BYOL else f"{ahead:+.1f}"
            rows.append(_row(study.label, len(points), *_scores(points), _spread(points), difference, paper))
    return "\n".join(rows)


def gpu_table(folder: Path) -> str:
    """Return the runs on a GPU, best first, by training and validation parts alone."""
    return _compared(folder, "gpu", "valid", "valid_mean")


def gpu_test_table(folder: Path) -> str:
    """Return the runs on a GPU whose tests were looked at, best first."""
    return _compared(folder, "gpu", "scores", "mean")


def corpus_table(folder: Path) -> str:
    """Return the runs on the corpus that anyone can build, as ``gpu_table``."""
    return _compared(folder, "corpus", "valid", "valid_mean")


def corpus_test_table(folder: Path) -> str:
    """Return the runs on the corpus that anyone can build, as ``gpu_test_table``."""
    return _compared(folder, "corpus", "scores", "mean")


def _compared(folder: Path, kind: str, what: str, mean: str) -> str:
    points: defaultdict[tuple[Any, ...], list[dict[str, Any]]] = defaultdict(list)
    for path in sorted((folder / kind).glob("*-[0-9].json")):
        run = json.loads(path.read_text(encoding="utf-8"))
        for point in run["curve"]:
            if what in point:
                points[run["label"], run["settings"]["feature_d"], point["step"]].append(point)
    rows = [_row("run", "width", "steps", "seeds", *AUDIOSET, "mean"), _row("---", *["---:"] * 8)]
    for key, of in sorted(points.items(), key=lambda item: -statistics.fmean(point[mean] for point in item[1])):
        rows.append(_row(*key, len(of), *_scores(of, what), _mean_std([point[mean] for point in of])))
    baseline = _read(folder / "gpu" / "random.json")
    if baseline is not None and baseline[what]:
        of = [{what: one} for one in baseline[what]]
        means = [statistics.fmean(_accuracy(one[task]) for task in AUDIOSET) for one in baseline[what]]
        rows.append(_row(baseline["label"], 512, "", len(of), *_scores(of, what), _mean_std(means)))
    return "\n".join(rows)


def pooling_table(folder: Path) -> str:
    """Return the ways to pool frames, best first for each width, by training and validation parts alone."""
    points: defaultdict[tuple[int, str], list[dict[str, Any]]] = defaultdict(list)
    for one in _read(folder / "gpu" / "poolings.json") or []:
        points[one["feature_d"], one["pooling"]].append(one)
    rows = [
        _row("width", "pooling", "seeds", *AUDIOSET, "mean", "whitened, logistic"),
        _row("---:", "---", *["---:"] * 7),
    ]

    def means(of: list[dict[str, Any]], what: str) -> list[float]:
        return [statistics.fmean(one[what][task] for task in AUDIOSET) for one in of if what in one]

    for (width, pooling), of in sorted(
        points.items(), key=lambda item: (item[0][0], -statistics.fmean(means(item[1], "valid")))
    ):
        logistic = means(of, "whitened_logistic")
        whitened = _mean_std(logistic) if logistic else ""
        rows.append(_row(width, pooling, len(of), *_scores(of, "valid"), _mean_std(means(of, "valid")), whitened))
    return "\n".join(rows)


def _runs(folder: Path, name: str) -> list[dict[str, Any]]:
    """Return the runs of a row, one per seed."""
    paths = [path for path in sorted(folder.glob(f"{name}-*.json")) if path.stem[len(name) + 1 :].isdigit()]
    return [json.loads(path.read_text(encoding="utf-8")) for path in paths]


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def _points(folder: Path, name: str) -> list[dict[str, Any]]:
    """Return the point of each seed of a row at the step at which all rows are compared."""
    return [point for run in _runs(folder, name) for point in run["curve"] if point["step"] == SHORT]


def _scores(found: list[dict[str, Any]], what: str = "scores") -> list[str]:
    return [f"{statistics.fmean(_accuracy(one[what][task]) for one in found):.1f}" for task in AUDIOSET]


def _accuracy(score: Any) -> float:
    return float(score["accuracy"] if isinstance(score, dict) else score)


def _spread(points: list[dict[str, Any]]) -> str:
    return _mean_std([point["mean"] for point in points])


def _mean_std(means: list[float]) -> str:
    return f"{statistics.fmean(means):.1f}" + (f" ± {statistics.stdev(means):.1f}" if len(means) > 1 else "")


def _mean_of(found: dict[str, Any]) -> str:
    """Return a baseline's mean over tasks, with its spread over seeds if every task has several."""
    by_seed = [one["by_seed"] for one in found["scores"].values() if len(one.get("by_seed", [])) > 1]
    if len(by_seed) < len(found["scores"]):
        return f"{found['mean']:.1f}"
    means = [statistics.fmean(values) for values in zip(*by_seed, strict=True)]
    return f"{found['mean']:.1f} ± {statistics.stdev(means):.1f}"


def _caption(runs: list[dict[str, Any]]) -> str:
    settings, cpu, torch = runs[0]["settings"], runs[0]["machine"]["cpu"], runs[0]["versions"]["torch"]
    return (
        "Accuracy in %, ± standard deviation over training seeds. Minutes: on one core, for the fastest seed, on a "
        "machine that ran other work too. "
        f"AudioNTT2020, {settings['feature_d']}-d, {renamed(settings)['dtype']}, {cpu}, torch {torch}: "
        "`python -m benchmarks.quality CORPUS TASKS`."
    )


def _row(*cells: object) -> str:
    return f"| {' | '.join(str(cell) for cell in cells)} |"
