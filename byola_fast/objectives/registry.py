"""Learners by name."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

from byola_fast.objectives.byol import BYOL
from byola_fast.objectives.contrastive import COLA, MoCo, SimCLR
from byola_fast.objectives.learner import Learner
from byola_fast.runtime.plugins import find_class

LEARNERS: dict[str, type[Learner]] = {"byol": BYOL, "simclr": SimCLR, "moco": MoCo, "cola": COLA}

# settings of every run, which a learner without a use for them passes over
COMMON = ("proj_size", "proj_dim", "ema_decay", "ema_buffers", "gather")


def find_learner(objective: str | type[Learner]) -> type[Learner]:
    """Return the class of an objective: by its name, ``"package.module:Class"``, or the class itself.

    Raises:
        ValueError: an unknown name, or no subclass of ``Learner``.

    >>> find_learner("cola").segments
    2
    """
    found = find_class("objective", objective, LEARNERS)
    if not issubclass(found, Learner):
        raise ValueError(f"objective: expected a subclass of byola_fast.Learner, got {found.__name__}")
    return found


def default_of(learner: type[Learner], setting: str) -> object:
    """Return a learner's own default of a setting; None if it has none.

    >>> default_of(MoCo, "ema_decay"), default_of(SimCLR, "ema_decay")
    (0.999, None)
    """
    parameter = inspect.signature(learner).parameters.get(setting)
    return None if parameter is None or parameter.default is parameter.empty else parameter.default


def make_learner(
    objective: str | type[Learner],
    encoder: nn.Module,
    *,
    proj_size: int | None = None,
    proj_dim: int | None = None,
    ema_decay: Any = None,
    ema_buffers: str | None = None,
    temperature: float | None = None,
    queue_size: int | None = None,
    reconstruction: float | None = None,
    joint_batch: bool | None = None,
    gather: bool | None = None,
) -> Learner:
    """Return a ``Learner`` for an encoder: ``learner(view1, view2) -> Output(loss, projection)``.

    byol and simclr also take a list of local views: ``learner(view1, view2, local_views)``.

    Settings left None have the published values:

        objective  loss                                   proj_size  proj_dim  ema_decay  temperature  queue_size
        byol       2 - 2 cos(q, z'), both ways            256        4096      0.99
        simclr     NT-Xent over both views of the batch   256        4096                 0.1
        moco       InfoNCE against a queue of past keys   256        4096      0.999      0.07         65536
        cola       bilinear similarity of two segments    512

    Args:
        objective: "byol", "simclr", "moco" or "cola"; or your own subclass of ``Learner``, as the class or its name
            ``"package.module:Class"``. It is given the encoder and those of these settings that its constructor names.
        encoder: any module that maps a view to ``(B, feature_d)`` and has an attribute ``feature_d``.
        proj_size: width of the projection.
        proj_dim: hidden width of projector and predictor.
        ema_decay: share of the target network kept at each step, in [0, 1], or what else ``EMA`` takes.
        ema_buffers: "none", "copy" or "ema"; see ``EMA``.
        temperature: of the softmax, above 0; simclr and moco only.
        queue_size: past keys; moco only.
        reconstruction: weight of a decoder's error beside the loss; simclr only, by default 0.
        joint_batch: pass both views through each network as one batch; not for moco.
        gather: under torch.distributed, negatives (moco: keys) from all ranks; on by default.

    Raises:
        ValueError: an unknown objective; a setting that it does not have (the common ones, such as ``proj_dim``, are
        passed over instead, as every run has them); a value out of range; a class that is no ``Learner``. TypeError: no
        ``feature_d``.

    >>> from byola_fast.networks.encoders import AudioNTT2020
    >>> type(make_learner("simclr", AudioNTT2020(d=32), proj_size=16, proj_dim=64)).__name__
    'SimCLR'
    """
    learner = find_learner(objective)
    settings: dict[str, Any] = {
        "proj_size": proj_size,
        "proj_dim": proj_dim,
        "ema_decay": ema_decay,
        "ema_buffers": ema_buffers,
        "temperature": temperature,
        "queue_size": queue_size,
        "reconstruction": reconstruction,
        "joint_batch": joint_batch or None,
        "gather": gather,
    }
    given = {name: value for name, value in settings.items() if value is not None}
    taken = inspect.signature(learner).parameters
    if useless := [name for name in given if name not in taken and name not in COMMON]:
        raise ValueError(f"{useless[0]}: objective {objective!r} has no use for it, got {given[useless[0]]!r}")
    for name in ("proj_size", "proj_dim"):
        if given.get(name, 1) < 1:
            raise ValueError(f"{name}: expected at least 1, got {given[name]}")
    build: Any = learner
    made: Learner = build(encoder, **{name: value for name, value in given.items() if name in taken})
    return made
