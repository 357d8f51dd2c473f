"""Checks of the arguments of ``ema_update_``, for every backend. C++ and Triton call them once for the same lists."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from byola_fast.ops import _checks as check

HALF = (torch.float16, torch.bfloat16)

Range = tuple[int, int, int]  # begin and end in bytes; number of the tensor: the targets, then the online tensors


def require_valid_lists(target: Sequence[Tensor], online: Sequence[Tensor]) -> None:
    """Refuse bad lists, judged by layouts, devices, dtypes, addresses, shapes and strides alone.

    So a backend may skip the check of lists in which none of these changed since the last one.
    """
    require_matching_lists(target, online)
    require_separate_memory(target, online)


def require_matching_lists(target: Sequence[Tensor], online: Sequence[Tensor]) -> None:
    """Refuse lists whose lengths, dtypes, layouts, shapes or devices do not match."""
    if len(target) != len(online):
        raise ValueError(f"online: expected as many tensors as in target ({len(target)}), got {len(online)}")
    device = target[0].device if target else None
    for number, (t, o) in enumerate(zip(target, online, strict=True)):
        if t.dtype not in (torch.float32, torch.float64):
            hint = "; small updates round to zero in half precision" if t.dtype in HALF else ""
            raise TypeError(f"target[{number}]: expected float32 or float64, got {t.dtype}{hint}")
        if o.dtype != t.dtype and not (t.dtype == torch.float32 and o.dtype in HALF):
            or_half = " or half precision" if t.dtype == torch.float32 else ""
            raise TypeError(f"online[{number}]: expected {t.dtype}{or_half}, got {o.dtype}")
        for name, x in (("target", t), ("online", o)):
            if x.layout != torch.strided:
                raise TypeError(f"{name}[{number}]: expected a dense tensor (torch.strided), got {x.layout}")
            if x.device != device:
                raise ValueError(f"{name}[{number}]: expected on the device of target[0] ({device}), got {x.device}")
        if o.shape != t.shape:
            check.require_shape(f"online[{number}]", o, tuple(t.shape))


def require_decay(decay: Tensor, target: Sequence[Tensor]) -> None:
    """Refuse a decay that is not a float scalar, is on a third device, or has a readable value outside [0, 1]."""
    check.require_float("decay", decay)
    if decay.numel() != 1:
        raise ValueError(f"decay: expected a 0-d tensor, got shape {tuple(decay.shape)}")
    if len(target) and isinstance(target[0], Tensor) and decay.device.type != "cpu":
        check.require_same_device("decay", decay, "target[0]", target[0])
    if check.is_readable(decay) and not 0 <= float(decay) <= 1:
        raise ValueError(f"decay: expected a number in [0, 1], got {float(decay)}")


def require_separate_memory(target: Sequence[Tensor], online: Sequence[Tensor]) -> None:
    """Refuse targets that share memory with another tensor of the lists, and tensors whose storage was freed."""

    def name_of(owner: int) -> str:
        return f"target[{owner}]" if owner < len(target) else f"online[{owner - len(target)}]"

    tensors = [*target, *online]
    filled = [(owner, x) for owner, x in enumerate(tensors) if x.numel()]
    extents = [_extent(owner, x) for owner, x in filled]
    for begin, _end, owner in extents:
        if not begin:
            raise ValueError(f"{name_of(owner)}: expected values, but its storage was freed")
    clash = _find_clash(extents, len(target))
    if clash is not None or not all(x.is_contiguous() or _is_nested(x) for x in target):
        # exactly, element by element: a clash of extents may lie in gaps between elements
        clash = _find_clash([piece for owner, x in filled for piece in _elements(owner, x)], len(target))
    if clash is None:
        return
    owner, other = clash
    if owner == other:
        raise ValueError(
            f"{name_of(owner)}: expected elements with memory of their own, got strides {tensors[owner].stride()}"
        )
    raise ValueError(f"{name_of(owner)}: expected memory of its own, got that of {name_of(other)}")


def is_dense(x: Tensor) -> bool:
    """Return whether the elements of a tensor fill one stretch of memory without gaps, in any order."""
    return x.is_contiguous() or (_reach(x) == x.numel() and _is_nested(x))


def _reach(x: Tensor) -> int:
    """Return the number of elements from the first to the last in memory, gaps included."""
    return 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))


def _is_nested(x: Tensor) -> bool:
    """Return whether each axis steps beyond the reach of the faster axes; then no two elements share memory."""
    reach = 1
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size > 1 and stride < reach:
            return False
        reach += (size - 1) * stride
    return True


def _extent(owner: int, x: Tensor) -> Range:
    begin = x.data_ptr()
    return begin, begin + (x.numel() if x.is_contiguous() else _reach(x)) * x.element_size(), owner


def _elements(owner: int, x: Tensor) -> list[Range]:
    """Return a range for each element, or one for all elements if they leave no gaps."""
    if is_dense(x):
        return [_extent(owner, x)]
    offsets = torch.zeros(1, dtype=torch.int64)
    for size, stride in zip(x.shape, x.stride(), strict=True):
        offsets = (offsets[:, None] + torch.arange(size) * stride).flatten()
    begin, size = x.data_ptr(), x.element_size()
    return [(begin + k * size, begin + (k + 1) * size, owner) for k in offsets.tolist()]


def _find_clash(ranges: Iterable[Range], targets: int) -> tuple[int, int] | None:
    """Return the owners of the first two ranges that overlap, the target first; online tensors may overlap."""
    target_end = online_end = 0  # the furthest so far
    last_target = last_online = 0  # their owners
    for begin, end, owner in sorted(ranges):
        if begin < target_end:
            return last_target, owner
        if owner < targets:
            if begin < online_end:
                return owner, last_online
            target_end, last_target = end, owner
        elif online_end < end:
            online_end, last_online = end, owner
    return None
