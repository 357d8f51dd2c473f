"""Devices, dtypes and memory of a process."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import sys
from pathlib import Path

import torch

logger = logging.getLogger("byola_fast")

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}  # of the networks
CPU_INFO = Path("/proc/cpuinfo")
BFLOAT16_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}  # of x86, and of Arm
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of <malloc.h>


def keep_freed_memory() -> None:
    """Let glibc keep freed memory.

    By default it returns blocks above 32 MB to the kernel, which maps and clears them again in every step. For the
    activations of a batch of 64 these are 800,000 page faults: two fifths of a training step, half of embedding.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, -1)


def warn_of_slow_bfloat16() -> None:
    """Warn if this CPU has no instructions for bfloat16, which is then 5 to 15 times slower than float32."""
    try:
        words = set(CPU_INFO.read_text(encoding="utf-8", errors="replace").split())
    except OSError:  # not Linux
        return
    if not words & BFLOAT16_FLAGS:
        logger.warning("dtype: this CPU has no instructions for bfloat16: float32 is 5 to 15 times as fast")


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Return a context in which nothing is cast; the meta device knows no autocast."""
    if device.type == "meta" or not (torch.compiler.is_compiling() or torch.is_autocast_enabled(device.type)):
        return contextlib.nullcontext()  # torch.autocast takes longer than a small front end
    return torch.autocast(device.type, enabled=False)


def pick_device(name: str) -> torch.device:
    """Return the device of this process. "auto" and "cuda" choose the GPU of the local rank; "auto" takes no MPS.

    Raises:
        ValueError: an unknown or unavailable device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device: expected auto, cpu, cuda, cuda:N or mps, got {name!r}") from error
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ValueError(f"device: expected one that is available, got {name!r}, but torch finds no CUDA")
        if device.index is None:
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        if device.index >= torch.cuda.device_count():
            raise ValueError(f"device: expected one of {torch.cuda.device_count()} GPUs, got {device}")
        return device
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # depends on the build of torch
        reason = str(error).splitlines()[0].split(". ")[0]  # torch goes on with advice to its own authors
        raise ValueError(f"device: expected one that is available, got {name!r}: {reason}") from error
    return device
