"""The learning rate, as a function of the step alone."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from byola_fast.training.config import PretrainConfig


def learning_rate(config: PretrainConfig, step: int, total: int, base: float | None = None) -> float:
    """Return the learning rate of a step, numbered from 0: a rise from 0 over ``warmup_steps``, then the schedule.

    Args:
        config: resolved settings.
        step: from 0.
        total: steps of the run.
        base: the learning rate that the schedule begins with; by default the settings'.

    >>> [learning_rate(PretrainConfig(lr=1.0, warmup_steps=2), step, 10) for step in (0, 1, 2, 9)]
    [0.5, 1.0, 1.0, 1.0]
    >>> [round(learning_rate(PretrainConfig(lr=1.0, lr_schedule="cosine"), step, 4), 3) for step in range(4)]
    [1.0, 0.854, 0.5, 0.146]
    """
    base = config.lr if base is None else base
    assert base is not None
    if step < config.warmup_steps:
        return base * (step + 1) / config.warmup_steps
    if config.lr_schedule == "constant":
        return base
    done = (step - config.warmup_steps) / max(1, total - config.warmup_steps)
    return base * (1 + math.cos(math.pi * min(1.0, done))) / 2


def set_learning_rate(
    optimizer: torch.optim.Optimizer, bases: Sequence[float], config: PretrainConfig, step: int, total: int
) -> float:
    """Set the learning rate of a step in each group, in place if it is a tensor, and return the first group's.

    Args:
        optimizer: whose groups change.
        bases: learning rate of each group before the first step.
        config, step, total: as for ``learning_rate``.
    """
    rates = [learning_rate(config, step, total, base) for base in bases]
    for group, lr in zip(optimizer.param_groups, rates, strict=True):
        if isinstance(group["lr"], Tensor):  # a CUDA graph holds it
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr
    return rates[0]
