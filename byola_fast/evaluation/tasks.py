"""Labelled tasks: reading the CSV, and the splits or folds of an evaluation."""

from __future__ import annotations

import csv
import io
import os
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from byola_fast.runtime.files import printable

SPLITS = {"training": "train", "validation": "valid", "val": "valid", "testing": "test"}  # other spellings
NAMED = 5  # names in a message
INNER_SHARE = 5  # without a valid split, a fifth of train chooses the probe


class TaskError(ValueError):
    """A task cannot be used; the message names its file and says why."""


@dataclass(frozen=True)
class Task:
    """Clips with labels.

    Attributes:
        name: of the task.
        file_names: relative to the folder of audio, sorted.
        labels: of each clip, in the order of ``classes``: one each, or any number in a multi-label task.
        splits: "train", "valid" or "test" for each clip, or the name of its fold.
        classes: all labels, sorted.
        folds: names of the folds, sorted; empty if the task has splits.
        multi_label: whether any clip has several labels.
    """

    name: str
    file_names: list[str]
    labels: list[tuple[str, ...]]
    splits: list[str]
    classes: list[str]
    folds: list[str]
    multi_label: bool

    def without(self, numbers: set[int]) -> Task:
        """Return the task without some clips, with the same classes and folds."""
        kept = [number for number in range(len(self.file_names)) if number not in numbers]
        lists: dict[str, Any] = {
            name: [getattr(self, name)[number] for number in kept] for name in ("file_names", "labels", "splits")
        }
        return replace(self, **lists)

    def counts(self) -> dict[str, int]:
        """Return the number of clips per split or fold."""
        counted = Counter(self.splits)
        return {split: counted[split] for split in (self.folds or ("train", "valid", "test"))}


class Round(NamedTuple):
    """Numbers of the clips for training, choosing and testing a probe.

    Attributes:
        train: each candidate learns from these.
        valid: the best candidate is chosen on these; it then learns from ``train`` and ``valid``.
        test: it is tested on these.
    """

    train: list[int]
    valid: list[int]
    test: list[int]


def read_task(path: str | Path, *, keep_going: bool = False) -> tuple[Task, list[str]]:
    """Read a task: columns ``file_name,label`` and ``split`` (train, valid, test) or ``fold``; others are ignored.

    Clips are sorted by file name, so that the order of the lines cannot move a score.

    Quoted labels with commas make the task multi-label. Columns are separated by commas, semicolons or tabs. Lines
    without anything in them are skipped. Names of files need not be UTF-8.

    Args:
        path: the CSV file.
        keep_going: leave out lines without a label or a split instead of stopping.

    Returns:
        The task, and notes on what was left out.

    Raises:
        FileNotFoundError: no such file.
        TaskError: no CSV file, missing or repeated columns, a line with too many cells, missing labels (names the
            lines), a file listed twice, an unknown split, fewer than two classes or folds, no clip to learn from or to
            test on.
    """
    path = Path(path)
    columns, lines = _table(path)
    if repeated := [name for name, count in Counter(filter(None, columns)).items() if count > 1]:
        raise TaskError(f"{path}: expected each column once, got {_some(repeated)} more than once")
    kinds = [kind for kind in ("split", "fold") if kind in columns]
    if "file_name" not in columns or "label" not in columns or len(kinds) != 1:
        raise TaskError(
            f"{path}: expected columns file_name, label, and split or fold, got {printable(', '.join(columns))}"
        )
    kind, left_out = kinds[0], []
    for column in ("file_name", "label", kind):
        empty = [number for number, row in lines if not row[column].strip(" ,")]
        if empty:
            message = f"{len(empty)} lines without {column}: {_some(empty)}"
            if not keep_going:
                raise TaskError(f"{path}: {message}; --keep_going leaves them out")
            left_out.append(message)
            lines = [(number, row) for number, row in lines if number not in set(empty)]
    lines.sort(key=lambda line: line[1]["file_name"].strip())
    file_names = [row["file_name"].strip() for _number, row in lines]
    if twice := [name for name, count in Counter(map(os.path.normpath, file_names)).items() if count > 1]:
        raise TaskError(f"{path}: {len(twice)} files listed more than once: {_some(twice)}")
    splits = [row[kind].strip() for _number, row in lines]
    if kind == "split":
        splits = [SPLITS.get(split.lower(), split.lower()) for split in splits]
        if unknown := sorted(set(splits) - {"train", "valid", "test"}):
            raise TaskError(f"{path}: split: expected train, valid or test, got {_some(unknown)}")
        if missing := sorted({"train", "test"} - set(splits)):
            raise TaskError(f"{path}: no clip of split {' or '.join(missing)}")
    folds = sorted(set(splits), key=lambda fold: (len(fold) if fold.isdigit() else 0, fold)) if kind == "fold" else []
    if kind == "fold" and len(folds) < 2:
        raise TaskError(f"{path}: expected at least two folds, got {_some(folds) or 'none'}")
    numbers = Counter(int(fold) for fold in folds if fold.isdecimal())
    if twice := [fold for fold in folds if fold.isdecimal() and numbers[int(fold)] > 1]:
        raise TaskError(f"{path}: fold: expected each number in one spelling, got {_some(twice)}")
    labels = [_labels(row["label"]) for _number, row in lines]
    multi_label = any(len(each) > 1 for each in labels)
    classes = sorted({label for labels in labels for label in labels})
    if len(classes) < 2:
        raise TaskError(f"{path}: expected at least two labels, got {_some(classes) or 'none'}")
    return Task(path.stem, file_names, labels, splits, classes, folds, multi_label), left_out


