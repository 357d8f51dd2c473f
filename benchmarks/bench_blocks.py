"""The encoder's three blocks, whole training steps and embeddings, against the layers one by one and compiled.

Everything comes twice: with malloc as it is, which returns large blocks to the system, and with memory kept, as the
command line does. That cannot be undone in a process, so ``bench_training.py`` has the second half and runs last.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.contenders import backend_of
from benchmarks.measure import PLACES, TOLERANCE, Contender, Group, Place, places_on
from benchmarks.tables import PRODUCT
from byola_fast import BYOL
from byola_fast.networks.encoders import AudioNTT2020

BATCH, MELS, FRAMES, WIDTH = 64, 64, 96, 512
BATCHES = (1, 8, 64)  # of embeddings
PEAKS = (PRODUCT, "copy")
CONTENDERS = ("layers", "compiled", "byola_fast")
MODES = ("training", "evaluation")
AS_IT_IS = "malloc as it is"


class Layers(AudioNTT2020):
    """The same network, which calls its layers one by one."""

    def _local(self, x: Tensor) -> Tensor:
        local: Tensor = self.features(x)
        return local.permute(0, 3, 2, 1).flatten(2)


def peaks(place: Place) -> list[Contender]:
    """Return a product of matrices and a copy: what the machine can do."""
    a, b = torch.randn(2, 1024, 1024, device=place.device)
    source = torch.randn(2**24, device=place.device)
    target, product = torch.empty_like(source), a.double() @ b.double()
    sizes: dict[str, tuple[int, ...]] = {"x": (1024, 1024)}
    return [
        Contender(
            PRODUCT,
            lambda k: [a @ b / 32],
            lambda k: [product / 32],
            place,
            sizes,
            1,
            3 * a.numel() * 4,
            flops=2 * 1024**3,
        ),
        Contender(
            "copy",
            lambda k: [target.copy_(source)],
            lambda k: [source],
            place,
            {"x": (2**24,)},
            1,
            2 * 4 * source.numel(),
        ),
    ]


def operations(run: Any) -> int:
    """Return the operations of a call of PyTorch's layers."""
    with FlopCounterMode(display=False) as counter:
        run(0)
    return counter.get_total_flops()


def contend(device: str, runs: dict[str, Any], exact: Any, shapes: Any, samples: int, moved: int) -> list[Contender]:
    """Return the contenders and the peaks for every number of threads."""
    flops = operations(runs["layers"])
    return [
        *(
            Contender(
                name,
                run,
                exact,
                place,
                shapes,
                samples,
                moved,
                backend=backend_of(device, ["conv_block"]) if name == "byola_fast" else "torch",
                optional=name == "compiled",
                tolerance=TOLERANCE,
                flops=flops,
            )
            for place in places_on(device)
            for name, run in runs.items()
        ),
        *(peak for place in places_on(device) for peak in peaks(place)),
    ]


def blocks(device: str, mode: str, memory: str = AS_IT_IS) -> Group:
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
    moved = 4 * (x[0].numel() + weight.numel())
    contenders = contend(device, runs, lambda k: [exact(k % 2)], shapes, BATCH, moved)
    return Group("blocks", f"{mode}, B = {BATCH}, {memory}", contenders, ("layers", "compiled"))


def step(device: str, memory: str = AS_IT_IS) -> Group:
    """A step of BYOL: networks, backward, Adam and EMA; at a learning rate of 0, so that every step is the same."""
    views = [torch.randn(2, BATCH, 1, MELS, FRAMES, device=device) for _ in range(2)]
    first = BYOL(AudioNTT2020(MELS, WIDTH)).state_dict()

    def learner(encoder: type[AudioNTT2020], dtype: torch.dtype = torch.float32) -> BYOL:
        byol = BYOL(encoder(MELS, WIDTH))
        byol.load_state_dict(first)
        return byol.to(device, dtype).to(memory_format=torch.channels_last)

    def trained(byol: BYOL, compiled: bool = False, dtype: torch.dtype = torch.float32) -> Any:
        # with PyTorch's own random numbers, or dropout would differ
        network: Any = torch.compile(byol, options={"fallback_random": True}) if compiled else byol
        optimizer = torch.optim.Adam([p for p in byol.parameters() if p.requires_grad], lr=0.0, fused=True)

        def run(k: int) -> Sequence[Tensor]:
            torch.manual_seed(k)  # of dropout
            with torch.enable_grad():
                loss, projection = network(*views[k % 2].to(dtype))
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
            optimizer.step()
            byol.update_target()
            return [loss.detach(), projection]

        return run

    runs = {"layers": trained(learner(Layers)), "compiled": trained(learner(Layers), compiled=True)}
    runs["byola_fast"] = trained(learner(AudioNTT2020))
    wide = trained(learner(Layers, torch.float64), dtype=torch.float64)
    shapes = {"views": (2, BATCH, 1, MELS, FRAMES)}
    contenders = contend(device, runs, wide, shapes, BATCH, 4 * views[0].numel())
    return Group("step", f"B = {BATCH}, d = {WIDTH}, {memory}", contenders, ("layers", "compiled"))


def encode(device: str, batch: int, memory: str = AS_IT_IS) -> Group:
    """Log-mels of about a second to embeddings."""
    x = [torch.randn(batch, 1, MELS, FRAMES, device=device) for _ in range(2)]
    network = AudioNTT2020(MELS, WIDTH)
    for layer in network.features:
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean, layer.running_var = torch.randn(64), torch.rand(64) + 0.5

    def ready(encoder: type[AudioNTT2020], dtype: torch.dtype = torch.float32) -> AudioNTT2020:
        made = encoder(MELS, WIDTH)
        made.load_state_dict(network.state_dict())
        return made.eval().to(device, dtype).to(memory_format=torch.channels_last)

    wide, layers, ours = ready(Layers, torch.float64), ready(Layers), ready(AudioNTT2020)
    compiled = torch.compile(ready(Layers), dynamic=False)
    runs: dict[str, Any] = {
        "layers": lambda k: [layers(x[k % 2])],
        "compiled": lambda k: [compiled(x[k % 2])],
        "byola_fast": lambda k: [ours(x[k % 2])],
    }
    shapes = {"x": (batch, 1, MELS, FRAMES), "embeddings": (batch, WIDTH)}
    moved = 4 * batch * (MELS * FRAMES + WIDTH)
    contenders = contend(device, runs, lambda k: [wide(x[k % 2].double())], shapes, batch, moved)
    return Group("encode", f"B = {batch}, {memory}", contenders, ("layers", "compiled"))


@pytest.mark.parametrize("contender", CONTENDERS + PEAKS)
@pytest.mark.parametrize("place", PLACES, ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_blocks(replay: Any, mode: str, place: Place, contender: str) -> None:
    replay(blocks, contender, place, mode=mode)


@pytest.mark.full
@pytest.mark.parametrize("contender", CONTENDERS + PEAKS)
@pytest.mark.parametrize("place", PLACES, ids=str)
def test_step(replay: Any, place: Place, contender: str) -> None:
    replay(step, contender, place)


@pytest.mark.parametrize("contender", CONTENDERS + PEAKS)
@pytest.mark.parametrize("place", PLACES, ids=str)
@pytest.mark.parametrize("batch", BATCHES)
def test_encode(replay: Any, batch: int, place: Place, contender: str) -> None:
    replay(encode, contender, place, batch=batch)
