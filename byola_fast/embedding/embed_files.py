"""Embeddings of folders of audio into one file: what is done is kept when a run is killed, and shared between ranks."""

from __future__ import annotations

import json
import logging
import os
import shutil
import time
from collections.abc import Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from byola_fast.audio.reading import list_audio_files
from byola_fast.embedding.embedder import Embedder, load_encoder
from byola_fast.embedding.streaming import BATCH_SEC, embed_clips
from byola_fast.embedding.tables import FORMATS, Clip, write_table
from byola_fast.runtime.device import keep_freed_memory
from byola_fast.runtime.distributed import explain_loss, join, pick_device
from byola_fast.runtime.files import file_sha256, fingerprint, write_whole
from byola_fast.runtime.progress import Progress
from byola_fast.spectrograms.corpus_statistics import read_stats

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

logger = logging.getLogger("byola_fast")

KEEP_SEC = 15.0  # of work that a kill can cost
TIMEOUT_MIN = 7 * 24 * 60  # ranks may end far apart
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass
class EmbedConfig:
    """Settings of embedding files or folders.

    Attributes:
        weights: file of an encoder: encoder.pth, encoder.safetensors, checkpoint.pt, or published weights.
        paths: audio files, or folders of them; of any rate, channel count and length.
        out: file to write. .npz: arrays file_names and embeddings. .npy: the embeddings, their names beside it in
            OUT.names.csv. .csv: a line for each.
        frames: write an embedding for each moment (every 80 ms with AudioNTT2020, 40 ms with AudioNTT2022), with its
            time, in place of one for each file.
        stats: JSON file of "byola-fast stats", for weights that hold no statistics; stands above those that they hold.
        dtype: that the encoder computes in: "float32", or "bfloat16", which is faster where hardware has it.
        device: that computes, as torch names it; by default the GPU where there is one.
        batch_sec: sound in a batch, in seconds; files that are longer are embedded piece by piece.
        workers: processes that decode audio; by default one fewer than there are CPU cores, at most 8.
    """

    weights: str
    paths: list[str]
    out: str = "embeddings.npz"
    frames: bool = False
    stats: str | None = None
    dtype: str = "float32"
    device: str | None = None
    batch_sec: float = BATCH_SEC
    workers: int | None = None


class EmbedResult(NamedTuple):
    """What was written.

    Attributes:
        out: the file.
        files: that have embeddings.
        rows: embeddings.
        feature_d: their width.
        broken: the files that could not be read, and why.
        resumed: files that a run before had done.
        speed: sound embedded by this process, in seconds of it a second.
    """

    out: Path
    files: int
    rows: int
    feature_d: int
    broken: dict[str, str]
    resumed: int
    speed: float


def run_embed(config: EmbedConfig) -> EmbedResult | None:
    """Embed files, showing progress; under torchrun, the files are shared between all ranks.

    What is done goes to the folder ``OUT.parts``, at least every 15 seconds. A run that was stopped, even by
    ``kill -9``, is continued by running it again, with another number of ranks if need be; files that have changed
    since are embedded again. The last step writes ``out``, whole or not at all, and removes that folder. A file that
    cannot be read is named by the logger ``byola_fast`` and left out.

    Returns:
        What was written; None on all ranks but the first.

    Raises:
        CheckpointError: the weights cannot be used. FileNotFoundError: no such audio file or folder.
        AudioError: no audio in a folder.
        ValueError: settings out of range; no file can be read; ``OUT.parts`` is of other weights or settings.
        RankError: another process of the run died.
    """
    out = Path(config.out)
    if out.suffix not in FORMATS:
        raise ValueError(f"out: expected a name ending in {', '.join(FORMATS)}, which chooses the format, got {out}")
    if config.dtype not in DTYPES:
        raise ValueError(f"dtype: expected one of {', '.join(DTYPES)}, got {config.dtype!r}")
    embedder = open_encoder(config.weights, config.stats, config.device).to(DTYPES[config.dtype])
    if embedder.to_lms.window.device.type == "cpu":
        keep_freed_memory()
    files = _name_files(config.paths)
    settings = {
        "weights_sha256": file_sha256(Path(config.weights)),
        "stats": list(embedder.stats),
        "frames": config.frames,
        "dtype": config.dtype,
    }
    kept = f"what is done is kept in {out}.parts, and the same command goes on from there"
    with join(torch.device("cpu"), TIMEOUT_MIN) as world, explain_loss(world, lambda: kept):
        store = _Parts(Path(f"{out}.parts"), settings, world.rank)
        done = store.clips(files)
        todo = [name for name in list(files)[world.rank :: world.size] if name not in done]
        speed = _embed(embedder, files, todo, store, config)
        world.most(0)  # waits for all
        if not world.first:
            return None
        clips = store.clips(files)
        broken = {name: reason for name, reason in store.broken().items() if name not in clips and name in files}
        if not clips:
            first = next(iter(files))
            raise ValueError(f"none of {len(files)} files can be read: {first}: {broken[first]}")
        ordered = [(name, clips[name]) for name in files if name in clips]
        period = embedder.frame_period_ms
        write_table(out, ordered, period_ms=period, first_ms=float(embedder.timestamps(1)) if config.frames else None)
        shutil.rmtree(store.folder)
    rows = sum(clip.rows for _name, clip in ordered)
    return EmbedResult(out, len(ordered), rows, embedder.feature_d, broken, len(done), speed)