def _table(path: Path) -> tuple[list[str], list[tuple[int, dict[str, str]]]]:
    """Return the columns of a CSV file, and each line's number and cells; a missing cell is empty."""
    try:
        text = path.read_bytes().decode("utf-8-sig", "surrogateescape")  # as the system decodes names of files
        if "\0" in text:
            raise TaskError(f"{path}: not a CSV file in UTF-8: holds NUL bytes; save it as CSV in UTF-8")
        header = "".join(text.splitlines()[:1])
        delimiter = next((mark for mark in ";\t" if mark in header), ",")
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True, strict=True)
        columns, lines = [name.strip() for name in next(reader, [])], []
        for cells in reader:
            if any(cell.strip() for cell in cells[len(columns) :]):
                raise TaskError(
                    f"{path}: line {reader.line_num}: expected {len(columns)} cells, as in the first line, got "
                    f"{len(cells)}; put a label that holds a {delimiter!r} in quotes"
                )
            if any("\n" in cell or "\r" in cell for cell in cells):
                raise TaskError(f"{path}: line {reader.line_num}: a line break inside a cell; is a quote missing?")
            if any(cell.strip() for cell in cells):
                cells += [""] * (len(columns) - len(cells))
                lines.append((reader.line_num, dict(zip(columns, cells, strict=False))))
    except csv.Error as error:
        raise TaskError(f"{path}: line {reader.line_num}: not a CSV file: {error}; is a quote missing?") from error
    return columns, lines


def rounds(task: Task, seed: int) -> Iterator[Round]:
    """Yield the clips for training, choosing and testing: once for splits, once per left-out fold.

    With folds, the probe is chosen on another fold, drawn by the seed from those that leave several classes to learn.
    With two folds, or splits without valid, it is chosen on a fifth of each class of train, drawn by the seed.
    """
    draw = random.Random(seed)
    for fold in task.folds or ["test"]:
        test = [number for number, split in enumerate(task.splits) if split == fold]
        rest = [number for number, split in enumerate(task.splits) if split != fold]
        if "valid" in task.splits and not task.folds:
            train = [number for number in rest if task.splits[number] == "train"]
            valid = [number for number in rest if task.splits[number] == "valid"]
            yield Round(train, valid, test)
            continue
        others = [other for other in task.folds if other != fold and len(_classes_beside(task, {fold, other})) > 1]
        if others:
            chosen = draw.choice(others)
            valid = [number for number in rest if task.splits[number] == chosen]
        else:
            valid = _fifth_of_each_class(task, rest, draw)
        chosen_clips = set(valid)
        yield Round([number for number in rest if number not in chosen_clips], valid, test)


def absent_classes(task: Task) -> list[str]:
    """Return warnings about classes that a split or the rest of a fold lacks; training splits come first."""

    def absent(numbers: Sequence[int]) -> list[str]:
        return sorted(set(task.classes) - {label for number in numbers for label in task.labels[number]})

    warnings, total = [], len(task.classes)
    for fold in task.folds:
        if missing := absent([number for number, split in enumerate(task.splits) if split != fold]):
            warnings.append(f"{len(missing)} of {total} classes occur in fold {fold} alone: {_some(missing)}")
    for name in () if task.folds else ("train", "valid", "test"):
        clips = [number for number, split in enumerate(task.splits) if split == name]
        if clips and (missing := absent(clips)):
            warnings.append(f"{len(missing)} of {total} classes absent from split {name}: {_some(missing)}")
    return warnings


def _labels(cell: str) -> tuple[str, ...]:
    return tuple(sorted({label.strip() for label in cell.split(",")} - {""}))


def _classes_beside(task: Task, folds: set[str]) -> set[tuple[str, ...]]:
    return {labels for labels, split in zip(task.labels, task.splits, strict=True) if split not in folds}


def _fifth_of_each_class(task: Task, numbers: list[int], draw: random.Random) -> list[int]:
    by_class: dict[tuple[str, ...], list[int]] = {}
    for number in numbers:
        by_class.setdefault(task.labels[number][:1], []).append(number)
    chosen = []
    for clips in by_class.values():
        draw.shuffle(clips)
        chosen += clips[: len(clips) // INNER_SHARE]
    return sorted(chosen or draw.sample(numbers, max(1, len(numbers) // INNER_SHARE)))


def _some(values: Sequence[object]) -> str:
    shown = ", ".join(printable(str(value)) for value in values[:NAMED])
    return shown + (f" and {len(values) - NAMED} more" if len(values) > NAMED else "")
