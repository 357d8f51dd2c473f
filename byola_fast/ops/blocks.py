"""The public op of the encoders' blocks: contract and plain PyTorch here, the kernels' arithmetic in the backends."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from byola_fast.ops import _checks as check
from byola_fast.ops._joint_blocks import joint_conv_block
from byola_fast.ops._route import has_kernels

__all__ = ["conv_block"]

POOL_BY_WINDOWS = tuple(int(number) for number in torch.__version__.split(".")[:2]) < (2, 14)
MAX_POSITIONS = 2**31  # kernels count positions of all images in int32


def conv_block(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gamma: Tensor,
    beta: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    num_batches_tracked: Tensor | None = None,
    *,
    training: bool,
    momentum: float | None = 0.1,
    eps: float = 1e-5,
    group: Any = None,
) -> Tensor:
    """Convolve 3 x 3, normalise by BatchNorm, clip by ReLU, and pool the maximum of 2 x 2.

    ``y = conv(x, weight) + bias``; ``z = gamma r (y - mean) + beta``, ``r = 1 / sqrt(var + eps)``;
    ``out = relu(max of z over 2 x 2)``. With g the gradient at the maxima that ReLU passes, N positions, sums over all
    positions of a channel, ``a = gamma r``:

    - of beta ``sum g``; of gamma ``D = r sum g (y - mean)``;
    - of y ``a g - a / N (sum g + D r (y - mean))``, hence of bias 0; with running statistics ``a g`` and ``a sum g``.

    One input channel is never convolved into memory. With p the 3 x 3 patch at each position (zeros outside),
    ``mu = E[p]``, ``S = E[p p'] - mu mu'`` and w the weights of a channel: ``mean = w . mu + bias``, ``var = w' S w``;
    ``S0 = sum g`` and ``S1 = sum g p``: of gamma ``D = r (w . S1 - w . mu S0)``, of w ``a (S1 - S0 mu - D r S w)``.

    Args:
        x: images, (mels, frames) in the encoders.
        weight: of the convolution, with padding 1. bias: its bias, or None.
        gamma: weight of BatchNorm. beta: its bias.
        running_mean: running statistics, or None to normalise by the batch always. In training ``running_mean``,
            ``running_var`` and ``num_batches_tracked`` are updated in place, as ``nn.BatchNorm2d`` does.
        training: normalise by the batch; else by the running statistics.
        momentum: weight of the batch in the running statistics; None for the mean over all batches.
        eps: added to the variance.
        group: a process group of torch.distributed over whose batches, of at least one image each, statistics are taken
            in training, as ``nn.SyncBatchNorm`` does; None for the own batch.

    Shape:
        x ``(B, C', F, T)``, weight ``(C, C', 3, 3)``, the others ``(C,)``; ``(B, C, F // 2, T // 2)``, channels-last
        from the kernels, in the dtype of x, or autocast's.

    Raises:
        ValueError: shapes that do not match; in training a batch of one position. TypeError: x is not floating-point.
        RuntimeError: images without a window.

    Numerics:
        Half precision is computed in float32. Under autocast one input channel is convolved in float32, and rounded
        when pooled. Kernels round each value once, after the maximum; plain PyTorch rounds after each layer. So they
        differ by rounding, and where two values of a window are equal within it, the gradient may go to the other.
        Ties go to the first. NaN and inf pass as in PyTorch. Our sums have a fixed order. As in PyTorch, cuDNN
        convolves float32 in TF32 unless ``torch.backends.cudnn.allow_tf32`` is False; not so one input channel. On
        the CPU more input channels are convolved by Winograd's algorithm, in float32 to 1e-6 of a channel's spread.

    Autograd:
        To x, weight, bias, gamma and beta, once differentiable. With ``group`` the sum over its processes is the
        gradient of the sum of their losses.

    Backends:
        C++ on the CPU, which stores no convolution unless a gradient is needed. Triton on CUDA, with cuDNN's
        convolution for more than one input channel. Plain PyTorch elsewhere, in exported graphs and in ``torch.func``,
        and with ``group`` for more than one input channel.

    Source:
        BYOL-A, arXiv:2103.06695, a block of its encoder; batch normalisation, arXiv:1502.03167; Winograd's convolution,
        arXiv:1509.09308.

    >>> x, weight, one = torch.zeros(2, 1, 6, 8), torch.zeros(4, 1, 3, 3), torch.ones(4)
    >>> conv_block(x, weight, None, one, one, training=True).shape
    torch.Size([2, 4, 3, 4])
    """
    check.require_float("x", x)
    check.require_shape("x", x, ("B", "C'", "F", "T"))
    channels = weight.shape[0]
    check.require_shape("weight", weight, (channels, x.shape[1], 3, 3))
    for name, values in (("bias", bias), ("gamma", gamma), ("beta", beta), ("running_mean", running_mean)):
        if values is not None:
            check.require_shape(name, values, (channels,))
    tracked = running_mean is not None and running_var is not None
    if training and group is not None:
        updates = x.new_zeros((), dtype=torch.int64) if num_batches_tracked is None else num_batches_tracked
        state: Any = (running_mean, running_var, updates) if tracked else None
        by_patches = x.shape[1] == 1 and not x.requires_grad and has_kernels(x) and _fits(x, weight)
        given = (x, weight, bias, gamma, beta, state, momentum, eps, _result_dtype(x))
        return joint_conv_block(*given, group, by_patches)
    if not has_kernels(x) or not _fits(x, weight) or (tracked and num_batches_tracked is None):
        return _plain(
            x, weight, bias, gamma, beta, running_mean, running_var, num_batches_tracked, training, momentum, eps
        )
    by_batch = training or not tracked
    known = (None, None) if by_batch else (running_mean, running_var)
    ops = torch.ops.byola_fast
    leaves = (x, weight, gamma, beta) if bias is None else (x, weight, bias, gamma, beta)
    keep = torch.is_grad_enabled() and any(t.requires_grad for t in leaves)
    out, _which, _kept, stats = ops.conv_block(x, weight, bias, gamma, beta, *known, eps, _result_dtype(x), keep)
    if training and tracked:
        count = x.shape[0] * x.shape[2] * x.shape[3]
        ops.batch_norm_running_(running_mean, running_var, num_batches_tracked, stats, count, momentum)
    return out


def _result_dtype(x: Tensor) -> torch.dtype:
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


def _fits(x: Tensor, weight: Tensor) -> bool:
    """Return whether the kernels take the sizes and dtypes; PyTorch serves or refuses the rest."""
    batch, _inputs, rows, columns = x.shape
    same = weight.dtype == x.dtype or torch.is_autocast_enabled(x.device.type)
    return same and batch > 0 and rows > 1 and columns > 1 and batch * rows * columns < MAX_POSITIONS


def _plain(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gamma: Tensor,
    beta: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    training: bool,
    momentum: float | None,
    eps: float,
) -> Tensor:
    """Return the same by PyTorch's layers.

    ReLU after the maximum gives the same bits and is a quarter of the work. Running statistics are folded into the
    convolution's weights, which changes rounding only.
    """
    if training or running_mean is None or running_var is None:
        weight_of_batch = momentum or 0.0
        if training and running_mean is not None and num_batches_tracked is not None:
            num_batches_tracked.add_(1)
            if momentum is None:
                weight_of_batch = 1.0 / float(num_batches_tracked)
        y = F.conv2d(x, weight, bias, padding=1)
        y = F.batch_norm(y, running_mean, running_var, gamma, beta, True, weight_of_batch, eps)
    else:
        scale = gamma * (running_var + eps).rsqrt()
        shift = beta - running_mean * scale if bias is None else (bias - running_mean) * scale + beta
        y = F.conv2d(x, weight * scale[:, None, None, None], shift, padding=1)
    return F.relu(_halve(y))


def _halve(x: Tensor) -> Tensor:
    """MaxPool2. Under export by windows: torch before 2.14 specialises its own to even or odd sizes."""
    if not (torch.compiler._is_exporting_flag and POOL_BY_WINDOWS):
        return F.max_pool2d(x, 2)
    return x.unfold(2, 2, 2).unfold(3, 2, 2).amax((4, 5))
