"""Philox4x32-10 counter-based random numbers, on Python integers or int64 tensors.

One call turns a 128-bit counter and a 64-bit key into four 32-bit words. There is no state: a draw depends on its
counter and key only, never on earlier draws. The layout is fixed, and every backend follows it:

    key     = (seed mod 2^32, seed div 2^32)
    counter = (step, sample, view, slot), each mod 2^32

Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch

Word = TypeVar("Word", int, torch.Tensor)

SLOT_CROP = 0  # words: mels, frames, mel position, frame position
SLOT_RATIO = 1  # word 0: lam
SLOT_PARTNER = 2  # word 0: the row to mix in
SLOT_FADER = 3  # words 0 and 1: head, tail
SLOT_SEGMENT = 4  # word 0: start of a clip's segment (step = epoch, sample = clip, view = draw)
SLOT_ORDER = 5  # words 0 and 1: seed of an epoch's order of clips (step = epoch)
SLOT_REPLACEMENT = 6  # word 0: the replacement of a broken clip (step = epoch, sample = its number, view = attempt)
SLOT_APPLY = 7  # word 0: whether a transform changes the sample
SLOT_NOISE = 1 << 16  # plus n: four standard normals, elements 4 n to 4 n + 3 of the sample

MASK32 = 0xFFFFFFFF
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)


def _multiply(word: Word, multiplier: int) -> tuple[Word, Word]:
    """Return the high and low 32 bits of a 32 x 32 bit product; int64 is signed, so intermediates stay below 2^49."""
    upper = word * (multiplier >> 16)
    lower = word * (multiplier & 0xFFFF)
    high = (upper + (lower >> 16)) >> 16
    low = (((upper & 0xFFFF) << 16) + lower) & MASK32
    return high, low


def philox4x32(c0: Word, c1: Word, c2: Word, c3: Word, k0: Word, k1: Word) -> tuple[Word, Word, Word, Word]:
    """Return the four 32-bit words of one counter and key; arguments in [0, 2^32), tensors broadcast.

    >>> [hex(word) for word in philox4x32(0, 0, 0, 0, 0, 0)]
    ['0x6627e8d5', '0xe169c58d', '0xbc57ac4c', '0x9b00dbd8']
    """
    for _ in range(10):
        high0, low0 = _multiply(c0, MULTIPLIERS[0])
        high1, low1 = _multiply(c2, MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + WEYL[0]) & MASK32, (k1 + WEYL[1]) & MASK32
    return c0, c1, c2, c3


def view_words(
    rng: torch.Tensor, batch: int, sample_offset: int, slot: int | torch.Tensor, views: int = 2, first_view: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return four words for each view and sample of a batch.

    Args:
        rng: ``(2,)`` int64, seed and step.
        batch: B, the number of samples.
        sample_offset: number of the first sample in the global batch.
        slot: a slot, or a 1-D tensor of N slots.
        views: V, the number of views.
        first_view: number of the first view.

    Shape:
        Four int64 tensors of ``(V, B)``, or ``(V, B, N)`` for N slots, on the device of ``rng``.
    """
    seed, step = rng[0], rng[1] & MASK32
    sample = (torch.arange(batch, device=rng.device) + sample_offset) & MASK32
    view = ((torch.arange(views, device=rng.device) + first_view) & MASK32)[:, None]
    counter = [word.expand(views, batch) for word in (step, sample, view)]
    if isinstance(slot, torch.Tensor):
        counter = [word[..., None] for word in counter]
        slots = slot
    else:
        slots = torch.full((), slot, dtype=torch.int64, device=rng.device)
    c0, c1, c2, c3 = torch.broadcast_tensors(*counter, slots)
    return philox4x32(c0, c1, c2, c3, seed & MASK32, (seed >> 32) & MASK32)


def segment_u24(seed: int, epoch: int, index: Word, draw: int | torch.Tensor = 0) -> Word:
    """Return the 24-bit draw that determines the start of a clip's segment in an epoch.

    Args:
        seed: key of the random numbers.
        epoch: at least 0.
        index: number of the clip, or an int64 tensor of numbers.
        draw: number of the segment among the clip's segments in this epoch; a tensor broadcasts with ``index``.
    """
    key: Any = seed & MASK32, (seed >> 32) & MASK32
    counter: Any = epoch & MASK32, index & MASK32, draw & MASK32, SLOT_SEGMENT
    word, *_ = philox4x32(*counter, *key)
    return word >> 8
