# mypy: ignore-errors
"""Convolution 3 x 3, BatchNorm, ReLU, max pooling 2 x 2, and their gradients; see ``ops.conv_block`` for the formulas.

One input channel: the kernels in ``first_conv``. More: those in ``norm_pool`` after the library's convolution, without
the bias, which BatchNorm takes off again; its output is read once for the statistics and once to normalise, clip and
pool, which writes a quarter and one byte for each pooled value. Backward reads gradient, byte and the maxima for the
two sums, then writes the convolution's incoming gradient in one pass. Everything is channels-last: a row of channels
belongs to one position.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from byola_fast.ops._triton import first_conv, norm_pool
from byola_fast.ops._triton.shared import INTERPRETED, compute_type, launch, on_device, resident_programs
from byola_fast.ops.reference import batch_norm_running__reference, compute_dtype

CHANNELS = 64  # of a tile at most
FEW = 4  # channels of a program that adds up partial sums
ROWS = 256  # of partial sums at a time
PATCHES = 512 if INTERPRETED else 128
FIRST_PIXELS = 256 if INTERPRETED else 16
PIXELS = 256 if INTERPRETED else 16
POSITIONS = 512 if INTERPRETED else 64


def conv_block(
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
    batch, inputs, rows, columns = x.shape
    channels = len(weight)
    shape = (batch, channels, rows // 2, columns // 2)
    out = torch.empty(shape, dtype=dtype, device=x.device, memory_format=torch.channels_last)
    places = torch.empty(shape, dtype=torch.uint8, device=x.device, memory_format=torch.channels_last) if keep else None
    stats = torch.empty(4, channels, dtype=compute_dtype(x.dtype), device=x.device)
    gamma, beta, bias = gamma.contiguous(), beta.contiguous(), None if bias is None else bias.contiguous()
    pooled = batch * shape[2] * shape[3]
    block = _block(channels)
    with on_device(x):
        if mean is not None:
            launch(
                norm_pool.frozen_stats_kernel,
                triton.cdiv(channels, CHANNELS),
                mean.contiguous(),
                variance.contiguous(),
                bias,
                stats,
                channels,
                eps,
                BLOCK=CHANNELS,
                num_warps=1,
            )
        if inputs == 1:
            x, weight = x.contiguous(), weight.contiguous()
            if mean is None:
                kept = _first_stats(x, weight, bias, stats, eps)
            else:
                kept = torch.zeros(56, dtype=torch.float64, device=x.device)
            launch(
                first_conv.first_forward_kernel,
                _programs(x, pooled, FIRST_PIXELS, channels, 3),
                x,
                weight,
                gamma,
                beta,
                stats,
                kept,
                out,
                places,
                pooled,
                rows,
                columns,
                channels,
                COMPUTE=compute_type(x.dtype),
                PIXELS=FIRST_PIXELS,
                CHANNELS=block,
            )
            return _results(out, places, kept, stats)
        y = _convolve(x.to(dtype), weight.to(dtype))
        if mean is None:
            _channel_stats(y, bias, stats, eps)
        launch(
            norm_pool.pool_kernel,
            triton.cdiv(pooled, PIXELS) * triton.cdiv(channels, block),
            y,
            gamma,
            beta,
            stats,
            out,
            places,
            pooled,
            rows,
            columns,
            channels,
            COMPUTE=compute_type(x.dtype),
            PIXELS=PIXELS,
            CHANNELS=block,
        )
    return _results(out, places, y, stats)


def _results(out: Tensor, places: Tensor | None, kept: Tensor, stats: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return what the op does; without places nothing is kept."""
    if places is None:
        return out, out.new_empty(0, dtype=torch.uint8), kept.new_empty(0), stats
    return out, places, kept, stats


def _first_stats(x: Tensor, weight: Tensor, bias: Tensor | None, stats: Tensor, eps: float) -> Tensor:
    """Fill the statistics of one input channel; return the moments of its patches and the anchor (56)."""
    total, (rows, columns), channels = x.numel(), x.shape[2:], len(weight)
    programs = min(triton.cdiv(total, PATCHES), resident_programs(x, 3))
    partials = torch.empty(programs, 64, dtype=stats.dtype, device=x.device)
    kept = torch.empty(56, dtype=torch.float64, device=x.device)
    launch(
        first_conv.patch_moments_kernel,
        programs,
        x,
        partials,
        total,
        rows,
        columns,
        COMPUTE=compute_type(x.dtype),
        BLOCK=PATCHES,
    )
    launch(
        first_conv.first_stats_kernel,
        triton.cdiv(channels, FEW),
        partials,
        weight,
        bias,
        kept,
        stats,
        programs,
        channels,
        eps,
        ROWS=64,
        CHANNELS=FEW,
    )
    return kept


def _channel_stats(y: Tensor, bias: Tensor | None, stats: Tensor, eps: float) -> None:
    batch, channels, rows, columns = y.shape
    total, block = batch * rows * columns, _block(channels)
    grid = _programs(y, total, POSITIONS, channels, 4)
    programs = grid // triton.cdiv(channels, block)
    partials = torch.empty(programs, 2, channels, dtype=stats.dtype, device=y.device)
    anchors = torch.empty(channels, dtype=stats.dtype, device=y.device)
    launch(
        norm_pool.channel_sums_kernel,
        grid,
        y,
        partials,
        anchors,
        total,
        channels,
        COMPUTE=compute_type(stats.dtype),
        POSITIONS=POSITIONS,
        CHANNELS=block,
    )
    launch(
        norm_pool.channel_stats_kernel,
        triton.cdiv(channels, FEW),
        partials,
        anchors,
        bias,
        stats,
        programs,
        channels,
        total,
        eps,
        ROWS=ROWS,
        CHANNELS=FEW,
    )


