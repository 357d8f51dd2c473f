"""The learning rate, as a function of the step alone."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from byola_fast.training.config import PretrainConfig


def learning_rate(config: PretrainConfig, step: int, total: int) -> float:
    """Return the learning rate of a step, numbered from 0: a rise from 0 over ``warmup_steps``, then the schedule.

    >>> [learning_rate(PretrainConfig(lr=1.0, warmup_steps=2), step, 10) for step in (0, 1, 2, 9)]
    [0.5, 1.0, 1.0, 1.0]
    >>> [round(learning_rate(PretrainConfig(lr=1.0, lr_schedule="cosine"), step, 4), 3) for step in range(4)]
    [1.0, 0.854, 0.5, 0.146]
    """
    assert config.lr is not None
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.lr_schedule == "constant":
        return config.lr
    done = (step - config.warmup_steps) / max(1, total - config.warmup_steps)
    return config.lr * (1 + math.cos(math.pi * min(1.0, done))) / 2


def set_learning_rate(optimizer: torch.optim.Optimizer, config: PretrainConfig, step: int, total: int) -> float:
    """Set the learning rate of a step, in place if it is a tensor, and return it."""
    lr = learning_rate(config, step, total)
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):  # a CUDA graph holds it
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr
    return lr
