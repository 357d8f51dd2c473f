"""Calls whose kernels are launched again without the Python in between: recorded once, then replayed.

Between a call of ``augment`` and its launches lie the checks of each argument at each level, the dispatcher, and an
allocation for each intermediate result; together they take ten times as long as the GPU's work. But what is launched
follows from a signature: settings, and the dtypes, shapes, strides and devices of the tensors. So the first call of a
signature runs with all checks. The second does too, while its launches and allocations are recorded. Later
calls make one allocation for results and one for all that lies in between, and launch the same compiled kernels with
the addresses of the call's own tensors. A recording is used only if it holds everything that the call did: launches,
allocations and views, and no other op. A call is replayed only if nothing looks on that must see its ops (autograd,
``torch.func``, a compiler, a dispatch mode), and if its tensors are aligned and share no memory; all others run with
all checks, which find the errors.
"""

from __future__ import annotations

import importlib
import operator
from collections.abc import Callable, Hashable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.utils._python_dispatch import TorchDispatchMode

from byola_fast.ops import _checks as check
from byola_fast.ops import _dispatch, _schemas, _triton
from byola_fast.ops._route import needs_reference

ALIGNMENT = 256  # bytes, of each part of the scratch memory; PyTorch's allocator gives 512
MOST_PLANS = 256
PLAIN = (int, float, bool, str, type(None))

INTERPRETED = _triton.interpreted()
ON_CPU = INTERPRETED  # the interpreter serves the CPU too, where checks read values
FLOAT_MAX = torch.finfo(torch.float32).max
SEEN, NEVER = object(), object()
_served: set[bool] = set()  # whether on CUDA
_plans: dict[Hashable, Any] = {}  # by signature: seen once, never to be replayed, or a plan

_aten = torch.ops.aten
ALLOCATIONS = (_aten.empty.memory_format, _aten.new_empty.default)


class _Step(NamedTuple):
    """A launch, with the places of its addresses: (argument, base, offset in bytes, dtype)."""

    launched: Any
    args: list[Any]
    addresses: list[tuple[int, int, int, torch.dtype]]
    numbers: int  # place of the call's numbers among the arguments, or -1


class _Plan(NamedTuple):
    """What a call launches. Bases are the inputs, then the result unless it is an input, then the scratch memory."""

    steps: list[_Step]
    lengths: list[int]  # bytes from the first to the last element of each input
    written: list[int]  # inputs, once for each write
    result: int  # number of the input that is the result, or -1
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    scratch: int  # bytes
    debugging: tuple[Any, ...]


def may_replay(x: object) -> bool:
    """Return whether a call on ``x`` may be replayed: Triton serves its device, and nothing must see its ops.

    float64 goes op by op, because some of its steps depend on values.
    """
    if torch.compiler.is_compiling() or type(x) is not Tensor or not (x.is_cuda or (ON_CPU and x.is_cpu)):
        return False
    if x.dtype == torch.float64 or needs_reference() or torch._C._len_torch_dispatch_stack():
        return False
    if x.is_cuda not in _served:
        if _dispatch.backend_in_use("CUDA" if x.is_cuda else "CPU", "augment_views_out")[0] != "triton":
            return False
        _served.add(x.is_cuda)
    return True


def freeze(value: Any) -> Hashable:
    """Return a key for a nest of plain values, where 1, 1.0 and True differ; None if it holds anything else."""
    try:
        return _freeze(value)
    except TypeError:
        return None


def _freeze(value: Any) -> Hashable:
    kind = type(value)
    if kind in PLAIN:
        return kind, value
    if kind is dict:
        return tuple(value), *map(_freeze, value.values())
    if kind is tuple or kind is list:
        return kind, *map(_freeze, value)
    raise TypeError(kind)


def numbers_of(
    seed: int | Tensor | None, step: int | Tensor, stats: tuple[float, float] | Tensor | None
) -> tuple[int, int, int, float, float] | None:
    """Return the numbers of ``write_inputs``; None for tensors, and for what is refused.

    They are the seed's low and high word and the step, as signed words of 32 bits, then mean and std.
    """
    if type(seed) is not int or type(step) is not int or not (0 <= seed < 2**63 and 0 <= step < 2**32):
        return None
    mean, std = 0.0, 1.0
    if stats is not None:
        if type(stats) is not tuple or len(stats) != 2 or not all(type(value) in (int, float) for value in stats):
            return None
        mean, std = map(float, stats)
        if not (-FLOAT_MAX <= mean <= FLOAT_MAX and 0 <= std <= FLOAT_MAX):
            return None
    low, number = ((word & 0xFFFFFFFF) - ((word & 0x80000000) << 1) for word in (seed, step))
    return low, seed >> 32, number, mean, std


