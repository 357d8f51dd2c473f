"""The memory bank against a Python deque."""

from __future__ import annotations

import math
from collections import deque

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from byola_fast import MemoryBank, ops


def check_against_deque(n_memory, batches, dtype=torch.float32, device="cpu", stats=None):
    rows = torch.zeros(n_memory, 2, 3, dtype=dtype, device=device)
    cursor = torch.zeros(3, dtype=torch.int64, device=device)
    ring, written, refused = deque(maxlen=n_memory), 0, 0
    for batch in batches:
        before = batch.clone()
        ops.bank_push_(rows, cursor, batch, stats)
        assert torch.equal(batch.nan_to_num(7), before.nan_to_num(7))
        mean, std = (0, 1) if stats is None else stats
        for sample in (batch.float() - mean) / std:
            row = sample.to(dtype)
            if row.isfinite().all():
                ring.append(row)
                written += 1
            else:
                refused += 1
        assert cursor.tolist() == [written % n_memory, len(ring), refused]
        order = [(written - len(ring) + k) % n_memory for k in range(len(ring))]
        for row, expected in zip(order, ring, strict=True):
            torch.testing.assert_close(rows[row], expected, rtol=0, atol=1e-6 if dtype == torch.float32 else 1e-3)
        unfilled = sorted(set(range(n_memory)) - set(order))
        assert (rows[unfilled] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("sizes", [[3, 4, 5], [7, 7, 7], [10], [0, 1, 0], [9, 2, 17, 1], [4, 3]])
def test_order_wrap_around_partial_filling_and_large_batches(sizes, dtype, device):
    batches = [torch.randn(n, 2, 3, device=device) for n in sizes]
    check_against_deque(7, batches, dtype, device)


@settings(max_examples=60, deadline=None)
@given(
    n_memory=st.integers(1, 9),
    batches=st.lists(st.lists(st.sampled_from([0, 0, 1, 2, 3]), max_size=20), min_size=1, max_size=5),
)
def test_samples_that_are_not_finite_are_refused(n_memory, batches):
    made = []
    for batch in batches:
        x = torch.randn(len(batch), 2, 3)
        for row, fault in zip(x, batch, strict=True):
            row[1, 2] = [row[1, 2], math.nan, math.inf, -math.inf][fault]
        made.append(x)
    check_against_deque(n_memory, made)


def test_pre_normalisation_and_strides(device):
    stats = torch.tensor([1.5, 0.25], device=device)
    check_against_deque(5, [torch.randn(3, 4, 9, device=device)[:, ::2, ::3]] * 3, stats=stats, device=device)


def test_samples_that_overflow_the_dtype_of_the_bank_are_refused(device):
    rows = torch.zeros(3, 1, 1, dtype=torch.float16, device=device)
    cursor = torch.zeros(3, dtype=torch.int64, device=device)
    ops.bank_push_(rows, cursor, torch.tensor([[[1.0]], [[1e6]], [[2.0]]], device=device))
    assert cursor.tolist() == [2, 2, 1]
    assert rows.flatten().tolist() == [1, 2, 0]


def test_the_module_counts_and_loads(device):
    bank = MemoryBank(4).to(device)
    bank.push(torch.randn(3, 5, 6, device=device))
    bank.push(torch.full((2, 5, 6), math.nan, device=device))
    assert len(bank) == 3
    assert int(bank.refused) == 2
    fresh = MemoryBank(4).to(device)
    fresh.load_state_dict(bank.state_dict())
    assert torch.equal(fresh.rows, bank.rows)
    assert torch.equal(fresh.cursor, bank.cursor)
    assert fresh.rows.data_ptr() != bank.rows.data_ptr()
    empty = MemoryBank(4)
    fresh.load_state_dict(empty.state_dict())
    assert len(fresh) == 0


def test_bad_input():
    bank = MemoryBank(4, shape=(5, 6))
    with pytest.raises(ValueError, match=r"memory bank's \(mels, frames\) \(5, 6\), got \(3, 5, 7\)"):
        bank.push(torch.randn(3, 5, 7))
    with pytest.raises(ValueError, match=r"n_memory: expected 0 to 2\^24 rows, got -1"):
        MemoryBank(-1)
    with pytest.raises(TypeError, match="floating-point dtype"):
        MemoryBank(4, dtype=torch.int8)
    with pytest.raises(RuntimeError, match=r"rows: of another shape \(4, 5, 6\) instead of \(4, 5, 7\)"):
        MemoryBank(4, shape=(5, 7)).load_state_dict(bank.state_dict())
    with pytest.raises(RuntimeError, match="rows"):
        MemoryBank(3).load_state_dict(bank.state_dict())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_half_precision_number_and_every_tie_between_two(dtype, device):
    """Widened exactly; rounded to nearest, ties to even; NaN of any payload is never taken for a number."""
    numbers = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype).float()
    finite = numbers[numbers.isfinite()].double().sort().values
    above = 2 ** finite[-1].log2().ceil()  # rounds to inf, as does the tie before it
    finite = torch.cat([-above[None], finite, above[None]])
    ties = ((finite[1:] + finite[:-1]) / 2).float()  # exact
    beside = [torch.nextafter(ties, torch.full((), end)) for end in (-math.inf, math.inf)]
    payloads = torch.tensor([1, 0x7FFF, 0x8000, 0x3FFFFF, 0x400000, 0x7FFFFF])
    nan = torch.cat([payloads + 0x7F800000, payloads - 0x800000]).int().view(torch.float32)
    wide = torch.cat([numbers, ties, *beside, nan])
    for source, target in ((numbers.to(dtype), torch.float32), (wide, dtype)):
        for frames in (1, 16):  # parts of vectors, whole vectors
            x = source.to(device)[:, None, None].expand(-1, 1, frames).contiguous()
            rows = torch.zeros(x.shape, dtype=target, device=device)
            cursor = torch.zeros(3, dtype=torch.int64, device=device)
            ops.bank_push_(rows, cursor, x)
            expected = x.to(target)
            expected = expected[expected.isfinite().flatten(1).all(1)]
            assert cursor[1] == len(expected)
            assert torch.equal(rows[: len(expected)].view(torch.int8), expected.view(torch.int8))
