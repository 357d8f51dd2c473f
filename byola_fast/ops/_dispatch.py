"""Lazy loading of backends: a stub under an op's dispatch key loads the backend on the first call.

Callers never choose a backend; the dispatcher does. Until the first call of an op on a device, its key holds a stub.
The stub asks the backends of that op and key, in order of preference, to prepare (import, compile). The first backend
that succeeds replaces the stubs by its kernels, and the stub dispatches the call again. If all fail, the stub is
removed and the reference answers. Because the dispatcher calls the stub, all calls behave the same: direct calls of
``torch.ops.byola_fast`` and graphs compiled before the backend was loaded.

``BYOLA_FAST_STRICT=1`` turns every fallback into a ``BackendError``. ``BYOLA_FAST_BACKEND=reference`` sends all public
functions to plain PyTorch (see ``_route.py``).
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from byola_fast.ops import _schemas

logger = logging.getLogger("byola_fast")

CHOSEN = os.environ.get("BYOLA_FAST_BACKEND", "")
if CHOSEN not in ("", "reference"):
    raise ValueError(f"BYOLA_FAST_BACKEND: expected reference, or nothing for the best backend, got {CHOSEN!r}")


class BackendError(RuntimeError):
    """A backend cannot be used on this machine; the message gives the reason and the remedy."""


@dataclass(eq=False)
class Backend:
    """Kernels for some ops on one kind of device.

    ``prepare`` does the slow part (import, compile) and raises ``BackendError`` with a reason. ``register`` receives
    its result and must be quick: while it runs, calls of the ops reach the reference.
    """

    name: str
    key: str
    ops: tuple[str, ...]
    prepare: Callable[[], Any]
    register: Callable[[Any], None]
    failure: str | None = None
    loaded: bool = False


@dataclass
class _Registry:
    backends: list[Backend] = field(default_factory=list)
    stubs: dict[tuple[str, str], torch.library.Library] = field(default_factory=dict)
    lock: threading.RLock = field(default_factory=threading.RLock)


_registry = _Registry()


def strict() -> bool:
    """Return whether a fallback is an error (``BYOLA_FAST_STRICT=1``)."""
    return os.environ.get("BYOLA_FAST_STRICT", "0") not in ("", "0")


def add_backend(backend: Backend) -> None:
    """Add a backend without loading it; backends added earlier for the same key are preferred."""
    with _registry.lock:
        _registry.backends.append(backend)
        _add_stubs(backend)


def _add_stubs(backend: Backend) -> None:
    for op in backend.ops:
        if (backend.key, op) not in _registry.stubs:
            stub = torch.library.Library(_schemas.NAMESPACE, "IMPL", backend.key)
            stub.impl(op, _make_stub(backend.key, op))
            _registry.stubs[backend.key, op] = stub


def candidates(key: str, op: str) -> list[Backend]:
    """Return the backends of an op on one kind of device, in order of preference."""
    return [backend for backend in _registry.backends if backend.key == key and op in backend.ops]


def resolve(key: str, op: str) -> None:
    """Load the preferred backend that works for an op, or leave the op to its reference.

    Raises:
        BackendError: the preferred backend cannot be loaded and ``BYOLA_FAST_STRICT`` is set.
    """
    with _registry.lock:
        for backend in candidates(key, op):
            if not backend.loaded and backend.failure is None:
                _load(backend)
            if backend.loaded:
                return
            if strict():
                raise BackendError(
                    f"{op} on {key}: {backend.name} backend: {backend.failure} (BYOLA_FAST_STRICT is set)"
                )
        _remove_stub(key, op)


def _load(backend: Backend) -> None:
    try:
        prepared = backend.prepare()
        for op in backend.ops:
            _remove_stub(backend.key, op)
        try:
            backend.register(prepared)
        except BaseException:
            _add_stubs(backend)  # else the reference would answer in silence
            raise
    except (ImportError, OSError, RuntimeError) as error:  # BackendError, or one of the loader or of a broken package
        backend.failure = str(error) if isinstance(error, BackendError) else f"the kernels cannot be loaded: {error}"
        if not strict():
            logger.warning("byola_fast: %s backend not used: %s", backend.name, backend.failure)
        return
    backend.loaded = True


def _remove_stub(key: str, op: str) -> None:
    stub = _registry.stubs.pop((key, op), None)
    if stub is not None:
        stub._destroy()


def _make_stub(key: str, op: str) -> Callable[..., Any]:
    packet = getattr(torch.ops.byola_fast, op)

    def stub(*args: Any, **kwargs: Any) -> Any:
        on_gpu = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor) and x.is_cuda]
        with torch.cuda.device_of(on_gpu[0]) if on_gpu else nullcontext():  # a backend asks what this GPU can do
            resolve(key, op)
        return packet(*args, **kwargs)

    return stub


def backend_in_use(key: str, op: str) -> tuple[str, str]:
    """Load the backend of an op on one kind of device; return its name and the reason for a fallback.

    Raises:
        BackendError: as ``resolve``, at every call.
    """
    if CHOSEN:
        return CHOSEN, "chosen by BYOLA_FAST_BACKEND"
    failures: list[str] = []
    for backend in candidates(key, op):
        if not backend.loaded:
            resolve(key, op)
        if backend.loaded:
            return backend.name, "; ".join(failures)
        failures.append(f"{backend.name}: {backend.failure}")
    none = f"made of {_schemas.MADE_OF[op]}" if op in _schemas.MADE_OF else "plain PyTorch, no kernel for this device"
    return "reference", "; ".join(failures) or none
