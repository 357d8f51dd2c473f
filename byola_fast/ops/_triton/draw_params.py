# mypy: ignore-errors
"""Draw the parameters of V views: Philox4x32-10, integer arithmetic, one rounding per float.

Reads seed and step; writes lam (V, B), bank_index (V, B), crop (V, B, 4) and fader (V, B, 2). Bit-identical to the
reference: 24-bit draws, products below 2^63, one rounded multiplication per float.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from byola_fast.ops import philox
from byola_fast.ops._triton.shared import launch, on_device
from byola_fast.ops.reference import SIZE_SHIFT

BLOCK = 128
SLOT_CROP = tl.constexpr(philox.SLOT_CROP)
SLOT_RATIO = tl.constexpr(philox.SLOT_RATIO)
SLOT_PARTNER = tl.constexpr(philox.SLOT_PARTNER)
SLOT_FADER = tl.constexpr(philox.SLOT_FADER)
SHIFT = tl.constexpr(SIZE_SHIFT)
# one variant for all values: specialising gains nothing
RUNTIME = ["batch", "pool", "pool_offset", "sample_offset", "mel_base", "mel_slope", "frame_base", "frame_slope"]
RUNTIME += ["canvas_mels", "canvas_frames", "views", "first_view"]


@triton.jit
def u24(seed, step, sample, view, SLOT: tl.constexpr):
    """Return four 24-bit draws of one slot, as int64."""
    slot = tl.full(sample.shape, SLOT, tl.uint32)
    a, b, c, d = tl.philox(seed, step + tl.zeros_like(sample), sample, view, slot)
    return (a >> 8).to(tl.int64), (b >> 8).to(tl.int64), (c >> 8).to(tl.int64), (d >> 8).to(tl.int64)


@triton.jit
def parameters(
    size_h, size_w, place_h, place_w, ratio, partner, head, tail,  # 24-bit draws, int64
    own, pool, pool_offset, mel_base, mel_slope, frame_base, frame_slope, canvas_mels, canvas_frames,
    mixup_ratio, fader_gain, bank_count, HAS_BANK: tl.constexpr,
):  # fmt: skip
    """Return the box (i, j, h, w), lam, bank_index, head and tail of a view of the batch's sample ``own``."""
    mels, frames = canvas_mels.to(tl.int64), canvas_frames.to(tl.int64)
    h = tl.minimum(tl.maximum((mel_base + mel_slope * size_h) >> SHIFT, 1), mels)
    w = tl.minimum(tl.maximum((frame_base + frame_slope * size_w) >> SHIFT, 1), frames)
    i = ((place_h * (mels - h + 1)) >> 24).to(tl.int32)
    j = ((place_w * (frames - w + 1)) >> 24).to(tl.int32)
    lam = (ratio.to(tl.float32) * 2.0**-24) * mixup_ratio
    index = (partner * tl.maximum(pool - 1, 0)) >> 24
    index = tl.where(index >= own + pool_offset, index + 1, index)
    index = tl.where(pool > 1, index, -1)
    if HAS_BANK:
        count = tl.load(bank_count)
        index = tl.where(count > 0, (partner * count) >> 24, index)
    head = ((head - 2**23).to(tl.float32) * 2.0**-23) * fader_gain
    tail = ((tail - 2**23).to(tl.float32) * 2.0**-23) * fader_gain
    return i, j, h.to(tl.int32), w.to(tl.int32), lam, index, head, tail


