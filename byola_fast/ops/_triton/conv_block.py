# mypy: ignore-errors
"""Convolution 3 x 3, BatchNorm, ReLU, max pooling 2 x 2, and their gradients; see ``ops.conv_block`` for the formulas.

One input channel: the kernels in ``first_conv``. More: the library's convolution, without the bias, which BatchNorm
takes off again; its output is read once for the statistics and once to normalise, clip and pool, which writes a quarter
and one byte for each pooled value. Backward reads gradient, byte and the maxima for the two sums, then writes the
convolution's incoming gradient in one pass. Everything is channels-last: a row of channels belongs to one position.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from byola_fast.ops._triton import first_conv
from byola_fast.ops._triton.first_conv import RUNTIME, window
from byola_fast.ops._triton.shared import INTERPRETED, compute_type, launch, on_device, resident_programs
from byola_fast.ops.reference import batch_norm_running__reference, compute_dtype

CHANNELS = 64  # of a tile at most
FEW = 4  # channels of a program that adds up partial sums
ROWS = 256  # of partial sums at a time
PATCHES = 512 if INTERPRETED else 128
FIRST_PIXELS = 256 if INTERPRETED else 16
PIXELS = 256 if INTERPRETED else 16
POSITIONS = 512 if INTERPRETED else 64


@triton.jit(do_not_specialize=RUNTIME)
def channel_sums_kernel(
    y, partials, anchors, total, channels, COMPUTE: tl.constexpr, POSITIONS: tl.constexpr, CHANNELS: tl.constexpr
):
    """Write each program's sums of y - anchor and its square, of each channel: partials (programs, 2, C).

    The anchor is the mean of the first positions, so that a large mean does not cancel.
    """
    blocks = tl.cdiv(channels, CHANNELS)
    group = tl.program_id(0) // blocks
    c = tl.program_id(0) % blocks * CHANNELS + tl.arange(0, CHANNELS)
    real = c < channels
    n = tl.arange(0, POSITIONS)
    first = tl.load(y + n[:, None] * channels + c[None, :], (n < total)[:, None] & real[None, :], other=0).to(COMPUTE)
    anchor = tl.sum(first, 0) / tl.minimum(total, POSITIONS)
    sums = tl.zeros((POSITIONS, CHANNELS), COMPUTE)
    squares = tl.zeros((POSITIONS, CHANNELS), COMPUTE)
    for start in range(group * POSITIONS, total, tl.num_programs(0) // blocks * POSITIONS):
        n = start + tl.arange(0, POSITIONS)
        some = (n < total)[:, None] & real[None, :]
        value = tl.load(y + n.to(tl.int64)[:, None] * channels + c[None, :], some, other=0).to(COMPUTE)
        value = tl.where(some, value - anchor[None, :], 0)
        sums += value
        squares += value * value
    row = partials + group * 2 * channels + c
    tl.store(row, tl.sum(sums, 0), real)
    tl.store(row + channels, tl.sum(squares, 0), real)
    if group == 0:
        tl.store(anchors + c, anchor, real)


@triton.jit
def add_up(partials, programs, channels, c, ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    """Return the two sums of partials (programs, 2, C) over the programs, in float64."""
    first = tl.zeros((CHANNELS,), tl.float64)
    second = tl.zeros((CHANNELS,), tl.float64)
    for start in range(0, programs, ROWS):
        n = start + tl.arange(0, ROWS)
        some = (n < programs)[:, None] & (c < channels)[None, :]
        at = partials + n[:, None] * 2 * channels + c[None, :]
        first += tl.sum(tl.load(at, some, other=0).to(tl.float64), 0)
        second += tl.sum(tl.load(at + channels, some, other=0).to(tl.float64), 0)
    return first, second


@triton.jit(do_not_specialize=RUNTIME)
def channel_stats_kernel(
    partials,
    anchors,
    bias,
    stats,
    programs,
    channels,
    count,
    eps,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Write of each channel centre, 1 / std, mean (with the bias) and variance: stats (4, C)."""
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    real = c < channels
    total, squares = add_up(partials, programs, channels, c, ROWS, CHANNELS)
    distance = total / count
    centre = tl.load(anchors + c, real, other=0).to(tl.float64) + distance
    variance = squares / count - distance * distance
    variance = tl.where(variance < 0, 0, variance)  # not tl.maximum, which would lose NaN
    mean = centre
    if bias is not None:
        mean += tl.load(bias + c, real, other=0).to(tl.float64)
    tl.store(stats + c, centre, real)
    tl.store(stats + channels + c, 1 / tl.sqrt(variance + eps), real)
    tl.store(stats + 2 * channels + c, mean, real)
    tl.store(stats + 3 * channels + c, variance, real)


