"""Objectives by name: one call from a word to a learner."""

from __future__ import annotations

from typing import Any

from torch import nn

from byola_fast.objectives.byol import BYOL
from byola_fast.objectives.contrastive import COLA, MoCo, SimCLR
from byola_fast.objectives.learner import Learner
from byola_fast.ops import _checks as check

LEARNERS: dict[str, type[Learner]] = {"byol": BYOL, "simclr": SimCLR, "moco": MoCo, "cola": COLA}

# Settings that each takes. Widths and the average are the trainer's common settings, passed over where there is no use
# for them; the others are meant for one objective, and refused elsewhere.
COMMON = ("proj_size", "proj_dim", "ema_decay", "ema_buffers")
TAKEN = {
    "byol": (*COMMON, "joint_batch"),
    "simclr": ("proj_size", "proj_dim", "temperature", "joint_batch", "gather"),
    "moco": (*COMMON, "temperature", "queue_size", "gather"),
    "cola": ("proj_size", "joint_batch", "gather"),
}


def make_learner(
    objective: str,
    encoder: nn.Module,
    *,
    proj_size: int | None = None,
    proj_dim: int | None = None,
    ema_decay: Any = None,
    ema_buffers: str | None = None,
    temperature: float | None = None,
    queue_size: int | None = None,
    joint_batch: bool | None = None,
    gather: bool | None = None,
) -> Learner:
    """Return what trains an encoder: a ``Learner`` with ``learner(view1, view2) -> Output(loss, projection)``.

    Every setting left None is the objective's published one:

        objective  loss                                   proj_size  proj_dim  ema_decay  temperature  queue_size
        byol       2 - 2 cos(q, z'), both ways            256        4096      0.99
        simclr     NT-Xent over both views of the batch   256        4096                 0.1
        moco       InfoNCE against a queue of past keys   256        4096      0.999      0.07         65536
        cola       bilinear similarity of two segments    512

    Args:
        objective: "byol", "simclr", "moco" or "cola".
        encoder: any module that maps a view to ``(B, feature_d)`` and has an attribute ``feature_d``.
        proj_size: width of the projection.
        proj_dim: hidden width of projector and predictor.
        ema_decay: share of the target network kept at each step, in [0, 1], or what else ``EMA`` takes.
        ema_buffers: "none", "copy" or "ema"; see ``EMA``.
        temperature: of the softmax, above 0; simclr and moco only.
        queue_size: past keys; moco only.
        joint_batch: both views as one batch through each network; not moco, whose views have a network each.
        gather: under torch.distributed, negatives (moco: keys) from all ranks; on where None.

    Raises:
        ValueError: an unknown objective; a setting that it has no use for (``proj_dim`` and the average's are passed
        over instead, as every run has them); a value out of range. TypeError: no ``feature_d``.

    >>> from byola_fast.networks.encoders import AudioNTT2020
    >>> type(make_learner("simclr", AudioNTT2020(d=32), proj_size=16, proj_dim=64)).__name__
    'SimCLR'
    """
    check.require_one_of("objective", objective, tuple(LEARNERS))
    settings: dict[str, Any] = {
        "proj_size": proj_size,
        "proj_dim": proj_dim,
        "ema_decay": ema_decay,
        "ema_buffers": ema_buffers,
        "temperature": temperature,
        "queue_size": queue_size,
        "joint_batch": joint_batch or None,
        "gather": gather,
    }
    given = {name: value for name, value in settings.items() if value is not None}
    taken = TAKEN[objective]
    if useless := [name for name in given if name not in taken and name not in COMMON and name != "gather"]:
        raise ValueError(f"{useless[0]}: objective {objective!r} has no use for it, got {given[useless[0]]!r}")
    for name in ("proj_size", "proj_dim"):
        if given.get(name, 1) < 1:
            raise ValueError(f"{name}: expected at least 1, got {given[name]}")
    return LEARNERS[objective](encoder, **{name: value for name, value in given.items() if name in taken})
