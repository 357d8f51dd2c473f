"""Linear evaluation: frozen embeddings of a labelled task, a linear probe, and an honest report."""

from __future__ import annotations

import hashlib
import inspect
import json
import logging
import os
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from byola_fast.audio.decoding import decoders
from byola_fast.audio.segments import SegmentFolder
from byola_fast.embedding.embed_files import open_encoder
from byola_fast.embedding.embedder import Embedder
from byola_fast.embedding.streaming import LONGEST_PAD_SEC, embed_clips
from byola_fast.evaluation.config import EvalConfig
from byola_fast.evaluation.mel_baseline import MelStats
from byola_fast.evaluation.probe import Scores, fit_probe
from byola_fast.evaluation.report import (
    EvalResult,
    _report,
    check_results,
)
from byola_fast.evaluation.tasks import NAMED, Task, TaskError, absent_classes, read_task, rounds
from byola_fast.networks.encoder_file import find_weights, names_weights
from byola_fast.networks.encoders import make_encoder
from byola_fast.runtime.device import DTYPES, pick_device, warn_of_slow_bfloat16
from byola_fast.runtime.files import file_sha256, fingerprint, write_whole
from byola_fast.runtime.progress import Progress
from byola_fast.spectrograms.corpus_statistics import read_stats, take_stats
from byola_fast.spectrograms.log_mel import FRONT_END

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

logger = logging.getLogger("byola_fast")

STATS_SEGMENTS = 2000  # of a task
MIDDLE_BYTES = 4096  # of a file; most that differ at all differ there


class _Features(NamedTuple):
    rows: npt.NDArray[np.float32]  # of all clips
    broken: dict[int, str]
    clips_per_sec: float

    def good_rows(self) -> npt.NDArray[np.float32]:
        return self.rows[[number for number in range(len(self.rows)) if number not in self.broken]]


def run_eval(config: EvalConfig) -> EvalResult:
    """Embed the clips of a task, train and choose a linear probe, test it, and write the results.

    The probe is a logistic regression on standardised embeddings. Its C is chosen on valid alone or, without one, on a
    part of the training clips drawn by the seed; the probe then learns from train and valid. With folds, each is left
    out and tested on once. Test clips are used for the score alone.

    Embeddings are cached in ``out`` for the same encoder, settings and audio; broken clips are tried again.

    Raises:
        TaskError: a faulty task (see ``read_task``); one file under two names; without ``keep_going``, files missing or
            broken (or with embeddings that are not finite), or a class that train lacks; no clip left to learn from or
            to test on. CheckpointError: the weights cannot be used. ImportError: scikit-learn or matplotlib is
            missing. ValueError: settings out of range, or a results.csv with other columns.
    """
    if Path(config.task).is_dir():
        hint = f"byola-fast recipes folders {config.task} TASK.csv makes one, if it holds a folder for each class"
        raise TaskError(f"{config.task}: expected a CSV file of a task, got a folder; {hint}")
    if names_weights(config.task, folders=False):
        raise TaskError(f"{config.task}: expected a CSV file of a task, got a name of weights; these come before it")
    if config.weights is not None or config.features == "trained":
        config = replace(config, weights=str(find_weights(config.weights)))
    _check(config)
    if config.dtype == "bfloat16" and pick_device(config.device).type == "cpu":
        warn_of_slow_bfloat16()
    out, (task, left_out) = Path(config.out), read_task(config.task, keep_going=config.keep_going)
    audio = _audio_folder(config)
    task, message = _without_missing(task, audio, config)
    left_out += message
    _check_clips(task, config)
    check_results(out / "results.csv")
    _check_twins(task, audio, config)
    out.mkdir(parents=True, exist_ok=True)
    weights_sha256 = file_sha256(Path(config.weights)) if config.weights else ""  # of the file that is read now

    drawn = config.features == "random" or bool(task.folds) or "valid" not in task.splits
    seeds = range(config.seeds if drawn else 1)
    found: list[list[Scores]] = []
    features, stats = None, None
    for seed in seeds:
        if features is None or config.features == "random":
            embedder = _make_embedder(config, task, audio, seed, stats)
            stats = embedder.stats  # the same for all seeds
            features = _embed(embedder, config, task, audio)
            whole = _without_broken(task, features, config)
        found.append([fit_probe(features.good_rows(), whole, plan) for plan in rounds(whole, seed)])
    assert features is not None
    if features.broken:
        left_out.append(f"{len(features.broken)} broken files")
    return _report(config, out, whole, embedder, found, left_out, features.clips_per_sec, weights_sha256)


