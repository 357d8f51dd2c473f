# mypy: ignore-errors
"""Helpers of the Triton kernels: taps of the resize, exp and log, log-mixup-exp, launches and their settings.

Launchers are plain functions of the ops' arguments. They launch by ``launch``, on the current stream of their tensors'
device, and never synchronise. Sizes are run-time arguments, so that another batch size compiles nothing (Triton
compiles one variant each for sizes of 1, multiples of 16, and others). Grids have one axis, because the others end at
65,535.
"""

from __future__ import annotations

import functools
import os
import threading
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes
from triton import knobs
from triton.runtime.driver import driver

EPS = tl.constexpr(2.0**-23)
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"  # it takes time per operation, not per element
COLUMNS = 64 if INTERPRETED else 32  # of a tile at the taps: one per lane of a warp, so that a warp reads one row
PROGRAMS_INTERPRETED = 4  # they run one after another: few, so that each takes several turns
# Triton's versions whose compiled kernels are launched as here; others launch by Triton's own, slower way
KEEP = not INTERPRETED and (3, 6) <= tuple(map(int, triton.__version__.split(".")[:2])) <= (3, 8)


@triton.jit
def box_side(box, AXIS: tl.constexpr, length, canvas):
    """Return the extent of a box (i, j, h, w) along an axis, and its start relative to the input of ``length``.

    A box that leaves the canvas is moved inside, so that nothing is read out of bounds.
    """
    extent = tl.minimum(tl.maximum(tl.load(box + 2 + AXIS), 1), canvas).to(tl.int32)  # int64 would wrap if cut first
    start = tl.minimum(tl.maximum(tl.load(box + AXIS), 0), canvas - extent).to(tl.int32)
    return extent, start - (canvas - length) // 2


