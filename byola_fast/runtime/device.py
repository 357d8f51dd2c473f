"""What a command asks of the process that it runs in."""

from __future__ import annotations

import ctypes
import os
import sys

import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}  # that networks compute in, by name
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of <malloc.h>


def keep_freed_memory() -> None:
    """Let glibc keep the memory it is given back.

    It returns blocks of more than 32 MB to the kernel, which maps and clears them anew in every step: activations of
    a batch of 64 cost 800,000 page faults, two fifths of the time of a training step, and half that of embedding.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, -1)


def pick_device(name: str) -> torch.device:
    """Return the device of this process: with "auto" and "cuda" its own of several GPUs.

    Raises:
        ValueError: no device of that name, or not here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device: expected auto, cpu, cuda or cuda:N, got {name!r}") from error
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ValueError(f"device: expected one that is here, got {name!r} where torch finds no CUDA")
        if device.index is None:
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        if device.index >= torch.cuda.device_count():
            raise ValueError(f"device: expected one of {torch.cuda.device_count()} GPUs, got {device}")
        return device
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # as this build of torch puts it
        raise ValueError(f"device: expected one that is here, got {name!r}: {str(error).splitlines()[0]}") from error
    return device
