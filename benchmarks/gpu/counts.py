"""Count what a warp executes of each Triton kernel on sm_90, without a GPU, from machine code and trips of loops.

``python -m benchmarks.gpu.counts`` prints the table. Tests hold the counts to budgets.

The shape is the benchmarks': B = 256, 64 x 96, an H200, crops that read the whole input; the trips of each loop follow
from it. Instructions and bytes count whether their predicate holds or not. A branch is not taken, unless it skips a
call (of a division's rare path) or is listed in ``taken``. A round is a wait for loads from global memory: an
instruction reads what a load returns, and by then all loads issued before it have returned too.
"""

from __future__ import annotations

import importlib
import re
import timeit
from dataclasses import astuple, dataclass, replace
from functools import cache, partial
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

from benchmarks.gpu import kernels

ARCHITECTURE = 90
LINE = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(@\S+\s+)?([A-Z][\w.]*)\s*(.*?)\s*;?$")
WIDTH = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16}  # bytes; others are 4
LOADS, STORES = ("LDG", "LD", "ATOMG", "ATOM"), ("STG", "ST", "ATOMG", "ATOM", "RED", "REDG")
SHARED = ("LDS", "STS", "LDSM", "STSM")
TYPES = {
    "fp32": torch.float32, "fp64": torch.float64, "bf16": torch.bfloat16,
    "u8": torch.uint8, "i16": torch.int16, "i32": torch.int32, "i64": torch.int64,
}  # fmt: skip


@dataclass(frozen=True)
class Work:
    """What one program does at the benchmarks' shape.

    Attributes:
        outputs: number that it makes; 0 if it makes few.
        trips: of each loop, in the order of their first instructions; a fraction is a mean.
        taken: numbers of the conditional branches that are taken.
        constants: compile-time constants other than the variant's.
    """

    outputs: int = 0
    trips: tuple[float, ...] = ()
    taken: tuple[int, ...] = ()
    constants: tuple[tuple[str, Any], ...] = ()


@dataclass(frozen=True)
class Count:
    """What a warp executes: instructions, rounds of loads, barriers; bytes that its lanes ask for."""

    instructions: float = 0
    rounds: float = 0
    barriers: float = 0
    read: float = 0
    written: float = 0
    shared: float = 0

    def plus(self, other: Count, times: float = 1) -> Count:
        return Count(*(a + times * b for a, b in zip(astuple(self), astuple(other), strict=True)))


