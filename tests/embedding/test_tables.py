"""Tables of embeddings: times of long sound, and pairs of files that belong together."""

from __future__ import annotations

import csv
import itertools
import os
from contextlib import suppress

import numpy as np
import pytest
import torch

import byola_fast
from byola_fast.embedding.tables import Clip, write_table


@pytest.fixture
def clip(tmp_path):
    """Three hours of frames every 80 ms."""
    rows = 3 * 3600 * 1000 // 80
    np.arange(rows, dtype=np.float32).tofile(tmp_path / "rows.f32")
    return Clip(tmp_path / "rows.f32", 0, rows, 1)


@pytest.mark.parametrize("period_ms", [80.0, 1000 * 8 * 160 / 22050])
def test_times_are_exact_for_hours(clip, tmp_path, period_ms):
    exact = [35.0 + period_ms * number for number in range(clip.rows)]
    for name in ("e.csv", "e.npz"):
        write_table(tmp_path / name, [("a.wav", clip)], period_ms=period_ms, first_ms=35.0)
    with open(tmp_path / "e.csv", newline="") as file:
        assert [float(line["timestamp_ms"]) for line in csv.DictReader(file)] == exact
    assert np.load(tmp_path / "e.npz")["timestamps_ms"].tolist() == exact


def numbered(tmp_path, first, count):
    """Clips whose names are the numbers in their only rows."""
    np.arange(first, first + count, dtype=np.float32).tofile(tmp_path / f"{first}.f32")
    return [(f"{first + n}", Clip(tmp_path / f"{first}.f32", n, 1, 1)) for n in range(count)]


@pytest.mark.parametrize("killed", [False, True])
@pytest.mark.parametrize("count", range(6))
def test_rows_and_names_of_two_results_never_stand_together(tmp_path, monkeypatch, count, killed):
    """Whatever call fails, or is the last before a kill."""
    out = tmp_path / "e.npy"
    write_table(out, numbered(tmp_path, 0, 5))

    class Failed(BaseException if killed else OSError):
        pass

    calls = itertools.count()
    for name in ("replace", "fsync"):
        function = getattr(os, name)

        def failing(*args, function=function):
            if next(calls) == count:
                raise Failed(28, "No space left on device")
            return function(*args)

        monkeypatch.setattr(os, name, failing)
    with suppress(Failed):
        write_table(out, numbered(tmp_path, 100, 5))
    with open(tmp_path / "e.npy.names.csv", newline="") as file:
        names = [float(line["file_name"]) for line in csv.DictReader(file)]
    assert names[0] in (0, 100)
    if out.exists():
        assert np.load(out)[:, 0].tolist() == names
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize("suffix", [".npz", ".npy", ".csv"])
def test_normalized_tables_equal_what_python_gives(tmp_path, suffix):
    rows = (np.random.default_rng(0).standard_normal((50, 6)) * [1, 10, 100, 1, 1, 0] + 1000).astype(np.float32)
    rows.tofile(tmp_path / "rows.f32")
    out = tmp_path / f"e{suffix}"
    clips = [("a.wav", Clip(tmp_path / "rows.f32", 0, 20, 6)), ("b.wav", Clip(tmp_path / "rows.f32", 20, 30, 6))]
    write_table(out, clips, first_ms=0.0, period_ms=80.0, normalize=True)
    wanted = byola_fast.standardize(rows)
    assert wanted[:, :5].mean(0) == pytest.approx(0, abs=1e-5)
    assert wanted.std(0) == pytest.approx([1, 1, 1, 1, 1, 0], abs=1e-5)
    found = np.load(out) if suffix != ".csv" else np.genfromtxt(out, delimiter=",", skip_header=1)[:, 2:]
    if suffix == ".npz":
        assert (rows - found["mean"]) / found["std"] == pytest.approx(found["embeddings"], abs=1e-3)
        found = found["embeddings"]
    assert found == pytest.approx(wanted, abs=1e-6)


def test_one_row_cannot_be_standardised(tmp_path):
    np.ones((1, 6), np.float32).tofile(tmp_path / "rows.f32")
    with pytest.raises(ValueError, match="normalize: expected at least two embeddings, as one alone becomes 0, got 1"):
        write_table(tmp_path / "e.npy", [("a.wav", Clip(tmp_path / "rows.f32", 0, 1, 6))], normalize=True)
    assert not (tmp_path / "e.npy").exists()


def test_a_query_on_the_scale_of_a_collection():
    rows = torch.randn(20, 4) * 3 + 5
    assert torch.equal(byola_fast.standardize(rows[7], like=rows), byola_fast.standardize(rows)[7])
    assert byola_fast.standardize(rows.half()).dtype == torch.float16
    with pytest.raises(ValueError, match=r"like: expected shape \(rows, d\), not empty, got \(4,\)"):
        byola_fast.standardize(rows[7])
