"""The correctness gate, interleaved timing and records of all benchmarks.

A ``Group`` holds the contenders for one piece of work. ``measure`` first checks each against its float64 expectation,
then times them in turns, so that a busy moment of a shared machine hits all alike. Only the ratio of two medians of one
group counts; absolute times are context.
"""

from __future__ import annotations

import contextlib
import gc
import importlib.metadata
import json
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

PACKAGES = ("byola_fast", "torch", "torchaudio", "triton")
CHECKED_CALLS = 2  # two input sets, as a contender could remember one
# Float32 against float64 after a logarithm and post-normalisation: ours stays below 1e-5; F.interpolate computes tap
# positions in float32, 6e-8 of up to 143 frames times steps of several std between neighbouring frames of noise.
TOLERANCE = 5e-4
LONG_CALL_S = 0.1
CHUNK = 2**18  # elements compared at once; float64 temporaries of a large tensor would cost seconds of page faults


class WrongAnswerError(AssertionError):
    """A contender's results are wrong."""


class Place(NamedTuple):
    """Device and CPU threads of a contender."""

    device: str
    threads: int

    def __str__(self) -> str:
        return self.device if self.device != "cpu" else f"cpu-{self.threads}-thread{'s' * (self.threads > 1)}"


def cores() -> int:
    """Return the number of CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


CPU_PLACES = [Place("cpu", threads) for threads in (1, 2) if threads <= cores()]
PLACES = CPU_PLACES + ([Place("cuda", 1)] if torch.cuda.is_available() else [])


def places_on(device: str) -> list[Place]:
    """Return the places of a device."""
    return [place for place in PLACES if place.device == device]


@dataclass(frozen=True)
class Contender:
    """One way to do a group's work.

    Attributes:
        name: key; tables show ``label``.
        run: does the work once on the input set of this call number and returns the results.
        expected: the float64 results for a call number.
        place: device and CPU threads.
        shapes: shapes of inputs and outputs by name.
        samples: samples in one call; ratios compare times per sample.
        bytes_moved: minimum bytes that the work reads and writes.
        backend: backend by ``byola_fast.doctor()`` for our contenders; "torch" for all others.
        prepare: resets in-place work before its check (done once).
        optional: whether it may be missing on this machine (no compiler for ``torch.compile``).
        tolerance: maximum error of an element, relative to 1 + its magnitude.
        flops: operations of a call, by the definition of its layers, whatever algorithm computes them; 0 if unknown.
    """

    name: str
    run: Callable[[int], Sequence[Tensor]]
    expected: Callable[[int], Sequence[Tensor]]
    place: Place
    shapes: dict[str, tuple[int, ...]]
    samples: int
    bytes_moved: int
    backend: str = "torch"
    prepare: Callable[[], object] | None = None
    optional: bool = False
    tolerance: float = TOLERANCE
    flops: int = 0

    @property
    def key(self) -> tuple[str, int]:
        return self.name, self.place.threads

    @property
    def label(self) -> str:
        """The name, with the backend if the reference runs any of its ops."""
        return f"{self.name} ({self.backend} backend)" if "reference" in self.backend else self.name


@dataclass(frozen=True)
class Group:
    """The contenders for one piece of work on one device, with the baselines of ratios and the floor of shares."""

    op: str
    variant: str
    contenders: list[Contender]
    baselines: tuple[str, ...]
    floor: str | None = None
    dtype: str = "float32"

    @property
    def title(self) -> str:
        return f"{self.op}, {self.variant}, {self.contenders[0].place.device}"


@dataclass(frozen=True)
class Timing:
    """Seconds per call, one value for each round."""

    samples: list[float]

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    @property
    def fastest(self) -> float:
        return min(self.samples)

    @property
    def iqr(self) -> float:
        if len(self.samples) < 2:
            return 0.0
        low, _middle, high = statistics.quantiles(self.samples, n=4, method="inclusive")
        return high - low


@dataclass(frozen=True)
class Record:
    """One contender's result.

    Times are seconds per call. ``ratios`` are the speed per sample relative to each baseline (2 = twice as fast).
    ``floor_share`` is the time of the floor's fastest round, divided by this median. ``others_share`` is the share of
    the CPU that other processes took during the timing, None if unknown.
    """

    op: str
    variant: str
    contender: str
    backend: str
    device: str
    threads: int
    dtype: str
    shapes: dict[str, list[int]]
    samples: int
    rounds: int
    median_s: float
    iqr_s: float
    bytes_moved: int
    gb_per_s: float
    floor: str | None
    floor_share: float | None
    ratios: dict[str, float]
    others_share: float | None
    machine: dict[str, str | int]
    versions: dict[str, str]
    gflop_per_s: float | None = None

    @property
    def us_per_sample(self) -> float:
        return self.median_s / self.samples * 1e6


@dataclass(frozen=True)
class Measured:
    """A group's records and samples by contender key, and reasons for missing optional contenders."""

    title: str
    records: dict[tuple[str, int], Record]
    samples: dict[tuple[str, int], list[float]]
    missing: dict[tuple[str, int], str]


