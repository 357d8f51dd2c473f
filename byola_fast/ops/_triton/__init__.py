"""The Triton backend: import of the kernels on the first call, and registration of the launchers.

It serves CUDA tensors. Under ``TRITON_INTERPRET=1`` Triton runs kernels in Python, and this backend also serves CPU
tensors, preferred to all others, so that the tests of the ops run the kernels on any machine. Triton is imported at the
first call of an op; a kernel is compiled at its first launch and cached on disk.
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
from byola_fast.ops._native import build

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
    if not os.path.isabs(os.path.expanduser("~")):  # Triton would write to a folder "~" in the current one
        os.environ.setdefault("TRITON_CACHE_DIR", str(build.writable(build.cache_folder() / "triton", build.MARKER)))
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
    """Register the stubs of this backend; import nothing yet."""
    for key in ("CUDA", *(["CPU"] if interpreted() else [])):
        _dispatch.add_backend(Backend("triton", key, tuple(_schemas.LAUNCHERS), prepare, _register(key)))