def _check(config: EvalConfig) -> None:
    if config.features not in ("trained", "random", "melstats"):
        raise ValueError(f"features: expected trained, random or melstats, got {config.features!r}")
    if config.feature_d is not None and config.weights is not None:
        raise ValueError(f"feature_d: expected none, as the weights have their own width, got {config.feature_d}")
    if config.feature_d is not None and config.feature_d < 1:
        raise ValueError(f"feature_d: expected at least 1, got {config.feature_d}")
    if config.stats == "weights" and config.weights is None:
        raise ValueError("stats: expected weights that hold statistics, got none")
    if config.seeds < 1:
        raise ValueError(f"seeds: expected at least 1, got {config.seeds}")
    if not 0 <= config.pad_sec <= LONGEST_PAD_SEC:
        raise ValueError(f"pad_sec: expected 0 to {LONGEST_PAD_SEC} s, got {config.pad_sec}")
    if config.dtype not in DTYPES:
        raise ValueError(f"dtype: expected one of {', '.join(DTYPES)}, got {config.dtype!r}")
    pick_device(config.device)  # refuses what is not here
    missing = [name for name in ("sklearn", "matplotlib") if find_spec(name) is None]
    if missing:
        raise ImportError(f"evaluation needs {' and '.join(missing)}: pip install scikit-learn matplotlib")


def _audio_folder(config: EvalConfig) -> Path:
    beside = Path(config.task).parent
    if config.audio is None:
        return beside / "audio" if (beside / "audio").is_dir() else beside
    if not Path(config.audio).is_dir():
        raise FileNotFoundError(f"no such folder: {config.audio}")
    return Path(config.audio)


def _without_missing(task: Task, audio: Path, config: EvalConfig) -> tuple[Task, list[str]]:
    missing = [number for number, name in enumerate(task.file_names) if not (audio / name).is_file()]
    if not missing:
        return task, []
    for number in missing[:NAMED]:
        logger.warning("missing: %s", audio / task.file_names[number])
    if len(missing) > NAMED:
        logger.warning("missing: %d more", len(missing) - NAMED)
    message = f"{len(missing)} of {len(task.file_names)} files missing in {audio}"
    if not config.keep_going or len(missing) == len(task.file_names):
        raise TaskError(f"{config.task}: {message}, first {task.file_names[missing[0]]}; --keep_going leaves them out")
    return task.without(set(missing)), [message]


def _without_broken(task: Task, features: _Features, config: EvalConfig) -> Task:
    if not features.broken:
        return task
    if not config.keep_going:
        first = min(features.broken)
        told_first = f"{task.file_names[first]}: {features.broken[first]}"
        raise TaskError(f"{len(features.broken)} broken files, {told_first}; --keep_going leaves them out")
    whole = task.without(set(features.broken))
    _check_clips(whole, config)
    return whole


def _check_clips(task: Task, config: EvalConfig) -> None:
    """Refuse a task with nothing to learn from or to test on; refuse, or warn of, classes that a part lacks."""
    empty = [part for part, count in task.counts().items() if not count and (task.folds or part != "valid")]
    if empty:
        raise TaskError(f"{config.task}: no clip left of {'fold' if task.folds else 'split'} {', '.join(empty)}")
    for words in absent_classes(task):
        if not config.keep_going and (" alone: " in words or " split train: " in words):
            raise TaskError(f"{config.task}: {words}; --keep_going counts their clips as errors")
        logger.warning("%s", words)