def write_inputs(x: Tensor, numbers: tuple[Any, ...], has_stats: bool) -> tuple[Tensor, Tensor | None]:
    """Return seed and step ``(2,)`` int64, and mean and std ``(2,)`` float32 or None, on the device of x."""
    from byola_fast.ops._triton import write_inputs

    rng = x.new_empty(2, dtype=torch.int64)
    stats = x.new_empty(2, dtype=torch.float32) if has_stats else None
    write_inputs.write_inputs(rng, stats, numbers)
    return rng, stats


def run(
    call: Callable[[], Tensor],
    op_by_op: Callable[[], Tensor],
    signature: Hashable,
    inputs: Sequence[Tensor | None],
    numbers: tuple[Any, ...] = (),
) -> Tensor:
    """Return ``call()``, which is recorded or replayed where that is possible.

    Args:
        call: reads and writes the inputs; returns one of them or a new contiguous tensor.
        op_by_op: does the same for inputs that need more care, such as gradients.
        signature: with the inputs' layouts, all that decides what ``call`` launches.
        inputs: all tensors that existed before; None for one that is absent.
        numbers: numbers that ``call`` passes to a launch as its last arguments, and that may differ between calls.
    """
    layouts = [None if x is None else _layout(x) for x in inputs]
    if False in layouts:
        return op_by_op()
    key = (signature, *layouts)
    plan = _plans.get(key)
    if plan is None:
        result = call()
        if len(_plans) >= MOST_PLANS:
            del _plans[next(iter(_plans))]
        _plans[key] = SEEN
        return result
    given = [x for x in inputs if x is not None]
    if plan is SEEN and _can_record(given):
        result, _plans[key] = _record(call, given, numbers)
        return result
    replayed = _replay(plan, given, numbers) if type(plan) is _Plan else None
    return call() if replayed is None else replayed


def _layout(x: Tensor) -> Hashable:
    """Return what is fixed by a recording; False for a tensor whose memory or autograd history needs more care."""
    if type(x) is not Tensor or x.layout is not torch.strided or x.is_neg():
        return False
    if x.requires_grad and torch.is_grad_enabled():
        return False
    return x.dtype, x.shape, x.stride(), x.get_device(), x.is_inference()


