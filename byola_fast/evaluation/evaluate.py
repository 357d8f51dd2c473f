"""Linear evaluation: frozen embeddings of a labelled task, a linear probe, and an honest report."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
import zipfile
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from byola_fast.audio.reading import SegmentFolder
from byola_fast.embedding.embed_files import DTYPES, open_encoder
from byola_fast.embedding.embedder import Embedder
from byola_fast.embedding.streaming import MelStats, embed_clips
from byola_fast.evaluation.probe import Scores, class_scores, fit_probe, headline, macro
from byola_fast.evaluation.report import append_result, check_results, percent, spread
from byola_fast.evaluation.tasks import NAMED, Task, TaskError, absent_classes, read_task, rounds
from byola_fast.networks.encoders import make_encoder
from byola_fast.runtime.device import keep_freed_memory
from byola_fast.runtime.distributed import pick_device
from byola_fast.runtime.files import file_sha256, fingerprint, write_whole
from byola_fast.runtime.progress import Progress
from byola_fast.spectrograms.corpus_statistics import read_stats, take_stats
from byola_fast.spectrograms.log_mel import FRONT_END
from byola_fast.views.pictures import draw_confusion

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

logger = logging.getLogger("byola_fast")

STATS_SEGMENTS = 2000  # of a task


@dataclass
class EvalConfig:
    """Settings of a linear evaluation.

    Attributes:
        task: CSV file: file_name, label, and split (train, valid, test) or fold; labels with commas are several.
        weights: file of an encoder; for encoder "random" it gives the network and the front end alone.
        audio: folder that file names are relative to; by default the folder audio beside the CSV file, or its own.
        out: folder for results.csv (one line is appended), the confusion matrix, and embeddings to be used again.
        encoder: "trained", or a baseline: "random" (the network before training, a new one for each seed) or
            "melstats" (mean, standard deviation and maximum over time of the log-mels).
        network: of a random encoder without weights: "AudioNTT2020" or "AudioNTT2022".
        feature_d: width of a random encoder without weights.
        stats: mean and standard deviation that log-mels are normalised with: "weights" (those that the weights hold),
            "task" (of the task's training part; of all clips where it has folds), or a JSON file of "byola-fast stats".
            By default "weights" for trained encoders, "task" for baselines.
        seeds: how many to take mean and spread over; they draw random encoders and, where the task has no valid part,
            what the probe is chosen on.
        pad_sec: shorter clips get zeros at their end, up to this length in seconds.
        keep_going: leave out clips that are missing or broken or have no label, and go on where the training part lacks
            a class (its clips then count as errors), in place of stopping.
        dtype: that the encoder computes in: "float32" or "bfloat16".
        device: that computes, as torch names it; by default the GPU where there is one.
        workers: processes that decode audio; by default one fewer than there are CPU cores, at most 8.
    """

    task: str
    weights: str | None = None
    audio: str | None = None
    out: str = "eval"
    encoder: str = "trained"
    network: str = "AudioNTT2020"
    feature_d: int = 512
    stats: str | None = None
    seeds: int = 3
    pad_sec: float = 0.95
    keep_going: bool = False
    dtype: str = "float32"
    device: str | None = None
    workers: int | None = None


class EvalResult(NamedTuple):
    """What an evaluation found.

    Attributes:
        score: accuracy, or mean average precision of a multi-label task, in [0, 1]: the mean over seeds and folds.
        macro: mean over classes of their accuracy; equals ``score`` for a multi-label task.
        by_seed: the score of each seed.
        line: what was appended to results.csv.
        report: all of it, for people.
        picture: the confusion matrix; None for a multi-label task.
    """

    score: float
    macro: float
    by_seed: list[float]
    line: dict[str, Any]
    report: str
    picture: Path | None


class _Features(NamedTuple):
    rows: npt.NDArray[np.float32]  # NaN where a clip is broken
    broken: dict[int, str]
    clips_per_sec: float


def run_eval(config: EvalConfig) -> EvalResult:
    """Embed the clips of a task, train and choose a linear probe, test it, and write the results.

    The probe is a logistic regression on standardised embeddings. Its C is chosen on the valid part alone, or, where
    the task has none, on a part of the training clips drawn by the seed; then it learns anew from train and valid.
    With folds, each is left out and tested on once. The test part serves for nothing else.

    Embeddings are kept in ``out`` and used again while weights, settings and audio are the same.

    Raises:
        TaskError: the task is not sound (see ``read_task``); files are missing or broken, or the training part lacks a
            class, without ``keep_going``. CheckpointError: the weights cannot be used. ImportError: scikit-learn or
            matplotlib is missing. ValueError: settings out of range, or a results.csv of other columns.
    """
    _check(config)
    keep_freed_memory()
    out, (task, left_out) = Path(config.out), read_task(config.task, keep_going=config.keep_going)
    audio = _audio_folder(config)
    task, told = _without_missing(task, audio, config)
    left_out += told
    for words in absent_classes(task):
        if not config.keep_going and (" alone: " in words or " split train: " in words):
            raise TaskError(f"{config.task}: {words}; --keep_going counts their clips as errors")
        logger.warning("%s", words)
    check_results(out / "results.csv")
    out.mkdir(parents=True, exist_ok=True)

    drawn = config.encoder == "random" or bool(task.folds) or "valid" not in task.parts
    seeds = range(config.seeds if drawn else 1)
    found: list[list[Scores]] = []
    features, stats = None, None
    for seed in seeds:
        if features is None or config.encoder == "random":
            embedder = _make_embedder(config, task, audio, seed, stats)
            stats = embedder.stats  # the same for all seeds
            features = _embed(embedder, config, task, audio)
        if features.broken and not config.keep_going:
            first = min(features.broken)
            told_first = f"{task.file_names[first]}: {features.broken[first]}"
            raise TaskError(f"{len(features.broken)} broken files, {told_first}; --keep_going leaves them out")
        whole = task.without(set(features.broken))
        rows = features.rows[[n for n in range(len(features.rows)) if n not in features.broken]]
        found.append([fit_probe(rows, whole, plan) for plan in rounds(whole, seed)])
    assert features is not None
    if features.broken:
        left_out.append(f"{len(features.broken)} broken files")
    return _report(config, out, whole, embedder, found, left_out, features.clips_per_sec)


def _check(config: EvalConfig) -> None:
    if config.encoder not in ("trained", "random", "melstats"):
        raise ValueError(f"encoder: expected trained, random or melstats, got {config.encoder!r}")
    if config.encoder == "trained" and config.weights is None:
        raise ValueError("weights: expected a file of weights; encoder random and melstats need none")
    if config.stats == "weights" and config.weights is None:
        raise ValueError("stats: expected weights that hold statistics, got none")
    if config.seeds < 1:
        raise ValueError(f"seeds: expected at least 1, got {config.seeds}")
    if config.dtype not in DTYPES:
        raise ValueError(f"dtype: expected one of {', '.join(DTYPES)}, got {config.dtype!r}")
    pick_device(config.device or "auto")  # refuses what is not here
    missing = [name for name in ("sklearn", "matplotlib") if find_spec(name) is None]
    if missing:
        raise ImportError(f'evaluation needs {" and ".join(missing)}: pip install "byola_fast[eval]"')


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
    told = f"{len(missing)} of {len(task.file_names)} files missing in {audio}"
    if not config.keep_going or len(missing) == len(task.file_names):
        raise TaskError(f"{config.task}: {told}, first {task.file_names[missing[0]]}; --keep_going leaves them out")
    return task.without(set(missing)), [told]


def _make_embedder(
    config: EvalConfig, task: Task, audio: Path, seed: int, stats: tuple[float, float] | None
) -> Embedder:
    """Return what turns clips into features, with its statistics; they are taken where they are not given."""
    source = config.stats or ("weights" if config.encoder == "trained" else "task")
    path = None if source in ("weights", "task") else source
    if config.weights is not None:
        given = (0.0, 1.0) if source == "task" else None  # until they are taken, below
        embedder = open_encoder(config.weights, path, "cpu", given=given)
    else:
        encoder = make_encoder(config.network, feature_d=config.feature_d)
        embedder = Embedder(encoder, stats=(0.0, 1.0) if path is None else read_stats(path)[:2])
    if config.encoder == "random":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            for module in embedder.encoder.modules():
                reset: Any = getattr(module, "reset_parameters", None)
                if reset is not None:
                    reset()
    elif config.encoder == "melstats":
        stand_in: Any = MelStats(embedder.to_lms.n_mels)
        embedder = Embedder(stand_in, stats=embedder.stats, to_lms=embedder.to_lms)
    embedder.eval().requires_grad_(False)
    if source == "task":
        stats = _task_stats(config, task, audio, embedder) if stats is None else stats
        embedder = Embedder(embedder.encoder, stats=stats, to_lms=embedder.to_lms).eval()
    return embedder.to(pick_device(config.device or "auto"), DTYPES[config.dtype])


def _task_stats(config: EvalConfig, task: Task, audio: Path, embedder: Embedder) -> tuple[float, float]:
    """Return mean and std over log-mels of clips that are not of the test split."""
    files = [audio / name for name, part in zip(task.file_names, task.parts, strict=True) if part != "test"]
    unit_sec = max(config.pad_sec, embedder.min_samples / embedder.sample_rate)
    segments = SegmentFolder(files, unit_sec=unit_sec, sample_rate=embedder.sample_rate)
    mean, std, _count = take_stats(segments, embedder.to_lms, segments=STATS_SEGMENTS, workers=config.workers)
    return mean, std


def _embed(embedder: Embedder, config: EvalConfig, task: Task, audio: Path) -> _Features:
    """Return the features of all clips, from an earlier run where nothing has changed."""
    import numpy as np

    files = [audio / name for name in task.file_names]
    path = Path(config.out) / "embeddings" / f"{_key(embedder, config, files)}.npz"
    if path.exists():
        try:
            with np.load(path) as kept:
                broken = dict(zip(kept["broken"].tolist(), kept["reasons"].tolist(), strict=True))
                return _Features(kept["rows"], broken, float(kept["clips_per_sec"]))
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            logger.warning("embedding again: %s: damaged: %s", path, error)
    rows = np.full((len(files), embedder.feature_d), np.nan, np.float32)
    broken, ended, started = {}, 0, time.monotonic()
    pieces = embed_clips(embedder, files, pad_sec=config.pad_sec, workers=config.workers)
    with Progress("clips", len(files)) as progress, closing(pieces):
        for piece in pieces:
            if piece.error is not None:
                broken[piece.number] = piece.error.reason
                logger.warning("broken: %s", piece.error)
            elif piece.last:
                rows[piece.number] = piece.rows[0].numpy()
            ended += piece.last
            progress.show(ended, f"{ended / (time.monotonic() - started + 1e-9):.0f} clips/s", len(files))
    speed = ended / (time.monotonic() - started)
    path.parent.mkdir(parents=True, exist_ok=True)
    content: dict[str, Any] = {"broken": list(broken), "reasons": list(broken.values()), "clips_per_sec": speed}
    write_whole(path, lambda file: np.savez(file, rows=rows, **content), writer=f".{os.getpid()}")
    return _Features(rows, broken, speed)


def _key(embedder: Embedder, config: EvalConfig, files: list[Path]) -> str:
    """Return a checksum of all that embeddings depend on."""
    digest = hashlib.sha256()
    for name, tensor in embedder.encoder.state_dict().items():
        digest.update(name.encode() + tensor.float().cpu().numpy().tobytes())
    front_end = [getattr(embedder.to_lms, name) for name in FRONT_END]
    settings = [type(embedder.encoder).__name__, front_end, embedder.stats, config.pad_sec, config.dtype]
    digest.update(json.dumps(settings).encode())
    for file in files:
        size, changed = fingerprint(file)
        digest.update(f"{file.name} {size} {changed}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()[:24]


def _report(
    config: EvalConfig,
    out: Path,
    task: Task,
    embedder: Embedder,
    found: list[list[Scores]],
    left_out: list[str],
    clips_per_sec: float,
) -> EvalResult:
    multi = task.multi_label
    by_round = [[headline(one.truth, one.scores, multi) for one in runs] for runs in found]
    macros = [fmean(macro(one.truth, one.scores, multi) for one in runs) for runs in found]
    by_seed = [fmean(values) for values in by_round]
    by_fold = [fmean(values) for values in zip(*by_round, strict=True)]
    metric = "mAP" if multi else "accuracy"
    strengths = sorted({one.strength for runs in found for one in runs})
    counts, encoder = task.counts(), config.encoder
    line = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "task": task.name,
        "encoder": encoder,
        "weights": config.weights or "",
        "weights_sha256": file_sha256(Path(config.weights)) if config.weights else "",
        "network": type(embedder.encoder).__name__,
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
    picture = None
    if not multi:
        picture = out / f"{task.name}-{Path(config.weights).stem if config.weights else encoder}-confusion.png"
        title = f"{task.name}, {encoder}: accuracy {line['score_percent']} %, macro {line['macro_percent']} %"
        draw_confusion(picture, _confusion(task, found), task.classes, title)
    append_result(out / "results.csv", line)
    report = "\n".join(_tell(config, task, found, line, left_out, picture))
    return EvalResult(fmean(by_seed), fmean(macros), by_seed, line, report, picture)


def _tell(
    config: EvalConfig,
    task: Task,
    found: list[list[Scores]],
    line: dict[str, Any],
    left_out: list[str],
    picture: Path | None,
) -> Iterator[str]:
    counts = ", ".join(f"{part}: {count}" if task.folds else f"{part} {count}" for part, count in task.counts().items())
    counts = f"folds {counts}" if task.folds else counts
    yield f"task        {task.name}: {len(task.file_names)} clips, {len(task.classes)} classes; {counts}"
    for words in left_out:
        yield f"left out    {words}"
    what = {"trained": str(config.weights), "random": "random weights", "melstats": "no network"}[config.encoder]
    width = f"{line['network']}, {line['feature_d']}-d"
    yield f"encoder     {what} ({width}), log-mel mean {line['stats_mean']}, std {line['stats_std']}"
    for words in _protocol(task, line):
        yield f"protocol    {words}"
    seeds = (
        f"std over {line['seeds']} seeds {line['std_over_seeds']}" if len(found) > 1 else "one run, nothing is drawn"
    )
    folds = f", over {line['folds']} folds {line['std_over_folds']}" if task.folds else ""
    yield f"{line['metric']:11s} {line['score_percent']} % ({seeds}{folds})"
    if not task.multi_label:
        varied = f" (std over seeds {line['macro_std_over_seeds']})" if len(found) > 1 else ""
        yield f"macro       {line['macro_percent']} %{varied}"
    yield f"speed       {line['clips_per_sec']} clips/s, decoding included"
    yield ""
    size = max(5, *(len(label) for label in task.classes))
    yield f"{'class':{size}}  {'clips':>6}  {'AP' if task.multi_label else 'accuracy':>8}"
    tables = [class_scores(one.truth, one.scores, task.multi_label) for runs in found for one in runs]
    for k, label in enumerate(task.classes):
        values = [table[k][0] for table in tables]
        seen = [value for value in values if value is not None]
        clips = sum(table[k][1] for table in tables) // len(found)
        yield f"{label:{size}}  {clips:6}  {percent(fmean(seen)) if seen else '-':>8}"
    yield ""
    if picture is not None:
        yield f"confusion matrix: {picture}"
    yield f"results: {Path(config.out) / 'results.csv'}"


def _protocol(task: Task, line: dict[str, Any]) -> Iterator[str]:
    kind = "binary logistic regressions" if task.multi_label else "logistic regression"
    yield f"{kind} on standardised embeddings, C = {line['C']}; clips padded to {line['pad_sec']} s"
    if len(task.folds) > 2:
        yield "one fold left out at a time; C chosen on another fold, drawn by the seed; then all others learnt from"
    elif task.folds:
        yield "one fold left out at a time; C chosen on a fifth of the other, drawn by the seed; then all learnt from"
    elif line["valid"]:
        yield "C chosen on valid, having learnt from train; then both learnt from; tested on test"
    else:
        yield "C chosen on a fifth of train, drawn by the seed; then all of it learnt from; tested on test"


def _confusion(task: Task, found: list[list[Scores]]) -> Any:
    """Return ``(classes, classes)``: how many clips of a class (row) were taken for which (column), over all seeds."""
    import numpy as np

    matrix = np.zeros((len(task.classes),) * 2, np.int64)
    for one in (one for runs in found for one in runs):
        np.add.at(matrix, (one.truth.argmax(1), one.scores.argmax(1)), 1)
    return matrix