@triton.jit
def draw_scalars(rng, sample, view):
    """Return the eight draws of one view as scalars: four lanes draw a slot each, and sums take the words."""
    slot = tl.arange(0, 4).to(tl.uint32)
    zero = tl.zeros_like(slot)
    step = tl.load(rng + 1).to(tl.uint32)
    counter = zero + sample.to(tl.uint32), zero + view.to(tl.uint32)
    a, b, c, d = tl.philox(tl.load(rng), zero + step, counter[0], counter[1], slot)
    return (
        word_of(a, slot, SLOT_CROP), word_of(b, slot, SLOT_CROP), word_of(c, slot, SLOT_CROP),
        word_of(d, slot, SLOT_CROP), word_of(a, slot, SLOT_RATIO), word_of(a, slot, SLOT_PARTNER),
        word_of(a, slot, SLOT_FADER), word_of(b, slot, SLOT_FADER),
    )  # fmt: skip


@triton.jit
def word_of(word, slot, SLOT: tl.constexpr):
    return tl.sum(tl.where(slot == SLOT, (word >> 8).to(tl.int32), 0)).to(tl.int64)


@triton.jit(do_not_specialize=RUNTIME)
def draw_params_kernel(
    rng,  # (2,) int64
    bank_count,  # () int64, or absent
    lam,  # (V, B)
    bank_index,  # (V, B)
    crop,  # (V, B, 4)
    fader,  # (V, B, 2)
    batch,
    pool,
    pool_offset,
    sample_offset,
    mel_base,
    mel_slope,
    frame_base,
    frame_slope,
    canvas_mels,
    canvas_frames,
    mixup_ratio,
    fader_gain,
    views,
    first_view,
    HAS_BANK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = row < views * batch
    own = row % batch
    view = (row // batch + first_view).to(tl.uint32)
    sample = (own + sample_offset).to(tl.uint32)
    seed = tl.load(rng)
    step = tl.load(rng + 1).to(tl.uint32)

    size_h, size_w, place_h, place_w = u24(seed, step, sample, view, SLOT_CROP)
    ratio, _1, _2, _3 = u24(seed, step, sample, view, SLOT_RATIO)
    partner, _4, _5, _6 = u24(seed, step, sample, view, SLOT_PARTNER)
    head, tail, _7, _8 = u24(seed, step, sample, view, SLOT_FADER)
    i, j, h, w, weight, index, head, tail = parameters(
        size_h, size_w, place_h, place_w, ratio, partner, head, tail,
        own, pool, pool_offset, mel_base, mel_slope, frame_base, frame_slope, canvas_mels, canvas_frames,
        mixup_ratio, fader_gain, bank_count, HAS_BANK,
    )  # fmt: skip
    tl.store(crop + 4 * row, i, inside)
    tl.store(crop + 4 * row + 1, j, inside)
    tl.store(crop + 4 * row + 2, h, inside)
    tl.store(crop + 4 * row + 3, w, inside)
    tl.store(lam + row, weight, inside)
    tl.store(bank_index + row, index, inside)
    tl.store(fader + 2 * row, head, inside)
    tl.store(fader + 2 * row + 1, tail, inside)


def draw_params(
    rng: Tensor,
    bank_count: Tensor | None,
    batch: int,
    pool: int,
    pool_offset: int,
    sample_offset: int,
    mels: list[int],
    frames: list[int],
    canvas: list[int],
    mixup_ratio: float,
    fader_gain: float,
    views: int,
    first_view: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    lam = rng.new_empty(views, batch, dtype=torch.float32)
    bank_index = rng.new_empty(views, batch, dtype=torch.int64)
    crop = rng.new_empty(views, batch, 4, dtype=torch.int32)
    fader = rng.new_empty(views, batch, 2, dtype=torch.float32)
    if batch:
        with on_device(rng):
            launch(
                draw_params_kernel,
                triton.cdiv(views * batch, BLOCK),
                rng.contiguous(),
                rng if bank_count is None else bank_count,
                lam,
                bank_index,
                crop,
                fader,
                batch,
                pool,
                pool_offset,
                sample_offset,
                *mels,
                *frames,
                *canvas,
                mixup_ratio,
                fader_gain,
                views,
                first_view,
                HAS_BANK=bank_count is not None,
                BLOCK=BLOCK,
            )
    return lam, bank_index, crop, fader
