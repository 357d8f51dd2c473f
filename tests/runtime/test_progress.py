"""Progress lines without a terminal."""

from __future__ import annotations

import pytest

from byola_fast.runtime import progress


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_compilation_before_the_first_step_does_not_count_as_its_pace(clock, capsys):
    with progress.Progress("steps", 10) as shown:
        for done, passed in ((1, 120.0), (2, 6.0), (3, 6.0), (10, 42.0)):
            clock[0] += passed
            shown.show(done, f"loss {done}")
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "steps 1/10  loss 1"
    assert lines[1:3] == ["steps 2/10  loss 2  48 s left", "steps 3/10  loss 3  42 s left"]
    assert lines[-1] == "steps 10/10  loss 10  0 s left"


def test_lines_are_seconds_apart_and_the_last_is_always_printed(clock, capsys):
    with progress.Progress("files") as shown:
        for done in range(1, 9):
            clock[0] += 1.5
            shown.show(done, total=8)
    assert [line.split()[1] for line in capsys.readouterr().err.splitlines()] == ["4/8", "8/8"]
