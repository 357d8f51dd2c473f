"""The groups of ``bench_blocks.py`` with freed memory kept by malloc. It stays so: this file must be the last one."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.bench_blocks import BATCHES, CONTENDERS, MODES, PEAKS, blocks, encode, step
from benchmarks.measure import PLACES, Group, Place
from byola_fast.runtime.device import keep_freed_memory

KEPT = "memory kept"
WAYS = [
    ("step", {}),
    *(("blocks", {"mode": mode}) for mode in MODES),
    *(("encode", {"batch": batch}) for batch in BATCHES),
]


def keeping(device: str, what: str, **settings: Any) -> Group:
    """Make a group after malloc is told to keep memory."""
    keep_freed_memory()
    build: Any = {"step": step, "blocks": blocks, "encode": encode}[what]
    group: Group = build(device, memory=KEPT, **settings)
    return group


@pytest.mark.full
@pytest.mark.parametrize("contender", CONTENDERS + PEAKS)
@pytest.mark.parametrize("place", PLACES, ids=str)
@pytest.mark.parametrize(("what", "settings"), WAYS, ids=str)
def test_with_memory_kept(replay: Any, what: str, settings: dict[str, Any], place: Place, contender: str) -> None:
    if place.device != "cpu":
        pytest.skip("malloc serves the CPU")
    replay(keeping, contender, place, what=what, **settings)
