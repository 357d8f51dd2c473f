"""The study of representations: pre-train on real audio, evaluate on labelled tasks.

    python -m benchmarks.quality CORPUS [TASKS] [--work FOLDER] [--only NAME ...] [--seeds N ...] [--threads 1]

CORPUS is a folder of unlabelled audio, or a packed store. TASKS has a folder for each task: ``NAME/NAME.csv``, with its
audio in ``NAME/audio``. Each run in ``runs.py`` has one JSON file in ``benchmarks/results/quality``, updated after
every score. The same command resumes after a stop. Several may run at once, on other cores or machines; each takes runs
that no other is working on. ``python -m benchmarks.readme_table`` makes the tables.

Protocol, for baselines and trained encoders alike: log-mels normalised with the statistics of the task's training part,
clips shorter than 0.95 s padded to it at both ends, logistic regression on standardised embeddings, C chosen on the
validation part.
"""

from __future__ import annotations

import argparse
import csv
import errno
import json
import logging
import math
import statistics
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from fnmatch import fnmatch
from pathlib import Path
from typing import IO, Any

import soundfile
import torch

from benchmarks.measure import machine, versions
from benchmarks.quality.runs import AUDIOSET, COMMON, STUDIES, Study
from byola_fast.audio.pack import pack
from byola_fast.audio.reading import read_audio
from byola_fast.evaluation.config import EvalConfig
from byola_fast.evaluation.evaluate import run_eval
from byola_fast.evaluation.tasks import read_task
from byola_fast.networks.checkpoint import CheckpointError
from byola_fast.runtime.files import as_text, write_whole
from byola_fast.training.config import PretrainConfig
from byola_fast.training.pretrain import pretrain

TASKS = tuple(AUDIOSET)
BASELINES = ("random", "melstats")
RANDOM_SEEDS = 3
SAMPLE_RATE = 16000
PADDING = "both ends"  # of short clips; records of before, padded at the end alone, lack the word
RESULTS = Path(__file__).parents[1] / "results" / "quality"

logger = logging.getLogger("benchmarks")


def prepare_corpus(corpus: Path, work: Path) -> Path:
    """Return the packed store of a corpus; pack it first if needed."""
    if next(corpus.glob("part-*.json"), None):
        return corpus
    pack(corpus, work / "corpus")
    return work / "corpus"


