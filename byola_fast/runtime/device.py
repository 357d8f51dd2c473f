"""Devices, dtypes and memory of a process."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys

import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}  # of the networks
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


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Return a context in which nothing is cast; the meta device knows no autocast."""
    return contextlib.nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


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
        raise ValueError(
            f"device: expected one that is available, got {name!r}: {str(error).splitlines()[0]}"
        ) from error
    return device
