# mypy: ignore-errors
"""Cut one box per sample from a zero canvas and resize it, corners aligned; bilinear or bicubic (arXiv:2103.06695).

Forward: y[b, o, t] = sum over taps (k, l) of wy_k(o) wx_l(t) x[b, row_k(o), column_l(t)], zeros outside the input.
Taps are read straight from x: the few outputs that share an input row find it in the L1 cache.
Reads x once, writes y once.

Backward gathers, so it is deterministic: along one axis, input p sums the outputs with a tap on p. The whole parts of
their positions grow with o, so these outputs are consecutive, with known ends. One kernel serves both axes, in two
launches with a float32 (B, F, T) between them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from byola_fast.ops._triton.shared import (
    COLUMNS,
    INTERPRETED,
    box_side,
    compute_type,
    division_magic,
    indexable,
    is_wide,
    launch,
    on_device,
    tap_base,
    tap_fraction,
    tap_row,
    tap_weight,
)

ROWS = 64 if INTERPRETED else 16
TAPS = {"bilinear": 2, "bicubic": 4}


@triton.jit
def resize_crop_kernel(
    x,  # (B, F, T), any strides
    crop,  # (B, 4)
    y,  # (B, out_mels, out_frames)
    mels,
    frames,
    stride_b,
    stride_f,
    stride_t,
    out_mels,
    out_frames,
    canvas_mels,
    canvas_frames,
    mel_magic,
    mel_shift,
    frame_magic,
    frame_shift,
    COMPUTE: tl.constexpr,
    TAPS: tl.constexpr,
    WIDE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    blocks = tl.cdiv(out_mels, ROWS)
    sample = (tl.program_id(0) // blocks).to(tl.int64)
    h, top = box_side(crop + 4 * sample, 0, mels, canvas_mels)
    w, left = box_side(crop + 4 * sample, 1, frames, canvas_frames)

    lane = tl.arange(0, ROWS * COLUMNS)  # one axis: with two, Triton 3.6 lays the mels along a warp
    o = tl.program_id(0) % blocks * ROWS + lane // COLUMNS
    row_base, row_rest = tap_base(o, h, out_mels, mel_magic, mel_shift, WIDE)
    row_t = tap_fraction(row_rest, out_mels, COMPUTE)
    source = x + sample * stride_b
    target = y + sample * out_mels * out_frames
    for block in range(0, tl.cdiv(out_frames, COLUMNS)):
        t = block * COLUMNS + lane % COLUMNS
        column_base, column_rest = tap_base(t, w, out_frames, frame_magic, frame_shift, WIDE)
        column_t = tap_fraction(column_rest, out_frames, COMPUTE)
        total = tl.zeros((ROWS * COLUMNS,), COMPUTE)
        for k in tl.static_range(TAPS):
            row = top + tap_row(row_base, h, k, TAPS)
            row_inside = (row >= 0) & (row < mels) & (o < out_mels)
            along_time = tl.zeros((ROWS * COLUMNS,), COMPUTE)
            for tap in tl.static_range(TAPS):
                column = left + tap_row(column_base, w, tap, TAPS)
                inside = row_inside & (column >= 0) & (column < frames)
                value = tl.load(source + row * stride_f + column * stride_t, inside, other=0)
                along_time += tap_weight(column_t, tap, TAPS) * value.to(COMPUTE)
            total += tap_weight(row_t, k, TAPS) * along_time
        tl.store(target + o * out_frames + t, total, (o < out_mels) & (t < out_frames))


@triton.jit
def first_output(p, extent, size, WIDE: tl.constexpr):
    """Return the first output with a whole part of at least ``p``: o (extent - 1) // (size - 1) >= p."""
    steps = tl.maximum(size - 1, 1)
    if WIDE:
        reach = tl.maximum(extent - 1, 1).to(tl.int64)
        first = ((tl.maximum(p, 0).to(tl.int64) * steps + reach - 1) // reach).to(tl.int32)
    else:
        reach = tl.maximum(extent - 1, 1)
        first = (tl.maximum(p, 0) * steps + reach - 1) // reach
    return tl.where(p <= 0, 0, tl.where(extent == 1, size, tl.minimum(first, size)))


@triton.jit
def resize_axis_backward_kernel(
    grad,  # (B, O, N) or (B, N, O), by the strides: O outputs along the axis, N lines across it
    crop,  # (B, 4)
    to_x,  # (B, P, N) or (B, N, P)
    inputs,  # P
    outputs,  # O
    lines,  # N
    canvas,  # along the axis
    magic,
    shift,
    grad_b,
    grad_o,
    grad_n,
    x_b,
    x_p,
    x_n,
    AXIS: tl.constexpr,
    COMPUTE: tl.constexpr,
    TAPS: tl.constexpr,
    WIDE: tl.constexpr,
    INPUTS: tl.constexpr,
    LINES: tl.constexpr,
):
    rows, columns = tl.cdiv(inputs, INPUTS), tl.cdiv(lines, LINES)
    block = tl.program_id(0) // columns
    sample = (block // rows).to(tl.int64)
    extent, start = box_side(crop + 4 * sample, AXIS, inputs, canvas)
    p = block % rows * INPUTS + tl.arange(0, INPUTS)
    n = tl.program_id(0) % columns * LINES + tl.arange(0, LINES)
    within = p - start  # row of the crop
    used = (within >= 0) & (within < extent) & (p < inputs)
    first = first_output(within - TAPS // 2, extent, outputs, WIDE)
    end = first_output(within + TAPS // 2, extent, outputs, WIDE)
    total = tl.zeros((INPUTS, LINES), COMPUTE)
    for number in range(0, tl.max(tl.where(used, end - first, 0), axis=0)):
        o = first + number
        base, rest = tap_base(o, extent, outputs, magic, shift, WIDE)
        t = tap_fraction(rest, outputs, COMPUTE)
        weight = tl.zeros((INPUTS,), COMPUTE)
        for k in tl.static_range(TAPS):
            weight += tl.where(tap_row(base, extent, k, TAPS) == within, tap_weight(t, k, TAPS), 0)
        taken = (used & (o < end))[:, None] & (n < lines)[None, :]
        value = tl.load(grad + sample * grad_b + o[:, None] * grad_o + n[None, :] * grad_n, taken, other=0)
        total += tl.where(taken, weight[:, None] * value.to(COMPUTE), 0)
    tl.store(
        to_x + sample * x_b + p[:, None] * x_p + n[None, :] * x_n, total, (p < inputs)[:, None] & (n < lines)[None, :]
    )


def resize_crop(x: Tensor, crop: Tensor, size: list[int], canvas: list[int], interpolation: str) -> Tensor:
    batch, mels, frames = x.shape
    y = x.new_empty(batch, *size)
    x = indexable(x)
    if batch:
        with on_device(x):
            launch(
                resize_crop_kernel,
                batch * triton.cdiv(size[0], ROWS),
                x,
                crop.contiguous(),
                y,
                mels,
                frames,
                *x.stride(),
                *size,
                *canvas,
                *division_magic(size[0]),
                *division_magic(size[1]),
                COMPUTE=compute_type(x.dtype),
                TAPS=TAPS[interpolation],
                WIDE=is_wide(size[0] * canvas[0], size[1] * canvas[1]),
                ROWS=ROWS,
                COLUMNS=COLUMNS,
            )
    return y


def resize_crop_backward(
    grad: Tensor, crop: Tensor, input_size: list[int], canvas: list[int], interpolation: str
) -> Tensor:
    batch, out_mels, out_frames = grad.shape
    mels, frames = input_size
    to_x = grad.new_empty(batch, mels, frames)
    if not batch:
        return to_x
    grad, crop = indexable(grad), crop.contiguous()
    shared = {
        "COMPUTE": compute_type(grad.dtype),
        "TAPS": TAPS[interpolation],
        "WIDE": is_wide(out_mels * canvas[0], out_frames * canvas[1]),
    }
    between = grad.new_empty(batch, mels, out_frames, dtype=torch.promote_types(grad.dtype, torch.float32))
    with on_device(grad):
        grad_b, grad_f, grad_t = grad.stride()
        between_b, between_f, between_t = between.stride()
        launch(resize_axis_backward_kernel, batch * triton.cdiv(mels, ROWS) * triton.cdiv(out_frames, COLUMNS),
            grad, crop, between, mels, out_mels, out_frames, canvas[0], *division_magic(out_mels),
            grad_b, grad_f, grad_t, between_b, between_f, between_t,
            AXIS=0, INPUTS=ROWS, LINES=COLUMNS, **shared,
        )  # fmt: skip
        x_b, x_f, x_t = to_x.stride()
        launch(resize_axis_backward_kernel, batch * triton.cdiv(frames, COLUMNS) * triton.cdiv(mels, ROWS),
            between, crop, to_x, frames, out_frames, mels, canvas[1], *division_magic(out_frames),
            between_b, between_t, between_f, x_b, x_t, x_f,
            AXIS=1, INPUTS=COLUMNS, LINES=ROWS, **shared,
        )  # fmt: skip
    return to_x
