"""The definition of ``conv_block`` in plain PyTorch, and of its gradients by their formulas; see ``reference``."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def _compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _channels_last(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last).copy_(x)


def _convolve(x: Tensor, weight: Tensor) -> Tensor:
    with torch.autocast(x.device.type, enabled=False):
        return F.conv2d(x, weight, padding=1)


def _per_channel(values: Tensor) -> Tensor:
    return values[:, None, None]


def conv_block_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gamma: Tensor,
    beta: Tensor,
    mean: Tensor | None,
    variance: Tensor | None,
    eps: float,
    dtype: torch.dtype,
    keep: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return out, which, kept and stats; ``mean`` and ``variance``: running statistics, or None for the batch's.

    Without ``keep``, which and kept are empty, and there is no backward pass.

    which: where each maximum was, 0 to 3 in reading order, 4 where ReLU clipped it. kept: the convolution's output
    without bias; of one input channel, which is convolved again, the moments of its patches (``patch_moments``).
    stats (4, C): centre (the mean without bias, for one channel of the input less its anchor), 1 / std, mean, variance.
    """
    compute = _compute_dtype(x.dtype)
    bias = gamma.new_zeros(len(gamma)) if bias is None else bias
    kept = torch.zeros(56, dtype=torch.float64, device=x.device)
    if x.shape[1] == 1:
        y = _convolve(x.to(compute), weight.to(compute))
        if mean is None:
            kept = patch_moments(x)
    else:
        y = _convolve(x.to(dtype), weight.to(dtype))
        kept, y = _channels_last(y), y.to(compute)
    if mean is not None and variance is not None:
        centre = mean.to(compute) - bias.to(compute)
        mean, variance = mean.to(compute), variance.to(compute)
    elif x.shape[1] == 1:
        patches, of_anchor = second_moments(kept), kept[55] * weight.double().sum((1, 2, 3))
        flat = weight.double().flatten(1)
        centre = flat @ patches[9, :9]
        extended = torch.cat([flat, -centre[:, None]], 1)
        variance = (extended @ patches * extended).sum(1).clamp_min(0).to(compute)
        mean = (centre + of_anchor + bias).to(compute)
        centre = centre.to(compute)
    else:
        variance, centre = torch.var_mean(y, (0, 2, 3), correction=0)
        mean = centre + bias.to(compute)
    stats = torch.stack([centre, (variance + eps).rsqrt(), mean, variance])
    without_bias = _per_channel(mean - bias.to(compute))
    z = (y - without_bias) * _per_channel(gamma.to(compute) * stats[1]) + _per_channel(beta.to(compute))
    rows, columns = z.shape[2] // 2, z.shape[3] // 2
    windows = z[:, :, : 2 * rows, : 2 * columns].unflatten(3, (-1, 2)).unflatten(2, (-1, 2))
    largest, place = windows.transpose(3, 4).flatten(4).max(4)  # the first of equal ones
    which = torch.where(largest <= 0, 4, place).to(torch.uint8)
    which = _channels_last(which)
    if not keep:
        which, kept = which.new_empty(0), kept.new_empty(0)
    return _channels_last(F.relu(largest).to(dtype)), which, kept, stats


def patch_moments(x: Tensor) -> Tensor:
    """Return E[q_i q_j], i >= j, of q = (p - anchor, 1) for all 3 x 3 patches p of ``x (B, 1, F, T)``; anchor (56)."""
    anchor = x.double().mean()
    patches = F.unfold(x.double(), 3, padding=1) - anchor
    q = F.pad(patches.transpose(1, 2).flatten(0, 1), (0, 1), value=1)
    i, j = torch.tril_indices(10, 10, device=x.device)
    return torch.cat([(q.T @ q / len(q))[i, j], anchor[None]])


def second_moments(kept: Tensor) -> Tensor:
    """Return the symmetric ``(10, 10)`` of the moments."""
    i, j = torch.tril_indices(10, 10, device=kept.device)
    full = kept.new_zeros(10, 10)
    full[i, j] = full[j, i] = kept[:55]
    return full


def conv_block_backward_reference(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    gamma: Tensor,
    which: Tensor,
    kept: Tensor,
    stats: Tensor,
    frozen: bool,
    needs_x: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of x (empty if not needed), weight, bias, gamma and beta; ``frozen``: running statistics.

    With g the gradient at the maxima, N positions and r = 1 / std: S0 = sum g; of gamma D = r sum g (y - centre);
    of the convolution a g - (a / N) (S0 + D r (y - centre)), a = gamma r; frozen: a g alone.
    """
    compute = stats.dtype
    rows, columns = x.shape[2:]
    here = which[..., None] == torch.arange(4, device=x.device)
    g = torch.where(here, grad.to(compute)[..., None], 0).unflatten(4, (2, 2)).transpose(3, 4).flatten(4).flatten(2, 3)
    g = F.pad(g, (0, columns - g.shape[3], 0, rows - g.shape[2]))
    one = x.shape[1] == 1
    wide_x, wide = (x.to(compute), weight.to(compute)) if one else (x.to(kept.dtype), weight.to(kept.dtype))
    y = _convolve(wide_x, wide) - _per_channel(kept[55] * weight.double().sum((1, 2, 3))).to(compute) if one else kept
    centred, r = y.to(compute) - _per_channel(stats[0]), stats[1]
    total, of_gamma = g.sum((0, 2, 3)), r * (g * centred).sum((0, 2, 3))
    a, count = gamma.to(compute) * r, len(x) * rows * columns
    of_y = _per_channel(a) * g
    if not frozen:
        of_y = of_y - _per_channel(a / count) * (_per_channel(total) + _per_channel(of_gamma * r) * centred)
    of_x, of_weight, _ = torch.ops.aten.convolution_backward(
        of_y.to(wide.dtype), wide_x, wide, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1, [needs_x, True, False]
    )
    to_x = _channels_last(of_x.to(x.dtype) if needs_x else x.new_empty(0, 1, 1, 1))
    to_bias = a * total if frozen else torch.zeros_like(total)
    to_bias, to_gamma, to_beta = (values.to(gamma.dtype) for values in (to_bias, of_gamma, total))
    return to_x, torch.empty_like(weight).copy_(of_weight), to_bias, to_gamma, to_beta


def batch_norm_running__reference(
    mean: Tensor, variance: Tensor, updates: Tensor, stats: Tensor, count: int | Tensor, momentum: float | None
) -> None:
    """Move running statistics to those of a batch of ``count`` values, as ``nn.BatchNorm2d`` does; count the update.

    ``momentum`` None: the mean over all updates.
    """
    updates.add_(1)
    weight = 1 / updates if momentum is None else momentum
    mean += weight * (stats[2].to(mean.dtype) - mean)
    variance += weight * (stats[3].to(variance.dtype) * (count / (count - 1)) - variance)
