"""Strategies that several property tests share: tensors of any layout, and the threads that compute."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
EXACT = [
    "contiguous",
    "permuted",
    "sliced",
    "offset",
]  # memory of its own for every element, so that it can be written to
LAYOUTS = [*EXACT, "expanded", "negated"]

# BYOLA_FAST_FUZZ=3000 by hand; the default is for every run of the tests
fuzzed = settings(max_examples=int(os.environ.get("BYOLA_FAST_FUZZ", "20")), deadline=None)


def lay_out(data: st.DataObject, values: Tensor, layouts: list[str] = LAYOUTS) -> Tensor:
    """Return a tensor of the same shape in memory of any layout; equal to ``values`` unless it is expanded."""
    layout = data.draw(st.sampled_from(layouts))
    dims, values = values.dim(), values.resolve_neg()
    if layout == "permuted":
        order = data.draw(st.permutations(range(dims)))
        back = [order.index(axis) for axis in range(dims)]
        return values.permute(order).contiguous().permute(back)
    if layout == "sliced":
        steps = [data.draw(st.integers(1, 3)) for _ in range(dims)]
        first = data.draw(st.integers(0, 2))
        # what lies between must not be read: NaN, or the largest integer
        wide = [first + n * step for n, step in zip(values.shape, steps, strict=True)]
        filler = torch.nan if values.dtype.is_floating_point else torch.iinfo(values.dtype).max
        view = torch.full(wide, filler, dtype=values.dtype)
        for axis, step in enumerate(steps):
            view = view[(slice(None),) * axis + (slice(first, None, step),)]
        return view.copy_(values)
    if layout == "expanded" and dims and values.numel():
        axis = data.draw(st.integers(0, dims - 1))
        return values.narrow(axis, 0, 1).clone().expand(values.shape)
    if layout == "offset":
        room = torch.empty(values.numel() + 1, dtype=values.dtype)
        return room[1:].view(values.shape).copy_(values)
    if layout == "negated" and values.dtype in (torch.float32, torch.float64):
        return torch.complex(torch.zeros_like(values), -values).conj().imag  # a view that owes a sign
    return values.contiguous()


def normal(data: st.DataObject, shape: tuple[int, ...], dtype: torch.dtype, scale: float = 2.0) -> Tensor:
    """Return random values of a drawn seed."""
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**32)))
    return (scale * torch.randn(shape, generator=generator, dtype=torch.float64) - 1).to(dtype)


def uniform(data: st.DataObject, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    """Return random weights in [0, 1], both ends among them."""
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**32)))
    values = torch.rand(shape, generator=generator, dtype=torch.float64) * 1.2 - 0.1
    return values.clamp(0, 1).to(dtype)


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Compute with so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def bits(x: Tensor) -> Tensor:
    """Return the bits, so that NaN equals itself and no sign is lost."""
    sizes = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return x.resolve_neg().contiguous().view(sizes[x.element_size()])


@contextmanager
def between_guards(x: Tensor, at_end: bool) -> Iterator[Tensor]:
    """Yield a float32 copy whose memory begins after, or ends before, a page that cannot be accessed."""
    page = mmap.PAGESIZE
    inner = -(-x.nbytes // page) * page
    memory = mmap.mmap(-1, inner + 2 * page)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    protect = ctypes.CDLL(None, use_errno=True).mprotect
    protect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    offset = page + (inner - x.nbytes if at_end else 0)
    copy = torch.frombuffer(memory, dtype=torch.float32, count=x.numel(), offset=offset).view(x.shape).copy_(x)
    guards = (start, start + page + inner)
    assert all(protect(guard, page, 0) == 0 for guard in guards)
    try:
        yield copy
    finally:
        for guard in guards:
            protect(guard, page, mmap.PROT_READ | mmap.PROT_WRITE)
