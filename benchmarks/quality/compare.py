"""Compare encoders: by training and validation parts alone, or on the tests.

    python -m benchmarks.quality.compare TASKS ENCODER... [--test]

TASKS is the folder of the study's tasks. An encoder is a file of weights, or random:SEED. Each line of output is the
JSON of one encoder.

Without ``--test``: ridge regression on standardised embeddings, best strength. A speaker, a SoundFont, or a group of
drum kits or packages is left out in turn, of the training and validation parts. It takes seconds and varies less than
one split. fsdd has no split to set aside, so its speakers are those of the test.

With ``--test``: the probe of ``byola-fast eval``, with one seed.

In both: log-mels normalised with the statistics of the task; clips shorter than 0.95 s padded as ``eval`` does it.
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from benchmarks.quality.runs import AUDIOSET, COMMON
from byola_fast import Embedder, load_encoder, make_encoder
from byola_fast.embedding.streaming import embed_clips
from byola_fast.evaluation.config import EvalConfig
from byola_fast.evaluation.evaluate import _task_stats
from byola_fast.evaluation.probe import fit_probe, headline, macro, truth_table
from byola_fast.evaluation.tasks import Task, read_task, rounds

RIDGES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3)
# Groups that are left out together; all other groups of the task form one more set.
LEFT_OUT: dict[str, list[set[str]]] = {
    "gm_family": [{"fluidr3"}],
    "drum6": [{"glen"}, {"BJA_Pacific"}, {"lmms"}, {"artemio"}],
    "env10": [
        {"0ad-data"},
        {"megaglest-data"},
        {"minetest-data", "supertux-data"},
        {"tuxpaint-stamps-default", "scratch"},
        {"warzone2100-data", "gcompris-qt-data-audio"},
    ],
}

Rows = npt.NDArray[np.float32]
Plan = tuple[list[int], list[int]]


def embed(task: Task, audio: Path, encoder: torch.nn.Module, tests: bool) -> Rows:
    """Return ``(clips, d)``; NaN for the clips of the test part without ``tests``."""
    config, plain = EvalConfig(task="", workers=0), Embedder(encoder, stats=(0.0, 1.0))
    embedder = Embedder(encoder, stats=_task_stats(config, task, audio, plain)).eval()
    rows = np.full((len(task.file_names), embedder.feature_d), np.nan, np.float32)
    asked = [number for number, split in enumerate(task.splits) if tests or split != "test"]
    files = [audio / task.file_names[number] for number in asked]
    for piece in embed_clips(embedder, files, pad_sec=config.pad_sec, workers=0):
        if piece.error is not None:
            raise piece.error
        if piece.last:
            rows[asked[piece.number]] = piece.rows[0].numpy()
    return rows


def plans(task: Task, groups: list[str]) -> list[Plan]:
    """Return the clips to learn from and to ask about, once for each set that is left out."""
    if task.folds:
        return [(plan.train, plan.valid) for plan in rounds(task, 0)]
    sets = LEFT_OUT[task.name]
    sets = [*sets, set(groups) - set().union(*sets)]
    kept = [number for number, split in enumerate(task.splits) if split != "test"]
    return [([k for k in kept if groups[k] not in out], [k for k in kept if groups[k] in out]) for out in sets]


def validate(task: Task, rows: Rows, groups: list[str]) -> float:
    """Return the accuracy, in %, of ridge regression over all sets that are left out."""
    truth, right, asked = truth_table(task), np.zeros(len(RIDGES)), 0
    for learn, ask in plans(task, groups):
        mean, std = rows[learn].mean(0), rows[learn].std(0) + 1e-6
        x, y, centre = (rows[learn] - mean) / std, truth[learn].astype(np.float32), truth[learn].mean(0)
        sizes, axes = np.linalg.eigh(x.T @ x / len(learn))
        slopes, queries = axes.T @ (x.T @ (y - centre)) / len(learn), (rows[ask] - mean) / std @ axes
        for k, ridge in enumerate(RIDGES):
            answer = (queries @ (slopes / (sizes + ridge)[:, None]) + centre).argmax(1)
            right[k] += (answer == truth[ask].argmax(1)).sum()
        asked += len(ask)
    return float(100 * right.max() / asked)


def test(task: Task, rows: Rows) -> dict[str, float]:
    """Return accuracy and macro accuracy, in %, on the test part or over the folds."""
    found = [fit_probe(rows, task, plan) for plan in rounds(task, 0)]
    truth, scores = np.concatenate([one.truth for one in found]), np.concatenate([one.scores for one in found])
    return {"accuracy": 100 * headline(truth, scores, False), "macro": 100 * macro(truth, scores, False)}


def _encoder(name: str) -> torch.nn.Module:
    if not name.startswith("random:"):
        return load_encoder(name).encoder
    torch.manual_seed(int(name.partition(":")[2]))
    return make_encoder(COMMON["encoder"], feature_d=COMMON["feature_d"])


def main(arguments: list[str] | None = None) -> int:
    """Print a line for each encoder."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality.compare", description=__doc__.splitlines()[0])
    parser.add_argument("tasks", type=Path)
    parser.add_argument("encoders", nargs="+")
    parser.add_argument("--test", action="store_true", help="score on the tests: look once")
    parser.add_argument("--only", nargs="*", default=[*AUDIOSET], help="tasks")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    for name in options.encoders:
        encoder, scores = _encoder(name).eval(), {}
        for key in options.only:
            path = options.tasks / key / f"{key}.csv"
            task = read_task(path)[0]
            rows = embed(task, path.parent / "audio", encoder, options.test or bool(task.folds))
            with open(path, newline="", encoding="utf-8") as file:
                group = {line["file_name"]: line.get("group", "") for line in csv.DictReader(file)}
            groups = [group[each] for each in task.file_names]
            scores[key] = test(task, rows) if options.test else {"accuracy": validate(task, rows, groups)}
        mean = statistics.fmean(one["accuracy"] for one in scores.values())
        print(json.dumps({"encoder": name, "scores": scores, "mean": mean}), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
