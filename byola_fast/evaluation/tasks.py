"""Labelled tasks: the CSV that names clips, their labels and their parts, and who is tested on what."""

from __future__ import annotations

import csv
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

SPLITS = {"training": "train", "validation": "valid", "val": "valid", "testing": "test"}  # as others write them
NAMED = 5  # of many, in a message
INNER_SHARE = 5  # a fifth of the training part chooses the probe where nothing else can


class TaskError(ValueError):
    """A task cannot be used; the message names its file and says why."""


@dataclass(frozen=True)
class Task:
    """Clips with labels.

    Attributes:
        name: of the task.
        file_names: relative to the folder of audio.
        labels: of each clip, in the order of ``classes``; one each, or any number of a multi-label task.
        parts: "train", "valid" or "test" of each clip, or the name of its fold.
        classes: all labels, sorted.
        folds: the names of the folds, sorted; empty where the task has splits.
        multi_label: whether any label holds a comma.
    """

    name: str
    file_names: list[str]
    labels: list[tuple[str, ...]]
    parts: list[str]
    classes: list[str]
    folds: list[str]
    multi_label: bool

    def without(self, numbers: set[int]) -> Task:
        """Return the task without some clips; classes and folds stay."""
        kept = [number for number in range(len(self.file_names)) if number not in numbers]
        lists: dict[str, Any] = {
            name: [getattr(self, name)[number] for number in kept] for name in ("file_names", "labels", "parts")
        }
        return replace(self, **lists)

    def counts(self) -> dict[str, int]:
        """Return the number of clips of each part."""
        counted = Counter(self.parts)
        return {part: counted[part] for part in (self.folds or ("train", "valid", "test"))}


class Round(NamedTuple):
    """Numbers of the clips that a probe learns from, is chosen on and is tested on.

    Attributes:
        train: what each candidate learns from.
        valid: what chooses among them.
        test: what the chosen one, which has learnt anew from ``train`` and ``valid``, is tested on.
    """

    train: list[int]
    valid: list[int]
    test: list[int]


def read_task(path: str | Path, *, keep_going: bool = False) -> tuple[Task, list[str]]:
    """Read a task: ``file_name,label`` and ``split`` (train, valid, test) or ``fold``; other columns are left alone.

    Labels with commas (quoted, as CSV wants it) make the task multi-label.

    Args:
        path: the CSV file, UTF-8.
        keep_going: leave out lines without a label or a part rather than stop.

    Returns:
        The task, and what was left out, in words.

    Raises:
        FileNotFoundError: no such file.
        TaskError: columns or labels missing (names the lines), a file listed twice, an unknown split, fewer than two
            classes or folds, no clip to learn from or to test on.
    """
    path = Path(path)
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            lines = [(reader.line_num, row) for row in reader]
            columns = reader.fieldnames or []
    except (UnicodeDecodeError, csv.Error) as error:
        raise TaskError(f"{path}: not a CSV file in UTF-8: {error}") from error
    kinds = [kind for kind in ("split", "fold") if kind in columns]
    if "file_name" not in columns or "label" not in columns or len(kinds) != 1:
        raise TaskError(f"{path}: expected columns file_name, label, and split or fold, got {', '.join(columns)}")
    kind, left_out = kinds[0], []
    for column in ("file_name", "label", kind):
        empty = [number for number, row in lines if not (row[column] or "").strip(" ,")]
        if empty:
            message = f"{len(empty)} lines without {column}: {_some(empty)}"
            if not keep_going:
                raise TaskError(f"{path}: {message}; --keep_going leaves them out")
            left_out.append(message)
            lines = [(number, row) for number, row in lines if number not in set(empty)]
    file_names = [row["file_name"].strip() for _number, row in lines]
    if twice := [name for name, count in Counter(file_names).items() if count > 1]:
        raise TaskError(f"{path}: {len(twice)} files listed more than once: {_some(twice)}")
    parts = [row[kind].strip() for _number, row in lines]
    if kind == "split":
        parts = [SPLITS.get(part.lower(), part.lower()) for part in parts]
        if unknown := sorted(set(parts) - {"train", "valid", "test"}):
            raise TaskError(f"{path}: split: expected train, valid or test, got {_some(unknown)}")
        if missing := sorted({"train", "test"} - set(parts)):
            raise TaskError(f"{path}: no clip of split {' or '.join(missing)}")
    folds = sorted(set(parts), key=lambda fold: (len(fold) if fold.isdigit() else 0, fold)) if kind == "fold" else []
    if kind == "fold" and len(folds) < 2:
        raise TaskError(f"{path}: expected at least two folds, got {_some(folds) or 'none'}")
    multi_label = any("," in row["label"] for _number, row in lines)
    labels = [_labels(row["label"]) for _number, row in lines]
    classes = sorted({label for own in labels for label in own})
    if len(classes) < 2:
        raise TaskError(f"{path}: expected at least two labels, got {_some(classes) or 'none'}")
    return Task(path.stem, file_names, labels, parts, classes, folds, multi_label), left_out


