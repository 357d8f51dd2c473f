"""State dicts in the published layout, files that try to run code or claim wrong sizes, and flipped bits."""

from __future__ import annotations

import io
import os
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor


class Malicious:
    """Leaves a mark where it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch {self.mark}",)


def layout(blocks: int, mels: int, widths: tuple[int, int]) -> dict[str, Tensor]:
    """A state dict made from the names and shapes alone, as published ones have them."""
    state = {}
    for block in range(blocks):
        state[f"features.{4 * block}.weight"] = torch.randn(64, 64 if block else 1, 3, 3)
        state[f"features.{4 * block}.bias"] = torch.randn(64)
        for name in ("weight", "bias", "running_mean"):
            state[f"features.{4 * block + 1}.{name}"] = torch.randn(64)
        state[f"features.{4 * block + 1}.running_var"] = torch.rand(64)
        state[f"features.{4 * block + 1}.num_batches_tracked"] = torch.tensor(7)
    local = 64 * (mels // 2**blocks)
    state |= {"fc.0.weight": torch.randn(widths[0], local), "fc.0.bias": torch.randn(widths[0])}
    return state | {"fc.3.weight": torch.randn(widths[1], widths[0]), "fc.3.bias": torch.randn(widths[1])}


def flipped(content: bytes, bits: Iterable[int]) -> Iterator[bytes]:
    """The content with one bit flipped, for each of the bits."""
    for bit in bits:
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        yield bytes(damaged)


class Claim(NamedTuple):
    """What a file says of a float32 tensor; its storage has 4 elements."""

    elements: int
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


class _Storage(NamedTuple):
    elements: int


class _Claimed:
    def __init__(self, claim: Claim) -> None:
        self.claim = claim

    def __reduce__(self):
        elements, *rest = self.claim
        return torch._utils._rebuild_tensor_v2, (_Storage(elements), *rest, False, OrderedDict())


def _pickled(claim: Claim, *more: None) -> bytes:
    class Pickler(pickle.Pickler):
        def persistent_id(self, value):
            if isinstance(value, _Storage):
                return ("storage", torch.FloatStorage, "0", "cpu", value.elements, *more)
            return None

    file = io.BytesIO()
    Pickler(file, 2).dump({"a": _Claimed(claim)})
    return file.getvalue()


def write_archive(path: Path, pickled: bytes, compression: int = zipfile.ZIP_STORED) -> None:
    """Write a file as torch.save does, around any pickle."""
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in (("data.pkl", pickled), ("version", b"3"), ("data/0", bytes(16))):
            archive.writestr(f"a/{name}", content)


def write_claim(path: Path, claim: Claim, *, legacy: bool) -> None:
    """Write a file of one tensor, in today's format or that of torch before 1.6."""
    if not legacy:
        write_archive(path, _pickled(claim))
        return
    head = [pickle.dumps(part, 2) for part in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})]
    tail = pickle.dumps(["0"], 2) + struct.pack("<q", 4) + bytes(16)
    path.write_bytes(b"".join([*head, _pickled(claim, None), tail]))
