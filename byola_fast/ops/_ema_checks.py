"""Checks of the arguments of ``ema_update_``.

The search for shared memory is here alone; C++ and Triton ask for it once for the same addresses, shapes and strides.
C++ does the other checks itself, at every call.
"""

from __future__ import annotations

import bisect
import functools
import itertools
import math
import numbers
from collections.abc import Sequence

import torch
from torch import Tensor

from byola_fast.ops import _checks as check

HALF = (torch.float16, torch.bfloat16)

Layout = tuple[int, int, tuple[int, ...], tuple[int, ...]]  # address, bytes per element, shape, strides


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
    tensors = [*target, *online]
    layouts = tuple((x.data_ptr(), x.element_size(), x.shape, x.stride()) for x in tensors)
    names = [f"target[{k}]" for k in range(len(target))] + [f"online[{k}]" for k in range(len(online))]
    for name, (address, _size, shape, _strides) in zip(names, layouts, strict=True):
        if not address and 0 not in shape:
            raise ValueError(f"{name}: expected values, but its storage was freed")
    clash = _find_clash(layouts, len(target))
    if clash is None:
        return
    owner, other = (names[k] for k in clash)
    if owner == other:
        strides = tensors[clash[0]].stride()
        raise ValueError(f"{owner}: expected elements with memory of their own, got strides {strides}")
    raise ValueError(f"{owner}: expected memory of its own, got that of {other}")


def have_clash(ranges: Tensor, targets: int) -> bool:
    """Return whether a target shares memory with another tensor; for C++. ``ranges`` as in ``_first_clash``."""
    return _first_clash(ranges, targets) is not None


def is_dense(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Return whether elements fill one stretch of memory without gaps, in any order."""
    return check.reach(shape, strides) == math.prod(shape) and check.is_nested(shape, strides)


@functools.lru_cache(maxsize=16)
def _find_clash(layouts: tuple[Layout, ...], targets: int) -> tuple[int, int] | None:
    """Return the numbers of two tensors that share memory, the target first. Online tensors may share."""
    extents = [
        (address, address + (0 if 0 in shape else check.reach(shape, strides) * size))
        for address, size, shape, strides in layouts
    ]
    clash = _first_clash(torch.tensor(extents, dtype=torch.int64, device="cpu").view(-1, 2), targets)
    if clash is None and all(check.is_nested(shape, strides) for _address, _size, shape, strides in layouts[:targets]):
        return None
    pieces = [_pieces(*layout) for layout in layouts]  # exactly: a clash of extents may lie in gaps between elements
    counts = [len(piece) for piece in pieces]
    clash = _first_clash(torch.cat(pieces), sum(counts[:targets]))
    ends = list(itertools.accumulate(counts))
    return None if clash is None else (bisect.bisect(ends, clash[0]), bisect.bisect(ends, clash[1]))


def _pieces(address: int, size: int, shape: Sequence[int], strides: Sequence[int]) -> Tensor:
    """Return a range for each element, or one for all elements if they leave no gaps."""
    offsets, length = torch.zeros(1, dtype=torch.int64, device="cpu"), size
    if 0 not in shape and is_dense(shape, strides):
        length *= math.prod(shape)
    else:
        for count, stride in zip(shape, strides, strict=True):
            offsets = (offsets[:, None] + torch.arange(count, device="cpu") * stride).flatten()
    begin = address + offsets * size
    return torch.stack([begin, begin + length], dim=1)


def _first_clash(ranges: Tensor, targets: int) -> tuple[int, int] | None:
    """Return the first two ranges that overlap, unless both are online tensors'; the target's first.

    Args:
        ranges: begin and end in bytes, those of the targets before those of the online tensors ``(N, 2)`` int64.
        targets: number of ranges of targets.
    """
    begin, order = ranges[:, 0].sort(stable=True)
    end = ranges[order, 1]
    if (end[:-1] <= begin[1:]).all():  # the usual case: no overlap at all
        return None
    is_target = order < targets
    target_end = torch.where(is_target, end, 0).cummax(0).values  # the furthest so far
    any_end = end.cummax(0).values
    overlaps = (begin[1:] < torch.where(is_target[1:], any_end[:-1], target_end[:-1])).nonzero()
    if not len(overlaps):
        return None
    last = int(overlaps[0]) + 1
    first = int(((end[:last] > begin[last]) & (is_target[:last] | is_target[last])).nonzero()[0])
    clash = int(order[first]), int(order[last])
    return clash if is_target[first] else clash[::-1]


def ema_decay(decay: float | Tensor, target: Sequence[Tensor]) -> Tensor:
    """Check the decay of ``ema_update_`` and return it as a tensor."""
    if isinstance(decay, Tensor):
        check.require_shape("decay", decay, ())
        require_decay(decay, target)
        return decay
    if not isinstance(decay, (int, float, numbers.Real)):  # the last is slow, and knows NumPy's scalars
        raise TypeError(f"decay: expected a number or a 0-d tensor, got {type(decay).__name__}")
    compiling = torch.compiler.is_compiling()
    if not compiling and not 0 <= decay <= 1:
        raise ValueError(f"decay: expected a number in [0, 1], got {float(decay)}")
    if compiling or torch._C._len_torch_dispatch_stack() or torch._C._functorch.peek_interpreter_stack() is not None:
        return torch.tensor(float(decay), dtype=torch.float64, device="cpu")  # a traced tensor must not be kept
    return _decay_tensor(float(decay))


@functools.lru_cache(maxsize=16)
def _decay_tensor(decay: float) -> Tensor:
    """Return a tensor that is kept, because making one takes a tenth of a small update."""
    with torch.inference_mode(False):
        return torch.tensor(decay, dtype=torch.float64, device="cpu")
