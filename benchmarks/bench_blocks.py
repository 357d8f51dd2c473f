"""The three blocks of AudioNTT2020: the layers one by one, as they are and compiled, against ``ops.conv_block``."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.contenders import backend_of
from benchmarks.measure import PLACES, TOLERANCE, Contender, Group, Place, places_on
from byola_fast.networks.encoders import AudioNTT2020

BATCH, MELS, FRAMES = 64, 64, 96
CONTENDERS = ("layers", "compiled", "byola_fast")
MODES = ("training", "evaluation")


def blocks(device: str, mode: str) -> Group:
    """Training: forward and backward of one view, without a gradient of the log-mels; evaluation: forward alone."""
    training = mode == "training"
    encoder = AudioNTT2020().train(training).to(device).to(memory_format=torch.channels_last)
    x = [torch.randn(BATCH, 1, MELS, FRAMES, device=device) for _ in range(2)]
    layers, wide = copy.deepcopy(encoder.features), copy.deepcopy(encoder.features).double()
    weight = torch.randn_like(encoder._local(x[0]))

    def in_order(network: Any) -> Any:
        return lambda x: network(x).permute(0, 3, 2, 1).flatten(2)

    def run(network: Any, parameters: nn.Module, k: int) -> list[Tensor]:
        with torch.set_grad_enabled(training):
            local: Tensor = network(x[k % 2])
            if training:
                parameters.zero_grad(set_to_none=True)
                (local * weight).sum().backward()
        return [local.detach()]

    @functools.lru_cache(maxsize=2)
    def exact(k: int) -> Tensor:
        with torch.no_grad():
            local: Tensor = in_order(wide)(x[k].double())
        return local

    runs: dict[str, Any] = {
        "layers": functools.partial(run, in_order(layers), layers),
        "compiled": functools.partial(run, in_order(torch.compile(layers)), layers),
        "byola_fast": functools.partial(run, encoder._local, encoder),
    }
    shapes = {"x": tuple(x[0].shape), "local": tuple(weight.shape)}
    contenders = [
        Contender(
            name,
            runs[name],
            lambda k: [exact(k % 2)],
            place,
            shapes,
            BATCH,
            4 * (x[0].numel() + weight.numel()),
            backend=backend_of(device, ["conv_block"]) if name == "byola_fast" else "torch",
            optional=name == "compiled",
            tolerance=TOLERANCE,
        )
        for place in places_on(device)
        for name in CONTENDERS
    ]
    return Group("blocks", f"{mode}, B = {BATCH}", contenders, ("layers", "compiled"))


@pytest.mark.parametrize("contender", CONTENDERS)
@pytest.mark.parametrize("place", PLACES, ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_blocks(replay: Any, mode: str, place: Place, contender: str) -> None:
    replay(blocks, contender, place, mode=mode)