# the correctness gate


def gate(group: Group) -> dict[tuple[str, int], str]:
    """Check every contender; return the ones that cannot run here, with reasons.

    Raises:
        WrongAnswerError: a contender's results differ from its float64 expectation.
    """
    missing: dict[tuple[str, int], str] = {}
    for number in range(CHECKED_CALLS):
        for contender in group.contenders:
            if contender.key in missing or (contender.prepare and number):
                continue
            if contender.prepare:
                contender.prepare()
            with cpu_threads(contender.place.threads), torch.no_grad():
                try:
                    found = contender.run(number)
                except Exception as error:
                    if not contender.optional:
                        raise
                    missing[contender.key] = (
                        f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
                    )
                    continue
            with cpu_threads(1):  # faster than two threads that wait for each other on a busy machine
                who = f"{group.title}: {contender.label}"
                _compare(who, found, contender.expected(number), contender.tolerance)
    return missing


def _compare(who: str, found: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float) -> None:
    if [tuple(f.shape) for f in found] != [tuple(e.shape) for e in expected]:
        raise WrongAnswerError(f"{who}: wrong shapes {[tuple(f.shape) for f in found]}")
    for f, e in zip(found, expected, strict=True):
        for found_part, part in zip(_chunks(f), _chunks(e), strict=True):
            error = (found_part.double() - part).abs() / (1 + part.double().abs())
            if not bool((error <= tolerance).all()):  # "not <=" also fails NaN
                raise WrongAnswerError(f"{who}: error {error.max().item():.3g} against the float64 reference")


def _chunks(x: Tensor) -> Iterator[Tensor]:
    flat = x.flatten()
    return (flat[start : start + CHUNK] for start in range(0, len(flat), CHUNK))


# timing


@contextlib.contextmanager
def cpu_threads(count: int) -> Iterator[None]:
    """Set the number of torch's threads inside the block."""
    before = torch.get_num_threads()
    if count != before:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        if count != before:
            torch.set_num_threads(before)


Stopwatch = Callable[[Callable[[int], object], int, int], float]


def cpu_stopwatch(run: Callable[[int], object], first: int, repeats: int) -> float:
    """Return the total seconds of calls number ``first`` to ``first + repeats - 1``."""
    start = time.perf_counter()
    for number in range(first, first + repeats):
        run(number)
    return time.perf_counter() - start


