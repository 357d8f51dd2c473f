# mypy: ignore-errors
"""Kernels of ``conv_block`` for more than one input channel: BatchNorm, ReLU, max pooling, and their gradients.

Everything is channels-last: a row of channels belongs to one position.
"""

from __future__ import annotations

import triton
import triton.language as tl

from byola_fast.ops._triton.first_conv import RUNTIME, first_maximum, store_maximum, window


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
            best, place = first_maximum(best, place, value, d)
    store_maximum(best, place, out, which, q.to(tl.int64)[:, None] * channels + c[None, :], some)


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