VIEW = 64 * 96
# The compiler makes four trips of some loops at once; branches skip those, what is left of two trips, and of one.
# loops of a view: the margin's column and row, views, rows of the tile, groups of their blocks, turns of output rows
ONE_VIEW = Work(VIEW, (0, 1, 1, 2, 1, 4), (1, 3, 6, 7))
BICUBIC = replace(ONE_VIEW, trips=(0, 1, 1, 2, 1, 3))  # blocks of columns; the turns are unrolled
# the fourth and fifth loop look for finite samples, in every other view; the sixth is for samples without values
TWO_VIEWS = replace(ONE_VIEW, trips=(0, 1, 1, 1, 1, 0, 2, 1, 4))
ONE_TRIP = (1, 2)
WORK = {
    "augment_views, bilinear": ONE_VIEW,
    "augment_views, bilinear, bf16": ONE_VIEW,
    "augment_views, bicubic": BICUBIC,
    "augment_views, bicubic, bf16": BICUBIC,
    "augment_views, Gaussian": ONE_VIEW,
    "two_views": TWO_VIEWS,
    "two_views, bf16": TWO_VIEWS,
    "two_views, bicubic": replace(TWO_VIEWS, trips=(0, 1, 1, 1, 1, 0, 2, 1, 3)),
    "finish_views": Work(3 * 2048, (1, 3), constants=(("PUSH", False),)),  # a program that normalises
    "exact_views": Work(VIEW, (2,)),  # rows of the tile
    "exact_views, bf16": Work(VIEW, (2,)),
    "exact_views, bicubic": Work(VIEW, (2,)),
    "finish_exact_views": Work(VIEW),
    "draw_params": Work(),
    "write_inputs": Work(),
    "ema_update": Work(4096),
    "ema_update, bf16 online": Work(4096),
    "normalize": Work(3 * 2048, (0, 3), ONE_TRIP),
    "sample_sums": Work(VIEW, (1,), (3,)),
    "batch_stats": Work(0, (0,), ONE_TRIP),
    "running_stats": Work(0, (1,)),
    "bank_push, flags": Work(VIEW, (6,)),
    "bank_push, rows": Work(VIEW, (1, 6), (3,)),  # not the program that moves the cursor
    # Waveforms' ends are copied, in 2 of 12 tiles; four blocks of bands take 1, 2, 3 and 6 steps, four at once.
    "log_mel": Work(512, (0, 4, 0.25), (0,)),
    "log_mel, int16, 256": Work(16 * 64, (0, 4, 1.25), (0,)),
    "log_mixup_exp": Work(1024),
    "log_mixup_exp, backward": Work(1024),
    "resize_crop, bilinear": Work(16 * 96, (3,)),
    "resize_crop, bicubic": Work(16 * 96, (3,)),
    "resize_crop, backward": Work(16 * 32, (5,)),
    "conv_block, moments": Work(32 * 128, (32,)),
    "conv_block, first statistics": Work(0, (7,)),
    "conv_block, first": Work(62 * 16 * 64, (62,)),
    "conv_block, first sums": Work(62 * 16 * 64, (62,)),
    "conv_block, first backward": Work(0, (2,)),
    "conv_block, sums": Work(12 * 64 * 64, (12,)),
    "conv_block, statistics": Work(0, (3,)),
    "conv_block, frozen": Work(),
    "conv_block, pool": Work(16 * 64),
    "conv_block, pooled sums": Work(12 * 16 * 64, (12,)),
    "conv_block, norm backward": Work(0, (3,)),
    "conv_block, unpool": Work(4 * 16 * 64),
    "conv_block, running": Work(0, (1,)),
}


class Code:
    """Machine code up to the last exit, behind which only subroutines lie."""

    def __init__(self, text: str):
        self.lines: list[tuple[bool, str, str]] = []  # predicated, opcode, operands
        labels: dict[str, int] = {}
        for line in text.splitlines():
            if label := re.match(r"^(\.L_x_\d+):", line):
                labels[label[1]] = len(self.lines)
            elif found := LINE.match(line):
                self.lines.append((bool(found[1]), found[2], found[3]))
        self.end = max(n for n, (_, opcode, _) in enumerate(self.lines) if opcode == "EXIT") + 1
        self.targets: dict[int, int] = {}
        self.loops: dict[int, int] = {}  # first instruction: last one
        self.branches: dict[int, int] = {}  # conditional ones, forward: their numbers
        for n, (predicated, opcode, operands) in enumerate(self.lines[: self.end]):
            if opcode.startswith("BRA") and (label := re.search(r"\(?(\.L_x_\d+)\)", operands)):
                self.targets[n] = labels[label[1]]
                if self.targets[n] <= n:
                    self.loops[self.targets[n]] = n
                elif predicated or "P" in operands.partition("`")[0]:
                    self.branches[n] = len(self.branches)

    def calls(self, first: int, end: int) -> bool:
        return any(opcode.startswith("CALL") for _, opcode, _ in self.lines[first:end])


