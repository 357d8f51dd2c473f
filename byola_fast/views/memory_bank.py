"""Past inputs to mix in: a ring buffer on the device."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor

from byola_fast import ops
from byola_fast.ops import _checks as check
from byola_fast.runtime.buffers import FixedDtype
from byola_fast.runtime.recomputation import refuse_recomputation
from byola_fast.runtime.state import require_state

_unshaped_copies: WeakKeyDictionary[MemoryBank, WeakSet[MemoryBank]] = WeakKeyDictionary()


class MemoryBank(FixedDtype):
    """Keep the last ``n_memory`` clean, pre-normalised inputs, first in, first out.

    Rows and cursor are persistent buffers on the device, so that no step syncs and a CUDA graph can hold it. Samples
    that are not finite are kept out and counted.

    Args:
        n_memory: rows, up to 2^24; 0 keeps and counts nothing.
        shape: (mels, frames) of a row; by default that of the first batch, also for deep copies that were made before.
        dtype: of the rows: float32, or float16 for half the memory; ``.half()`` does not change it.

    Shape:
        ``rows (n_memory, F, T)`` (None until the shape is known), ``cursor (3,)`` int64: next row, rows filled,
        samples refused.

    Source:
        The FIFO of log-mixup-exp, arXiv:2103.06695. Differs: a batch is pushed once, after both views
        were drawn from the bank; published code pushes each sample once per view in between.
    """

    rows: Tensor | None
    cursor: Tensor

    def __init__(
        self, n_memory: int = 2048, shape: tuple[int, int] | None = None, dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__()
        if not 0 <= n_memory <= 2**24:
            raise ValueError(f"n_memory: expected 0 to 2^24 rows, got {n_memory}")
        if dtype not in check.FLOATS:
            raise TypeError(f"bank_dtype: expected a floating-point dtype, got {dtype}")
        self.n_memory = n_memory
        self.dtype = dtype
        self.register_buffer("rows", None)
        self.register_buffer("cursor", torch.zeros(3, dtype=torch.int64))
        if shape is not None:
            self.allocate(shape, self.cursor.device)

    def allocate(self, shape: tuple[int, int], device: torch.device) -> None:
        """Fix the shape of a row and allocate the rows."""
        if len(shape) != 2 or min(shape) < 1:
            raise ValueError(f"shape: expected (mels, frames) of at least 1, got {shape}")
        with torch.inference_mode(False):  # later calls write to them, perhaps outside of it
            self.rows = torch.zeros(self.n_memory, *shape, dtype=self.dtype, device=device)
        for twin in _unshaped_copies.pop(self, ()):
            if twin.rows is None:
                twin.allocate(shape, twin.cursor.device)

    def __deepcopy__(self, memo: dict[int, Any]) -> MemoryBank:
        """Copy, and remember a copy without rows: AveragedModel copies buffers to it as soon as this bank has rows."""
        twin = memo[id(self)] = type(self).__new__(type(self))
        vars(twin).update(copy.deepcopy(vars(self), memo))
        if self.rows is None:
            _unshaped_copies.setdefault(self, WeakSet()).add(twin)
        return twin

    @property
    def count(self) -> Tensor:
        """Rows filled, a 0-d tensor on the device."""
        return self.cursor[1]

    @property
    def refused(self) -> Tensor:
        """Samples kept out because they were not finite, a 0-d tensor on the device."""
        return self.cursor[2]

    def __len__(self) -> int:
        """Return the rows filled; reads the device."""
        return int(self.count)

    def prepare(self, x: Tensor, *, allocate: bool = True) -> Tensor:
        """Return the rows for a batch ``x (B, F, T)``; before the first one they are allocated, or there are none.

        Raises:
            ValueError: x has another shape than the rows, or is on another device. RuntimeError: the shape is unknown
            while a graph is traced, or a state dict without rows was loaded.
        """
        if self.rows is None:
            if check.is_readable(self.cursor) and len(self):
                raise RuntimeError(
                    f"MemoryBank: expected the {len(self)} rows that its cursor counts, got none; give shape=(mels, "
                    "frames), so that a checkpoint can fill them"
                )
            if not allocate:
                return x[:0]
            if torch.compiler.is_compiling():
                raise RuntimeError("MemoryBank: its shape is not known yet; give shape=(mels, frames) or call it once")
            self.allocate((x.shape[1], x.shape[2]), x.device)
            self.cursor[:2].zero_()  # on a GPU it was not read
        rows = self.rows
        assert rows is not None
        if x.shape[1:] != rows.shape[1:]:
            raise ValueError(
                f"x: expected the memory bank's (mels, frames) {tuple(rows.shape[1:])}, got {tuple(x.shape)}"
            )
        check.require_same_device("x", x, "the memory bank", rows)
        return rows

    def push(self, x: Tensor, stats: Tensor | None = None) -> None:
        """Append a batch ``(B, F, T)``, pre-normalised with ``stats (2,)`` if given; see ``ops.bank_push_``."""
        refuse_recomputation("MemoryBank.push")
        rows = self.prepare(x)
        if self.n_memory:
            ops.bank_push_(rows, self.cursor, x, stats)

    def extra_repr(self) -> str:
        return f"n_memory={self.n_memory}, shape={None if self.rows is None else tuple(self.rows.shape[1:])}"

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        require_state(self, state_dict, prefix)
        rows, cursor = state_dict.get(prefix + "rows"), state_dict.get(prefix + "cursor")
        if isinstance(rows, Tensor) and self.rows is None and rows.dim() == 3:
            if len(rows) != self.n_memory:
                error_msgs.append(f"{prefix}rows: expected n_memory = {self.n_memory} rows, got {len(rows)}")
                return
            self.allocate((rows.shape[1], rows.shape[2]), self.cursor.device)
        elif rows is None and isinstance(cursor, Tensor) and bool(cursor[1:2].any()):
            if self.rows is None:
                missing_keys.append(prefix + "rows")  # an error, or with strict=False the bank begins empty
            state_dict = {**state_dict, prefix + "cursor": cursor * cursor.new_tensor([0, 0, 1])}
        elif rows is None and isinstance(cursor, Tensor):
            self.rows = None
        rest = (local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        super()._load_from_state_dict(state_dict, prefix, *rest)
