"""Waveforms to embeddings: log-mel and the layers one by one, against ``byola_fast.Embedder``."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.contenders import backend_of
from benchmarks.measure import PLACES, TOLERANCE, Contender, Group, Place, places_on
from byola_fast.embedding.embedder import Embedder
from byola_fast.networks.encoders import AudioNTT2020, pool_frames

BATCH, SECONDS, WIDTH = 1, 10, 512
CONTENDERS = ("layers", "byola_fast", "byola_fast, bfloat16")
ROUGH = 0.05  # for bfloat16, five layers deep; the tests require a cosine of 0.999 to float32


def embed(device: str) -> Group:
    """A clip of 10 s to its 512-d embedding; ``layers`` is the same front end and the network as trained."""
    wav = [torch.randn(BATCH, SECONDS * 16000, device=device).mul_(0.1) for _ in range(2)]
    encoder = AudioNTT2020(d=WIDTH)
    for layer in encoder.features:
        if isinstance(layer, torch.nn.BatchNorm2d):
            layer.running_mean = torch.randn(layer.num_features)
            layer.running_var = torch.rand(layer.num_features) + 0.5

    def made(dtype: torch.dtype) -> Embedder:
        twin = AudioNTT2020(d=WIDTH)
        twin.load_state_dict(encoder.state_dict())
        return Embedder(twin, stats=(-7.1, 4.2)).eval().requires_grad_(False).to(device, dtype)

    whole, half, exactly, plain = (made(d) for d in (torch.float32, torch.bfloat16, torch.float64, torch.float32))
    network: Any = plain.encoder
    layers = torch.nn.Sequential(*network.features).to(memory_format=torch.contiguous_format)

    def one_by_one(x: Tensor) -> Tensor:
        local = layers(plain.log_mels(x)).permute(0, 3, 2, 1).flatten(2)
        return pool_frames(network.fc(local))

    @functools.lru_cache(maxsize=2)
    def exact(k: int) -> Tensor:
        embedding: Tensor = exactly(wav[k % 2].double())
        return embedding

    runs = {
        "layers": lambda k: [one_by_one(wav[k % 2])],
        "byola_fast": lambda k: [whole(wav[k % 2])],
        "byola_fast, bfloat16": lambda k: [half(wav[k % 2])],
    }
    shapes: dict[str, tuple[int, ...]] = {"wav": (BATCH, SECONDS * 16000), "embeddings": (BATCH, WIDTH)}
    backend = backend_of(device, ["log_mel"])
    contenders = [
        Contender(
            name,
            run,
            lambda k: [exact(k % 2)],
            place,
            shapes,
            BATCH * SECONDS,
            4 * BATCH * (SECONDS * 16000 + WIDTH),
            backend=backend if name != "layers" else "torch",
            tolerance=ROUGH if "bfloat16" in name else TOLERANCE,
        )
        for place in places_on(device)
        for name, run in runs.items()
    ]
    return Group("embed", f"a clip of {SECONDS} s; a sample is a second", contenders, ("layers",))


@pytest.mark.parametrize("contender", CONTENDERS)
@pytest.mark.parametrize("place", PLACES, ids=str)
def test_embed(replay: Any, place: Place, contender: str) -> None:
    replay(embed, contender, place)
