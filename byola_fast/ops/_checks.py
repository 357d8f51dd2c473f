"""Checks of arguments. Each message gives the expected and the actual value. No check syncs a GPU."""

from __future__ import annotations

import operator
from collections.abc import Sequence

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
INTERPOLATIONS = ("bilinear", "bicubic")
MIXERS = ("log", "linear", "gaussian", "none")


def require_tensor(name: str, value: object) -> None:
    """Require a tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(value).__name__}")


def require_float(name: str, x: object) -> None:
    """Require a floating-point tensor."""
    require_tensor(name, x)
    assert isinstance(x, Tensor)
    if x.dtype not in FLOATS:
        wanted = ", ".join(str(dtype).removeprefix("torch.") for dtype in FLOATS)
        raise TypeError(f"{name}: expected a floating-point tensor ({wanted}), got {x.dtype}")
    if x.layout is not torch.strided:
        raise TypeError(f"{name}: expected a dense tensor (torch.strided), got {x.layout}")


def require_integer(name: str, x: object, dtypes: tuple[torch.dtype, ...] = (torch.int32, torch.int64)) -> None:
    """Require an integer tensor of one of these dtypes."""
    require_tensor(name, x)
    assert isinstance(x, Tensor)
    if x.dtype not in dtypes:
        wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"{name}: expected {wanted}, got {x.dtype}")


def require_shape(name: str, x: object, wanted: tuple[int | str, ...]) -> None:
    """Require a tensor of shape ``wanted``; a letter stands for any size."""
    require_tensor(name, x)
    assert isinstance(x, Tensor)
    if tuple(x.shape) == wanted:
        return
    fits = x.dim() == len(wanted) and all(isinstance(w, str) or w == n for w, n in zip(wanted, x.shape, strict=True))
    if not fits:
        shape = "(" + ", ".join(map(str, wanted)) + ("," if len(wanted) == 1 else "") + ")"
        raise ValueError(f"{name}: expected shape {shape}, got {tuple(x.shape)}")


def require_spectrogram(name: str, x: object) -> None:
    """Require a float tensor (B, F, T) with F and T of at least 1."""
    require_float(name, x)
    assert isinstance(x, Tensor)
    require_shape(name, x, ("B", "F", "T"))
    if x.shape[1] < 1 or x.shape[2] < 1:
        raise ValueError(f"{name}: expected at least one mel and one frame, got shape {tuple(x.shape)}")


def require_same_device(name: str, x: Tensor, other_name: str, other: Tensor) -> None:
    """Require both tensors on one device."""
    if x.device != other.device:
        raise ValueError(f"{name}: expected on the device of {other_name} ({other.device}), got {x.device}")


def require_same_dtype(name: str, x: Tensor, other_name: str, other: Tensor) -> None:
    """Require both tensors in one dtype."""
    if x.dtype != other.dtype:
        raise TypeError(f"{name}: expected the dtype of {other_name} ({other.dtype}), got {x.dtype}")


def require_count(name: str, count: Tensor | None, other_name: str, other: Tensor) -> None:
    """Require a 0-d integer tensor on the device of ``other``; None passes."""
    if count is not None:
        require_integer(name, count)
        require_shape(name, count, ())
        require_same_device(name, count, other_name, other)


def require_one_of(name: str, value: object, known: tuple[str, ...]) -> None:
    """Require one of the known values."""
    if value not in known:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, known))}, got {value!r}")


def whole(name: str, value: object, minimum: int, limit: int) -> int:
    """Return an integer in [minimum, limit), where ``limit`` is a power of two."""
    number: int | None = None
    if isinstance(value, (int, torch.SymInt)):
        number = value  # type: ignore[assignment]
    elif hasattr(value, "__index__") and not isinstance(value, Tensor):
        number = operator.index(value)
    if number is None or not minimum <= number < limit:
        raise ValueError(f"{name}: expected an integer in [{minimum}, 2^{limit.bit_length() - 1}), got {value!r}")
    return number


def is_pair(value: object) -> bool:
    """Return whether a value has a length of 2; a number has none."""
    return hasattr(value, "__len__") and len(value) == 2


def require_no_grad(op: str, **tensors: Tensor | None) -> None:
    """Require that no tensor needs a gradient, which the op would silently drop."""
    if torch.is_grad_enabled():
        for name, x in tensors.items():
            if x is not None and x.requires_grad:
                raise RuntimeError(f"{op}: gives no gradient to {name}; detach it, or call under torch.no_grad()")


def _has_memory(x: Tensor) -> bool:
    """Return whether x is an ordinary tensor, neither traced nor wrapped by a transform."""
    if torch.compiler.is_compiling() or type(x).__torch_dispatch__ is not Tensor.__torch_dispatch__:
        return False
    return not x.is_meta and not torch._C._functorch.is_functorch_wrapped_tensor(x)


def is_readable(x: Tensor) -> bool:
    """Return whether values can be read without a sync: on the CPU, and not while tracing."""
    return x.is_cpu and _has_memory(x)


def reach(shape: Sequence[int], strides: Sequence[int]) -> int:
    """Return the number of elements from the first to the last in memory, gaps included; at least one."""
    return 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))


def is_nested(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Return whether each axis steps beyond the reach of the faster axes; then no two elements share memory."""
    end = 1
    for stride, size in sorted(zip(strides, shape, strict=True)):
        if size > 1 and stride < end:
            return False
        end += (size - 1) * stride
    return True


