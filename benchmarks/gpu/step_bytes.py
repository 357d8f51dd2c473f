"""Count the bytes of memory that a training step's networks move on a GPU, without one.

``python -m benchmarks.gpu.step_bytes [B] [d]`` prints a table; a test holds the sum to its budget.

The step runs on tensors without data, so that only shapes and dtypes count. Each operator reads each of its tensors and
writes its results once; what its kernels read twice is in ``TWICE``. Our launchers run as they are, and a Triton kernel
moves what it is given. Caches are not counted, nor what a library's convolution needs beside its tensors.
"""

from __future__ import annotations

import contextlib
import sys
from collections import Counter
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from byola_fast import BYOL, AudioNTT2020
from byola_fast.ops import blocks

BATCH, WIDTH, SIZE = 256, 2048, (64, 96)
SMS = 132  # of an H100
EMPTY = ("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided", "_unsafe_view")
# operators whose kernels read these arguments twice: for statistics and results; for gradients of input and weights
TWICE = {
    "native_batch_norm": (0,), "_native_batch_norm_legit": (0,), "_batch_norm_with_update": (0,),
    "native_batch_norm_backward": (0, 1), "batch_norm_backward": (0, 1), "convolution_backward": (0,),
}  # fmt: skip


def _bytes(tensors: Any) -> int:
    return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, Tensor))


class CountBytes(TorchDispatchMode):
    """Add up the bytes of every operator and Triton kernel, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.moved: Counter[str] = Counter()

    def launch(self, kernel: Any, grid: Any, *args: Any, **constants: Any) -> None:
        self.moved[kernel.__name__] += _bytes({id(t): t for t in args}.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.partition("::")[2]
        if name in ("conv_block", "conv_block_backward", "batch_norm_running_"):
            from byola_fast.ops._triton import conv_block as launchers

            with self:
                return getattr(launchers, name)(*args, **(kwargs or {}))
        results = None if name == "ema_update_" else func(*args, **(kwargs or {}))
        written = [
            value
            for argument, value in zip(func._schema.arguments, args, strict=False)
            if argument.alias_info is not None and argument.alias_info.is_write and argument.name != "grads"
        ]
        given, made, changed = (tree_flatten(values)[0] for values in ((args, kwargs), results, written))
        if func.is_view or name in EMPTY or not any(isinstance(t, Tensor) for t in made + changed):
            return results
        seen = {id(t): t for t in given}
        self.moved[name] += _bytes(seen.values()) + _bytes(changed) + _bytes(t for t in made if id(t) not in seen)
        self.moved[name] += _bytes(args[k] for k in TWICE.get(name, ()))
        return results


@contextlib.contextmanager
def _on_kernels(count: CountBytes, fused: bool) -> Iterator[None]:
    from byola_fast.ops._triton import conv_block as launchers

    def dropout(x: Tensor, p: float, training: bool, inplace: bool) -> Tensor:
        return torch.native_dropout(x, p, training)[0]  # CUDA's

    with (
        mock.patch.object(torch.nn.functional, "dropout", dropout),
        mock.patch.object(blocks, "has_kernels", return_value=fused),
        mock.patch.object(launchers, "launch", count.launch),
        mock.patch.object(launchers, "on_device", return_value=contextlib.nullcontext()),
        mock.patch.object(launchers, "resident_programs", lambda x, per_sm: SMS * per_sm),
    ):
        yield


def count(batch: int = BATCH, width: int = WIDTH, fused: bool = True) -> Counter[str]:
    """Return the bytes of a step in bfloat16 by operator and kernel; ``fused``: with ``conv_block``'s kernels."""
    counter = CountBytes()
    byol = BYOL(AudioNTT2020(SIZE[0], width)).to(memory_format=torch.channels_last)
    with FakeTensorMode() as without_data, _on_kernels(counter, fused):
        for module in byol.modules():
            held: Any
            for held in (module._parameters, module._buffers):
                held |= {name: without_data.from_tensor(x) for name, x in held.items() if x is not None}
        optimizer = torch.optim.Adam([p for p in byol.parameters() if p.requires_grad], fused=True)
        views = [torch.empty(batch, 1, *SIZE) for _ in range(2)]
        for turn in range(2):  # the first creates the optimiser's state
            if turn:
                counter.__enter__()
            with torch.autocast("cpu", torch.bfloat16):
                loss, _projection = byol(*views)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
        byol.update_target()
        counter.__exit__(None, None, None)
    return counter.moved


def table(batch: int = BATCH, width: int = WIDTH) -> str:
    """Return a Markdown table of the step with our kernels, and the sum of PyTorch's layers."""
    ours, layers = (count(batch, width, fused) for fused in (True, False))
    lines = ["| operator or kernel | GB |", "|---|---:|"]
    lines += [f"| {name} | {moved / 1e9:.3f} |" for name, moved in ours.most_common() if moved > 1e6]
    lines += [f"| all | {ours.total() / 1e9:.2f} |", f"| all, with PyTorch's layers | {layers.total() / 1e9:.2f} |"]
    return "\n".join(lines)


if __name__ == "__main__":
    print(table(*map(int, sys.argv[1:])))
