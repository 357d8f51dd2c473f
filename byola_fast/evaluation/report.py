"""Results of evaluations as lines of a CSV file, which grows and is never rewritten."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from pathlib import Path
from statistics import stdev
from typing import Any

COLUMNS = [
    *("date", "task", "encoder", "weights", "weights_sha256", "network", "feature_d"),
    *("metric", "score_percent", "std_over_seeds", "std_over_folds", "macro_percent", "macro_std_over_seeds"),
    *("seeds", "folds", "train", "valid", "test", "classes", "left_out"),
    *("C", "stats_mean", "stats_std", "pad_sec", "dtype", "clips_per_sec"),
]


def check_results(path: Path) -> None:
    """Refuse a file that lines cannot be appended to.

    Raises:
        ValueError: it has other columns, or is no text.
    """
    if path.exists():
        try:
            with open(path, newline="", encoding="utf-8") as file:
                columns = next(csv.reader(file), COLUMNS)
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise ValueError(f"{path}: not a CSV file in UTF-8: {error}; move it away or give another out") from error
        if columns != COLUMNS:
            raise ValueError(f"{path}: has other columns than this version writes; move it away or give another out")


def append_result(path: Path, line: Mapping[str, Any]) -> None:
    """Append a line, and the columns before the first, in one write, so that evaluations may run side by side."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    with open(path, "a", encoding="utf-8", newline="") as file:
        if not file.tell():
            writer.writeheader()
        writer.writerow(line)
        file.write(text.getvalue())


def percent(value: float | None) -> str:
    """Return a share as text; nothing where there is none.

    >>> percent(0.7256), percent(None)
    ('72.6', '')
    """
    return "" if value is None else f"{100 * value:.1f}"


def spread(values: list[float]) -> float | None:
    """Return the unbiased standard deviation; None of a single value."""
    return stdev(values) if len(values) > 1 else None