def cuda_stopwatch(run: Callable[[int], object], first: int, repeats: int) -> float:
    """Return the seconds between two events on the current stream around the calls, with host gaps."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    for number in range(first, first + repeats):
        run(number)
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3


def interleaved(
    contenders: Sequence[Contender],
    *,
    rounds: int = 25,
    min_rounds: int = 3,
    budget_s: float = 10.0,
    min_sample_s: float = 3e-3,
    stopwatch: Stopwatch = cpu_stopwatch,
) -> dict[tuple[str, int], Timing]:
    """Time contenders in turns: each round takes one sample of each, starting one contender later than the last round.

    A sample is the mean over enough calls to fill ``min_sample_s`` (over 10,000 ticks of the clock). One untimed call
    precedes it, to warm code and threads again after the previous contender, unless a call takes ``LONG_CALL_S``. Call
    numbers keep increasing, so that inputs rotate. The number of rounds fits the budget, between ``min_rounds`` and
    ``rounds``.
    """
    calls = dict.fromkeys((c.key for c in contenders), 0)

    def sample(contender: Contender, repeats: int, warm_up: bool) -> float:
        with cpu_threads(contender.place.threads):
            first = calls[contender.key]
            calls[contender.key] += warm_up + repeats
            if warm_up:
                contender.run(first)
            return stopwatch(contender.run, first + warm_up, repeats) / repeats

    plan: dict[tuple[str, int], tuple[int, bool]] = {}
    round_s = 0.0
    for contender in contenders:
        count = 1
        while (seconds := sample(contender, count, True)) * count < min_sample_s:
            count = min(max(math.ceil(1.2 * min_sample_s / max(seconds, 1e-9)), count + 1), 100 * count)
        plan[contender.key] = count, seconds < LONG_CALL_S
        round_s += seconds * (count + plan[contender.key][1])
    rounds = max(min_rounds, min(rounds, int(budget_s / max(round_s, 1e-9))))

    samples: dict[tuple[str, int], list[float]] = {c.key: [] for c in contenders}
    gc.collect()
    gc.disable()
    try:
        for turn in range(rounds):
            shift = turn % len(contenders)
            for contender in [*contenders[shift:], *contenders[:shift]]:
                samples[contender.key].append(sample(contender, *plan[contender.key]))
    finally:
        gc.enable()
    return {key: Timing(values) for key, values in samples.items()}


def measure(group: Group, budget_s: float = 10.0) -> Measured:
    """Check a group, time it in turns, and return its records."""
    missing = gate(group)
    present = [c for c in group.contenders if c.key not in missing]
    stopwatch = cuda_stopwatch if present[0].place.device == "cuda" else cpu_stopwatch
    before = _cpu_seconds()
    with torch.no_grad():
        timings = interleaved(present, budget_s=budget_s, stopwatch=stopwatch)
    others = _others_share(before, _cpu_seconds())
    per_sample = {c.key: timings[c.key].median / c.samples for c in present}
    floors = {c.place.threads: timings[c.key].fastest / c.samples for c in present if c.name == group.floor}
    records = {c.key: _record(group, c, timings[c.key], per_sample, floors, others) for c in present}
    return Measured(group.title, records, {key: timing.samples for key, timing in timings.items()}, missing)


def _record(
    group: Group,
    c: Contender,
    timing: Timing,
    per_sample: dict[tuple[str, int], float],
    floors: dict[int, float],
    others: float | None,
) -> Record:
    seconds, threads = per_sample[c.key], c.place.threads
    baselines = [b for b in group.baselines if (b, threads) in per_sample and b != c.name]
    ratios = {b: per_sample[b, threads] / seconds for b in baselines}
    if threads > 1 and (c.name, 1) in per_sample:
        ratios["1 thread"] = per_sample[c.name, 1] / seconds
    return Record(
        op=group.op,
        variant=group.variant,
        contender=c.label,
        backend=c.backend,
        device=c.place.device,
        threads=threads,
        dtype=group.dtype,
        shapes={name: list(shape) for name, shape in c.shapes.items()},
        samples=c.samples,
        rounds=len(timing.samples),
        median_s=timing.median,
        iqr_s=timing.iqr,
        bytes_moved=c.bytes_moved,
        gb_per_s=c.bytes_moved / timing.median / 1e9,
        floor=group.floor,
        floor_share=floors[threads] / seconds if threads in floors else None,
        ratios=ratios,
        others_share=others,
        machine=machine(),
        versions=versions(),
        gflop_per_s=c.flops / timing.median / 1e9 if c.flops else None,
    )


# inputs


def input_sets(bytes_per_set: int, device: str) -> int:
    """Return how many input sets to rotate, so that none is still in the last-level cache on its next turn."""
    return max(2, min(64, math.ceil(2 * last_level_cache(device) / bytes_per_set)))


def last_level_cache(device: str) -> int:
    """Return the size of the largest cache in bytes; 32 MiB if the system does not report it."""
    if device == "cuda":
        return int(torch.cuda.get_device_properties(0).L2_cache_size)
    sizes = [32 * 2**20]
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        if text.endswith("K") and text[:-1].isdigit():
            sizes.append(int(text[:-1]) * 2**10)
    return min(max(sizes), 256 * 2**20)


# machine and records


def _cpu_seconds() -> tuple[float, float, float] | None:
    """Return total, busy (or stolen) seconds of all cores, and busy seconds of this process; None if unknown."""
    stat = Path("/proc/stat")
    if not stat.exists():
        return None
    ticks = [int(word) for word in stat.read_text().split("\n", 1)[0].split()[1:9]]
    idle = ticks[3] + ticks[4]
    per_second = os.sysconf("SC_CLK_TCK")
    return sum(ticks) / per_second, (sum(ticks) - idle) / per_second, time.process_time()


def _others_share(before: tuple[float, float, float] | None, after: tuple[float, float, float] | None) -> float | None:
    if before is None or after is None or after[0] <= before[0]:
        return None
    total, busy, ours = (b - a for a, b in zip(before, after, strict=True))
    return max(0.0, (busy - ours) / total)


def machine() -> dict[str, str | int]:
    """Return the facts about the machine that figures depend on."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return {
        "cpu": _cpu_model(),
        "instruction_set": torch.backends.cpu.get_cpu_capability(),
        "cores": cores(),
        "gpu": gpu,
        "system": f"{platform.system()} {platform.machine()}",
    }


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    """Return the versions of Python, CUDA and the packages in use."""
    found = {"python": platform.python_version(), "cuda": torch.version.cuda or "none"}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


@dataclass(frozen=True)
class Results:
    """The records of one run, as stored in ``results/``."""

    command: str
    date: str
    records: list[Record] = field(default_factory=list)


def write_results(path: Path, results: Results) -> None:
    """Write results as JSON, one record per line."""
    lines = ",\n".join("  " + json.dumps(asdict(record)) for record in results.records)
    head = f'"command": {json.dumps(results.command)},\n"date": {json.dumps(results.date)}'
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'{{\n{head},\n"records": [\n{lines}\n]\n}}\n')


def read_results(path: Path) -> Results:
    """Read the results that ``write_results`` wrote."""
    stored = json.loads(path.read_text())
    return Results(stored["command"], stored["date"], [Record(**record) for record in stored["records"]])
