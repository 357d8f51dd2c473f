"""How long each stage of a training step takes."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch

from byola_fast.runtime.files import write_whole

UNTIMED_STEPS, TIMED_STEPS = 3, 200


class StageTimes:
    """Time the stages of steps; on a GPU by events, so that no stage waits for another.

    Args:
        device: where the stages run.
        on: False makes everything a no-op.

    >>> times = StageTimes(torch.device("cpu"), on=True)
    >>> for _ in range(5):
    ...     with times("forward"):
    ...         pass
    >>> list(times.medians())
    ['forward']
    """

    def __init__(self, device: torch.device, *, on: bool) -> None:
        self.on = on
        self.events = device.type == "cuda"
        self.spans: dict[str, list[Any]] = {}

    def __call__(self, stage: str) -> AbstractContextManager[None]:
        """Time what runs inside ``with``."""
        return self._measure(stage) if self.on else nullcontext()

    def each(self, stage: str, batches: Iterable[Any]) -> Iterator[Any]:
        """Yield the items of an iterable and time how long each takes."""
        waiting = iter(batches)
        while True:
            begun = time.perf_counter()
            try:
                batch = next(waiting)
            except StopIteration:
                return
            self._add(stage, time.perf_counter() - begun)
            yield batch

    @contextmanager
    def _measure(self, stage: str) -> Iterator[None]:
        if self.events:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            yield
            end.record()
            self._add(stage, (begin, end))
        else:
            begun = time.perf_counter()
            yield
            self._add(stage, time.perf_counter() - begun)

    def _add(self, stage: str, span: Any) -> None:
        spans = self.spans.setdefault(stage, [])
        if self.on and len(spans) < UNTIMED_STEPS + TIMED_STEPS:
            spans.append(span)

    def medians(self) -> dict[str, float]:
        """Return each stage's median time in seconds, without the first steps."""
        if self.events:
            torch.cuda.synchronize()
        return {stage: statistics.median(map(_seconds, _warm(spans))) for stage, spans in self.spans.items() if spans}

    def report(self, path: Path, samples: int, **described: Any) -> str:
        """Write the times to a JSON file and return them as a table.

        Args:
            path: file to write.
            samples: samples per step of this process.
            described: more entries of the file.
        """
        medians = self.medians()
        total = sum(medians.values())
        timed = min((len(_warm(spans)) for spans in self.spans.values()), default=0)
        content = {"ms": {stage: 1e3 * seconds for stage, seconds in medians.items()}, "steps": timed}
        content |= {"samples": samples, "samples_per_s": samples / total if total else 0.0} | described
        write_whole(path, lambda file: file.write(json.dumps(content, indent=1).encode() + b"\n"))
        rows = [f"{stage:<14}{1e3 * s:>10.2f} ms{s / total:>7.1%}" for stage, s in medians.items()]
        last = f"{'step':<14}{1e3 * total:>10.2f} ms  ({samples / total:.0f} samples/s; medians of {timed} steps)"
        return "\n".join([*rows, last])


def _warm(spans: list[Any]) -> list[Any]:
    return spans[UNTIMED_STEPS:] or spans


def _seconds(span: Any) -> float:
    return span if isinstance(span, float) else span[0].elapsed_time(span[1]) / 1e3
