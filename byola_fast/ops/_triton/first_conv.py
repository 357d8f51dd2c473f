# mypy: ignore-errors
# ruff: noqa: RUF005 (Triton unpacks no tuples in a display)
"""Kernels of ``conv_block`` for one input channel: the convolution is computed where it is used, and never stored.

BatchNorm's statistics follow from the moments of the input's 3 x 3 patches p: with mu = E[p] and S = E[p p'] - mu mu',
the convolution w . p has mean w . mu and variance w' S w. So one pass reads the input for 54 moments, one reads it and
writes the pooled maxima and a byte each, and the backward's one pass reads the input, the byte and the gradient. All
three compute with a number close to the input's mean (the anchor) taken off the patches, or a large mean would cancel.
Sums have a fixed order: partial sums of each program in float32 (float64 for float64), then one float64 sum.

Moments are E[q_i q_j], i >= j, of q = (p, 1) in lower-triangular order: 45 products, 9 means, 1; the anchor follows.
"""

from __future__ import annotations

import triton
import triton.language as tl

ANCHOR = tl.constexpr(55)  # its place after the moments
MOMENTS = tl.constexpr(64)  # a row of partial moments
# sizes that no address is a multiple of: other images compile nothing again
RUNTIME = ("total", "pooled", "windows", "rows", "columns", "programs", "count")
SAMPLES = tl.constexpr(1024)  # of the input, for the anchor


@triton.jit
def load_patches(x, image, i, j, live, rows, columns, anchor, SIDE: tl.constexpr, COMPUTE: tl.constexpr):
    """Return SIDE x SIDE values from (i - 1, j - 1) on, less the anchor; beyond the image they are 0, less the anchor.

    Rows that are not ``live`` are 0 themselves.
    """
    values = ()
    for dy in tl.static_range(SIDE):
        for dx in tl.static_range(SIDE):
            y = i + (dy - 1)
            t = j + (dx - 1)
            inside = live & (y >= 0) & (y < rows) & (t >= 0) & (t < columns)
            value = tl.load(x + (image * rows + y) * columns + t, inside, other=0).to(COMPUTE)
            values = values + (tl.where(live, value - anchor, 0),)
    return values


