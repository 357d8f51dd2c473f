"""The stage of ``gpu_check`` that times the encoder's blocks, forward and backward, against PyTorch's layers."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.gpu.stages import BATCH, every, row, sizes, time_in_turns
from byola_fast import ops

BLOCKS = ((1, 64, 96), (64, 32, 48), (64, 16, 24))  # input channels, mels, frames of AudioNTT2020's


def blocks(context: Any) -> dict[str, Any]:
    """Time each block of AudioNTT2020 in training, channels last under bfloat16 autocast, called eagerly."""
    found: dict[str, Any] = {"times": {}}
    for number, shape in enumerate(BLOCKS, 1):
        found["times"][number] = _times(context, *shape)
        context.keep(found)

    def total(who: str, way: str) -> float:
        return sum(float(times[f"{who}, {way}"]["median_us"]) for times in found["times"].values())

    ours, theirs = ([total(who, way) for way in ("forward", "backward")] for who in ("byola_fast", "layers"))
    measured = (
        f"forward {ours[0]:.0f} us, backward {ours[1]:.0f}; PyTorch's layers {theirs[0]:.0f} and {theirs[1]:.0f}: "
    )
    measured += f"{sum(theirs) / sum(ours):.1f} x"
    work = f"the encoder's three blocks in training, bf16, B = {sizes(context, BATCH, 2)}, eager"
    return found | {"rows": [row(work, measured, {})]}


def _times(context: Any, inputs: int, mels: int, frames: int) -> dict[str, dict[str, float]]:
    device, batch = context.device, sizes(context, BATCH, 2)
    last = torch.channels_last
    conv = nn.Conv2d(inputs, 64, 3, padding=1).to(device).to(memory_format=last)
    norm = nn.BatchNorm2d(64).to(device)
    x = torch.randn(batch, inputs, mels, frames, device=device)
    if inputs > 1:  # what the block before it gives
        x = x.relu().bfloat16().contiguous(memory_format=last).requires_grad_()
    grad = torch.randn(batch, 64, mels // 2, frames // 2, device=device).bfloat16().contiguous(memory_format=last)
    leaves = [conv.weight, conv.bias, norm.weight, norm.bias] + ([x] if inputs > 1 else [])

    state = [x.clone() for x in norm.buffers()]  # autograd of the layers keeps theirs

    def fused() -> Tensor:
        return ops.conv_block(x, conv.weight, conv.bias, norm.weight, norm.bias, *state, training=True)

    def layers() -> Tensor:
        return F.relu(F.max_pool2d(norm(conv(x)), 2))

    calls = {}
    for who, block in (("byola_fast", fused), ("layers", layers)):

        def forward(block: Any = block) -> Tensor:
            with torch.autocast(torch.device(device).type, torch.bfloat16):
                made: Tensor = block()
            return made

        y = forward()
        calls[f"{who}, forward"] = every(torch.no_grad()(forward))
        calls[f"{who}, backward"] = every(partial(torch.autograd.grad, y, leaves, grad, retain_graph=True))
    return time_in_turns(context, calls, rounds=20)