@triton.jit
def tap_base(o, extent, size, magic, shift, WIDE: tl.constexpr):
    """Return the position of output ``o`` of ``size`` in a crop of ``extent``, corners aligned: whole part and rest.

    o (extent - 1) / (size - 1), both parts exact. ``magic`` and ``shift`` are from ``division_magic(size)``; ``WIDE``
    divides instead, for products of more than 31 bits.
    """
    steps = tl.maximum(size - 1, 1)
    if WIDE:
        position = o.to(tl.int64) * (extent - 1)
        return (position // steps).to(tl.int32), (position % steps).to(tl.int32)
    position = o * (extent - 1)
    base = ((position.to(tl.int64) * magic) >> shift).to(tl.int32)
    return base, position - base * steps


@triton.jit
def tap_fraction(rest, size, COMPUTE: tl.constexpr):
    """Return the fraction between two taps: rest / (size - 1)."""
    return rest.to(COMPUTE) * (1 / tl.maximum(size - 1, 1).to(COMPUTE))


@triton.jit
def tap_weight(t, K: tl.constexpr, TAPS: tl.constexpr):
    """Return the weight of tap ``K`` at fraction ``t``: linear, or cubic (a = -0.75) without cancellation."""
    s = 1 - t
    if TAPS == 2:
        weight = s if K == 0 else t
    elif K == 0:
        weight = -0.75 * t * s * s
    elif K == 1:
        weight = (1.25 * t - 2.25) * t * t + 1
    elif K == 2:
        weight = (1.25 * s - 2.25) * s * s + 1
    else:
        weight = -0.75 * s * t * t
    return weight


@triton.jit
def tap_row(base, extent, K: tl.constexpr, TAPS: tl.constexpr):
    """Return the row of the crop that tap ``K`` reads, clamped to the crop's edge."""
    row = base + (K - (TAPS // 2 - 1))
    return tl.minimum(tl.maximum(row, 0), extent - 1)


@triton.jit
def exponential(x, APPROXIMATE: tl.constexpr):
    """Return exp(x); ``APPROXIMATE`` uses the GPU's ex2 instruction: relative error 2^-22, 0 below 2^-126."""
    if APPROXIMATE:
        scaled = x * 1.4426950408889634
        return tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [scaled], dtype=tl.float32, is_pure=True, pack=1
        )
    return tl.exp(x)


@triton.jit
def logarithm(x, APPROXIMATE: tl.constexpr):
    """Return log(x) for x >= eps; ``APPROXIMATE`` uses the GPU's lg2 instruction: relative error 2^-22."""
    if APPROXIMATE:
        y = tl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
        return y * 0.6931471805599453
    return tl.log(x)


@triton.jit
def cosine(turns, APPROXIMATE: tl.constexpr):
    """Return cos(2 pi turns) for turns in [-1, 1); ``APPROXIMATE`` uses the GPU's cos instruction: error below 5e-7."""
    turns -= tl.floor(turns + 0.5)
    angle = turns * 6.283185307179586
    if APPROXIMATE:
        return tl.inline_asm_elementwise(
            "cos.approx.ftz.f32 $0, $1;", "=f,f", [angle], dtype=tl.float32, is_pure=True, pack=1
        )
    return tl.cos(angle)


@triton.jit
def mix_log(x, z, lam, APPROXIMATE: tl.constexpr):
    """Return log((1 - lam) exp(x) + lam exp(z) + eps)."""
    of_x = (1 - lam) * exponential(x, APPROXIMATE)
    return logarithm(of_x + lam * exponential(z, APPROXIMATE) + EPS, APPROXIMATE)


def compute_type(dtype: torch.dtype) -> Any:
    """Return the compute type for tensors of ``dtype``."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def approximate(x: Tensor) -> bool:
    """Return whether ``x`` allows the GPU's approximate instructions: float32 arithmetic, not interpreted."""
    return x.is_cuda and x.dtype != torch.float64 and not INTERPRETED


_HERE = nullcontext()


def on_device(x: Tensor) -> AbstractContextManager[Any]:
    """Make the device of ``x`` current: Triton launches on the current device's current stream."""
    if not x.is_cuda or x.get_device() == torch._C._cuda_getDevice():
        return _HERE
    return torch.cuda.device(x.device)


def resident_programs(x: Tensor, per_sm: int) -> int:
    """Return the number of programs of a persistent kernel: as many as run at once."""
    return multiprocessors(x.device) * per_sm if x.is_cuda else PROGRAMS_INTERPRETED


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Return the number of multiprocessors of a GPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def division_magic(size: int) -> tuple[int, int]:
    """Return (m, s) with which n // d == n * m >> s for d = max(size - 1, 1) and all n in [0, 2^31).

    Source: Granlund and Montgomery, "Division by invariant integers using multiplication", PLDI 1994, theorem 4.2.
    """
    divisor = max(size - 1, 1)
    bits = (divisor - 1).bit_length()
    return -(-(1 << (31 + bits)) // divisor), 31 + bits


def indexable(x: Tensor) -> Tensor:
    """Return ``x (B, F, T)``, or a contiguous copy if an offset within a sample needs more than 32 bits."""
    reach = sum((size - 1) * stride for size, stride in zip(x.shape[1:], x.stride()[1:], strict=True))
    return x if reach < 2**31 else x.contiguous()


def round_up(size: int, multiple: int) -> int:
    """Return ``size`` rounded up to a multiple."""
    return -(-size // multiple) * multiple


def is_wide(*products: int) -> bool:
    """Return whether a product of sizes needs more than 31 bits (huge inputs); a compile-time constant of kernels."""
    return any(product >= 2**31 for product in products)


class Kept(NamedTuple):
    """A compiled kernel, and its constants in the order of its parameters."""

    kernel: Any
    compiled: Any
    constants: tuple[Any, ...]


class Launched(NamedTuple):
    """A launch as it was asked for; ``kept`` is None if Triton's own way was taken."""

    kernel: Any
    programs: int
    args: tuple[Any, ...]
    constants: dict[str, Any]
    kept: Kept | None


class _Recording(threading.local):
    launches: list[Launched] | None = None  # of this thread, while they are recorded


recording = _Recording()
_kept: dict[tuple[Any, ...], Kept] = {}


def launch(kernel: Any, programs: int, *args: Any, **constants: Any) -> None:
    """Launch ``kernel[(programs,)](*args, **constants)``, in a tenth of the host's time.

    ``args`` are tensors and numbers, ``constants`` all parameters that are ``tl.constexpr``, and launch options.

    Triton's ``run`` decides at each launch, in Python, which compiled kernel the arguments ask for, from all that it
    specialises kernels by. That decision is kept here under a key that is at least as fine: device, debugging modes,
    constants, dtypes, alignments of 16 bytes, and of integers the width and, unless the kernel does not specialise
    them, whether they are 1 or multiples of 16. The first launch of a key is Triton's own, as are all launches of a
    kernel with hooks of its own, or while its compilation is inspected.
    """
    kept = None
    if not KEEP or kernel.pre_run_hooks or knobs.runtime.add_stages_inspection_hook is not None:
        with _HERE if recording.launches is None else _disable_current_modes():  # the interpreter's own ops
            kernel[(programs,)](*args, **constants)
    else:
        device = driver.active.get_current_device()
        key = [id(kernel), device, *debugging()]
        for value, parameter in zip(args, kernel.params):  # noqa: B905  constants follow
            if isinstance(value, Tensor):
                key += value.dtype, value.data_ptr() % 16 == 0
            elif type(value) is int:
                key.append((value >= -(2**31)) + (value >= 2**31) + (value >= 2**63))
                if not parameter.do_not_specialize:
                    key.append((value == 1) + 2 * (value % 16 == 0))
            else:
                key += type(value), value if value is None or value is True or value is False else 0
        key += constants
        key += constants.values()
        key = tuple(key)
        kept = _kept.get(key)
        if kept is None:
            compiled = kernel[(programs,)](*args, **constants)
            rest = kernel.arg_names[len(args) :]
            kept = _kept[key] = Kept(kernel, compiled, tuple([constants[name] for name in rest]))
        else:
            run_kept(kept, programs, driver.active.get_current_stream(device), args)
    if recording.launches is not None:
        recording.launches.append(Launched(kernel, programs, args, constants, kept))


def debugging() -> tuple[Any, ...]:
    """Return Triton's modes that change how a kernel is compiled."""
    runtime = knobs.runtime
    return runtime.debug, knobs.compilation.instrumentation_mode, runtime.add_stages_inspection_hook


def current_stream(device: torch.device) -> int | None:
    """Return the current stream of a device; None if another device is current, or without a GPU."""
    if device.type != "cuda" or driver.active.get_current_device() != device.index:
        return None
    return driver.active.get_current_stream(device.index)


def relaunch(launched: Launched, stream: int | None, args: list[Any]) -> None:
    """Launch a recorded kernel with other arguments that ask for the same compiled one."""
    if launched.kept is None:
        launched.kernel[(launched.programs,)](*args, **launched.constants)
    else:
        run_kept(launched.kept, launched.programs, stream, args)


def run_kept(kept: Kept, programs: int, stream: int, args: Any) -> None:
    """Launch a kept kernel on a stream of the current device; ``args`` may hold addresses in place of tensors."""
    compiled = kept.compiled
    enter, leave = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
    metadata = None
    if getattr(enter, "calls", enter) or getattr(leave, "calls", leave):
        metadata = compiled.launch_metadata((programs,), stream, *args, *kept.constants)
    else:
        enter = leave = None  # empty chains, which Triton would call
    compiled.run(
        programs,
        1,
        1,
        stream,
        compiled.function,
        compiled.packed_metadata,
        metadata,
        enter,
        leave,
        *args,
        *kept.constants,
    )
