# mypy: ignore-errors
"""Other designs of the fused kernel, kept short, for comparison with the shipped one.

Each makes both views of a batch from x and a full bank, log-mixup-exp and bilinear, without statistics, fader and sums.
``python -m benchmarks.gpu.designs`` prints their compiled resources for an H200; ``gpu_check.py`` times them.

- ``registers``: one program per view, the mixed tile in registers, one ``tl.gather`` for each tap along each axis.
- ``matrices``: the resize as two products with interpolation matrices built in registers (three TF32 products each, as
  plain TF32 is not accurate enough).
- ``recompute``: nothing staged; every tap mixes its element again, with four times the exponentials and logarithms.
- ``held``: a normalising step that holds its part of the views in registers across a barrier of the whole grid, so that
  views are written once; all programs must run at once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from byola_fast.ops._triton.shared import (
    approximate,
    box_side,
    division_magic,
    mix_log,
    on_device,
    tap_base,
    tap_fraction,
    tap_row,
    tap_weight,
)

DESIGNS = ("registers", "matrices", "recompute")
TRIALS: list[dict[str, object]] = [  # other values of the shipped kernel's constants
    {"WARPS": w, "ROWS": w, "PROGRAMS_PER_SM": p, "REGISTERS": 65536 // (32 * w * p)}
    for w, p in ((4, 8), (8, 4), (8, 3), (16, 2))
]
TRIALS += [{"STAGED_ROWS": 16}, {"STAGED_ROWS": 64}, {"PREFETCH": False}, {"MOST_MIX_BLOCKS": 1}]


@triton.jit
def axis_taps(o, start, extent, length, size, magic, shift, K: tl.constexpr):
    """Return the input row that tap ``K`` of each output reads, clamped, and its weight, 0 outside the input."""
    base, rest = tap_base(o, extent, size, magic, shift, False)
    row = start + tap_row(base, extent, K, 2)
    inside = (row >= 0) & (row < length) & (o < size)
    weight = tl.where(inside, tap_weight(tap_fraction(rest, size, tl.float32), K, 2), 0)
    return tl.minimum(tl.maximum(row, 0), length - 1), weight


@triton.jit
def design_kernel(
    x,  # (B, F, T)
    bank,  # (N, F, T)
    lam,  # (2, B)
    bank_index,  # (2, B)
    crop,  # (2, B, 4)
    out,  # (2, B, F, T)
    batch,
    mels,
    frames,
    canvas_mels,
    canvas_frames,
    mel_magic,
    mel_shift,
    frame_magic,
    frame_shift,
    DESIGN: tl.constexpr,
    APPROXIMATE: tl.constexpr,
    F: tl.constexpr,
    T: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    source = x + (row % batch) * mels * frames
    partner = bank + tl.load(bank_index + row) * mels * frames
    weight = tl.load(lam + row)
    h, top = box_side(crop + 4 * row, 0, mels, canvas_mels)
    w, left = box_side(crop + 4 * row, 1, frames, canvas_frames)
    f = tl.arange(0, F)
    t = tl.arange(0, T)
    y = tl.zeros((F, T), tl.float32)
    if DESIGN == "recompute":
        for k in tl.static_range(2):
            rows, row_weight = axis_taps(f, top, h, mels, mels, mel_magic, mel_shift, k)
            for tap in tl.static_range(2):
                columns, column_weight = axis_taps(t, left, w, frames, frames, frame_magic, frame_shift, tap)
                place = rows[:, None] * frames + columns[None, :]
                mixed = mix_log(tl.load(source + place), tl.load(partner + place), weight, APPROXIMATE)
                y += row_weight[:, None] * column_weight[None, :] * mixed
    else:
        place = f[:, None] * frames + t[None, :]
        inside = (f < mels)[:, None] & (t < frames)[None, :]
        mixed = mix_log(tl.load(source + place, inside, 0), tl.load(partner + place, inside, 0), weight, APPROXIMATE)
        if DESIGN == "registers":
            along_mels = tl.zeros((F, T), tl.float32)
            for k in tl.static_range(2):
                rows, row_weight = axis_taps(f, top, h, mels, mels, mel_magic, mel_shift, k)
                along_mels += row_weight[:, None] * tl.gather(mixed, tl.broadcast_to(rows[:, None], (F, T)), 0)
            for tap in tl.static_range(2):
                columns, column_weight = axis_taps(t, left, w, frames, frames, frame_magic, frame_shift, tap)
                y += column_weight[None, :] * tl.gather(along_mels, tl.broadcast_to(columns[None, :], (F, T)), 1)
        else:
            of_mels = tl.zeros((F, F), tl.float32)
            of_frames = tl.zeros((T, T), tl.float32)
            for k in tl.static_range(2):
                rows, row_weight = axis_taps(f, top, h, mels, mels, mel_magic, mel_shift, k)
                of_mels += tl.where(rows[:, None] == f[None, :], row_weight[:, None], 0)
                columns, column_weight = axis_taps(t, left, w, frames, frames, frame_magic, frame_shift, k)
                of_frames += tl.where(columns[None, :] == t[:, None], column_weight[None, :], 0)
            along_mels = tl.dot(of_mels, mixed, input_precision="tf32x3")
            y = tl.dot(along_mels, of_frames, input_precision="tf32x3")
    t_inside = (f < mels)[:, None] & (t < frames)[None, :]
    tl.store(out + row * mels * frames + f[:, None] * frames + t[None, :], y, t_inside)


@triton.jit
def held_normalize_kernel(x, sums, arrived, numel, BLOCK: tl.constexpr):
    """Normalise ``x`` in place; ``sums (programs, 2)`` and ``arrived (1,)``, which starts at 0, are scratch."""
    n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + n, n < numel, other=0)
    tl.store(sums + 2 * tl.program_id(0), tl.sum(value.to(tl.float64)))
    tl.store(sums + 2 * tl.program_id(0) + 1, tl.sum(value.to(tl.float64) * value))
    tl.debug_barrier()
    tl.atomic_add(arrived, 1, sem="acq_rel")
    while tl.atomic_add(arrived, 0, sem="acq_rel") < tl.num_programs(0):
        pass
    total = tl.zeros((), tl.float64)
    squares = tl.zeros((), tl.float64)
    for start in range(0, tl.num_programs(0), 512):
        p = start + tl.arange(0, 512)
        total += tl.sum(tl.load(sums + 2 * p, p < tl.num_programs(0), other=0, cache_modifier=".cg"))
        squares += tl.sum(tl.load(sums + 2 * p + 1, p < tl.num_programs(0), other=0, cache_modifier=".cg"))
    mean = total / numel
    std = tl.sqrt((squares - total * mean) / (numel - 1))
    tl.store(x + n, (value - mean.to(tl.float32)) / std.to(tl.float32), n < numel)


def run_design(
    design: str, x: Tensor, bank: Tensor, lam: Tensor, index: Tensor, crop: Tensor, warps: int = 8
) -> Tensor:
    """Make both views ``(2, B, F, T)`` of ``x (B, F, T)`` by one of ``DESIGNS``, on the default canvas."""
    batch, mels, frames = x.shape
    out = x.new_empty(2, batch, mels, frames)
    magics = (*division_magic(mels), *division_magic(frames))
    with on_device(x):
        design_kernel[(2 * batch,)](
            x, bank, lam, index, crop, out, batch, mels, frames, mels, int(1.5 * frames), *magics, design,
            approximate(x), triton.next_power_of_2(mels), triton.next_power_of_2(frames), num_warps=warps,
        )  # fmt: skip
    return out


def held_normalize_(x: Tensor, block: int = 8192) -> None:
    """Normalise views in place with a barrier of the whole grid; the driver refuses if not all programs fit."""
    programs = triton.cdiv(x.numel(), block)
    sums = torch.empty(programs, 2, dtype=torch.float64, device=x.device)
    arrived = torch.zeros(1, dtype=torch.int32, device=x.device)
    with on_device(x):
        held_normalize_kernel[(programs,)](
            x, sums, arrived, x.numel(), BLOCK=block, num_warps=8, launch_cooperative_grid=True
        )


def table() -> str:
    """Return a Markdown table of each design's resources on an H200, for 64 x 96."""
    from benchmarks.gpu.kernels import Variant, _names, compile_variant, resources

    pointers = _names("x bank lam out", "fp32") | {"bank_index": "i64", "crop": "i32"}
    lines = [
        "| design | warps | registers | spilled, bytes | shared, bytes | programs per SM | instructions per output |"
    ]
    lines.append("|---|---:|---:|---:|---:|---:|---:|")
    for design in DESIGNS:
        for warps in (8, 16):
            constants = {"DESIGN": design, "APPROXIMATE": True, "F": 64, "T": 128}
            odd = ("batch", "mel_shift", "frame_shift")
            variant = Variant("", pointers, constants, ("mel_magic", "frame_magic"), odd, warps)
            found = resources(compile_variant(variant, 90, design_kernel), 90, warps)
            each = found.instructions * 32 * warps / (64 * 96)
            cells = (design, warps, found.registers, found.spilled, found.shared, found.programs, f"{each:.0f}")
            lines.append("| " + " | ".join(map(str, cells)) + " |")
    constants = {"BLOCK": 8192}
    variant = Variant("", _names("x", "fp32") | {"sums": "fp64", "arrived": "i32"}, constants, warps=8)
    found = resources(compile_variant(variant, 90, held_normalize_kernel), 90, 8)
    cells = ("held", 8, found.registers, found.spilled, found.shared, found.programs, f"{found.instructions / 24:.0f}")
    lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