def rounds(task: Task, seed: int) -> Iterator[Round]:
    """Yield what a probe is trained, chosen and tested on: once for splits, once for each fold that is left out.

    Where there are folds, the probe is chosen on another fold, drawn by the seed; where there are two folds, or splits
    without a valid part, on a fifth of the training part, drawn by the seed from each class alike.
    """
    draw = random.Random(seed)
    for fold in task.folds or ["test"]:
        test = [number for number, part in enumerate(task.parts) if part == fold]
        rest = [number for number, part in enumerate(task.parts) if part != fold]
        if "valid" in task.parts and not task.folds:
            train = [number for number in rest if task.parts[number] == "train"]
            valid = [number for number in rest if task.parts[number] == "valid"]
            yield Round(train, valid, test)
            continue
        if len(task.folds) > 2:
            chosen = draw.choice([other for other in task.folds if other != fold])
            valid = [number for number in rest if task.parts[number] == chosen]
        else:
            valid = _fifth_of_each_class(task, rest, draw)
        own = set(valid)
        yield Round([number for number in rest if number not in own], valid, test)


def absent_classes(task: Task) -> list[str]:
    """Return, in words, which classes are missing from which part; parts that a probe learns from first."""
    message = []
    for fold in task.folds:
        present = {label for own, part in zip(task.labels, task.parts, strict=True) for label in own if part != fold}
        if missing := sorted(set(task.classes) - present):
            message.append(
                f"{len(missing)} of {len(task.classes)} classes occur in fold {fold} alone: {_some(missing)}"
            )
    for split in () if task.folds else ("train", "valid", "test"):
        present = {label for own, part in zip(task.labels, task.parts, strict=True) for label in own if part == split}
        missing = sorted(set(task.classes) - present)
        if missing and split in task.parts:
            message.append(f"{len(missing)} of {len(task.classes)} classes absent from split {split}: {_some(missing)}")
    return message


def _labels(cell: str) -> tuple[str, ...]:
    return tuple(sorted({label.strip() for label in cell.split(",")} - {""}))


def _fifth_of_each_class(task: Task, numbers: list[int], draw: random.Random) -> list[int]:
    by_class: dict[tuple[str, ...], list[int]] = {}
    for number in numbers:
        by_class.setdefault(task.labels[number][:1], []).append(number)
    chosen = []
    for own in by_class.values():
        draw.shuffle(own)
        chosen += own[: len(own) // INNER_SHARE]
    return sorted(chosen or draw.sample(numbers, max(1, len(numbers) // INNER_SHARE)))


def _some(values: Sequence[object]) -> str:
    shown = ", ".join(map(str, values[:NAMED]))
    return shown + (f" and {len(values) - NAMED} more" if len(values) > NAMED else "")
