"""Where a call of an op goes: to the dispatcher's kernels, or to plain PyTorch where only that serves."""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from byola_fast.ops import _dispatch, reference
from byola_fast.ops._dispatch import CHOSEN
from byola_fast.ops._native import cuda

PLAIN = bool(CHOSEN)
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


def op(name: str, *inputs: Tensor | None) -> Callable[..., Any]:
    """Return an op of the dispatcher, or its reference where only plain PyTorch serves.

    Args:
        inputs: the tensors that get gradients. If none asks for one, the call does not enter autograd, whose part of an
            op is Python and takes longer than small inputs do.
    """
    if needs_reference():
        return getattr(reference, f"{name}_reference")
    found = getattr(torch.ops.byola_fast, name)
    if not inputs or torch.compiler.is_compiling():
        return found
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs):
        return found
    return functools.partial(_without_autograd, found.default)


def is_without_autograd(found: Callable[..., Any]) -> bool:
    """Return whether ``op`` returned an op that does not enter autograd."""
    return type(found) is functools.partial


def _without_autograd(found: Callable[..., Any], *args: Any) -> Any:
    with torch._C._AutoDispatchBelowAutograd():
        return found(*args)


def ema_update_without_grad(target: Sequence[Tensor], online: Sequence[Tensor], decay: Tensor) -> None:
    """Call ``ema_update_`` under ``torch.no_grad``: by the CUDA library's own binding for lists where it is loaded."""
    if len(target) + len(online) == 0:  # len() refuses a generator, which the op would use up before it is checked
        return
    is_seen = torch.compiler.is_compiling() or torch._C._len_torch_function_stack() > 0
    call = None if is_seen else cuda.ema_call
    if call is None or call(target, online, decay) is NotImplemented:
        torch.ops.byola_fast.ema_update_(target, online, decay)


def has_kernels(x: Tensor) -> bool:
    """Return whether a backend serves ``conv_block``, whose reference is slower than PyTorch's own layers."""
    if needs_reference():
        return False
    return HAS_TRITON if x.is_cuda or INTERPRETED else x.is_cpu and _cpp_serves()


def _cpp_serves() -> bool:
    return _dispatch.backend_in_use("CPU", "conv_block")[0] != "reference"


_cpp_serves._dynamo_marked_constant = True  # type: ignore[attr-defined]