def open_encoder(
    weights: str | Path,
    stats: str | None = None,
    device: str | None = None,
    *,
    given: tuple[float, float] | None = None,
) -> Embedder:
    """Load an encoder onto the device that computes; statistics given, or of a JSON file, stand above its own."""
    where = pick_device(device or "auto")
    return load_encoder(weights, device=where, stats=given if stats is None else read_stats(stats)[:2])


def _name_files(paths: Sequence[str]) -> dict[str, Path]:
    """Return audio files by the names that they are written under: in the only folder given, or as given."""
    if not paths:
        raise ValueError("paths: expected audio files or a folder of them, got none")
    root = Path(paths[0]) if len(paths) == 1 and Path(paths[0]).is_dir() else None
    listed = [file for path in paths for file in list_audio_files(path)]
    return {(file if root is None else file.relative_to(root)).as_posix(): file for file in listed}


def _embed(embedder: Embedder, files: dict[str, Path], todo: list[str], store: _Parts, config: EmbedConfig) -> float:
    """Embed files by name into this rank's parts; return seconds of sound a second."""
    paths = [files[name] for name in todo]
    pieces = embed_clips(
        embedder, paths, frames=config.frames, batch_sec=config.batch_sec, workers=config.workers
    )  # fmt: skip
    samples, ended, started = 0, 0, time.monotonic()
    progress: Any = nullcontext() if store.rank else Progress("files", len(todo))
    with progress, closing(pieces), store:
        for piece in pieces:
            name = todo[piece.number]
            if piece.error is not None:
                logger.warning("skipping %s", piece.error)
                store.add_broken(name, piece.error.reason)
            else:
                store.add(name, paths[piece.number], piece.rows.numpy(), piece.last)
            samples += piece.samples
            ended += piece.last
            if not store.rank:
                sound = samples / embedder.sample_rate
                told = f"{sound / 3600:.2f} h of sound, {sound / (time.monotonic() - started + 1e-9):.0f} x real time"
                progress.show(ended, told, len(todo))
    return samples / embedder.sample_rate / (time.monotonic() - started)


