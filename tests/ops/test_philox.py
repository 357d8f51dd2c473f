"""Random numbers: known answers, and integer sizes and positions over every 24-bit draw."""

from __future__ import annotations

import math

import pytest
import torch

from byola_fast.ops import draw_params, functional, philox

EVERY_U24 = torch.arange(2**24)
KNOWN_ANSWERS = [  # counter, key, output of philox4x32-10; from Random123's kat_vectors
    ((0,) * 4, (0,) * 2, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_known_answers(counter, key, expected, device):
    assert philox.philox4x32(*counter, *key) == expected
    words = philox.philox4x32(*(torch.tensor([w], device=device) for w in (*counter, *key)))
    assert tuple(int(word) for word in words) == expected


def test_view_words_use_the_documented_counter(device):
    seed, step, offset = 2**40 + 5, 7, 2**32 - 1
    rng = torch.tensor([seed, step], device=device)
    words = philox.view_words(rng, 3, offset, philox.SLOT_RATIO)
    for view in range(2):
        for b in range(3):
            counter = (step, (offset + b) % 2**32, view, philox.SLOT_RATIO)
            expected = philox.philox4x32(*counter, seed % 2**32, seed // 2**32)
            assert tuple(int(word[view, b]) for word in words) == expected


def test_segment_draws_differ_by_seed_epoch_and_index():
    draws = {philox.segment_u24(s, e, i) for s in range(5) for e in range(5) for i in range(5)}
    assert len(draws) == 125
    assert all(0 <= draw < 2**24 for draw in draws)


@pytest.mark.parametrize(
    ("length", "scale", "canvas"),
    [
        (64, (0.6, 1.5), 64),
        (96, (0.6, 1.5), 144),
        (63, (0.6, 1.5), 63),
        (97, (0.6, 1.5), 145),
        (1, (0.6, 1.5), 1),
        (601, (1.0, 1.0), 601),
        (998, (0.05, 0.3), 998),
        (5, (0.6, 0.6), 7),
    ],
)
def test_sizes_over_every_draw(length, scale, canvas):
    """The frequency of each size is that of int(U(*scale) * length), within the documented 2^-16 of a bin."""
    base, slope = functional.size_range("scale", length, scale)
    sizes = ((base + slope * EVERY_U24) >> 40).clamp(1, canvas)
    low, high = scale[0] * length, scale[1] * length
    exact = (low + (high - low) * (EVERY_U24.double() / 2**24)).long().clamp(1, canvas)
    counts, expected = (torch.bincount(s, minlength=canvas + 1) for s in (sizes, exact))
    per_bin = 2**24 / max(high - low, 1)
    assert (counts - expected).abs().max() <= 2 + 2 * per_bin * 2**-16  # a bin has two edges; each falls between draws
    assert sizes.max() <= max(1, math.ceil(high) - 1 if high > low else int(high))
    assert sizes[0] == min(max(int(low), 1), canvas)


@pytest.mark.parametrize("positions", [1, 2, 3, 48, 57, 143, 2048, 2**20 + 7])
def test_positions_over_every_draw(positions):
    """Every valid position is drawn, both ends included, equally often up to one draw."""
    place = (EVERY_U24 * positions) >> 24
    counts = torch.bincount(place, minlength=positions)
    assert counts.numel() == positions
    assert counts.max() - counts.min() <= 1


def test_lam_and_fader_round_once_over_every_draw():
    ratio = torch.tensor(0.4, dtype=torch.float32)
    exact = ratio.double() * EVERY_U24.double() / 2**24
    assert torch.equal((EVERY_U24.float() * 2.0**-24) * 0.4, exact.float())
    gain = torch.tensor(0.7, dtype=torch.float32)
    exact = gain.double() * (EVERY_U24.double() - 2**23) / 2**23
    assert torch.equal(((EVERY_U24 - 2**23).float() * 2.0**-23) * 0.7, exact.float())


@pytest.mark.parametrize(("views", "first_view"), [(2, 0), (1, 0), (3, 2**32 - 1)])
def test_drawn_parameters_follow_from_the_words(views, first_view, device):
    """Repeat the draw for each sample in Python integers."""
    seed, step, offset, batch, (mels, frames) = 2**35 + 17, 9, 1000, 37, (63, 97)
    count = torch.tensor(29, device=device)
    rng = torch.tensor([seed, step], device=device)
    named = {"sample_offset": offset, "views": views, "first_view": first_view}
    lam, bank_index, crop, fader = draw_params(
        rng, batch, (mels, frames), bank_count=count, fader_gain=0.75, mixup_ratio=0.3, **named
    )
    pool_index = draw_params(rng, batch, (mels, frames), **named)[1]
    canvas = (63, 145)
    ranges = [functional.size_range("", n, (0.6, 1.5)) for n in (mels, frames)]
    assert len(lam) == views
    for view in range(views):
        for b in range(batch):

            def words(slot, view=view, b=b):
                counter = (step, offset + b, (first_view + view) % 2**32, slot)
                return [w >> 8 for w in philox.philox4x32(*counter, seed % 2**32, seed >> 32)]

            u = words(philox.SLOT_CROP)
            h, w = (
                min(max((base + slope * draw) >> 40, 1), maximum)
                for (base, slope), draw, maximum in zip(ranges, u, canvas, strict=False)
            )
            box = [(u[2] * (canvas[0] - h + 1)) >> 24, (u[3] * (canvas[1] - w + 1)) >> 24, h, w]
            assert crop[view, b].tolist() == box
            expected = torch.tensor(words(philox.SLOT_RATIO)[0] / 2**24, dtype=torch.float32) * 0.3
            assert lam[view, b].item() == expected.item()
            partner = words(philox.SLOT_PARTNER)[0]
            assert bank_index[view, b].item() == (partner * 29) >> 24
            other = (partner * (batch - 1)) >> 24
            assert pool_index[view, b].item() == other + (other >= b)
            for end in range(2):
                u = (words(philox.SLOT_FADER)[end] - 2**23) / 2**23
                assert fader[view, b, end].item() == (torch.tensor(u, dtype=torch.float32) * 0.75).item()


def test_distributions_of_a_million_samples():
    """Means and extremes of every parameter; the bounds are five standard errors."""
    n = 500_000
    lam, bank_index, crop, fader = draw_params(
        torch.tensor([1, 2]), n, (64, 96), fader_gain=1.0, bank_count=torch.tensor(2048)
    )
    error = 5 / math.sqrt(12 * 2 * n)
    assert abs(lam.mean() / 0.4 - 0.5) < error
    assert 0 <= lam.min() < 1e-5
    assert 0.39999 < lam.max() < 0.4
    assert abs(bank_index.double().mean() / 2047 - 0.5) < error
    assert bank_index.min() == 0
    assert bank_index.max() == 2047
    assert abs(fader.mean()) < 2 * error
    assert fader.abs().max() <= 1
    i, j, h, w = crop.long().unbind(-1)
    assert h.min() == 38
    assert h.max() == 64
    assert w.min() == 57
    assert w.max() == 143
    clipped = (h == 64).double().mean()
    assert abs(clipped - (96 - 64) / (96 - 38.4)) < 10 * error
    for start, largest in ((i, 64 - h), (j, 144 - w)):
        free = largest > 0
        assert abs((start[free] / largest[free]).mean() - 0.5) < 4 * error
        assert bool((start[free] == largest[free]).any())
        assert bool((start[free] == 0).any())
    assert not torch.equal(crop[0], crop[1])
