"""Results of evaluations as lines of a CSV file, which grows and is never rewritten."""

from __future__ import annotations

import csv
import io
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from statistics import fmean, stdev
from typing import IO, Any, NamedTuple

from byola_fast.embedding.embedder import Embedder
from byola_fast.evaluation.config import EvalConfig
from byola_fast.evaluation.probe import Scores, class_scores, headline, macro, probabilities
from byola_fast.evaluation.tasks import Task
from byola_fast.runtime.figures import new_figure, plain_text, save_figure, short_name
from byola_fast.runtime.files import as_text, lock_soon, printable, write_whole

logger = logging.getLogger("byola_fast")

NAME_LENGTH = 60  # characters of a class in the report

COLUMNS = [
    *("date", "task", "features", "weights", "weights_sha256", "encoder", "feature_d"),
    *("metric", "score_percent", "std_over_seeds", "std_over_folds", "macro_percent", "macro_std_over_seeds"),
    *("seeds", "folds", "train", "valid", "test", "classes", "left_out"),
    *("C", "stats_mean", "stats_std", "pad_sec", "dtype", "clips_per_sec"),
]

OLD_COLUMNS = [{"features": "encoder", "encoder": "network"}.get(name, name) for name in COLUMNS]  # of version 0.1


def check_results(path: Path) -> None:
    """Refuse a results file that cannot be appended to.

    Raises:
        ValueError: other columns, or no text; a file that cannot be written.
    """
    if path.exists():
        try:
            with open(path, "r+", newline="", encoding="utf-8") as file:
                columns = next(csv.reader(file), COLUMNS)
        except OSError as error:
            raise ValueError(f"{path}: cannot be appended to: {error.strerror or error}") from error
        except (UnicodeDecodeError, csv.Error) as error:
            raise ValueError(f"{path}: not a CSV file in UTF-8: {error}; move it away or give another out") from error
        if columns not in (COLUMNS, OLD_COLUMNS):
            raise ValueError(f"{path}: has other columns than this version writes; move it away or give another out")


def append_result(path: Path, line: Mapping[str, Any]) -> None:
    """Append a line whole or not at all (to a new file, also the header); evaluations may run side by side."""
    with open(path, "a+b", buffering=0) as file:
        lock_soon(file)
        end = file.seek(0, os.SEEK_END)
        text = io.StringIO()
        writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
        if not end:
            writer.writeheader()
        else:
            file.seek(end - 1)
            text.write("" if file.read() == b"\n" else "\n")  # an editor may have left it out
        writer.writerow(line)  # by position, also under the old names
        content = text.getvalue().encode("utf-8", "backslashreplace")
        try:
            while content:
                content = content[file.write(content) :]
            os.fsync(file.fileno())
        except OSError:
            file.truncate(end)
            raise


def percent(value: float | None) -> str:
    """Return a share as a percentage; "" for None.

    >>> percent(0.7256), percent(None)
    ('72.6', '')
    """
    return "" if value is None else f"{100 * value:.1f}"


def spread(values: list[float]) -> float | None:
    """Return the unbiased standard deviation; None of a single value."""
    return stdev(values) if len(values) > 1 else None


WRITTEN_CLASSES = 30  # larger matrices are drawn without numbers


def write_predictions(path: Path, task: Task, found: list[list[Scores]]) -> None:
    """Write a line for each tested clip and seed: what was predicted, and the probability of each class.

    Columns: ``file_name``, ``split`` or ``fold``, ``seed``, ``label``, ``predicted``, then ``p(CLASS)`` for each class.
    In a multi-label task, ``predicted`` has the labels of a probability of at least a half, perhaps none.
    """
    header = ["file_name", "fold" if task.folds else "split", "seed", "label", "predicted"]

    def write(file: IO[str]) -> None:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([*header, *(f"p({name})" for name in task.classes)])
        for seed, runs in enumerate(found):
            for one in runs:
                chances = probabilities(one.scores, task.multi_label)
                hits = chances >= 0.5 if task.multi_label else chances.argmax(1)[:, None] == range(len(task.classes))
                for clip, row, hit in zip(one.test, chances, hits, strict=True):
                    predicted = ",".join(task.classes[k] for k in hit.nonzero()[0])
                    known = [task.file_names[clip], task.splits[clip], seed, ",".join(task.labels[clip]), predicted]
                    writer.writerow([*known, *(f"{value:.6g}" for value in row)])

    write_whole(path, as_text(write))