class _Parts:
    """The folder of what is done: pairs of raw rows and a list of the clips in them, of which the list counts.

    Rows are appended as they come, so that a file of any length needs no memory; a list is written every few seconds,
    under a temporary name that it then leaves, with all clips that ended since the last.
    """

    def __init__(self, folder: Path, settings: dict[str, Any], rank: int) -> None:
        self.folder, self.rank = folder, rank
        folder.mkdir(parents=True, exist_ok=True)
        about = folder / "settings.json"
        if about.exists() and any(folder.glob("*-*.json")):
            try:
                found = dict(json.loads(about.read_bytes()))
            except (ValueError, TypeError, RecursionError) as error:
                raise ValueError(f"{about}: damaged: {error}; remove its folder") from error
            if other := [name for name, value in settings.items() if found.get(name) != value]:
                raise ValueError(
                    f"{folder}: holds the work of a run that was stopped, with other {', '.join(other)}; "
                    "run that again, remove the folder, or give another out"
                )
        _write_json(about, settings, rank)
        for orphan in folder.glob(f"{rank}-*.f32"):
            if not orphan.with_suffix(".json").exists():
                orphan.unlink()
        self._number = 1 + max((int(path.stem.split("-")[1]) for path in folder.glob(f"{rank}-*.json")), default=-1)

    def __enter__(self) -> _Parts:
        self._open()
        return self

    def _open(self) -> None:
        self._path = self.folder / f"{self.rank}-{self._number}.f32"
        self._file = open(self._path, "wb")  # noqa: SIM115
        self._content: dict[str, Any] = {"clips": {}, "broken": {}, "width": 0}
        self._rows = self._begin = 0  # rows written, and how many of them are of clips that have ended
        self._since = time.monotonic()

    def __exit__(self, *_exception: object) -> None:
        self._keep()
        self._file.close()
        if not self._path.with_suffix(".json").exists():
            self._path.unlink()

    def add(self, name: str, path: Path, rows: npt.NDArray[np.float32], last: bool) -> None:
        self._file.write(rows.tobytes())
        self._rows += len(rows)
        self._content["width"] = rows.shape[1]
        if last:
            self._content["clips"][name] = [self._begin, self._rows - self._begin, *fingerprint(path)]
            self._begin = self._rows
            if time.monotonic() - self._since > KEEP_SEC:
                self._keep()
                self._file.close()
                self._number += 1
                self._open()

    def add_broken(self, name: str, reason: str) -> None:
        self._content["broken"][name] = reason
        self._begin = self._rows

    def _keep(self) -> None:
        if self._content["clips"] or self._content["broken"]:
            self._file.flush()
            os.fsync(self._file.fileno())
            _write_json(self._path.with_suffix(".json"), self._content, self.rank)

    def clips(self, files: dict[str, Path]) -> dict[str, Clip]:
        """Return where the rows of each clip lie, of clips whose files have not changed since."""
        found = {}
        for path, content in self._lists():
            for name, (begin, rows, *source) in content["clips"].items():
                if name in files and tuple(source) == fingerprint(files[name]):
                    found[name] = Clip(path.with_suffix(".f32"), begin, rows, content["width"])
        if len({clip.width for clip in found.values()}) > 1:
            raise ValueError(f"{self.folder}: damaged: rows of several widths; remove it")
        return found

    def broken(self) -> dict[str, str]:
        return {name: reason for _path, content in self._lists() for name, reason in content["broken"].items()}

    def _lists(self) -> list[tuple[Path, dict[str, Any]]]:
        paths = sorted(self.folder.glob("*-*.json"), key=lambda path: path.stat().st_mtime_ns)
        return [(path, content) for path in paths if (content := _read_list(path)) is not None]


def _read_list(path: Path) -> dict[str, Any] | None:
    """Read a list that ``_Parts`` wrote; None where it is damaged or its rows are gone, as after half a removal."""
    try:
        content = json.loads(path.read_bytes())
        clips, width = content["clips"].values(), content["width"]
        numbers = [width, *(number for clip in clips for number in clip)]
        whole = all(type(number) is int for number in numbers) and all(len(clip) == 4 for clip in clips)
        held = path.with_suffix(".f32").stat().st_size
        whole = whole and all(begin >= 0 <= rows and 4 * width * (begin + rows) <= held for begin, rows, *_ in clips)
        whole = whole and (width > 0 or not clips) and all(isinstance(x, str) for x in content["broken"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        whole = False
    if not whole:
        logger.warning("%s: damaged, or its rows are gone; embedding its clips again", path)
        path.unlink()
        return None
    return content


def _write_json(path: Path, content: dict[str, Any], rank: int) -> None:
    write_whole(path, lambda file: file.write(json.dumps(content).encode()), writer=f".{rank}")