def _end(x: Tensor, begin: int) -> int:
    """Return the address one past the last byte of x."""
    return begin + (x.nbytes if x.is_contiguous() else reach(x.shape, x.stride()) * x.element_size())


def require_own_memory(name: str, written: Tensor, **read: Tensor | None) -> None:
    """Require that a tensor to write to shares no memory with those that are read, nor within itself."""
    if not _has_memory(written) or not written.numel() or torch._C._functorch.peek_interpreter_stack() is not None:
        return  # under torch.func the reference runs, which reads everything before it writes
    if not written.is_contiguous() and not is_nested(written.shape, written.stride()):
        raise ValueError(f"{name}: expected elements with memory of their own, got strides {written.stride()}")
    if written.is_neg():
        raise ValueError(f"{name}: expected a tensor of its own, got a lazily negated view")
    begin = written.data_ptr()
    end = _end(written, begin)
    for other, x in read.items():
        if x is not None and (first := x.data_ptr()) < end and begin < _end(x, first) and x.numel():
            raise ValueError(f"{name}: expected memory of its own, got that of {other}")


def require_lam_in_range(name: str, lam: Tensor) -> None:
    """Require weights in [0, 1]; NaN is refused."""
    if is_readable(lam) and not torch.ops.byola_fast._all_weights(lam):
        worst = lam[~((lam >= 0) & (lam <= 1))][0].item()
        raise ValueError(f"{name}: expected weights in [0, 1], got {worst}")


def require_crop_in_canvas(name: str, crop: Tensor, canvas: tuple[int, int]) -> None:
    """Require crop boxes (i, j, h, w) that are not empty and lie inside the canvas."""
    if is_readable(crop) and not torch.ops.byola_fast._all_inside(crop, *canvas):
        boxes = crop.reshape(-1, 4).tolist()
        number, box = next((n, tuple(box)) for n, box in enumerate(boxes) if not _is_inside(box, canvas))
        raise ValueError(f"{name}: expected boxes (i, j, h, w) inside the canvas {canvas}, got {box} at {number}")


def _is_inside(box: Sequence[int], canvas: tuple[int, int]) -> bool:
    axes = zip(box[:2], box[2:], canvas, strict=True)
    return all(start >= 0 and extent >= 1 and start + extent <= limit for start, extent, limit in axes)


def require_index_in_range(name: str, index: Tensor, rows: int) -> None:
    """Require partner rows in [0, rows), or -1 for no partner."""
    if is_readable(index) and index.numel():
        low, high = int(index.min()), int(index.max())
        if low < -1 or high >= rows:
            wrong = low if low < -1 else high
            raise ValueError(f"{name}: expected rows in [0, {rows}), or -1 for no partner, got {wrong}")