@triton.jit(do_not_specialize=RUNTIME)
def frozen_stats_kernel(mean, variance, bias, stats, channels, eps, BLOCK: tl.constexpr):
    """Write the same from running statistics; the centre is that of the convolution without its bias."""
    c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    real = c < channels
    known_mean = tl.load(mean + c, real, other=0).to(tl.float64)
    known_variance = tl.load(variance + c, real, other=0).to(tl.float64)
    centre = known_mean
    if bias is not None:
        centre -= tl.load(bias + c, real, other=0).to(tl.float64)
    tl.store(stats + c, centre, real)
    tl.store(stats + channels + c, 1 / tl.sqrt(known_variance + eps), real)
    tl.store(stats + 2 * channels + c, known_mean, real)
    tl.store(stats + 3 * channels + c, known_variance, real)


@triton.jit(do_not_specialize=RUNTIME)
def pool_kernel(
    y,
    gamma,
    beta,
    stats,
    out,
    which,
    pooled,
    rows,
    columns,
    channels,
    COMPUTE: tl.constexpr,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Write relu(max over windows of BatchNorm(y)) and where each maximum was (0 to 3; 4 if clipped to 0)."""
    blocks = tl.cdiv(channels, CHANNELS)
    c = tl.program_id(0) % blocks * CHANNELS + tl.arange(0, CHANNELS)
    real = c < channels
    q = tl.program_id(0) // blocks * PIXELS + tl.arange(0, PIXELS)
    centre = tl.load(stats + c, real, other=0)
    scale = tl.load(gamma + c, real, other=0).to(COMPUTE) * tl.load(stats + channels + c, real, other=0)
    shift = tl.load(beta + c, real, other=0).to(COMPUTE)
    image, i, j = window(q, rows // 2, columns // 2)
    some = (q < pooled)[:, None] & real[None, :]
    corner = (image * rows + 2 * i) * columns + 2 * j
    best = tl.zeros((PIXELS, CHANNELS), COMPUTE)
    place = tl.zeros((PIXELS, CHANNELS), tl.int32)
    for d in tl.static_range(4):
        at = (corner + d // 2 * columns + d % 2).to(tl.int64)[:, None] * channels + c[None, :]
        value = (tl.load(y + at, some, other=0).to(COMPUTE) - centre[None, :]) * scale[None, :] + shift[None, :]
        if d == 0:
            best = value
        else:
            larger = (value > best) | (value != value)
            best = tl.where(larger, value, best)
            place = tl.where(larger, d, place)
    clipped = best <= 0  # NaN is not
    at = q.to(tl.int64)[:, None] * channels + c[None, :]
    tl.store(out + at, tl.where(clipped, 0, best), some)
    tl.store(which + at, tl.where(clipped, 4, place).to(tl.uint8), some)


@triton.jit(do_not_specialize=RUNTIME)
def pool_sums_kernel(
    grad,
    grad_b,
    grad_i,
    grad_j,
    which,
    y,
    stats,
    partials,
    pooled,
    rows,
    columns,
    channels,
    COMPUTE: tl.constexpr,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Write each program's sums of g and g (y* - centre), y* the maximum: partials (programs, 2, C)."""
    blocks = tl.cdiv(channels, CHANNELS)
    group = tl.program_id(0) // blocks
    c = tl.program_id(0) % blocks * CHANNELS + tl.arange(0, CHANNELS)
    real = c < channels
    centre = tl.load(stats + c, real, other=0)
    total = tl.zeros((PIXELS, CHANNELS), COMPUTE)
    products = tl.zeros((PIXELS, CHANNELS), COMPUTE)
    for start in range(group * PIXELS, pooled, tl.num_programs(0) // blocks * PIXELS):
        q = start + tl.arange(0, PIXELS)
        image, i, j = window(q, rows // 2, columns // 2)
        some = (q < pooled)[:, None] & real[None, :]
        place = tl.load(which + q.to(tl.int64)[:, None] * channels + c[None, :], some, other=4).to(tl.int32)
        live = place < 4
        at = image.to(tl.int64) * grad_b + i.to(tl.int64) * grad_i + j * grad_j
        g = tl.load(grad + at[:, None] + c[None, :], some, other=0).to(COMPUTE)
        corner = ((image * rows + 2 * i) * columns + 2 * j).to(tl.int64)
        position = corner[:, None] + (place >> 1) * columns + (place & 1)
        largest = tl.load(y + position * channels + c[None, :], live, other=0).to(COMPUTE)
        total += tl.where(live, g, 0)
        products += tl.where(live, g * (largest - centre[None, :]), 0)
    row = partials + group * 2 * channels + c
    tl.store(row, tl.sum(total, 0), real)
    tl.store(row + channels, tl.sum(products, 0), real)


@triton.jit(do_not_specialize=RUNTIME)
def norm_backward_kernel(
    partials,
    gamma,
    stats,
    to_bias,
    to_gamma,
    to_beta,
    factors,
    programs,
    channels,
    count,
    FROZEN: tl.constexpr,
    COMPUTE: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Write the gradients of bias, gamma and beta, and a, u, v of dy = a g [at the maximum] + u (y - centre) + v."""
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    real = c < channels
    total, products = add_up(partials, programs, channels, c, ROWS, CHANNELS)
    r = tl.load(stats + channels + c, real, other=0).to(tl.float64)
    a = r * tl.load(gamma + c, real, other=0).to(tl.float64)
    of_gamma = products * r
    tl.store(to_beta + c, total.to(COMPUTE), real)
    tl.store(to_gamma + c, of_gamma.to(COMPUTE), real)
    tl.store(to_bias + c, tl.where(FROZEN, a * total, 0).to(COMPUTE), real)
    tl.store(factors + c, a, real)
    tl.store(factors + channels + c, tl.where(FROZEN, 0, -a * of_gamma * r / count), real)
    tl.store(factors + 2 * channels + c, tl.where(FROZEN, 0, -a * total / count), real)


@triton.jit(do_not_specialize=RUNTIME)
def unpool_kernel(
    grad,
    grad_b,
    grad_i,
    grad_j,
    which,
    y,
    stats,
    factors,
    to_y,
    windows,
    rows,
    columns,
    channels,
    COMPUTE: tl.constexpr,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Write dy = a g [at the maximum] + u (y - centre) + v, in windows that also cover a last odd row and column."""
    blocks = tl.cdiv(channels, CHANNELS)
    c = tl.program_id(0) % blocks * CHANNELS + tl.arange(0, CHANNELS)
    real = c < channels
    w = tl.program_id(0) // blocks * PIXELS + tl.arange(0, PIXELS)
    centre = tl.load(stats + c, real, other=0)
    a = tl.load(factors + c, real, other=0)
    u = tl.load(factors + channels + c, real, other=0)
    v = tl.load(factors + 2 * channels + c, real, other=0)
    image, i, j = window(w, (rows + 1) // 2, (columns + 1) // 2)
    whole = ((w < windows) & (i < rows // 2) & (j < columns // 2))[:, None] & real[None, :]
    q = (image * (rows // 2) + i) * (columns // 2) + j
    place = tl.load(which + q.to(tl.int64)[:, None] * channels + c[None, :], whole, other=4).to(tl.int32)
    at = image.to(tl.int64) * grad_b + i.to(tl.int64) * grad_i + j * grad_j
    g = tl.load(grad + at[:, None] + c[None, :], whole, other=0).to(COMPUTE) * a[None, :]
    for d in tl.static_range(4):
        row = 2 * i + d // 2
        column = 2 * j + d % 2
        some = ((w < windows) & (row < rows) & (column < columns))[:, None] & real[None, :]
        position = (image * rows + row) * columns + column
        here = position.to(tl.int64)[:, None] * channels + c[None, :]
        value = tl.load(y + here, some, other=0).to(COMPUTE) - centre[None, :]
        tl.store(to_y + here, tl.where(place == d, g, 0) + u[None, :] * value + v[None, :], some)


@triton.jit(do_not_specialize=RUNTIME)
def norm_running_kernel(mean, variance, updates, stats, channels, count, momentum, BLOCK: tl.constexpr):
    """Move running statistics (C) to those of a batch of ``count`` values; one program of one warp."""
    number = tl.load(updates) + 1
    weight = momentum
    if momentum is None:
        weight = 1 / number.to(tl.float32)
    for start in range(0, channels, BLOCK):
        c = start + tl.arange(0, BLOCK)
        real = c < channels
        unbiased = tl.load(stats + 3 * channels + c, real, other=0) * count / (count - 1)
        old = tl.load(mean + c, real, other=0)
        tl.store(mean + c, old + weight * (tl.load(stats + 2 * channels + c, real, other=0) - old), real)
        old = tl.load(variance + c, real, other=0)
        tl.store(variance + c, old + weight * (unbiased - old), real)
    tl.store(updates, number)


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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, inputs, rows, columns = x.shape
    channels = len(weight)
    shape = (batch, channels, rows // 2, columns // 2)
    out = torch.empty(shape, dtype=dtype, device=x.device, memory_format=torch.channels_last)
    which = torch.empty(shape, dtype=torch.uint8, device=x.device, memory_format=torch.channels_last)
    stats = torch.empty(4, channels, dtype=compute_dtype(x.dtype), device=x.device)
    gamma, beta, bias = gamma.contiguous(), beta.contiguous(), None if bias is None else bias.contiguous()
    pooled = batch * shape[2] * shape[3]
    block = _block(channels)
    with on_device(x):
        if mean is not None:
            launch(
                frozen_stats_kernel,
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
                which,
                pooled,
                rows,
                columns,
                channels,
                COMPUTE=compute_type(x.dtype),
                PIXELS=FIRST_PIXELS,
                CHANNELS=block,
            )
            return out, which, kept, stats
        y = _convolve(x.to(dtype), weight.to(dtype))
        if mean is None:
            _channel_stats(y, bias, stats, eps)
        launch(
            pool_kernel,
            triton.cdiv(pooled, PIXELS) * triton.cdiv(channels, block),
            y,
            gamma,
            beta,
            stats,
            out,
            which,
            pooled,
            rows,
            columns,
            channels,
            COMPUTE=compute_type(x.dtype),
            PIXELS=PIXELS,
            CHANNELS=block,
        )
    return out, which, y, stats


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
        channel_sums_kernel,
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
        channel_stats_kernel,
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
                pool_sums_kernel,
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
                norm_backward_kernel,
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
            unpool_kernel,
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
            norm_running_kernel,
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
