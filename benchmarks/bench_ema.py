"""The EMA of a whole model: 1,000 tiny tensors, one large tensor, and BYOL-A's encoder with its projector."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from benchmarks.contenders import backend_of
from benchmarks.measure import PLACES, Contender, Group, Place, places_on
from byola_fast import ops
from byola_fast.networks.ema import EMA

DECAY = 0.99
CONV, CONV_NEXT, NORM = [(64, 1, 3, 3), (64,)], [(64, 64, 3, 3), (64,)], [(64,), (64,)]


def audio_ntt_2020(d: int) -> list[tuple[int, ...]]:
    """Return the shapes of BYOL-A's encoder with feature_d ``d`` and its projector."""
    return [
        *(CONV + NORM + CONV_NEXT + NORM + CONV_NEXT + NORM),
        *[(d, 512), (d,), (d, d), (d,)],
        *[(4096, d), (4096,), (4096,), (4096,), (256, 4096), (256,)],
    ]


MODELS: dict[str, list[tuple[int, ...]]] = {
    "1,000 tiny tensors": [(64,)] * 1000,
    "one tensor of 100 million": [(100_000_000,)],
    "AudioNTT2020 d = 512 and projector": audio_ntt_2020(512),
    "AudioNTT2020 d = 2048 and projector": audio_ntt_2020(2048),
}
CONTENDERS = (
    "loop",
    "_foreach_lerp_",
    "AveragedModel",
    "byola_fast, ema_update_",
    "byola_fast, EMA.update()",
    "copy",
    "add_",
)


class Weights(nn.Module):
    """A model with parameters only."""

    def __init__(self, shapes: Sequence[tuple[int, ...]], device: str) -> None:
        super().__init__()
        self.tensors = nn.ParameterList(torch.randn(shape, device=device) for shape in shapes)
        self.requires_grad_(False)


def ema(device: str, model: str) -> Group:
    """One update of every parameter: read target and online, write target, 12 bytes per parameter."""
    shapes = MODELS[model]
    online, start = Weights(shapes, device), Weights(shapes, device)
    online_list: list[Tensor] = list(online.parameters())
    start_list: list[Tensor] = list(start.parameters())
    count = sum(o.numel() for o in online_list)
    source = torch.randn(3 * count // 2, device=device)  # a copy reads and writes it: also 12 bytes per parameter
    destination = torch.empty_like(source)
    flat, change = torch.randn(count, device=device), torch.randn(count, device=device)

    @functools.lru_cache(maxsize=1)
    def exact(_k: int) -> Sequence[Tensor]:
        pairs = zip(start_list, online_list, strict=True)
        return [s.double() * DECAY + (1 - DECAY) * o.double() for s, o in pairs]

    def loop(target: list[Tensor]) -> None:
        for t, o in zip(target, online_list, strict=True):
            t.data = t.data * DECAY + (1 - DECAY) * o.data

    averaged = AveragedModel(online, multi_avg_fn=get_ema_multi_avg_fn(DECAY))
    ours = EMA(online, DECAY, buffers="none")
    targets: dict[str, nn.Module] = {
        "loop": copy.deepcopy(start),
        "_foreach_lerp_": copy.deepcopy(start),
        "AveragedModel": averaged.module,
        "byola_fast, ema_update_": copy.deepcopy(start),
        "byola_fast, EMA.update()": ours.target,
    }
    updates: dict[str, Callable[[list[Tensor]], Any]] = {
        "loop": loop,
        "_foreach_lerp_": lambda target: torch._foreach_lerp_(target, online_list, 1 - DECAY),
        "AveragedModel": lambda target: averaged.update_parameters(online),
        "byola_fast, ema_update_": lambda target: ops.ema_update_(target, online_list, DECAY),
        "byola_fast, EMA.update()": lambda target: ours.update(),
    }

    def contender(name: str, place: Place) -> Contender:
        if name == "copy":
            shape = {"source": tuple(source.shape)}
            moved = [destination], [source]
            return Contender(
                name, lambda k: [destination.copy_(moved[1][0])], lambda k: moved[1], place, shape, 1, 12 * count
            )
        if name == "add_":
            shape = {"flat": tuple(flat.shape)}
            return Contender(
                name, lambda k: [flat.add_(change)], lambda k: [change], place, shape, 1, 12 * count, prepare=flat.zero_
            )
        target: list[Tensor] = list(targets[name].parameters())

        def prepare() -> None:
            averaged.n_averaged.fill_(1)  # its first update would be a copy
            torch._foreach_copy_(target, start_list)

        def run(_k: int) -> Sequence[Tensor]:
            updates[name](target)
            return target

        shape = {"tensors": (len(shapes),), "parameters": (count,)}
        backend = backend_of(device, ["ema_update_"]) if name.startswith("byola_fast") else "torch"
        return Contender(name, run, exact, place, shape, 1, 12 * count, backend, prepare)

    contenders = [contender(name, place) for place in places_on(device) for name in CONTENDERS]
    return Group("ema", model, contenders, ("loop", "_foreach_lerp_", "AveragedModel", "copy"), floor="add_")


@pytest.mark.parametrize("contender", CONTENDERS)
@pytest.mark.parametrize("place", PLACES, ids=str)
@pytest.mark.parametrize("model", MODELS)
def test_ema(replay: Any, model: str, place: Place, contender: str) -> None:
    replay(ema, contender, place, model=model)