def _check_twins(task: Task, audio: Path, config: EvalConfig) -> None:
    """Refuse a file under two names; warn of clips with the same bytes in two splits or folds."""
    clips: dict[Path, int] = {}
    for number, name in enumerate(task.file_names):
        path = (audio / name).resolve()
        if (first := clips.setdefault(path, number)) != number:
            raise TaskError(f"{config.task}: {task.file_names[first]} and {name} are one file, {path}")
    groups = [[number for path, number in clips.items() if fingerprint(path)[0]]]
    paths = list(clips)
    looks: list[Callable[[Path], object]] = [lambda path: fingerprint(path)[0], _middle, file_sha256]
    for look in looks:  # from fast to sure
        alike: dict[object, list[int]] = defaultdict(list)
        for group, numbers in enumerate(groups):
            for number in numbers:
                with suppress(OSError):  # a broken clip, which is named later
                    alike[group, look(paths[number])].append(number)
        groups = [numbers for numbers in alike.values() if len({task.splits[number] for number in numbers}) > 1]
    if groups:
        names = " and ".join(f"{task.file_names[number]} ({task.splits[number]})" for number in groups[0][:NAMED])
        message = "%d clips occur in several splits or folds, with the same bytes: %s; the score may be too high"
        logger.warning(message, len(groups), names)


