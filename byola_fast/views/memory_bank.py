"""Past inputs to mix in: a ring buffer on the device."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from byola_fast import ops
from byola_fast.ops import _checks as check
from byola_fast.runtime.state import require_state


class MemoryBank(nn.Module):
    """Keep the last ``n_memory`` clean, pre-normalised inputs, first in, first out.

    Rows and cursor are persistent buffers on the device, so that no step syncs and a CUDA graph can hold it. Samples
    that are not finite are kept out and counted.

    Args:
        n_memory: rows, up to 2^24; 0 keeps and counts nothing.
        shape: (mels, frames) of a row; by default that of the first batch.
        dtype: of the rows: float32, or float16 for half the memory.

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
        self.rows = torch.zeros(self.n_memory, *shape, dtype=self.dtype, device=device)

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

    def prepare(self, x: Tensor) -> Tensor:
        """Return the rows for a batch ``x (B, F, T)``, allocating them for the first one.

        Raises:
            ValueError: x has another shape than the rows, or is on another device. RuntimeError: the shape is unknown
            while a graph is traced.
        """
        if self.rows is None:
            if torch.compiler.is_compiling():
                raise RuntimeError("MemoryBank: its shape is not known yet; give shape=(mels, frames) or call it once")
            self.allocate((x.shape[1], x.shape[2]), x.device)
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
        rows = self.prepare(x)
        if self.n_memory:
            ops.bank_push_(rows, self.cursor, x, stats)

    def extra_repr(self) -> str:
        return f"n_memory={self.n_memory}, shape={None if self.rows is None else tuple(self.rows.shape[1:])}"

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        require_state(self, state_dict, prefix)
        saved = state_dict.get(prefix + "rows")
        if saved is not None and self.rows is None and saved.dim() == 3 and saved.shape[0] == self.n_memory:
            self.allocate((saved.shape[1], saved.shape[2]), self.cursor.device)
        elif saved is None and prefix + "cursor" in state_dict:
            self.rows = None
        super()._load_from_state_dict(state_dict, prefix, *args)