class _Recorder(TorchDispatchMode):
    """Note allocations, and any op that is neither an allocation, a view nor an op with a launcher."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[Tensor] = []
        self.foreign: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == _schemas.NAMESPACE and not kwargs:
            name = func._schema.name.split("::")[1]
            if name in _schemas.COMPOSITES:
                with self:
                    return _schemas.COMPOSITES[name](*args)
            key = next(x.device.type for x in args if isinstance(x, Tensor)).upper()
            if name in _schemas.LAUNCHERS and _dispatch.backend_in_use(key, name)[0] == "triton":
                with self:
                    return _launcher(name)(*args)
        result = func(*args, **(kwargs or {}))
        if func in ALLOCATIONS:
            self.made.append(result)
        elif not func.is_view and not (ON_CPU and func is _aten._local_scalar_dense.default):
            self.foreign.append(str(func))
        return result


def _launcher(name: str) -> Callable[..., Any]:
    module = importlib.import_module(f"byola_fast.ops._triton.{_schemas.LAUNCHERS[name]}")
    launcher: Callable[..., Any] = getattr(module, name)
    return launcher


def _can_record(inputs: list[Tensor]) -> bool:
    """Return whether every address in a recording will say which input it belongs to."""
    aligned = all(x.data_ptr() % 16 == 0 for x in inputs)
    return aligned and len({x.untyped_storage().data_ptr() for x in inputs}) == len(inputs)


def _record(call: Callable[[], Tensor], inputs: list[Tensor], numbers: tuple[Any, ...]) -> tuple[Tensor, Any]:
    """Return the result of a call, and its plan or NEVER."""
    from byola_fast.ops._triton import shared

    versions = [None if x.is_inference() else x._version for x in inputs]
    recorder = _Recorder()
    launches: list[Any] = []
    shared.recording.launches = launches
    try:
        with recorder:
            result = call()
    finally:
        shared.recording.launches = None
    if recorder.foreign or any(step.kept is None and not INTERPRETED for step in launches):
        return result, NEVER
    written = [
        number
        for number, (x, version) in enumerate(zip(inputs, versions, strict=True))
        if version is not None
        for _ in range(x._version - version)
    ]

    number = next((n for n, x in enumerate(inputs) if _is_same(x, result)), -1)
    bases = {x.untyped_storage().data_ptr(): (n, x.data_ptr()) for n, x in enumerate(inputs)}
    scratch, found = 0, number >= 0
    for made in recorder.made:
        storage = made.untyped_storage()
        place = len(inputs) + (number < 0), made.data_ptr() - scratch
        if made.numel() and made.data_ptr() == result.data_ptr():
            place = len(inputs), made.data_ptr()
            found = made.numel() == result.numel() and made.dtype == result.dtype and result.is_contiguous()
        else:
            scratch += -(-storage.nbytes() // ALIGNMENT) * ALIGNMENT
        bases.setdefault(storage.data_ptr(), place)
    if not found:
        return result, NEVER
    steps = []
    for launched in launches:
        args, addresses = list(launched.args), []
        for position, x in enumerate(args):
            if isinstance(x, Tensor):
                base = bases.get(x.untyped_storage().data_ptr())
                if base is None:
                    return result, NEVER
                addresses.append((position, base[0], x.data_ptr() - base[1], x.dtype))
                args[position] = None  # a plan holds no memory
        first = len(args) - len(numbers)
        takes_numbers = bool(numbers) and first >= 0 and all(map(operator.is_, args[first:], numbers))
        steps.append(_Step(launched._replace(args=()), args, addresses, first if takes_numbers else -1))
    if numbers and sum(step.numbers >= 0 for step in steps) != 1:
        return result, NEVER
    geometry = result.shape, result.dtype, result.device
    return result, _Plan(steps, [*map(_length, inputs)], written, number, *geometry, scratch, shared.debugging())


def _is_same(x: Tensor, y: Tensor) -> bool:
    return (x.data_ptr(), x.shape, x.stride(), x.dtype) == (y.data_ptr(), y.shape, y.stride(), y.dtype)


def _length(x: Tensor) -> int:
    return check.reach(x.shape, x.stride()) * x.element_size()


def _are_apart(addresses: list[int], lengths: list[int]) -> bool:
    """Return whether no two stretches of memory overlap."""
    spans = sorted(zip(addresses, lengths, strict=True))
    return all(begin + length <= after for (begin, length), (after, _length) in pairwise(spans))


def _replay(plan: _Plan, inputs: list[Tensor], numbers: tuple[Any, ...]) -> Tensor | None:
    """Launch the kernels of a plan for other inputs; None, and nothing launched, if that would not be the same."""
    from byola_fast.ops._triton import shared

    bits, addresses = 0, [x.data_ptr() for x in inputs]
    for address in addresses:
        bits |= address
    if bits % 16 or not all(addresses) or not _are_apart(addresses, plan.lengths):
        return None
    if shared.debugging() != plan.debugging or any(step.launched.kernel.pre_run_hooks for step in plan.steps):
        return None
    stream = shared.current_stream(plan.device)
    if stream is None and not ON_CPU:
        return None
    bases = list(inputs)
    if plan.result < 0:
        bases.append(torch.empty(plan.shape, dtype=plan.dtype, device=plan.device))
        addresses.append(bases[-1].data_ptr())
    result = bases[plan.result]
    bases.append(torch.empty(plan.scratch, dtype=torch.uint8, device=plan.device))
    addresses.append(bases[-1].data_ptr())
    for launched, template, places, first_number in plan.steps:
        args = template.copy()
        for position, base, offset, dtype in places:
            args[position] = _tensor_at(bases[base], offset, dtype) if INTERPRETED else addresses[base] + offset
        if first_number >= 0:
            args[first_number:] = numbers
        shared.relaunch(launched, stream, args)
    if plan.written:
        increment_version([inputs[number] for number in plan.written])
    return result


def _tensor_at(base: Tensor, offset: int, dtype: torch.dtype) -> Tensor:
    """Return a tensor that begins ``offset`` bytes after ``base``; the interpreter takes no addresses."""
    storage = base.untyped_storage()
    begin = base.data_ptr() - storage.data_ptr() + offset
    return torch.empty(0, dtype=dtype).set_(storage, begin // dtype.itemsize, (1,), (1,))
