"""``conv_block`` with BatchNorm's statistics over the processes of a group, as ``nn.SyncBatchNorm`` has them.

A process adds one row to the statistics: its count, mean and sum of squares around it. Rows are gathered, and the
gradient of each row summed over the processes. One input channel needs neither its convolution nor that sum: the joint
moments of the patches are the same for all processes, and the statistics follow from them and the own weights.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from byola_fast.ops.conv_reference import batch_norm_running__reference, second_moments
from byola_fast.ops.reference import compute_dtype


def joint_conv_block(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gamma: Tensor,
    beta: Tensor,
    state: tuple[Tensor, Tensor, Tensor] | None,
    momentum: float | None,
    eps: float,
    dtype: torch.dtype,
    group: Any,
    by_patches: bool,
) -> Tensor:
    """Return ``conv_block`` in training, and update the running statistics.

    ``by_patches``: for one input channel without a gradient.
    """
    # BatchNorm takes the bias off again: it gets zeros as gradient, so that hooks that wait for it are called
    beta = beta if bias is None else beta + 0 * bias
    if by_patches:
        mean, variance, count = _of_patches(x, weight, group)
        out = torch.ops.byola_fast.conv_block(x, weight, None, gamma, beta, mean, variance, eps, dtype)[0]
    else:
        y = F.conv2d(x, weight, padding=1)
        y = y.to(compute_dtype(y.dtype))
        mean, variance, count = _of_values(y, group)
        a = gamma * (variance + eps).rsqrt()
        z = (y - mean.to(y.dtype)[:, None, None]) * a.to(y.dtype)[:, None, None] + beta.to(y.dtype)[:, None, None]
        out = F.relu(F.max_pool2d(z, 2)).to(dtype)
    if state is not None:
        with torch.no_grad():
            mean = mean if bias is None else mean + bias
            stats = torch.stack([mean, mean, mean, variance])
            batch_norm_running__reference(*state, stats, count, momentum)
    return out


def _of_values(y: Tensor, group: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Return mean and variance (C,) of all processes' ``y``, and the number of values; with a gradient to y."""
    count = y.numel() // y.shape[1]
    mean = y.sum((0, 2, 3)) / max(count, 1)
    squares = (y - mean[:, None, None]).square().sum((0, 2, 3))
    rows = _gather(torch.cat([mean.new_full((1,), count), mean, squares]).double(), group)
    counts, means, squares = rows.split([1, y.shape[1], y.shape[1]], 1)
    total = counts.sum()
    mean = (counts * means).sum(0) / total
    return mean, (squares + counts * (means - mean).square()).sum(0) / total, total


def _of_patches(x: Tensor, weight: Tensor, group: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Return the same of one input channel's convolution; with a gradient to the weights."""
    with torch.no_grad():
        one = weight.new_ones(1)  # the moments do not depend on the weights: one channel is enough
        moments = torch.ops.byola_fast.conv_block(x, weight[:1], None, one, one, None, None, 1.0, x.dtype)[2]
        rows = _gather(torch.cat([moments.new_full((1,), x.numel()), moments]), group)
        counts, total = rows[:, 0], rows[:, 0].sum()
        of_pairs = torch.stack([second_moments(row[1:]) for row in rows])
        means, anchors = of_pairs[:, 9, :9], rows[:, -1:]
        covariances = of_pairs[:, :9, :9] - means[:, :, None] * means[:, None]
        shares = counts / total
        mean = shares @ (means + anchors)
        off = means + anchors - mean
        covariance = torch.tensordot(shares, covariances + off[:, :, None] * off[:, None], 1)
    flat = weight.double().flatten(1)
    return flat @ mean, (flat @ covariance * flat).sum(1).clamp_min(0), total


def _gather(row: Tensor, group: Any) -> Tensor:
    """Return the rows of all processes: ``(n,)`` to ``(processes, n)``."""
    # torch.compile traces these, and their backward, which sums over the processes
    from torch.distributed import _functional_collectives as collectives

    names = ("all_gather_single_autograd", "all_gather_tensor_autograd")  # since torch 2.14, and before
    all_gather = next(getattr(collectives, name) for name in names if hasattr(collectives, name))
    rows: Tensor = all_gather(row[None].contiguous(), 0, group)
    return rows