class Walk:
    """One way through the code; ``pending`` holds the registers that loads have not written yet."""

    def __init__(self, code: Code, work: Work):
        if len(code.loops) != len(work.trips):
            raise ValueError(f"trips: expected one for each loop, {sorted(code.loops.items())}, got {work.trips}")
        self.code, self.taken = code, work.taken
        self.trips = dict(zip(sorted(code.loops), work.trips, strict=True))
        self.pending: set[str] = set()

    def run(self, at: int, end: int, inside: int = -1) -> tuple[Count, int | None]:
        """Count from ``at`` until a place from ``end`` on; return the count and that place, None if the walk ended."""
        code, count = self.code, Count()
        place: int | None = at
        while place is not None and place < end:
            if place in code.loops and place != inside:
                last, trips = code.loops[place] + 1, self.trips[place]
                begin, place = place, last
                for times in (min(trips, 1), max(trips - 1, 0)):  # later rounds wait for what earlier ones asked for
                    if times:
                        found, place = self.run(begin, last, begin)
                        count = count.plus(found, times)
                continue
            inside = -1
            count = count.plus(self.step(place))
            place = self.following(place)
        return count, place

    def following(self, place: int) -> int | None:
        predicated, opcode, _ = self.code.lines[place]
        target = self.code.targets.get(place)
        if opcode == "EXIT" and not predicated:
            return None
        if target is None or target <= place:
            return place + 1
        number = self.code.branches.get(place)
        return target if number is None or number in self.taken or self.code.calls(place, target) else place + 1

    def step(self, place: int) -> Count:
        _, opcode, operands = self.code.lines[place]
        kind, *parts = opcode.split(".")
        size = next((WIDTH[part] for part in parts if part in WIDTH), 4)
        size = int(parts[-1]) * 4 if "M88" in parts and parts[-1].isdigit() else size
        waits = bool(self.pending.intersection(re.findall(r"\bR\d+\b", operands)))
        if waits:
            self.pending.clear()
        if kind in LOADS and (register := re.search(r"\bR(\d+)\b", operands)):
            self.pending |= {f"R{int(register[1]) + k}" for k in range(max(size // 4, 1))}
        return Count(
            1,
            waits,
            kind == "BAR",
            32 * size * (kind in LOADS),
            32 * size * (kind in STORES),
            32 * size * (kind in SHARED),
        )


def walk(text: str, work: Work) -> Count:
    """Return what a warp executes of a program's machine code."""
    code = Code(text)
    return Walk(code, work).run(0, code.end)[0]


@cache
def count(name: str) -> Count:
    """Return what a warp executes of one kernel."""
    variant, work = kernels.variants()[name], WORK[name]
    variant = replace(variant, constants=variant.constants | dict(work.constants))
    return walk(kernels.disassemble(kernels.compile_variant(variant, ARCHITECTURE)), work)


def host_us(name: str, launches: int = 100) -> float:
    """Return the host's time of a launch, without what the driver takes."""
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction

    from byola_fast.ops._triton import shared

    variant = kernels.variants()[name]
    module, function = variant.kernel.split(".")
    kernel = getattr(importlib.import_module(f"byola_fast.ops._triton.{module}"), function)
    args: list[Any] = []
    for parameter in kernel.params:
        if parameter.name in variant.pointers:
            args.append(torch.zeros(16, dtype=TYPES[variant.pointers[parameter.name]]))
        elif not parameter.is_constexpr:
            args.append(0.5 if parameter.name in kernels.FLOATS else variant.constants.get(parameter.name, 16))
    constants = {p.name: variant.constants[p.name] for p in kernel.params if p.is_constexpr}
    stub = SimpleNamespace(get_current_device=lambda: 0, get_current_stream=lambda _: 0)
    compiled = SimpleNamespace(function=0, packed_metadata=0, run=lambda *_: None)
    with (
        mock.patch.object(driver, "_active", stub),
        mock.patch.object(JITFunction, "run", return_value=compiled),
        mock.patch.object(shared, "_kept", {}),
    ):
        call = partial(shared.launch, kernel, 1, *args, **constants, num_warps=variant.warps)
        return 1e6 * min(timeit.repeat(call, number=launches, repeat=50)) / launches


def table() -> str:
    """Return a Markdown table of all kernels."""
    lines = [
        "| kernel | instructions of a warp | of a lane for an output | rounds | barriers "
        "| bytes for an output: read, written, shared | host, us |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for name, work in WORK.items():
        found = count(name)
        of_output = work.outputs and kernels.variants()[name].warps / work.outputs
        moved = ", ".join(f"{x * of_output:.1f}" for x in (found.read, found.written, found.shared))
        of_lane = f"{found.instructions * 32 * of_output:.1f}" if work.outputs else ""
        lines.append(
            f"| {name} | {found.instructions:,.0f} | {of_lane} | {found.rounds:.0f} | {found.barriers:.0f} "
            f"| {moved if work.outputs else ''} | {host_us(name):.0f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
