"""Where a call of an op goes: to the dispatcher's kernels, or to plain PyTorch where only that serves."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from byola_fast.ops import reference

PLAIN = os.environ.get("BYOLA_FAST_BACKEND") == "reference"
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"
HAS_TRITON = importlib.util.find_spec("triton") is not None


def needs_reference() -> bool:
    """Return whether only plain PyTorch serves: in exported graphs, forward mode and ``torch.func``, or if chosen.

    An exported or traced graph must run without this package. PyTorch would drop forward-mode derivatives at a custom
    op in silence, and has no ``torch.func`` for it.
    """
    # Read the flag itself, because torch 2.11 compiles a call of is_exporting() to True.
    if PLAIN or torch.compiler._is_exporting_flag or forward_ad._current_level >= 0:
        return True
    if torch._C._get_tracing_state() is not None:
        return True
    return not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is not None


def op(name: str) -> Callable[..., Any]:
    """Return an op of the dispatcher, or its reference where only plain PyTorch serves."""
    if needs_reference():
        return getattr(reference, f"{name}_reference")
    return getattr(torch.ops.byola_fast, name)


def has_kernels(x: Tensor) -> bool:
    """Return whether Triton serves an op that is faster in PyTorch's own layers wherever it does not."""
    return HAS_TRITON and (x.is_cuda or INTERPRETED) and not needs_reference()