def draw_confusion(path: str | Path, matrix: Any, classes: Sequence[str], title: str = "") -> None:
    """Draw a confusion matrix: how many clips of each true class (row) are predicted as each class (column).

    The colour is the share of the row, the number the count.

    Args:
        path: picture to write; its suffix is the format.
        matrix: ``(classes, classes)`` counts.
        classes: their names.
        title: one line above it.

    Raises:
        ImportError: matplotlib is missing; says how to install it.
    """
    import numpy as np

    counts = np.asarray(matrix)
    share = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    size = min(2.5 + 0.42 * len(classes), 24.0)
    figure = new_figure(width=size + 1.0, height=size)
    axes = figure.subplots()
    picture = axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    places = range(len(classes))
    names = [short_name(name) for name in classes]
    axes.set_xticks(places, names, rotation=90, fontsize=8)
    axes.set_yticks(places, names, fontsize=8)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    if len(classes) <= WRITTEN_CLASSES:
        for row, column in np.argwhere(counts > 0):
            colour = "white" if share[row, column] > 0.5 else "black"
            message = str(counts[row, column])
            axes.text(column, row, message, ha="center", va="center", fontsize=7, color=colour)
    figure.colorbar(picture, ax=axes, shrink=0.7, label="share of the class")
    if title:
        axes.set_title(plain_text(title), fontsize=10, loc="left")
    save_figure(figure, path)


class EvalResult(NamedTuple):
    """What an evaluation found.

    Attributes:
        score: accuracy, or mean average precision of a multi-label task, in [0, 1]; the mean over seeds and folds.
        macro: mean accuracy over classes; equals ``score`` for a multi-label task.
        by_seed: the score of each seed.
        line: the line appended to results.csv.
        report: all of it as text.
        predictions: CSV file with the prediction and the probabilities for each tested clip.
        picture: the confusion matrix; None for a multi-label task, or if it cannot be drawn.
    """

    score: float
    macro: float
    by_seed: list[float]
    line: dict[str, Any]
    report: str
    predictions: Path
    picture: Path | None


def _report(
    config: EvalConfig,
    out: Path,
    task: Task,
    embedder: Embedder,
    found: list[list[Scores]],
    left_out: list[str],
    clips_per_sec: float,
    weights_sha256: str,
) -> EvalResult:
    multi = task.multi_label
    by_round = [[headline(one.truth, one.scores, multi) for one in runs] for runs in found]
    macros = [fmean(macro(one.truth, one.scores, multi) for one in runs) for runs in found]
    by_seed = [fmean(values) for values in by_round]
    by_fold = [fmean(values) for values in zip(*by_round, strict=True)]
    metric = "mAP" if multi else "accuracy"
    strengths = sorted({one.strength for runs in found for one in runs})
    counts = task.counts()
    line = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "task": task.name,
        "features": config.features,
        "weights": config.weights or "",
        "weights_sha256": weights_sha256,
        "encoder": type(embedder.encoder).__name__,
        "feature_d": embedder.feature_d,
        "metric": metric,
        "score_percent": percent(fmean(by_seed)),
        "std_over_seeds": percent(spread(by_seed)),
        "std_over_folds": percent(spread(by_fold)),
        "macro_percent": percent(fmean(macros)),
        "macro_std_over_seeds": percent(spread(macros)),
        "seeds": len(found),
        "folds": len(task.folds) or "",
        **{part: "" if task.folds else counts[part] for part in ("train", "valid", "test")},
        "classes": len(task.classes),
        "left_out": "; ".join(left_out),
        "C": " ".join(f"{strength:g}" for strength in strengths),
        "stats_mean": f"{embedder.stats[0]:.4f}",
        "stats_std": f"{embedder.stats[1]:.4f}",
        "pad_sec": config.pad_sec,
        "dtype": config.dtype,
        "clips_per_sec": f"{clips_per_sec:.0f}",
    }
    append_result(out / "results.csv", line)
    trained = config.features == "trained" and config.weights
    drawn = f"random-{line['encoder']}-{line['feature_d']}" if config.features == "random" else config.features
    source = f"{Path(trained).stem}-{weights_sha256[:8]}" if trained else drawn
    predictions = out / f"{task.name}-{source}-predictions.csv"
    write_predictions(predictions, task, found)
    picture = None
    if not multi:
        picture = out / f"{task.name}-{source}-confusion.png"
        title = f"{task.name}, {config.features}: accuracy {line['score_percent']} %, macro {line['macro_percent']} %"
        title += f"; counts over {len(found)} seeds" if len(found) > 1 else ""
        try:
            draw_confusion(picture, _confusion(task, found), task.classes, title)
        except Exception as error:  # the results are written, and worth more than their picture
            logger.warning("%s: cannot be drawn: %s", picture, error)
            picture = None
    report = "\n".join(_tell(config, task, found, line, left_out, predictions, picture))
    return EvalResult(fmean(by_seed), fmean(macros), by_seed, line, report, predictions, picture)