def prepare_task(tasks: Path, name: str, work: Path) -> Path:
    """Decode a task's audio once, to 16-bit wav at 16 kHz, for many evaluations; return the new CSV."""
    made = work / "tasks" / name / f"{name}.csv"
    if made.exists():
        return made
    with open(tasks / name / f"{name}.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        source = tasks / name / "audio" / row["file_name"]
        row["file_name"] = str(Path(row["file_name"]).with_suffix(".wav"))
        decoded = made.parent / "audio" / row["file_name"]
        decoded.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(decoded, read_audio(source, SAMPLE_RATE).numpy(), SAMPLE_RATE, subtype="PCM_16")
    write_whole(made, as_text(lambda file: _write_rows(file, rows)))
    return made


def _write_rows(file: IO[str], rows: list[dict[str, str]]) -> None:
    writer = csv.DictWriter(file, rows[0])
    writer.writeheader()
    writer.writerows(rows)


def score(csvs: dict[str, Path], **how: Any) -> dict[str, Any]:
    """Evaluate an encoder on all tasks: accuracy and macro accuracy, also by seed if there are several."""
    scores: dict[str, Any] = {}
    for name, path in csvs.items():
        with tempfile.TemporaryDirectory() as out:
            result = run_eval(EvalConfig(task=str(path), out=out, stats="task", workers=0, **how))
        scores[name] = {"accuracy": 100 * result.score, "macro": 100 * result.macro}
        if len(result.by_seed) > 1:
            scores[name]["by_seed"] = [100 * value for value in result.by_seed]
    return scores


def mean(scores: dict[str, Any]) -> float:
    """Return the mean accuracy over tasks."""
    return statistics.fmean(one["accuracy"] for one in scores.values())


def run_baseline(name: str, csvs: dict[str, Path], results: Path) -> None:
    """Score a baseline, once."""
    path = results / f"{name}.json"
    if path.exists():
        return
    clips = {task: len(read_task(file)[0].file_names) for task, file in csvs.items()}
    seeds = RANDOM_SEEDS if name == "random" else 1
    scores = score(csvs, features=name, feature_d=COMMON["feature_d"], seeds=seeds)
    content = {"name": name, "seeds": seeds, "clips": clips, "scores": scores, "mean": mean(scores)}
    _write(path, content | {"padding": PADDING, "versions": versions(), "machine": machine()})
    print(f"{name}: mean {content['mean']:.1f} %", flush=True)


def run_study(
    study: Study, seed: int, config: dict[str, Any], csvs: dict[str, Path], work: Path, results: Path
) -> bool:
    """Score the encoders a run has kept, train the rest of the run, score the rest; write its JSON after each score.

    Without tasks it only trains, for example on a machine with a GPU and no tasks. Scoring elsewhere needs only the
    run's folder with its log and kept encoders.

    Returns:
        Whether the run is complete; False if another process is working on it.
    """
    out, settings = work / "runs" / f"{study.name}-{seed}", COMMON | dict(study.settings) | config
    path = results / f"{study.name}-{seed}.json"
    if _score_kept(study, seed, settings, csvs, out, path):
        return True
    ended = _train(study, seed, settings, out)
    return ended and (not csvs or _score_kept(study, seed, settings, csvs, out, path))


def _score_kept(
    study: Study, seed: int, settings: dict[str, Any], csvs: dict[str, Path], out: Path, path: Path
) -> bool:
    """Score the kept encoders that have no score yet; return whether all steps are scored."""
    curve = json.loads(path.read_text())["curve"] if path.exists() else []
    scored = {point["step"] for point in curve}
    for step in study.scored if csvs else ():
        weights = out / f"encoder-{step}.pth"
        if step in scored or not weights.exists():
            continue
        lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
        scores = score(csvs, weights=str(weights), seeds=1)
        curve.append(_point(step, lines, settings["batch_size"]) | {"scores": scores, "mean": mean(scores)})
        content = {"name": study.name, "seed": seed, "steps": study.steps, "settings": _plain(settings), "curve": curve}
        _write(path, content | {"padding": PADDING, "versions": versions(), "machine": machine()})
        print(f"{study.name}-{seed}, step {step}: mean {curve[-1]['mean']:.1f} %", flush=True)
    return {point["step"] for point in curve} == set(study.scored)


def _train(study: Study, seed: int, settings: dict[str, Any], out: Path) -> bool:
    """Train a run to its end if needed; return False if another process is working on it."""
    if all((out / f"encoder-{step}.pth").exists() for step in study.scored):
        return True
    more: dict[str, Any] = {"epochs": 10**6, "keep_every": math.gcd(*study.scored), "tensorboard": False}
    try:
        ended = pretrain(PretrainConfig(out=str(out), steps=study.steps, seed=seed, **more, **settings))
    except CheckpointError as error:
        if getattr(error.__cause__, "errno", None) != errno.EBUSY:
            raise
        logger.warning("%s", error)
        return False
    if ended.stopped_by:
        raise KeyboardInterrupt
    return True


def _point(step: int, lines: list[dict[str, Any]], batch_size: int) -> dict[str, Any]:
    """Return the loss and spread at a step, and the seconds up to it, from the log."""
    done = [line for line in lines if line["step"] <= step]
    steps = [line["step"] for line in done]
    new = [now - before for before, now in zip([0, *steps], steps, strict=False)]
    seconds = sum(batch_size * n / line["samples_per_s"] for n, line in zip(new, done, strict=True))
    last = done[-20:]
    return {
        "step": step,
        "samples": step * batch_size,
        "seconds": round(seconds, 1),
        "loss": statistics.fmean(line["loss"] for line in last),
        "spread": statistics.fmean(line["spread"] for line in last),
    }


def _plain(settings: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in asdict(PretrainConfig(**settings)).items() if name in settings} | {
        "audio_dir": Path(settings["audio_dir"]).name
    }


def _write(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(content, indent=1) + "\n"
    write_whole(path, lambda file: file.write(text.encode()))


def _chosen(only: list[str], seeds: list[int] | None, gpu: bool) -> Iterator[tuple[Study, int]]:
    """Yield the first seed of every row, then the other seeds."""
    chosen = [study for study in STUDIES.values() if _is_chosen(study, only, gpu)]
    for seed in range(max((study.seeds for study in chosen), default=0)) if seeds is None else seeds:
        yield from ((study, seed) for study in chosen if seeds is not None or seed < study.seeds)


def _is_chosen(study: Study, only: list[str], gpu: bool) -> bool:
    return any(fnmatch(study.name, pattern) for pattern in only) if only else gpu or not study.gpu


def main(arguments: list[str] | None = None) -> int:
    """Run the study, or the rest of it."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality", description=__doc__.splitlines()[0])
    parser.add_argument("corpus", type=Path, help="folder of unlabelled audio, or a packed store")
    parser.add_argument(
        "tasks", type=Path, nargs="?", help="folder of tasks: NAME/NAME.csv and NAME/audio; if missing, train only"
    )
    parser.add_argument("--work", type=Path, default=Path("runs/quality"), help="runs and decoded tasks (some GB)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for a JSON file of each run")
    parser.add_argument("--only", nargs="*", default=[], help="row names or patterns, and random, melstats")
    parser.add_argument("--seeds", nargs="*", type=int, help="run only these seeds")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of this process")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16"])
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    gpu = options.device.startswith("cuda") or (options.device == "auto" and torch.cuda.is_available())
    csvs = {name: prepare_task(options.tasks, name, options.work) for name in TASKS if options.tasks}
    for name in BASELINES if csvs else ():
        if not options.only or any(fnmatch(name, pattern) for pattern in options.only):
            run_baseline(name, csvs, options.results)
    config = {"audio_dir": str(prepare_corpus(options.corpus, options.work))}
    config |= {"threads": options.threads, "device": options.device, "dtype": options.dtype}
    whole = True
    try:
        for study, seed in _chosen(options.only, options.seeds, gpu):
            whole &= run_study(study, seed, config, csvs, options.work, options.results)
    except KeyboardInterrupt:
        print("stopped; the same command resumes", flush=True)
        return 130
    return 0 if whole else 1


if __name__ == "__main__":
    raise SystemExit(main())
