"""Buffers that keep their dtype."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from torch import Tensor, nn

from byola_fast.runtime.state import require_state

M = TypeVar("M", bound="FixedDtype")


class FixedDtype(nn.Module):
    """Keep the dtype of all buffers, whatever ``.half()``, ``.to(dtype)`` or a loaded state dict ask for.

    Statistics in half precision overflow, or stop to follow; a filter bank in half precision is off by up to 1.
    """

    def _apply(self: M, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> M:
        def keep_dtype(buffer: Tensor) -> Tensor:
            moved = fn(buffer)
            return moved if moved.dtype == buffer.dtype else buffer.to(moved.device)

        super()._apply(keep_dtype, recurse)
        return self

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        require_state(self, state_dict, prefix)  # of all submodules, before anything changes
        state = dict(state_dict)
        for name, own in self._buffers.items():  # with assign=True they would become the buffers as they are
            if own is not None and isinstance(x := state.get(prefix + name), Tensor):
                state[prefix + name] = x.to(own.dtype)
        super()._load_from_state_dict(state, prefix, *args)
