"""Does it learn? A linear probe on a small labelled task, scored while the encoder trains."""

from __future__ import annotations

import copy
import logging
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from byola_fast.embedding.embedder import Embedder
from byola_fast.embedding.streaming import embed_clips
from byola_fast.evaluation.probe import fit_probe, headline
from byola_fast.evaluation.tasks import Round, Task, TaskError, read_task, rounds
from byola_fast.spectrograms.log_mel import LogMel

logger = logging.getLogger("byola_fast")

PAD_SEC = 0.95  # as in eval


class Probe:
    """A labelled task that an encoder is scored on every so many steps.

    A probe is fitted as in ``byola-fast eval`` and scored on the split valid, on one fold left out, or else on a fifth
    of train. Clips of the split test are never read.

    Args:
        path: CSV file of the task; its audio lies in the folder "audio" beside it, or beside it.
        every: steps between two scores.
        best: step and score of the best encoder so far.
        workers: processes that decode.

    Raises:
        ImportError: scikit-learn is missing. TaskError: as ``read_task``; missing clips, or too few to score.
    """

    def __init__(
        self, path: str | Path, every: int, *, best: tuple[int, float] | None = None, workers: int | None = None
    ) -> None:
        import sklearn  # noqa: F401  # missing at the start, not after hours

        self.every, self.best, self.workers = every, best, workers
        whole, _notes = read_task(path)
        self.task, self.plan = _without_test(whole)
        beside = Path(path).parent
        folder = beside / "audio" if (beside / "audio").is_dir() else beside
        self.files = [folder / name for name in self.task.file_names]
        if missing := [file for file in self.files if not file.is_file()]:
            raise TaskError(f"{path}: {len(missing)} of {len(self.files)} clips missing, first {missing[0]}")

    def due(self, step: int, total: int) -> bool:
        """Return whether the encoder is scored after this step."""
        return step % self.every == 0 or step == total

    def __call__(self, encoder: nn.Module, stats: tuple[float, float] | None, to_lms: LogMel) -> float | None:
        """Return the accuracy (or mean average precision) of an encoder; None, with a warning, if that fails."""
        import numpy as np

        try:
            embedder = Embedder(copy.deepcopy(encoder), stats=stats or (0.0, 1.0), to_lms=to_lms)
            embedder.eval().requires_grad_(False)
            rows = np.full((len(self.files), embedder.feature_d), np.nan, np.float32)
            pieces = embed_clips(embedder, self.files, pad_sec=PAD_SEC, workers=self.workers)
            with closing(pieces):
                for piece in pieces:
                    if piece.error is not None:
                        raise piece.error
                    rows[piece.number] = piece.rows[0].numpy()
            found = fit_probe(rows, self.task, self.plan)
            return headline(found.truth, found.scores, self.task.multi_label)
        except Exception as error:  # a score is worth no run
            logger.warning("no score of the probe: %s: %s", type(error).__name__, error)
            return None

    def is_best(self, step: int, score: float | None) -> bool:
        """Return whether a score is the best so far, and keep it."""
        better = score is not None and (self.best is None or score > self.best[1])
        if better and score is not None:
            self.best = step, score
        return better


def _without_test(task: Task) -> tuple[Task, Round]:
    """Return a task without its test clips, and the round whose test clips are those of valid, or of one fold."""
    scored = task.folds[0] if task.folds else "valid" if "valid" in task.splits else "test"
    kept = task if task.folds else task.without({k for k, split in enumerate(task.splits) if split == "test"})
    parts: list[Any] = ["test" if split == scored else "train" for split in kept.splits]
    (plan,) = rounds(replace(kept, splits=parts, folds=[]), seed=0)
    if not plan.test:  # no split valid: the fifth of train that would choose C is scored, and another one chooses
        held_out = set(plan.valid)
        parts = ["test" if number in held_out else "train" for number in range(len(parts))]
        (plan,) = rounds(replace(kept, splits=parts, folds=[]), seed=0)
    if not (plan.train and plan.valid and plan.test):
        raise TaskError(f"{task.name}: too few clips to fit and score a probe on without the split test")
    return replace(kept, splits=parts, folds=[]), plan
