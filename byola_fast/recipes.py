"""Task files for evaluation from the folders that public data sets come in: ``python -m byola_fast.recipes``."""

from __future__ import annotations

import csv
import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from byola_fast.files import as_text, write_whole

USAGE = "usage: python -m byola_fast.recipes DATASET FOLDER TASK.csv\nDATASET is one of: "


class Row(NamedTuple):
    """A clip of a task: its file below the folder, its label (several with commas between), its split or fold."""

    file_name: str
    label: str
    part: str


def speech_commands(root: Path) -> Iterator[Row]:
    """Speech Commands (v1, v2): WORD/*.wav; validation_list.txt and testing_list.txt name those parts."""
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
        for name, note in sorted(json.loads(_text(folder / "examples.json")).items()):
            yield Row(f"nsynth-{part}/audio/{name}.wav", note["instrument_family_str"], part)


def fsd50k(root: Path) -> Iterator[Row]:
    """FSD50K: FSD50K.ground_truth/{dev,eval}.csv, FSD50K.{dev,eval}_audio/*.wav; several labels a clip."""
    for line in _lines(root / "FSD50K.ground_truth" / "dev.csv", "fname", "labels", "split"):
        part = {"train": "train", "val": "valid"}[line["split"]]
        yield Row(f"FSD50K.dev_audio/{line['fname']}.wav", line["labels"], part)
    for line in _lines(root / "FSD50K.ground_truth" / "eval.csv", "fname", "labels"):
        yield Row(f"FSD50K.eval_audio/{line['fname']}.wav", line["labels"], "test")


RECIPES: dict[str, Callable[[Path], Iterator[Row]]] = {
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
    rows = list(RECIPES[dataset](Path(root)))
    if not rows:
        raise ValueError(f"{root}: no clip of {dataset} in this folder; expected: {RECIPES[dataset].__doc__}")
    kind = "fold" if all(re.fullmatch(r"\d+", row.part) for row in rows) else "split"
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    lines = [("file_name", "label", kind), *rows]
    write_whole(Path(out), as_text(lambda file: csv.writer(file, lineterminator="\n").writerows(lines)))
    return len(rows)


def main(argv: Sequence[str] | None = None) -> int:
    """Write a task file; return 0, or 2 after an error."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    if len(arguments) != 3:
        print(USAGE + ", ".join(RECIPES), file=sys.stderr)
        return 2
    try:
        print(f"{arguments[2]}: {write_task(*arguments)} clips")
    except (OSError, ValueError) as error:
        print(f"byola_fast.recipes: error: {error}", file=sys.stderr)
        return 2
    return 0


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise ValueError(f"{path}: missing; expected the folder as its authors laid it out") from error


def _lines(path: Path, *columns: str) -> Iterator[dict[str, str]]:
    reader = csv.DictReader(_text(path).splitlines())
    if missing := [column for column in columns if column not in (reader.fieldnames or ())]:
        raise ValueError(f"{path}: no column {', '.join(missing)}")
    yield from reader


if __name__ == "__main__":
    sys.exit(main())
