"""Check saved tensors before a module loads them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

NEVER_NEGATIVE = ("running_var", "num_batches_tracked", "variance", "count", "updates", "cursor", "step")


def mismatch(name: str, x: Tensor, wanted: Tensor) -> tuple[str, str] | None:
    """Return what is wrong with a tensor that is to be copied to another of that name, and its details."""
    if x.shape != wanted.shape:
        return "of another shape", f"{tuple(x.shape)} instead of {tuple(wanted.shape)}"
    if x.layout != torch.strided or x.is_quantized or x.is_meta:
        return "not dense", f"{x.layout}, {x.device}, {x.dtype}"
    if type(x) in (Tensor, torch.nn.Parameter) and x.numel() * x.element_size() > x.untyped_storage().nbytes():
        return "of fewer values than their shape", f"{tuple(x.shape)}"
    floats = x.is_floating_point() and wanted.is_floating_point() and x.element_size() > 1  # float8 is coarse
    if x.dtype != wanted.dtype and not floats:
        return "of another dtype", f"{x.dtype} instead of {wanted.dtype}"
    bad = ~x.to(wanted.dtype).isfinite()
    if bool(bad.any()) and not wanted.is_meta:
        bad &= x != wanted.to(x.device)  # a mask of -inf is right
    if bool(bad.any()):
        return f"not finite in {wanted.dtype}", f"({int(bad.sum())} of {x.numel()} values)"
    if name.endswith(NEVER_NEGATIVE) and bool((x < 0).any()):
        return "negative", f"({int((x < 0).sum())} of {x.numel()} values)"
    return None


def require_state(module: torch.nn.Module, state: Mapping[str, Any], prefix: str = "") -> None:
    """Refuse tensors that ``load_state_dict`` would convert, or take although they are not finite.

    Raises:
        RuntimeError: as ``load_state_dict`` raises it; names the first one.
    """
    own = module.state_dict(prefix=prefix)
    for name, x in state.items():
        wanted = own.get(name, x)
        if not name.startswith(prefix) or not isinstance(x, Tensor) or not isinstance(wanted, Tensor):
            continue
        if problem := mismatch(name, x, wanted):
            raise RuntimeError(f"{name}: {problem[0]} {problem[1]}")
