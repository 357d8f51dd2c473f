# mypy: ignore-errors
"""``ema_update_`` in Triton, for GPUs without nvcc: one launch for each pair of dtypes in the lists.

target <- t + w (o - t) if w < 1/2, else o - (1 - w) (o - t), with w = 1 - decay; each operation rounded once, never
fused. BYOL, arXiv:2006.07733, eq. (1). Reads target and online once, writes target once: 12 bytes an element in
float32, bound by memory.

A launch reads its tensors from a table in device memory: addresses and sizes, and the tensor of every chunk of 4096
elements. Tables are cached by the addresses, shapes, strides and dtypes that they were made from, so none is ever out
of date. The tables of a captured CUDA graph are never freed.
"""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Hashable
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.graph import increment_version

from byola_fast.ops import _ema_checks as check
from byola_fast.ops._triton.shared import launch

CHUNK = 4096  # elements
WARPS = 8
KEPT = 16  # plans in the cache

TYPES = {torch.float32: tl.float32, torch.float64: tl.float64, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


@triton.jit
def ema_update_kernel(
    table,  # (tensors, 4) int64: addresses of target and online, elements, number of the first chunk
    chunks,  # (chunks,) int32: row of the table for each chunk
    decay,  # () float64
    TARGET: tl.constexpr,
    ONLINE: tl.constexpr,
    ALIGNED: tl.constexpr,  # every address is a multiple of 16
    CHUNK: tl.constexpr,
):
    """Update one chunk of one tensor. Compile without fused multiply-adds."""
    chunk = tl.program_id(0)
    row = table + 4 * tl.load(chunks + chunk)
    start = (chunk - tl.load(row + 3)) * CHUNK  # int64
    left = tl.load(row + 2) - start
    target = tl.load(row).to(tl.pointer_type(TARGET)) + start
    online = tl.load(row + 1).to(tl.pointer_type(ONLINE)) + start
    if ALIGNED:
        target = tl.multiple_of(target, 16)
        online = tl.multiple_of(online, 16)
    # both branches of the formula as base + factor (o - t), with the same roundings: x - y is x + (-y), for zeros too
    weight = (1 - tl.load(decay)).to(TARGET)
    is_near = weight < 0.5
    factor = tl.where(is_near, weight, (1 - weight) * -1.0)
    k = tl.arange(0, CHUNK)
    if left >= CHUNK:  # no mask, so that accesses are 16 bytes wide
        near = tl.load(target + k)
        far = tl.load(online + k).to(TARGET)
        tl.store(target + k, tl.where(is_near, near, far) + factor * (far - near))
    else:
        inside = k < left
        near = tl.load(target + k, mask=inside)
        far = tl.load(online + k, mask=inside).to(TARGET)
        tl.store(target + k, tl.where(is_near, near, far) + factor * (far - near), mask=inside)


class _Launch(NamedTuple):
    """The tables of one launch: all tensors of one pair of dtypes and one alignment."""

    table: Tensor
    chunks: Tensor
    target: torch.dtype
    online: torch.dtype
    aligned: bool


class _Work(NamedTuple):
    """The launches of an update of two lists."""

    launches: list[_Launch]
    apart: list[int]  # pairs with gaps or a different order of elements: updated in copies
    pinned: list[Tensor]  # host memory of the tables; a captured graph copies from it at every replay


_known: OrderedDict[Hashable, _Work] = OrderedDict()
_captured: list[_Work] = []


def ema_update_(target: list[Tensor], online: list[Tensor], decay: Tensor) -> None:
    """Launch the kernel for two lists; see ``ops.ema_update_``. A CUDA graph needs one update before it is captured."""
    check.require_decay(decay, target)
    if not target and not online:
        return
    device = (target or online)[0].device
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        if decay.device != device:
            decay = torch.full((), float(decay), dtype=torch.float64, device=device)
        _update(target, online, decay.to(torch.float64))
    increment_version([t for t in target if not t.is_inference()])


def _update(target: list[Tensor], online: list[Tensor], decay: Tensor) -> None:
    work = _work_of(target, online)
    for part in work.launches:
        launch(
            ema_update_kernel,
            len(part.chunks),
            part.table,
            part.chunks,
            decay,
            TARGET=TYPES[part.target],
            ONLINE=TYPES[part.online],
            ALIGNED=part.aligned,
            CHUNK=CHUNK,
            num_warps=WARPS,
            enable_fp_fusion=False,
        )
    if work.apart:
        near = [target[k].detach().contiguous() for k in work.apart]
        _update(near, [online[k].detach().contiguous() for k in work.apart], decay)
        for k, result in zip(work.apart, near, strict=True):
            if result.data_ptr() != target[k].data_ptr():
                target[k].detach().copy_(result)


def _work_of(target: list[Tensor], online: list[Tensor]) -> _Work:
    """Return the launches of two lists: cached ones of the same addresses, shapes, strides and dtypes, or new ones."""
    key = tuple((x.data_ptr(), x.shape, x.stride(), x.dtype, x.device, x.layout) for x in target + online)
    capturing = target[0].device.type == "cuda" and torch.cuda.is_current_stream_capturing() if target else False
    work = _known.get((len(target), key))
    if work is None:
        check.require_valid_lists(target, online)
        work = _make_work(target, online, capturing)
        if not capturing:  # the tables of a captured graph are empty until it runs
            _known[len(target), key] = work
            if len(_known) > KEPT:
                _known.popitem(last=False)
    else:
        _known.move_to_end((len(target), key))
    if capturing:
        _captured.append(work)
    return work


def _make_work(target: list[Tensor], online: list[Tensor], capturing: bool) -> _Work:
    rows: dict[tuple[torch.dtype, torch.dtype, bool], tuple[list[Any], list[int]]] = {}
    work = _Work([], [], [])
    for number, (t, o) in enumerate(zip(target, online, strict=True)):
        contiguous = t.is_contiguous() and o.is_contiguous()
        alike = contiguous or (t.stride() == o.stride() and check.is_dense(t.shape, t.stride()))
        if not alike:
            work.apart.append(number)
        elif t.numel():
            aligned = t.data_ptr() % 16 == 0 and o.data_ptr() % 16 == 0
            table, chunks = rows.setdefault((t.dtype, o.dtype, aligned), ([], []))
            table.append((t.data_ptr(), o.data_ptr(), t.numel(), len(chunks)))
            chunks += [len(table) - 1] * triton.cdiv(t.numel(), CHUNK)
    for (target_dtype, online_dtype, aligned), lists in rows.items():
        on_device = []
        for values, dtype in zip(lists, (torch.int64, torch.int32), strict=True):
            pinned = torch.tensor(values, dtype=dtype, device="cpu")
            if target[0].device.type == "cuda":
                pinned = pinned.pin_memory()  # a captured copy needs it
            work.pinned.append(pinned)
            # the copy blocks unless captured, so that any stream may read the table
            on_device.append(pinned.to(target[0].device, non_blocking=capturing))
        work.launches.append(_Launch(on_device[0], on_device[1], target_dtype, online_dtype, aligned))
    return work
