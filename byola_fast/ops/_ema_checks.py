"""Checks of the two lists of ``ema_update_``, for backends in Python; those in C++ do the same themselves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from byola_fast.ops import _checks as check

HALF = (torch.float16, torch.bfloat16)


class _Range(NamedTuple):
    """A piece of memory, in bytes."""

    begin: int
    end: int
    owner: str
    is_target: bool


def check_lists(target: Sequence[Tensor], online: Sequence[Tensor]) -> None:
    """Refuse lists that do not fit together: lengths, dtypes, layouts, shapes, devices."""
    if len(target) != len(online):
        raise ValueError(f"online: expected as many tensors as in target ({len(target)}), got {len(online)}")
    for number, (t, o) in enumerate(zip(target, online, strict=True)):
        if t.dtype not in (torch.float32, torch.float64):
            half = "; half would never move" if t.dtype in HALF else ""
            raise TypeError(f"target[{number}]: expected float32 or float64, got {t.dtype}{half}")
        if o.dtype != t.dtype and not (t.dtype == torch.float32 and o.dtype in HALF):
            half = " or half precision" if t.dtype == torch.float32 else ""
            raise TypeError(f"online[{number}]: expected {t.dtype}{half}, got {o.dtype}")
        for name, x in (("target", t), ("online", o)):
            if x.layout != torch.strided:
                raise TypeError(f"{name}[{number}]: expected a dense tensor (torch.strided), got {x.layout}")
            if x.device != target[0].device:
                where = target[0].device
                raise ValueError(f"{name}[{number}]: expected on the device of target[0] ({where}), got {x.device}")
        check.require_shape(f"online[{number}]", o, tuple(t.shape))


def check_decay(decay: Tensor, target: Sequence[Tensor]) -> None:
    """Refuse a decay that is no float scalar, is on a third device, or, where it can be read, lies outside [0, 1]."""
    check.require_float("decay", decay)
    if decay.numel() != 1:
        raise ValueError(f"decay: expected a 0-d tensor, got shape {tuple(decay.shape)}")
    if len(target) and isinstance(target[0], Tensor) and decay.device.type != "cpu":
        check.require_same_device("decay", decay, "target[0]", target[0])
    if check.is_readable(decay) and not 0 <= float(decay) <= 1:
        raise ValueError(f"decay: expected a number in [0, 1], got {float(decay)}")


def check_memory(target: Sequence[Tensor], online: Sequence[Tensor]) -> None:
    """Refuse targets that share memory with any other tensor of the lists, or that have no memory any more."""
    named = [(f"{name}[{n}]", x) for name, xs in (("target", target), ("online", online)) for n, x in enumerate(xs)]
    named = [(name, x) for name, x in named if x.numel()]
    for name, x in named:
        if not x.data_ptr():
            raise ValueError(f"{name}: expected values, but its storage was freed")
    clash = _find_clash([_extent(name, x) for name, x in named])
    if clash is not None or not all(_is_nested(x) for name, x in named if name.startswith("target")):
        # it may be the gaps between elements that others fill
        clash = _find_clash([piece for name, x in named for piece in _elements(name, x)])
    if clash is None:
        return
    owner, other = clash[0].owner, clash[1].owner
    if owner == other:
        strides = dict(named)[owner].stride()
        raise ValueError(f"{owner}: expected elements with memory of their own, got strides {strides}")
    raise ValueError(f"{owner}: expected memory of its own, got that of {other}")


def is_dense(x: Tensor) -> bool:
    """Return whether the elements of a tensor fill one stretch of memory, in whatever order."""
    return _reach(x) == x.numel() and _is_nested(x)


def _reach(x: Tensor) -> int:
    """Return the number of elements from the first to the last in memory, gaps included."""
    return 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))


def _is_nested(x: Tensor) -> bool:
    """Return whether each axis steps over all that the faster ones reach; then no two elements share memory."""
    reach = 1
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size > 1 and stride < reach:
            return False
        reach += (size - 1) * stride
    return True


def _extent(name: str, x: Tensor) -> _Range:
    begin = x.data_ptr()
    return _Range(begin, begin + _reach(x) * x.element_size(), name, name.startswith("target"))


def _elements(name: str, x: Tensor) -> list[_Range]:
    """Return a range for each element, or for all of them where they leave no gaps."""
    if is_dense(x):
        return [_extent(name, x)]
    offsets = torch.zeros(1, dtype=torch.int64)
    for size, stride in zip(x.shape, x.stride(), strict=True):
        offsets = (offsets[:, None] + torch.arange(size) * stride).flatten()
    begin, size = x.data_ptr(), x.element_size()
    is_target = name.startswith("target")
    return [_Range(begin + k * size, begin + (k + 1) * size, name, is_target) for k in offsets.tolist()]


def _find_clash(pieces: list[_Range]) -> tuple[_Range, _Range] | None:
    """Return the first two pieces that meet and of which one is a target's, that one first."""
    last_target: _Range | None = None  # that reach furthest so far
    last_online: _Range | None = None
    for piece in sorted(pieces):
        if last_target is not None and piece.begin < last_target.end:
            return last_target, piece
        if piece.is_target:
            if last_online is not None and piece.begin < last_online.end:
                return piece, last_online
            last_target = piece
        elif last_online is None or last_online.end < piece.end:
            last_online = piece
    return None