@triton.jit(do_not_specialize=RUNTIME)
def patch_moments_kernel(x, partials, total, rows, columns, COMPUTE: tl.constexpr, BLOCK: tl.constexpr):
    """Write each program's sums of the 55 moments, and the anchor: partials (programs, 64)."""
    step = tl.maximum(total // SAMPLES, 1)
    place = tl.arange(0, SAMPLES)
    sampled = place < total // step
    some = tl.load(x + place * step, sampled, other=0).to(COMPUTE)
    anchor = tl.sum(some) / tl.minimum(total // step, SAMPLES)
    sums = ()
    for _k in tl.static_range(55):
        sums = sums + (tl.zeros((BLOCK,), COMPUTE),)
    for start in range(tl.program_id(0) * BLOCK, total, tl.num_programs(0) * BLOCK):
        n = start + tl.arange(0, BLOCK)
        live = n < total
        line = n // columns
        image = line // rows
        q = load_patches(x, image, line - image * rows, n - line * columns, live, rows, columns, anchor, 3, COMPUTE)
        q = q + (tl.where(live, 1.0, 0.0).to(COMPUTE),)
        more = ()
        for i in tl.static_range(10):
            for j in tl.static_range(i + 1):
                more = more + (sums[i * (i + 1) // 2 + j] + q[i] * q[j],)
        sums = more
    row = partials + tl.program_id(0) * MOMENTS
    for k in tl.static_range(55):
        tl.store(row + k, tl.sum(sums[k]))
    tl.store(row + ANCHOR, anchor)


@triton.jit
def pair(k):
    """Return i and j of the k-th moment."""
    i = ((tl.sqrt((8 * k + 1).to(tl.float32)) - 1) * 0.5 + 0.001).to(tl.int32)
    return i, k - i * (i + 1) // 2


@triton.jit(do_not_specialize=RUNTIME)
def first_stats_kernel(
    partials, weight, bias, kept, stats, programs, channels, eps, ROWS: tl.constexpr, CHANNELS: tl.constexpr
):
    """Write the moments and the anchor (56), and of each channel centre, 1 / std, mean and variance: stats (4, C)."""
    k = tl.arange(0, MOMENTS)
    sums = tl.zeros((MOMENTS,), tl.float64)
    for start in range(0, programs, ROWS):
        n = start + tl.arange(0, ROWS)
        some = (n < programs)[:, None] & (k < 55)[None, :]
        sums += tl.sum(tl.load(partials + n[:, None] * MOMENTS + k[None, :], some, other=0).to(tl.float64), 0)
    moments = sums / tl.sum(tl.where(k == 54, sums, 0))
    anchor = tl.load(partials + ANCHOR).to(tl.float64)
    if tl.program_id(0) == 0:
        tl.store(kept + k, tl.where(k == ANCHOR, anchor, moments), k <= ANCHOR)

    i, j = pair(k)
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    real = (c < channels)[None, :]
    at = weight + c[None, :] * 9
    w_i = tl.load(at + i[:, None], real & (i < 9)[:, None], other=0).to(tl.float64)
    w_j = tl.load(at + j[:, None], real & ((i < 10) & (j < 9))[:, None], other=0).to(tl.float64)
    means = ((i == 9) & (j < 9))[:, None]
    centre = tl.sum(tl.where(means, moments[:, None] * w_j, 0), 0)
    of_anchor = anchor * tl.sum(tl.where(means, w_j, 0), 0)
    # E[(w . p - centre)^2]: q's last entry, 1, has the weight -centre
    w_i = tl.where((i == 9)[:, None], -centre[None, :], w_i)
    w_j = tl.where((j == 9)[:, None], -centre[None, :], w_j)
    times = tl.where(i == j, 1.0, 2.0).to(tl.float64)
    variance = tl.sum(tl.where((k < 55)[:, None], (moments * times)[:, None] * w_i * w_j, 0), 0)
    variance = tl.where(variance < 0, 0, variance)  # not tl.maximum, which would lose NaN
    mean = centre + of_anchor
    if bias is not None:
        mean += tl.load(bias + c, c < channels, other=0).to(tl.float64)
    tl.store(stats + c, centre, c < channels)
    tl.store(stats + channels + c, 1 / tl.sqrt(variance + eps), c < channels)
    tl.store(stats + 2 * channels + c, mean, c < channels)
    tl.store(stats + 3 * channels + c, variance, c < channels)


@triton.jit
def window(q, out_rows, out_columns):
    """Return image, row and column of pooled values numbered ``q``."""
    line = q // out_columns
    image = line // out_rows
    return image, line - image * out_rows, q - line * out_columns


@triton.jit
def first_maximum(best, place, value, d: tl.constexpr):
    """Return the maximum of a window's values up to ``value``, the d-th, and where it is; NaN is the largest."""
    larger = (value > best) | (value != value)
    return tl.where(larger, value, best), tl.where(larger, d, place)


@triton.jit
def store_maximum(best, place, out, which, at, some):
    """Write relu of a window's maximum and its place (0 to 3; 4 if clipped to 0); ``which`` None: no place."""
    clipped = best <= 0  # NaN is not
    tl.store(out + at, tl.where(clipped, 0, best), some)
    if which is not None:
        tl.store(which + at, tl.where(clipped, 4, place).to(tl.uint8), some)


@triton.jit(do_not_specialize=RUNTIME)
def first_forward_kernel(
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
    COMPUTE: tl.constexpr,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Write relu(max over windows of BatchNorm(conv)) and where each maximum was (0 to 3; 4 if clipped to 0).

    A thread holds the nine scaled weights of its channels; 16 inputs of a window serve 36 products for each of them.
    It is beta that decides how the compiler lays out a tile, one pixel and 8 channels a thread: the only load of one.
    """
    blocks = tl.cdiv(channels, CHANNELS)
    c = tl.program_id(0) % blocks * CHANNELS + tl.arange(0, CHANNELS)
    real = c < channels
    scale = tl.load(gamma + c, real, other=0).to(COMPUTE) * tl.load(stats + channels + c, real, other=0)
    centre = tl.load(stats + c, real, other=0) * scale
    anchor = tl.load(kept + ANCHOR).to(COMPUTE)
    w = ()
    for k in tl.static_range(9):
        w = w + (tl.load(weight + c * 9 + k, real, other=0).to(COMPUTE) * scale,)
    turn = tl.num_programs(0) // blocks * PIXELS
    for start in range(tl.program_id(0) // blocks * PIXELS, pooled, turn):
        q = start + tl.arange(0, PIXELS)
        live = q < pooled
        image, i, j = window(q, rows // 2, columns // 2)
        p = load_patches(x, image, 2 * i, 2 * j, live, rows, columns, anchor, 4, COMPUTE)
        some = live[:, None] & real[None, :]
        shift = (
            tl.load(beta + c[None, :] + tl.zeros((PIXELS, 1), tl.int32), some, other=0).to(COMPUTE) - centre[None, :]
        )
        best = shift
        place = tl.zeros((PIXELS, CHANNELS), tl.int32)
        for d in tl.static_range(4):
            value = shift
            for k in tl.static_range(9):
                value += p[(d // 2 + k // 3) * 4 + d % 2 + k % 3][:, None] * w[k][None, :]
            if d == 0:
                best = value
            else:
                best, place = first_maximum(best, place, value, d)
        store_maximum(best, place, out, which, q.to(tl.int64)[:, None] * channels + c[None, :], some)


@triton.jit(do_not_specialize=RUNTIME)
def first_sums_kernel(
    grad,
    grad_b,
    grad_i,
    grad_j,
    which,
    x,
    kept,
    partials,
    pooled,
    rows,
    columns,
    channels,
    COMPUTE: tl.constexpr,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Write each program's sums of g and g p* over its windows, p* the patch at the maximum: (programs, 10, C)."""
    blocks = tl.cdiv(channels, CHANNELS)
    group = tl.program_id(0) // blocks
    c = tl.program_id(0) % blocks * CHANNELS + tl.arange(0, CHANNELS)
    real = c < channels
    anchor = tl.load(kept + ANCHOR).to(COMPUTE)
    sums = ()
    for _k in tl.static_range(10):
        sums = sums + (tl.zeros((PIXELS, CHANNELS), COMPUTE),)
    for start in range(group * PIXELS, pooled, tl.num_programs(0) // blocks * PIXELS):
        q = start + tl.arange(0, PIXELS)
        live = q < pooled
        image, i, j = window(q, rows // 2, columns // 2)
        some = live[:, None] & real[None, :]
        at = image.to(tl.int64) * grad_b + i.to(tl.int64) * grad_i + j * grad_j
        g = tl.load(grad + at[:, None] + c[None, :], some, other=0).to(COMPUTE)
        place = tl.load(which + q.to(tl.int64)[:, None] * channels + c[None, :], some, other=4).to(tl.int32)
        p = load_patches(x, image, 2 * i, 2 * j, live, rows, columns, anchor, 4, COMPUTE)
        more = (sums[0] + tl.where(place < 4, g, 0),)
        for k in tl.static_range(9):
            value = sums[k + 1]
            for d in tl.static_range(4):
                value += tl.where(place == d, g, 0) * p[(d // 2 + k // 3) * 4 + d % 2 + k % 3][:, None]
            more = more + (value,)
        sums = more
    row = partials + group * 10 * channels + c
    for k in tl.static_range(10):
        tl.store(row + k * channels, tl.sum(sums[k], 0), real)


@triton.jit(do_not_specialize=RUNTIME)
def first_backward_kernel(
    partials,
    weight,
    gamma,
    kept,
    stats,
    to_weight,
    to_bias,
    to_gamma,
    to_beta,
    programs,
    channels,
    FROZEN: tl.constexpr,
    COMPUTE: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Write the gradients of the parameters from the sums S0 of g and S1 of g p*, with r = 1 / std and a = gamma r.

    of beta S0, of gamma r (w . S1 - centre S0) = D, of w a (S1 - S0 mu - D r S w), of the bias 0; frozen statistics:
    of w a S1, of the bias a S0.
    """
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    real = c < channels
    sums = ()
    for _k in tl.static_range(10):
        sums = sums + (tl.zeros((CHANNELS,), tl.float64),)
    for start in range(0, programs, ROWS):
        n = start + tl.arange(0, ROWS)
        some = (n < programs)[:, None] & real[None, :]
        more = ()
        for k in tl.static_range(10):
            part = tl.load(partials + (n[:, None] * 10 + k) * channels + c[None, :], some, other=0)
            more = more + (sums[k] + tl.sum(part.to(tl.float64), 0),)
        sums = more
    total = sums[0]
    centre = tl.load(stats + c, real, other=0).to(tl.float64)
    r = tl.load(stats + channels + c, real, other=0).to(tl.float64)
    a = r * tl.load(gamma + c, real, other=0).to(tl.float64)
    of_gamma = -centre * total
    for k in tl.static_range(9):
        of_gamma += tl.load(weight + c * 9 + k, real, other=0).to(tl.float64) * sums[k + 1]
    of_gamma *= r
    tl.store(to_beta + c, total.to(COMPUTE), real)
    tl.store(to_gamma + c, of_gamma.to(COMPUTE), real)
    tl.store(to_bias + c, tl.where(FROZEN, a * total, 0).to(COMPUTE), real)
    k64 = tl.arange(0, MOMENTS)
    i, j = pair(k64)
    moments = tl.load(kept + k64, k64 < 55, other=0)
    at = weight + c[None, :] * 9
    w_i = tl.load(at + i[:, None], real[None, :] & (i < 9)[:, None], other=0).to(tl.float64)
    w_j = tl.load(at + j[:, None], real[None, :] & ((i < 10) & (j < 9))[:, None], other=0).to(tl.float64)
    w_i = tl.where((i == 9)[:, None], -centre[None, :], w_i)
    for k in tl.static_range(9):
        value = sums[k + 1]
        if not FROZEN:
            # row k of S w is E[p_k (w . p - centre)]
            row = tl.where((i == k)[:, None], w_j, 0) + tl.where(((j == k) & (i != k))[:, None], w_i, 0)
            value -= total * tl.load(kept + 45 + k) + of_gamma * r * tl.sum(moments[:, None] * row, 0)
        tl.store(to_weight + c * 9 + k, (a * value).to(COMPUTE), real)