def conv_block_backward(
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
    batch, inputs, rows, columns = x.shape
    channels, pooled = len(weight), which.numel() // len(weight)
    to_x = torch.empty((0, 1, 1, 1), dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    given = x.dtype
    to_weight = torch.empty_like(weight)
    to_bias, to_gamma, to_beta = (torch.empty(channels, dtype=gamma.dtype, device=x.device) for _ in range(3))
    grad = grad if grad.stride(1) == 1 else grad.contiguous(memory_format=torch.channels_last)
    gradient = (grad, grad.stride(0), grad.stride(2), grad.stride(3), which)
    gamma = gamma.contiguous()
    block = _block(channels)
    sizes = {"COMPUTE": compute_type(stats.dtype), "CHANNELS": block}
    results = (to_bias, to_gamma, to_beta)
    with on_device(x):
        if inputs == 1:
            flat, near = to_weight.contiguous(), x.contiguous()
            grid = _programs(x, pooled, FIRST_PIXELS, channels, 3)
            programs = grid // triton.cdiv(channels, block)
            partials = torch.empty(programs, 10, channels, dtype=stats.dtype, device=x.device)
            launch(
                first_conv.first_sums_kernel,
                grid,
                *gradient,
                near,
                kept,
                partials,
                pooled,
                rows,
                columns,
                channels,
                PIXELS=FIRST_PIXELS,
                **sizes,
            )
            launch(
                first_conv.first_backward_kernel,
                triton.cdiv(channels, FEW),
                partials,
                weight.contiguous(),
                gamma,
                kept,
                stats,
                flat,
                *results,
                programs,
                channels,
                FROZEN=frozen,
                COMPUTE=sizes["COMPUTE"],
                ROWS=ROWS,
                CHANNELS=FEW,
            )
            if flat is not to_weight:
                to_weight.copy_(flat)
            if not needs_x:
                return to_x, to_weight, *results
            x, weight = x.to(stats.dtype), weight.to(stats.dtype)
            y = _convolve(x, weight)
            stats = stats.clone()
            stats[0] += kept[55].to(stats.dtype) * weight.sum((1, 2, 3))  # kept's anchor is off the patches alone
            factors = _factors(gamma, stats, to_gamma, to_beta, x.numel(), frozen)
        else:
            y, factors = kept, torch.empty(3, channels, dtype=stats.dtype, device=x.device)
            grid = _programs(x, pooled, PIXELS, channels, 4)
            programs = grid // triton.cdiv(channels, block)
            partials = torch.empty(programs, 2, channels, dtype=stats.dtype, device=x.device)
            launch(
                norm_pool.pool_sums_kernel,
                grid,
                *gradient,
                y,
                stats,
                partials,
                pooled,
                rows,
                columns,
                channels,
                PIXELS=PIXELS,
                **sizes,
            )
            launch(
                norm_pool.norm_backward_kernel,
                triton.cdiv(channels, FEW),
                partials,
                gamma,
                stats,
                *results,
                factors,
                programs,
                channels,
                batch * rows * columns,
                FROZEN=frozen,
                COMPUTE=sizes["COMPUTE"],
                ROWS=ROWS,
                CHANNELS=FEW,
            )
        to_y = torch.empty_like(y)
        windows = batch * ((rows + 1) // 2) * ((columns + 1) // 2)
        launch(
            norm_pool.unpool_kernel,
            triton.cdiv(windows, PIXELS) * triton.cdiv(channels, block),
            *gradient,
            y,
            stats,
            factors,
            to_y,
            windows,
            rows,
            columns,
            channels,
            PIXELS=PIXELS,
            **sizes,
        )
    wanted = [needs_x, inputs > 1, False]
    of_x, of_weight, _ = torch.ops.aten.convolution_backward(
        to_y, x.to(y.dtype), weight.to(y.dtype), None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1, wanted
    )
    if needs_x:
        to_x = of_x.to(given).contiguous(memory_format=torch.channels_last)
    if inputs > 1:
        to_weight.copy_(of_weight)
    return to_x, to_weight, *results


def batch_norm_running_(
    mean: Tensor, variance: Tensor, updates: Tensor, stats: Tensor, count: int, momentum: float | None
) -> None:
    if mean.dtype == torch.float64:  # a kernel's momentum is float32
        return batch_norm_running__reference(mean, variance, updates, stats, count, momentum)
    with on_device(mean):
        launch(
            norm_pool.norm_running_kernel,
            1,
            mean,
            variance,
            updates,
            stats,
            len(mean),
            count,
            momentum,
            BLOCK=CHANNELS,
            num_warps=1,
        )


def _convolve(x: Tensor, weight: Tensor) -> Tensor:
    """Return the convolution, channels-last."""
    x, weight = (t.contiguous(memory_format=torch.channels_last) for t in (x, weight))
    return torch.conv2d(x, weight, padding=1).contiguous(memory_format=torch.channels_last)


def _factors(gamma: Tensor, stats: Tensor, to_gamma: Tensor, to_beta: Tensor, count: int, frozen: bool) -> Tensor:
    a = gamma.to(stats.dtype) * stats[1]
    fixed = 0 if frozen else 1 / count
    return torch.stack([a, -a * to_gamma * stats[1] * fixed, -a * to_beta * fixed])


def _block(channels: int) -> int:
    return min(CHANNELS, max(16, triton.next_power_of_2(channels)))


def _programs(x: Tensor, pixels: int, block: int, channels: int, per_sm: int) -> int:
    """Return the number of programs of a grid that covers all channels several times at most."""
    blocks = triton.cdiv(channels, _block(channels))
    return blocks * min(triton.cdiv(pixels, block), max(1, resident_programs(x, per_sm) // blocks))