def _tell(
    config: EvalConfig,
    task: Task,
    found: list[list[Scores]],
    line: dict[str, Any],
    left_out: list[str],
    predictions: Path,
    picture: Path | None,
) -> Iterator[str]:
    counts = ", ".join(f"{part}: {count}" if task.folds else f"{part} {count}" for part, count in task.counts().items())
    counts = f"folds {counts}" if task.folds else counts
    yield f"task        {task.name}: {len(task.file_names)} clips, {len(task.classes)} classes; {counts}"
    for words in left_out:
        yield f"left out    {words}"
    what = {"trained": str(config.weights), "random": "random weights", "melstats": "no network"}[config.features]
    width = f"{line['encoder']}, {line['feature_d']}-d"
    yield f"encoder     {what} ({width}), log-mel mean {line['stats_mean']}, std {line['stats_std']}"
    if config.features == "trained" and config.stats in (None, "weights"):
        yield "            mean and std are those of the weights; --stats task takes the task's, as baselines do"
    for words in _protocol(task, line):
        yield f"protocol    {words}"
    seeds = f"std over {line['seeds']} seeds {line['std_over_seeds']}" if len(found) > 1 else "one run, no randomness"
    folds = f", over {line['folds']} folds {line['std_over_folds']}" if task.folds else ""
    yield f"{line['metric']:11s} {line['score_percent']} % ({seeds}{folds})"
    if not task.multi_label:
        varied = f" (std over seeds {line['macro_std_over_seeds']})" if len(found) > 1 else ""
        yield f"macro       {line['macro_percent']} %{varied}"
    yield f"speed       {line['clips_per_sec']} clips/s, decoding included"
    yield ""
    names = [printable(label)[:NAME_LENGTH] for label in task.classes]
    size = max(5, *map(len, names))
    yield f"{'class':{size}}  {'clips':>6}  {'AP' if task.multi_label else 'accuracy':>8}"
    tables = [class_scores(one.truth, one.scores, task.multi_label) for runs in found for one in runs]
    for k, name in enumerate(names):
        seen = [(value, count) for value, count in (table[k] for table in tables) if value is not None]
        clips = sum(count for _value, count in seen)
        # by clips, as the confusion matrix; an AP of each probe
        score = sum(value * (1 / len(seen) if task.multi_label else count / clips) for value, count in seen)
        yield f"{name:{size}}  {clips // len(found):6}  {percent(score) if seen else '-':>8}"
    yield ""
    yield f"predictions: {predictions}"
    if picture is not None:
        yield f"confusion matrix: {picture}"
    yield f"results: {Path(config.out) / 'results.csv'}"


def _protocol(task: Task, line: dict[str, Any]) -> Iterator[str]:
    kind = "binary logistic regressions" if task.multi_label else "logistic regression"
    padding = f"shorter clips padded with zeros at both ends to {line['pad_sec']} s"
    yield f"{kind} on standardised embeddings, C = {line['C']}; {padding}"
    if len(task.folds) > 2:
        yield "one fold left out at a time; C chosen on another fold, drawn by the seed; then trained on all others"
    elif task.folds:
        yield "one fold left out at a time; C chosen on a fifth of the other, drawn by the seed; then trained on all"
    elif line["valid"]:
        yield "C chosen on valid after training on train; then trained on both; tested on test"
    else:
        yield "C chosen on a fifth of train, drawn by the seed; then trained on all of it; tested on test"


def _confusion(task: Task, found: list[list[Scores]]) -> Any:
    """Return ``(classes, classes)`` counts: true class (row) and predicted class (column), over all seeds."""
    import numpy as np

    matrix = np.zeros((len(task.classes),) * 2, np.int64)
    for one in (one for runs in found for one in runs):
        np.add.at(matrix, (one.truth.argmax(1), one.scores.argmax(1)), 1)
    return matrix
