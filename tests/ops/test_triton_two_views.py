"""A call in two launches against the same call op by op, on CUDA or interpreted."""

from __future__ import annotations

import math

import pytest
import torch
from helpers.tolerances import assert_close

from byola_fast import ops
from byola_fast.ops import _triton
from byola_fast.ops._triton import augment_views, normalize, two_views

if not (torch.cuda.is_available() or _triton.interpreted()):
    reason = "kernels need a GPU or TRITON_INTERPRET=1; test_triton_interpreted.py runs this file under the interpreter"
    pytest.skip(reason, allow_module_level=True)

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
RANGES = {"mixup_ratio": 0.4, "freq_scale": (0.6, 1.5), "time_scale": (0.6, 1.5), "virtual_crop_scale": (1.0, 1.5)}


def both(
    batch=3, shape=(11, 19), *, size=None, dtype=torch.float32, held=torch.float32, memory=7, cursor=(2, 5, 1),
    pool=None, stats=True, interpolation="bilinear", mixup="log", post_norm=True, advance=True, bad=(), offset=5,
    scale=(1.0, 1.5), layout=lambda x: x,
):  # fmt: skip
    """Return views, memory, cursor and rng of the call in two launches, then of single ops."""
    size = size or shape
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, *shape, generator=generator).to(dtype)
    for number, value in zip(bad, (math.nan, math.inf, -math.inf), strict=False):
        x[number, -1, -1] = value
    x = layout(x.to(DEVICE))
    others = None if pool is None else torch.randn(pool, *shape, generator=generator).to(DEVICE, dtype)
    rows = None if memory is None else torch.randn(memory, *shape, generator=generator).to(DEVICE, held)
    moments = torch.tensor([0.3, 1.7], device=DEVICE) if stats else None
    results = []
    for single in (False, True):
        turn, rng = torch.tensor(cursor, device=DEVICE), torch.tensor([11, 2**32 - 1], device=DEVICE)
        kept = None if rows is None else rows.clone()
        views = torch.full((2, batch, *size), math.nan, dtype=dtype, device=DEVICE)
        canvas = ops.canvas_size(*shape, scale)
        if single:
            given = {"bank": kept, "bank_count": None if kept is None else turn[1], "pool": others, "stats": moments}
            drawn = ops.draw_params(
                rng, batch, shape, fader_gain=1.0, bank_count=given["bank_count"], pool=pool,
                pool_offset=1 if pool else 0, sample_offset=offset, **RANGES | {"virtual_crop_scale": scale},
            )  # fmt: skip
            settings = {"sample_offset": offset, "size": size, "canvas": canvas, "mixup": mixup}
            views, sums = ops.augment_views(x, *drawn, rng, interpolation=interpolation, out=views, **given, **settings)
            if post_norm:
                views = ops.normalize(views, sums, inplace=True)
            if advance:
                rng[1:].add_(1)
                if kept is not None:
                    ops.bank_push_(kept, turn, x, moments)
        else:
            ranges = [list(ops.functional.size_range("", n, (0.6, 1.5))) for n in shape]
            two_views.two_views_(
                x, others, kept, None if kept is None else turn, moments, rng, 1 if pool else 0, offset,
                *ranges, list(canvas), 0.4, 1.0, interpolation, mixup, post_norm, advance, views,
            )  # fmt: skip
        results.append((views, kept, turn, rng))
    return results


def check(**case):
    (views, rows, cursor, rng), (expected, expected_rows, expected_cursor, expected_rng) = both(**case)
    assert_close(views, expected.double(), factor=4)
    assert torch.equal(cursor, expected_cursor)
    assert torch.equal(rng, expected_rng)
    if rows is not None:
        torch.testing.assert_close(rows, expected_rows, rtol=0, atol=0, equal_nan=True)


CASES = {
    "plain": {},
    "bicubic": {"interpolation": "bicubic"},
    "bfloat16": {"dtype": torch.bfloat16},
    "float16 memory": {"held": torch.float16, "bad": (1,)},
    "float64": {"dtype": torch.float64},
    "no memory": {"memory": None},
    "no memory, pool": {"memory": None, "pool": 5},
    "empty memory": {"cursor": (0, 0, 0)},
    "empty memory, pool": {"cursor": (0, 0, 0), "pool": 5, "dtype": torch.bfloat16},
    "refused": {"batch": 5, "bad": (0, 2, 4)},
    "all refused": {"batch": 2, "bad": (0, 1), "post_norm": False},
    "larger than the memory": {"batch": 9, "memory": 4, "cursor": (3, 4, 0), "bad": (2,), "post_norm": False},
    "damaged cursor": {"cursor": (-9, 5, 0)},
    "no stats": {"stats": False},
    "not normalised": {"post_norm": False},
    "evaluation": {"advance": False},
    "nothing but views": {"advance": False, "post_norm": False, "memory": None},
    "Gaussian": {"mixup": "gaussian"},
    "linear": {"mixup": "linear"},
    "none": {"mixup": "none"},
    "other size": {"size": (9, 21), "scale": (1.4, 1.6)},
    "taller": {"size": (37, 70)},
    "one value": {"batch": 1, "shape": (1, 1), "size": (3, 2), "post_norm": False},
    "transposed": {"layout": lambda x: x.mT.contiguous().mT},
    "apart": {"layout": lambda x: x.repeat_interleave(2, 1)[:, ::2]},
    "offset beyond 32 bits": {"offset": 2**33 + 3},
}

EXACT = {"shape": (40, 32), "size": (48, 64), "scale": (1.1, 1.5)}  # sizes of exact_views.py
CASES |= {
    "exact": {"shape": (64, 96)},
    "exact, margins": EXACT,
    "exact, bicubic": EXACT | {"interpolation": "bicubic"},
    "exact, bfloat16": EXACT | {"dtype": torch.bfloat16, "bad": (1,)},
    "exact, refused": EXACT | {"batch": 5, "bad": (0, 2, 4), "post_norm": False},
    "exact, empty memory": EXACT | {"cursor": (0, 0, 0), "pool": 5},
    "exact, float16 memory": EXACT | {"held": torch.float16, "cursor": (0, 0, 0)},
    "exact, no memory": EXACT | {"memory": None, "batch": 1},
    "exact, larger than the memory": EXACT | {"batch": 9, "memory": 4, "cursor": (3, 4, 0), "bad": (2,)},
    "exact, no stats": EXACT | {"stats": False},
    "exact, evaluation": EXACT | {"advance": False},
    "exact, apart": EXACT | {"layout": lambda x: x.repeat_interleave(2, 1)[:, ::2]},
}


@pytest.mark.parametrize("name", CASES)
def test_two_launches_equal_single_ops(name):
    check(**CASES[name])


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_of_many_tiles(interpolation, monkeypatch):
    monkeypatch.setattr(augment_views, "ROWS", 4)
    monkeypatch.setattr(augment_views, "COLUMNS", 8)
    monkeypatch.setattr(augment_views, "STAGED_ROWS", 4)
    monkeypatch.setattr(augment_views, "resident_programs", lambda x, per_sm: 2)
    monkeypatch.setattr(two_views, "resident_programs", lambda x, per_sm: 2)
    monkeypatch.setattr(two_views, "NORMALIZED", 256)
    monkeypatch.setattr(normalize, "NORMALIZED", 512)
    check(batch=5, shape=(13, 43), interpolation=interpolation, bad=(3,), post_norm=False)
    check(batch=5, shape=(12, 48), interpolation=interpolation)


def test_an_empty_batch_changes_nothing():
    check(batch=0, post_norm=False, advance=False)
