"""Feed interleaved measurements to pytest-benchmark, print ratios at the end, and store records.

pytest-benchmark runs contenders one after the other. So the first test of a group measures the whole group in turns,
and each test replays its contender's samples through the clock that pytest-benchmark reads.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.measure import Group, Measured, Place, Results, gate, measure, write_results
from benchmarks.tables import terminal_table
from byola_fast.ops._dispatch import strict

HERE = Path(__file__).parent
BUDGET_S, FULL_BUDGET_S = 6.0, 30.0

Key = tuple[str, str, tuple[tuple[str, Any], ...]]
MEASURED = pytest.StashKey[dict[Key, Measured | Exception]]()

_readings: Iterator[float] = iter(())


def recorded() -> float:
    """Clock that pytest-benchmark reads before and after each round: 0, sample, 0, sample, ..."""
    return next(_readings)


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("byola_fast")
    group.addoption("--results", type=Path, metavar="JSON", help="write a record for each contender to this file")
    group.addoption("--full", action="store_true", help="more rounds, and what takes minutes to compile")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[MEASURED] = {}
    config.addinivalue_line("markers", "full: left out unless asked for by --full")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    left_out = [] if config.getoption("--full") else [x for x in items if x.get_closest_marker("full")]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [x for x in items if x not in left_out]
    for item in items:
        if item.path.is_relative_to(HERE):
            item.add_marker(pytest.mark.benchmark(timer=recorded))


@pytest.fixture
def replay(benchmark: Any, pytestconfig: pytest.Config) -> Callable[..., None]:
    """Return ``replay(build, contender, place, **settings)``; ``build(device, **settings)`` makes the group."""
    measured = pytestconfig.stash[MEASURED]
    budget_s = FULL_BUDGET_S if pytestconfig.getoption("--full") else BUDGET_S

    def feed(build: Callable[..., Group], contender: str, place: Place, **settings: Any) -> None:
        global _readings
        key = (build.__name__, place.device, tuple(settings.items()))
        if key not in measured:
            measured[key] = _outcome(lambda: build(place.device, **settings), benchmark.enabled, budget_s)
        found = measured[key]
        if isinstance(found, Exception):
            raise found
        reason = found.missing.get((contender, place.threads))
        if reason is not None:
            pytest.skip(f"{contender} cannot run here: {reason}")
        if not benchmark.enabled:
            benchmark.pedantic(lambda: None)
            return
        record = found.records[contender, place.threads]
        if "reference" in record.backend and strict():
            pytest.fail(f"{record.contender}: BYOLA_FAST_STRICT is set; see byola_fast.doctor()")
        benchmark.group = found.title
        benchmark.name = f"{record.contender} [{place}]"
        benchmark.extra_info |= asdict(record)
        samples = found.samples[contender, place.threads]
        _readings = iter([reading for sample in samples for reading in (0.0, sample)])
        benchmark.pedantic(lambda: None, rounds=len(samples), iterations=1)

    return feed


def _outcome(build: Callable[[], Group], timed: bool, budget_s: float) -> Measured | Exception:
    torch.manual_seed(int.from_bytes(os.urandom(4), "little"))
    try:
        group = build()
        return measure(group, budget_s) if timed else Measured(group.title, {}, {}, gate(group))
    except Exception as error:  # every test of the group fails with it, without measuring again
        return error


def _groups(config: pytest.Config) -> list[Measured]:
    return [found for found in config.stash[MEASURED].values() if isinstance(found, Measured) and found.records]


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    if not _groups(config):
        return
    terminalreporter.section("byola_fast: ratios of medians measured in turns; x = times as fast as")
    for found in _groups(config):
        for line in terminal_table(found):
            terminalreporter.write_line(line)


def pytest_sessionfinish(session: pytest.Session) -> None:
    path = session.config.getoption("--results")
    groups = _groups(session.config)
    if path and groups:
        root = f"{session.config.rootpath}{os.sep}"
        command = " ".join(["pytest", *(str(arg).replace(root, "") for arg in session.config.invocation_params.args)])
        date = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
        write_results(path, Results(command, date, [record for found in groups for record in found.records.values()]))
