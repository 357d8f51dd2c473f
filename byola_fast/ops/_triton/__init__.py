"""The Triton backend: which op runs which launcher, and when the kernels are imported.

It serves CUDA tensors; under ``TRITON_INTERPRET=1``, where Triton runs kernels in Python, it serves CPU tensors, ahead
of every other backend, so that the tests of the ops test the kernels on any machine. Nothing is imported before the
first call of an op, and nothing is compiled before a kernel's first launch; Triton keeps what it compiled on disk.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable
from typing import Any

import torch

from byola_fast.ops import _dispatch, _schemas
from byola_fast.ops._dispatch import Backend, BackendError

OLDEST_CAPABILITY = (7, 5)

_registered: list[torch.library.Library] = []


def interpreted() -> bool:
    """Return whether Triton runs kernels in Python, on CPU tensors (``TRITON_INTERPRET=1``)."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def prepare() -> dict[str, Callable[..., Any]]:
    """Import Triton and the kernels; return the launcher of each op.

    Raises:
        BackendError: no Triton, or a GPU too old for it.
    """
    if importlib.util.find_spec("triton") is None:
        raise BackendError("Triton was not found: pip install triton")
    if not interpreted() and (found := torch.cuda.get_device_capability()) < OLDEST_CAPABILITY:
        wanted = ".".join(map(str, OLDEST_CAPABILITY))
        raise BackendError(f"Triton needs a GPU of compute capability {wanted} or later, found {found[0]}.{found[1]}")
    files = {
        name: importlib.import_module(f"byola_fast.ops._triton.{name}") for name in set(_schemas.LAUNCHERS.values())
    }
    return {op: getattr(files[name], op) for op, name in _schemas.LAUNCHERS.items()}


def _register(key: str) -> Callable[[dict[str, Callable[..., Any]]], None]:
    def register(launchers: dict[str, Callable[..., Any]]) -> None:
        library = torch.library.Library(_schemas.NAMESPACE, "IMPL", key)
        for op, launcher in launchers.items():
            library.impl(op, launcher)
        _registered.append(library)

    return register


def install() -> None:
    """Put the stubs of this backend in place."""
    for key in ("CUDA", *(["CPU"] if interpreted() else [])):
        _dispatch.add_backend(Backend("triton", key, tuple(_schemas.LAUNCHERS), prepare, _register(key)))
