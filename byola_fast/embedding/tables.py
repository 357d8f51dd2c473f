"""Tables of embeddings for other tools: .npz, .npy with names beside it, .csv; written row by row."""

from __future__ import annotations

import csv
import os
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

from byola_fast.runtime.files import as_text, write_whole

BLOCK_ROWS = 4096  # copied at a time
TABLE_FORMATS = (".npz", ".npy", ".csv")


class Clip(NamedTuple):
    """The place of a clip's embeddings: float32 rows in a raw file.

    Attributes:
        path: the raw file.
        begin: first row.
        rows: number of rows.
        width: of a row.
    """

    path: Path
    begin: int
    rows: int
    width: int


class Scale(NamedTuple):
    """Mean and standard deviation of each feature, float64 ``(d,)``; the deviation is 1 where a feature is constant."""

    mean: Any
    std: Any


def write_table(
    out: Path,
    clips: Sequence[tuple[str, Clip]],
    *,
    period_ms: float = 0.0,
    first_ms: float | None = None,
    normalize: bool = False,
) -> None:
    """Write embeddings and file names, whole or not at all, in memory that does not grow with their number.

    ``.npz``: ``file_names`` (clips,) and ``embeddings`` (clips, d); for frames, ``embeddings`` (rows, d), ``offsets``
    (clips + 1,) of each clip's rows, and ``timestamps_ms`` (rows,); if normalised, ``mean`` and ``std`` (d,).
    ``.npy``: the embeddings alone; ``OUT.names.csv`` has ``file_name,first_row,rows``.
    ``.csv``: one line per embedding: ``file_name``, for frames ``timestamp_ms``, then ``e0, e1, ...``. Numbers keep all
    their digits, and names their bytes.

    Args:
        out: file to write; its suffix is the format.
        clips: names and rows, at least one, in the order of the file.
        period_ms: time between frames.
        first_ms: time of the first frame; None for one row per clip.
        normalize: standardise each feature over all rows, as ``byola_fast.standardize``.

    Raises:
        ValueError: nothing to standardise one row by.
    """
    scale = _measure([clip for _name, clip in clips]) if normalize else None
    if out.suffix == ".npy":
        write_whole(out, lambda file: _write_pair(file, out, clips, scale))
    elif out.suffix == ".npz":
        write_whole(out, lambda file: _write_npz(file, clips, scale, period_ms, first_ms))
    else:
        write_whole(out, as_text(lambda file: _write_csv(file, clips, scale, period_ms, first_ms)))


def _measure(clips: Sequence[Clip]) -> Scale:
    import numpy as np

    total, squares, count = np.zeros(clips[0].width), np.zeros(clips[0].width), sum(clip.rows for clip in clips)
    for clip in clips:
        for block in _blocks(clip):
            total += block.sum(0, dtype=np.float64)
    if count < 2:
        raise ValueError(f"normalize: expected at least two embeddings, as one alone becomes 0, got {count}")
    mean = total / count
    for clip in clips:
        for block in _blocks(clip):
            squares += np.square(block - mean).sum(0)
    std = np.sqrt(squares / count)
    return Scale(mean, std + (std == 0))


def _blocks(clip: Clip, scale: Scale | None = None) -> Iterator[Any]:
    """Yield ``(n, width)`` arrays."""
    import numpy as np

    with open(clip.path, "rb") as file:
        file.seek(4 * clip.width * clip.begin)
        left = clip.rows
        while left:
            block = np.fromfile(file, np.float32, min(left, BLOCK_ROWS) * clip.width).reshape(-1, clip.width)
            if len(block) < min(left, BLOCK_ROWS):
                raise ValueError(f"{clip.path}: cut short: {left - len(block)} rows are missing; remove its folder")
            left -= len(block)
            yield block if scale is None else ((block - scale.mean) / scale.std).astype(np.float32)


def _write_rows(file: IO[bytes], clips: Sequence[tuple[str, Clip]], scale: Scale | None) -> None:
    import numpy as np

    shape = (sum(clip.rows for _name, clip in clips), clips[0][1].width)
    np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": shape})
    for _name, clip in clips:
        for block in _blocks(clip, scale):
            file.write(block.astype("<f4").tobytes())


def _write_pair(file: IO[bytes], out: Path, clips: Sequence[tuple[str, Clip]], scale: Scale | None) -> None:
    """Write rows to the temporary file of ``out``, and names beside it. A kill never leaves names beside other rows."""
    _write_rows(file, clips, scale)
    file.flush()  # a full disk changes nothing

    def names(text: IO[str]) -> None:
        _write_names(text, clips)
        text.flush()
        Path(os.path.realpath(out)).unlink(missing_ok=True)  # before the new names come

    write_whole(out.with_name(f"{out.name}.names.csv"), as_text(names))


def _write_npz(
    file: IO[bytes],
    clips: Sequence[tuple[str, Clip]],
    scale: Scale | None,
    period_ms: float,
    first_ms: float | None,
) -> None:
    import numpy as np

    small: dict[str, Any] = {"file_names": np.array([name for name, _clip in clips])}
    if scale is not None:
        small |= {"mean": scale.mean.astype(np.float32), "std": scale.std.astype(np.float32)}
    if first_ms is not None:
        counts = [clip.rows for _name, clip in clips]
        small["offsets"] = np.cumsum([0, *counts])
        small["timestamps_ms"] = np.concatenate([first_ms + period_ms * np.arange(count) for count in counts])
    with zipfile.ZipFile(file, "w") as archive:
        for name, array in small.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, array, allow_pickle=False)
        with archive.open("embeddings.npy", "w", force_zip64=True) as member:
            _write_rows(member, clips, scale)


def _write_names(file: IO[str], clips: Sequence[tuple[str, Clip]]) -> None:
    writer, first = csv.writer(file), 0
    writer.writerow(["file_name", "first_row", "rows"])
    for name, clip in clips:
        writer.writerow([name, first, clip.rows])
        first += clip.rows


def _write_csv(
    file: IO[str],
    clips: Sequence[tuple[str, Clip]],
    scale: Scale | None,
    period_ms: float,
    first_ms: float | None,
) -> None:
    writer = csv.writer(file)
    times = [] if first_ms is None else ["timestamp_ms"]
    writer.writerow(["file_name", *times, *(f"e{number}" for number in range(clips[0][1].width))])
    for name, clip in clips:
        number = 0
        for block in _blocks(clip, scale):
            for row in block.tolist():
                when = [] if first_ms is None else [first_ms + period_ms * number]
                writer.writerow([name, *when, *(f"{value:.9g}" for value in row)])
                number += 1
