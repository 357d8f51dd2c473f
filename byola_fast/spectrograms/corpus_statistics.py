"""Statistics of a corpus: mean and std of the log-mel spectrograms of random segments, for the pre-normalisation."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from byola_fast.audio.batches import Batches, as_float
from byola_fast.audio.sources import Source, open_source
from byola_fast.runtime.files import require_writable, write_whole
from byola_fast.runtime.progress import Progress
from byola_fast.spectrograms.log_mel import FRONT_END, FrontEnd, LogMel
from byola_fast.spectrograms.statistics import compute_stats

MIN_SEGMENTS = 1000  # the clips of a small corpus give several segments each
BATCH = 64
MIN_STD = 1e-3  # of log-mels; sounds have 1 or more


@dataclass(kw_only=True)
class StatsConfig(FrontEnd):
    """Settings of the statistics of a corpus; those of the front end as in pretrain.

    Attributes:
        audio_dir: folder of audio files, one file, a manifest (CSV or JSONL: file_name, start, end), several of these,
            or a packed store.
        out: JSON file to write, for ``pretrain --stats``; by default the numbers are only printed.
        segments: number of random segments, at most one per clip (or 1000 in all, with fewer clips); more is steadier
            and slower.
        unit_sec: length of a segment, in seconds.
        seed: of the segments; the same seed gives the same numbers.
        workers: processes that decode audio; by default one fewer than CPU cores, at most 8.
    """

    audio_dir: str | list[str]
    out: str | None = None
    segments: int = 10000
    unit_sec: float = 0.95
    seed: int = 0
    workers: int | None = None


class Stats(NamedTuple):
    """Mean and std of log-mel spectrograms, and the number of segments."""

    mean: float
    std: float
    segments: int


def run_stats(config: StatsConfig) -> Stats:
    """Compute the statistics of a folder or a packed store, showing progress, and write them if asked.

    Raises:
        FileNotFoundError: no such folder. AudioError or StoreError: no file in it can be read. ValueError: settings out
            of range. ValueError or OSError: ``out`` cannot be written.
    """
    source = open_source(config.audio_dir, unit_sec=config.unit_sec, sample_rate=config.sample_rate, seed=config.seed)
    to_lms = LogMel(**config.front_end())
    if config.out is not None:
        require_writable(Path(config.out))
    with Progress("segments") as progress:
        stats = take_stats(
            source,
            to_lms,
            segments=config.segments,
            seed=config.seed,
            workers=config.workers,
            progress=lambda done, total: progress.show(done, total=total),
        )
    if config.out is not None:
        write_stats(config.out, stats, to_lms, config.unit_sec)
    return stats


def take_stats(
    source: Source,
    to_lms: LogMel,
    *,
    segments: int = 10000,
    seed: int = 0,
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    broken: dict[Path, str] | None = None,
    durations: Tensor | None = None,
) -> Stats:
    """Return mean and unbiased std over the log-mels of random segments of a corpus.

    Args:
        source: as for ``Batches``.
        to_lms: the front end, on the device that computes.
        segments: as in ``StatsConfig``, at least 1.
        seed: of the choice of clips.
        workers: as for ``Batches``.
        progress: called with (segments done, total).
        broken: receives the broken files, with the reason.
        durations: of the clips, to sample by them; as ``seconds`` of ``Batches``.

    Raises:
        AudioError: no file can be read. ValueError: ``segments`` below 1, segments too short for the front end, or all
        alike.
    """
    if segments < 1:
        raise ValueError(f"segments: expected at least 1, got {segments}")
    to_lms.num_frames(source.num_samples)  # refuses short segments before anything is read
    count = min(segments, max(len(source), MIN_SEGMENTS))
    device = to_lms.window.device
    batches = Batches(source, min(BATCH, count), seed=seed, workers=workers, device=device, seconds=durations)

    def log_mels() -> Iterator[Tensor]:
        for batch in batches.run(math.ceil(count / batches.batch_size)):
            done = batch.step * batches.batch_size
            yield to_lms(as_float(batch.wav[: count - done]))
            if progress is not None:
                progress(min(done + batches.batch_size, count), count)

    stats = Stats(*compute_stats(log_mels()), count)
    require_sound(stats.std)
    if broken is not None:
        broken.update(batches.broken)
    return stats


def require_sound(std: float) -> None:
    """Refuse log-mels that are all alike: normalised, they would be rounding errors."""
    if std < MIN_STD:
        raise ValueError(f"audio_dir: expected sounds, got log-mels with a std of {std:.2g}, such as silence")


def write_stats(path: str | Path, stats: Stats, to_lms: LogMel, unit_sec: float) -> None:
    """Write statistics and their front end as JSON, in place of an older file; the folder is made if missing.

    Raises:
        ValueError: the file cannot be written.
    """
    front_end = {name: getattr(to_lms, name) for name in FRONT_END}
    content = json.dumps(stats._asdict() | {"unit_sec": unit_sec, "front_end": front_end}, indent=1) + "\n"
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        write_whole(Path(path), lambda file: file.write(content.encode()))
    except OSError as error:
        raise ValueError(f"{path}: cannot be written: {error.strerror or error}") from error


def read_stats(path: str | Path, to_lms: LogMel | None = None) -> Stats:
    """Read statistics that ``write_stats`` wrote.

    Args:
        path: the JSON file.
        to_lms: the front end that will use them.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not such a file, or computed with another front end (names the setting).
    """
    try:
        content: Any = json.loads(Path(path).read_text(encoding="utf-8"))
        stats = Stats(float(content["mean"]), float(content["std"]), int(content["segments"]))
        front_end = {"center": True} | dict(content["front_end"])  # older files do not say
    except FileNotFoundError:
        raise
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        why = f"no {error}" if isinstance(error, KeyError) else error
        raise ValueError(f"{path}: not a file of statistics that byola-fast stats wrote ({why})") from error
    if not math.isfinite(stats.mean) or not 0 < stats.std < math.inf:
        raise ValueError(f"{path}: expected a finite mean and a std above 0, got {stats.mean} and {stats.std}")
    for name in FRONT_END if to_lms is not None else ():
        if front_end.get(name) != getattr(to_lms, name):
            message = f"{name} {front_end.get(name)}, expected {getattr(to_lms, name)}"
            how = "" if name == "center" else f" --{name}"
            raise ValueError(f"{path}: computed with {message}; compute it again with byola-fast stats{how}")
    return stats
