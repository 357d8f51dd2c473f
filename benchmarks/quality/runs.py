"""The runs of the study of representations: one ``Study`` for each row of its tables.

All runs share ``COMMON``. Results are stored under the row's name and the seed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

COMMON: dict[str, Any] = {"preset": "byola-v1", "encoder": "AudioNTT2020", "feature_d": 512, "batch_size": 256}
SHORT, LONG = 300, 1000  # steps
WHOLE: dict[str, Any] = {"freq_scale": (1.0, 1.0), "time_scale": (1.0, 1.0), "virtual_crop_scale": (1.0, 1.0)}


@dataclass(frozen=True)
class Study:
    """One way to train.

    Attributes:
        name: key of the row.
        label: the row's text in tables.
        seeds: number of runs.
        scored: steps after which the encoder is evaluated; the last ends the run.
        settings: settings of ``PretrainConfig`` that override ``COMMON``.
        gpu: whether it takes too long for a CPU; then it runs on a GPU, or by name.
        paper: its score in Table II of BYOL-A (arXiv:2103.06695), a mean over other tasks, if it is there.
    """

    name: str
    label: str
    seeds: int = 1
    scored: tuple[int, ...] = (SHORT,)
    settings: tuple[tuple[str, Any], ...] = ()
    gpu: bool = False
    paper: float | None = None

    @property
    def steps(self) -> int:
        return self.scored[-1]


def _study(name: str, label: str, *, paper: float | None = None, **settings: Any) -> Study:
    return Study(name, label, settings=tuple(settings.items()), paper=paper)


BYOL = Study("byol-v1", "BYOL-A: log-mixup-exp, resize crop", seeds=3, scored=(100, SHORT, 600, LONG), paper=72.3)
# Segments of 32 frames instead of 96: three times the steps in the same time.
BYOL_SHORT = Study(
    "byol-short",
    "BYOL-A, segments of 0.31 s",
    seeds=3,
    scored=(SHORT, 600, LONG),
    settings=(("unit_sec", 0.31),),
)
SIMCLR_SHORT = Study(
    "simclr-short",
    "SimCLR's loss, segments of 0.31 s",
    seeds=3,
    scored=(SHORT, 600, LONG, 2000),
    settings=(("objective", "simclr"), ("unit_sec", 0.31)),
)
# The start of training: a random encoder whose BatchNorm has taken the statistics of the corpus.
START = Study(
    "start",
    "random weights, BatchNorm's statistics of this corpus",
    seeds=3,
    scored=(40,),
    settings=(("lr", 1e-9), ("batch_size", 64)),
)
ABLATIONS = [
    _study("no-mixup", "resize crop alone", mixup="none", paper=68.4),
    _study("no-crop", "log-mixup-exp alone", **WHOLE, paper=63.9),
    _study("neither", "neither (both views equal)", mixup="none", **WHOLE),
    _study("gaussian", "Gaussian noise instead of log-mixup-exp", mixup="gaussian"),
    _study("gaussian-alone", "Gaussian noise alone", mixup="gaussian", **WHOLE, paper=23.2),
    _study("linear", "linear instead of log mixing", mixup="linear"),
    _study("no-post-norm", "no post-normalisation", post_norm=False),
    _study("bicubic", "bicubic instead of bilinear", interpolation="bicubic"),
    _study("in-batch", "partners from the same batch, no memory", n_memory=0),
]
OBJECTIVES = [
    _study("simclr", "SimCLR's loss on the same views", objective="simclr"),
    _study("cola", "COLA: two segments, bilinear similarity", objective="cola"),
]
WIDE = Study(
    "byol-v1-2048",
    "BYOL-A, 2048-d, on a GPU",
    seeds=3,
    scored=(LONG, 3000, 10000, 30000),
    settings=(("feature_d", 2048),),
    gpu=True,
)
CURVES = [BYOL, BYOL_SHORT, SIMCLR_SHORT, WIDE]
STUDIES = {study.name: study for study in [START, *CURVES, *ABLATIONS, *OBJECTIVES]}

# The same kind of network trained with BYOL-A on AudioSet (5,000 hours), under the same protocol: the goal.
AUDIOSET = {"fsdd": 65.4, "drum6": 71.1, "env10": 47.6, "gm_family": 68.8}