def _middle(path: Path) -> bytes:
    with open(path, "rb") as file:
        file.seek(fingerprint(path)[0] // 2)
        return file.read(MIDDLE_BYTES)


def _make_embedder(
    config: EvalConfig, task: Task, audio: Path, seed: int, stats: tuple[float, float] | None
) -> Embedder:
    """Return the module from clips to features; its statistics are computed if not given."""
    source = config.stats or ("weights" if config.features == "trained" else "task")
    path = None if source in ("weights", "task") else source
    if config.weights is not None:
        given = (0.0, 1.0) if source == "task" else None  # replaced below
        embedder = open_encoder(config.weights, path, "cpu", encoder=config.encoder, given=given)
    else:
        try:
            encoder = make_encoder(config.encoder or "AudioNTT2020", feature_d=config.feature_d)
        except TypeError as error:  # of its constructor
            raise ValueError(f"encoder: {config.encoder} cannot be made: {error}") from error
        embedder = Embedder(encoder, stats=(0.0, 1.0) if path is None else read_stats(path)[:2])
    if config.features == "random":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            for module in embedder.encoder.modules():
                reset: Any = getattr(module, "reset_parameters", None)
                if reset is not None:
                    reset()
                elif any(True for _ in module.parameters(recurse=False)):
                    raise ValueError(f"features: random weights need reset_parameters of {type(module).__name__}")
    elif config.features == "melstats":
        stand_in: Any = MelStats(embedder.to_lms.n_mels)
        embedder = Embedder(stand_in, stats=embedder.stats, to_lms=embedder.to_lms)
    embedder.eval().requires_grad_(False)
    if path is not None:
        read_stats(path, embedder.to_lms)  # refuses those of another front end
    if source == "task":
        stats = _task_stats(config, task, audio, embedder) if stats is None else stats
        embedder = Embedder(embedder.encoder, stats=stats, to_lms=embedder.to_lms).eval()
    return embedder.to(pick_device(config.device), DTYPES[config.dtype])


def _task_stats(config: EvalConfig, task: Task, audio: Path, embedder: Embedder) -> tuple[float, float]:
    """Return mean and std over the log-mels of all clips outside the test split."""
    files = [audio / name for name, split in zip(task.file_names, task.splits, strict=True) if split != "test"]
    unit_sec = max(config.pad_sec, embedder.min_samples / embedder.sample_rate)
    segments = SegmentFolder(files, unit_sec=unit_sec, sample_rate=embedder.sample_rate)
    mean, std, _count = take_stats(segments, embedder.to_lms, segments=STATS_SEGMENTS, workers=config.workers)
    return mean, std


def _embed(embedder: Embedder, config: EvalConfig, task: Task, audio: Path) -> _Features:
    """Return the features of all clips, from the cache if nothing has changed."""
    import numpy as np

    files = [audio / name for name in task.file_names]
    path = Path(config.out) / "embeddings" / f"{_key(embedder, config, files)}.npz"
    rows, speed = np.full((len(files), embedder.feature_d), np.nan, np.float32), 0.0
    if path.exists():
        try:
            with np.load(path) as kept:
                rows[kept["clips"]], speed = kept["rows"], float(kept["clips_per_sec"])
        except Exception as error:  # bytes that are no archive may raise anything
            logger.warning("embedding again: %s: damaged: %s", path, error)
            rows[:] = np.nan
    todo = np.flatnonzero(~np.isfinite(rows).all(1)).tolist()  # new clips, and those that were broken
    if not todo:
        return _Features(rows, {}, speed)
    broken, ended, started = {}, 0, time.monotonic()
    pieces = embed_clips(embedder, [files[number] for number in todo], pad_sec=config.pad_sec, workers=config.workers)
    with Progress("clips", len(todo)) as progress, closing(pieces):
        for piece in pieces:
            number = todo[piece.number]
            if piece.error is not None:
                broken[number] = piece.error.reason
                logger.warning("broken: %s", piece.error)
            elif piece.last:
                rows[number] = piece.rows[0].numpy()
            ended += piece.last
            progress.show(ended, f"{ended / (time.monotonic() - started + 1e-9):.0f} clips/s", len(todo))
    speed = speed or ended / (time.monotonic() - started)
    good = np.array([number for number in range(len(files)) if number not in broken], np.int64)
    path.parent.mkdir(parents=True, exist_ok=True)
    content: dict[str, Any] = {"clips": good, "rows": rows[good], "clips_per_sec": speed}
    write_whole(path, lambda file: np.savez(file, **content))
    return _Features(rows, broken, speed)


def _key(embedder: Embedder, config: EvalConfig, files: list[Path]) -> str:
    """Return a checksum of all that embeddings depend on: encoder, settings, versions, files.

    The encoder counts as its weights, the code of its classes and its answer to a fixed sound, which tells of settings
    that are neither.
    """
    digest = hashlib.sha256()
    for name, tensor in [*embedder.named_parameters(), *embedder.named_buffers()]:
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    for kind in sorted({type(module) for module in embedder.modules()}, key=str):
        digest.update(f"{kind.__module__}.{kind.__qualname__}".encode())
        with suppress(OSError, TypeError):  # no file holds it
            digest.update(b"" if kind.__module__.startswith("torch.") else Path(inspect.getfile(kind)).read_bytes())
    samples = max(round(config.pad_sec * embedder.sample_rate), embedder.min_samples)
    sound = torch.randn(1, samples, generator=torch.Generator("cpu").manual_seed(0), dtype=torch.float32, device="cpu")
    with suppress(RuntimeError, ValueError), torch.no_grad():  # an encoder may take longer clips alone
        digest.update(embedder(sound.to(embedder.to_lms.window.device)).float().cpu().numpy().tobytes())
    front_end = [getattr(embedder.to_lms, name) for name in FRONT_END]
    settings = [front_end, embedder.stats, config.pad_sec, "at both ends", config.dtype, _versions()]
    digest.update(json.dumps(settings).encode())
    for file in files:
        digest.update(os.fsencode(os.path.abspath(file)) + b"\0" + str(_identity(file)).encode())
    return digest.hexdigest()[:24]


def _versions() -> list[str]:
    """Return versions of what decodes, resamples and embeds."""
    import soxr

    import byola_fast

    return [byola_fast.__version__, torch.__version__, decoders(), soxr.__version__, soxr.__libsoxr_version__]


def _identity(file: Path) -> tuple[int, ...]:
    """Return what changes if other content takes a file's name: also inode and time of change, which no tool sets."""
    try:
        status = os.stat(file)
    except OSError:  # it has gone meanwhile
        return ()
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino
