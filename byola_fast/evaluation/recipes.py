"""Make task files from folders of classes or public data sets: ``byola-fast recipes``."""

from __future__ import annotations

import csv
import io
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

from byola_fast.audio.reading import list_audio_files
from byola_fast.evaluation.tasks import SPLITS, TaskError, read_task
from byola_fast.runtime.files import as_text, printable, write_whole

FOLDS = 5


class _MissingError(ValueError):
    """A missing file of a data set; the message is its path."""


class Row(NamedTuple):
    """A clip: its path below the folder, its label (several separated by commas), its split or fold."""

    file_name: str
    label: str
    part: str


def speech_commands(root: Path) -> Iterator[Row]:
    """Speech Commands (v1, v2): WORD/*.wav; validation_list.txt and testing_list.txt name those splits."""
    listed: dict[str, str] = {}
    for part, name in (("valid", "validation_list.txt"), ("test", "testing_list.txt")):
        listed |= dict.fromkeys(_text(root / name).split(), part)
    for path in sorted(root.glob("*/*.wav")):
        if not path.parent.name.startswith("_"):  # _background_noise_ has no word
            name = path.relative_to(root).as_posix()
            yield Row(name, path.parent.name, listed.get(name, "train"))


def urbansound8k(root: Path) -> Iterator[Row]:
    """UrbanSound8K: metadata/UrbanSound8K.csv, audio/foldN/*.wav; its ten folds."""
    for line in _lines(root / "metadata" / "UrbanSound8K.csv", "slice_file_name", "fold", "class"):
        yield Row(f"audio/fold{line['fold']}/{line['slice_file_name']}", line["class"], line["fold"])


def esc50(root: Path) -> Iterator[Row]:
    """ESC-50: meta/esc50.csv, audio/*.wav; its five folds."""
    for line in _lines(root / "meta" / "esc50.csv", "filename", "fold", "category"):
        yield Row(f"audio/{line['filename']}", line["category"], line["fold"])


def nsynth(root: Path) -> Iterator[Row]:
    """NSynth: nsynth-{train,valid,test}/examples.json and audio/*.wav; instrument families."""
    for part in ("train", "valid", "test"):
        folder = root / f"nsynth-{part}"
        for name, note in sorted(_json(folder / "examples.json").items()):
            yield Row(f"nsynth-{part}/audio/{name}.wav", note["instrument_family_str"], part)


def fsd50k(root: Path) -> Iterator[Row]:
    """FSD50K: FSD50K.ground_truth/{dev,eval}.csv, FSD50K.{dev,eval}_audio/*.wav; several labels a clip."""
    for line in _lines(root / "FSD50K.ground_truth" / "dev.csv", "fname", "labels", "split"):
        part = {"train": "train", "val": "valid"}[line["split"]]
        yield Row(f"FSD50K.dev_audio/{line['fname']}.wav", line["labels"], part)
    for line in _lines(root / "FSD50K.ground_truth" / "eval.csv", "fname", "labels"):
        yield Row(f"FSD50K.eval_audio/{line['fname']}.wav", line["labels"], "test")


def folders(root: Path) -> Iterator[Row]:
    """CLASS/*, of which every fifth clip of each class is of one fold; or train, valid and test, each of CLASS/*."""
    files = list_audio_files(root)
    tops = {path.relative_to(root).parts[0] for path in files}  # folders without audio do not count
    parts = {name for name in tops if SPLITS.get(name.lower(), name.lower()) in ("train", "valid", "test")}
    split = bool(tops) and parts == tops
    if len({SPLITS.get(name.lower(), name.lower()) for name in parts}) > 1 and not split:
        others = ", ".join(sorted(tops - parts))
        raise ValueError(f"{root}: expected folders train, valid and test alone, or no such folder, got also {others}")
    seen: Counter[str] = Counter()
    for path in files:
        name = path.relative_to(root)
        if len(name.parts) < 2 + split:
            raise ValueError(f"{path}: lies in no folder of a class; expected {'SPLIT/' * split}CLASS/{path.name}")
        label = name.parts[int(split)]
        if "," in label:
            raise ValueError(f"{path}: a comma in the name of a class stands between two labels; rename the folder")
        if label != label.strip():
            raise ValueError(f"{path}: a space at the end of the name of a class is lost in CSV; rename the folder")
        seen[label] += 1
        yield Row(name.as_posix(), label, name.parts[0] if split else str((seen[label] - 1) % FOLDS + 1))


RECIPES: dict[str, Callable[[Path], Iterator[Row]]] = {
    "folders": folders,
    "speech_commands": speech_commands,
    "urbansound8k": urbansound8k,
    "esc50": esc50,
    "nsynth": nsynth,
    "fsd50k": fsd50k,
}


def write_task(dataset: str, root: str | Path, out: str | Path) -> int:
    """Write the task file of a data set, as ``byola-fast eval TASK.csv --audio FOLDER`` takes it.

    Args:
        dataset: a name of ``RECIPES``.
        root: the folder that the data set was unpacked to, as its authors laid it out.
        out: CSV file to write: file_name, label, and split or fold.

    Returns:
        The number of clips.

    Raises:
        ValueError: an unknown data set, or a folder of another layout (says what is missing).
    """
    if dataset not in RECIPES:
        raise ValueError(f"dataset: expected one of {', '.join(RECIPES)}, got {dataset!r}")
    if not Path(root).is_dir():
        raise FileNotFoundError(f"no such folder: {root}")
    try:
        rows = list(RECIPES[dataset](Path(root)))
    except _MissingError as error:
        raise ValueError(f"{error}: missing; expected: {RECIPES[dataset].__doc__}") from error
    except (KeyError, TypeError, AttributeError) as error:  # in the data set's own tables
        raise ValueError(f"{root}: {error!r}; expected: {RECIPES[dataset].__doc__}") from error
    if not rows:
        raise ValueError(f"{root}: no clip of {dataset} in this folder; expected: {RECIPES[dataset].__doc__}")
    kind = "fold" if all(re.fullmatch(r"\d+", row.part) for row in rows) else "split"
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    lines = [("file_name", "label", kind), *rows]

    def write(file: IO[bytes]) -> None:
        as_text(lambda text: csv.writer(text, lineterminator="\n").writerows(lines))(file)
        file.flush()
        _check(Path(file.name), rows, root)

    write_whole(Path(out), write)
    return len(rows)


def _check(path: Path, rows: list[Row], root: str | Path) -> None:
    """Refuse a task that cannot be evaluated, or names that CSV does not keep."""
    try:
        task, _left_out = read_task(path, keep_going=True)
    except TaskError as error:
        raise ValueError(f"{root}: {str(error).removeprefix(f'{path}: ')}") from error
    if changed := sorted({row.file_name for row in rows} - set(task.file_names)):
        raise ValueError(f"{root}: a space at an end of the name is lost in CSV; rename {printable(changed[0])!r}")


def _text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig", "surrogateescape")  # as the system decodes names of files
    except FileNotFoundError as error:
        raise _MissingError(str(path)) from error


def _json(path: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(_text(path))
    except ValueError as error:
        raise ValueError(f"{path}: not a JSON file: {error}") from error
    return content


def _lines(path: Path, *columns: str) -> Iterator[dict[str, str]]:
    reader = csv.DictReader(io.StringIO(_text(path), newline=""), strict=True)
    if missing := [column for column in columns if column not in (reader.fieldnames or ())]:
        raise ValueError(f"{path}: no column {', '.join(missing)}")
    try:
        for line in reader:
            if not all(line[column] for column in columns):
                raise ValueError(f"{path}: line {reader.line_num}: expected {', '.join(columns)}, got {line}")
            yield line
    except csv.Error as error:
        raise ValueError(f"{path}: line {reader.line_num}: not a CSV file: {error}") from error


if __name__ == "__main__":
    raise SystemExit("now a command: byola-fast recipes DATASET FOLDER TASK.csv")
