"""Statistics of the pre-normalisation."""

from __future__ import annotations

import pytest
import torch
from helpers.tolerances import assert_close
from hypothesis import given, settings
from hypothesis import strategies as st

from byola_fast import RunningStats
from byola_fast.spectrograms.statistics import batch_stats, compute_stats


@settings(max_examples=40, deadline=None)
@given(sizes=st.lists(st.integers(0, 6), min_size=1, max_size=6), mean=st.floats(-20, 20), std=st.floats(0.1, 10))
def test_running_statistics_equal_those_of_everything_at_once(sizes, mean, std):
    batches = [mean + std * torch.randn(n, 3, 5) for n in sizes]
    everything = torch.cat(batches).double()
    running = RunningStats()
    for batch in batches:
        running.update(batch)
    if len(everything) == 0:
        assert running.stats().tolist() == [0, 1]
        return
    wanted = torch.stack([everything.mean(), everything.std()])
    assert_close(running.stats(), wanted, factor=20)  # values up to 60, six merges
    assert compute_stats(batches) == tuple(running.stats().tolist())


def test_samples_that_are_not_finite_are_left_out_with_a_warning(caplog):
    batches = [torch.randn(4, 3, 5), torch.randn(4, 3, 5)]
    wanted = compute_stats([batches[0], batches[1][1:]])
    assert not caplog.messages
    batches[1][0, 0, 0] = torch.inf
    assert compute_stats(batches) == pytest.approx(wanted)
    assert caplog.messages == ["stats: 12 % of the log-mels are not finite and left out"]


def test_empty_batches_do_not_count():
    running = RunningStats(max_updates=1)
    assert running.update(torch.empty(0, 3, 4)).tolist() == [0, 1]
    x = torch.randn(5, 3, 4)
    assert_close(running.update(x), torch.stack([x.double().mean(), x.double().std()]))


def test_samples_that_are_not_finite_are_left_out():
    x = torch.randn(5, 3, 4)
    broken = x.clone()
    broken[1, 0, 0], broken[3] = float("nan"), float("inf")
    running = RunningStats()
    running.update(broken)
    kept = x[[0, 2, 4]].double()
    assert_close(running.stats(), torch.stack([kept.mean(), kept.std()]))


def test_statistics_without_data_say_so():
    with pytest.raises(ValueError, match="at least one finite log-mel"):
        compute_stats([torch.full((2, 3), float("nan"))])


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_batch_stats(dtype):
    x = (3 * torch.randn(4, 5, 6) - 8).to(dtype)
    stats = batch_stats(x)
    assert stats.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_close(stats, torch.stack([x.double().mean(), x.double().std()]))
    assert batch_stats(x[:0]).tolist() == [0, 1]
    assert batch_stats(x[:1, :1, :1])[1] == 2.0**-23
