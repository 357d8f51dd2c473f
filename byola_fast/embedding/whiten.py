"""Whitening: give the directions of an embedding more equal strength, learnt from unlabelled sound."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from byola_fast.audio.batches import Batches, as_float
from byola_fast.audio.sources import open_source
from byola_fast.embedding.embed_files import open_encoder
from byola_fast.networks.encoder_file import describe_encoder, save_encoder
from byola_fast.networks.encoders import AudioNTT
from byola_fast.runtime.files import require_writable
from byola_fast.runtime.progress import Progress

BATCH = 64
FLOOR = 0.3


@dataclass(kw_only=True)
class WhitenConfig:
    """Settings of a whitening.

    Attributes:
        weights: file of an encoder: encoder.pth, encoder.safetensors, a checkpoint.pt, a run's folder, or published
            weights.
        audio_dir: folder of audio files, one file, a manifest, or a packed store: the corpus that it was trained on, or
            sound of the kind that it will embed. No labels are used.
        out: file to write: .pth, .pt or .safetensors.
        segments: number of random segments, at least twice the width of the embedding; more is steadier and slower.
        unit_sec: length of a segment, in seconds; shorter clips are padded with silence.
        floor: strength below which a direction counts as noise, where the average is 1; smaller is closer to equal.
        stats: JSON file from "byola-fast stats", for weights without statistics.
        seed: of the segments and of the rotation.
        workers: processes that decode audio; by default one fewer than CPU cores, at most 8.
    """

    weights: str
    audio_dir: str
    out: str = "whitened.pth"
    segments: int = 4096
    unit_sec: float = 0.95
    floor: float = FLOOR
    stats: str | None = None
    seed: int = 0
    workers: int | None = None


def whiten(encoder: nn.Module, embeddings: Tensor, *, floor: float = FLOOR, seed: int = 0) -> AudioNTT:
    """Return a copy of an encoder whose embeddings are softly whitened by a linear layer after the pooling.

    Embeddings of sound have a few strong directions and many weak ones, and linear probes under regularisation barely
    use the weak ones. Each dimension is standardised, each principal component of strength u is divided by
    ``sqrt(u + floor)``, and all are rotated at random, so that a probe that standardises dimensions changes little. It
    is an invertible linear map: nothing is added or lost. Frame-level embeddings stay as they are.

    Args:
        encoder: AudioNTT2020 or AudioNTT2022, not whitened yet.
        embeddings: ``(n, feature_d)`` of unlabelled sounds, n of at least ``2 * feature_d``.
        floor: above 0; strength below which a direction counts as noise, where the average is 1.
        seed: of the rotation.

    Raises:
        ValueError: another encoder, too few embeddings, values that are not finite, or a floor out of range.

    Numerics:
        Computed in float64 on the CPU; the layer has dtype and device of the encoder.

    >>> from byola_fast import AudioNTT2020
    >>> whitened = whiten(AudioNTT2020(d=8), torch.randn(64, 8))
    >>> whitened(torch.zeros(2, 1, 64, 96)).shape
    torch.Size([2, 8])
    """
    _check(encoder, floor)
    assert isinstance(encoder, AudioNTT)
    width = encoder.feature_d
    if embeddings.ndim != 2 or embeddings.shape[1] != width or len(embeddings) < 2 * width:
        raise ValueError(
            f"embeddings: expected shape (n, {width}) with n of at least {2 * width}, got {tuple(embeddings.shape)}"
        )
    x = embeddings.detach().double().cpu()
    if not x.isfinite().all():
        raise ValueError("embeddings: expected finite values, got NaN or infinity")
    mean, std = x.mean(0), x.std(0)
    std = std.clamp_min(0.01 * float(std.median())) + 1e-6  # a dimension that never moves stays small
    z = (x - mean) / std
    strengths, axes = torch.linalg.eigh(z.T @ z / len(z))
    rotation = torch.empty(width, width, dtype=torch.float64, device="cpu")
    nn.init.orthogonal_(rotation, generator=torch.Generator().manual_seed(seed))
    weight = (rotation / (strengths.clamp_min(0) + floor).sqrt()) @ axes.T / std
    whitened = copy.deepcopy(encoder)
    whitened.add_output()
    assert whitened.output is not None
    with torch.no_grad():
        whitened.output.weight.copy_(weight)
        whitened.output.bias.copy_(-weight @ mean)
    return whitened


def run_whiten(config: WhitenConfig) -> Path:
    """Whiten an encoder from a file of weights with random segments of sound, and write it.

    Raises:
        CheckpointError: the weights cannot be read or written. AudioError: no file can be read. ValueError: as
        ``whiten``.
    """
    out = Path(config.out)
    if out.suffix not in (".pth", ".pt", ".safetensors"):
        raise ValueError(f"out: expected a name ending in .pth, .pt or .safetensors, got {out}")
    embedder = open_encoder(config.weights, config.stats, "cpu")
    _check(embedder.encoder, config.floor)
    if config.segments < 2 * embedder.feature_d:
        raise ValueError(
            f"segments: expected at least {2 * embedder.feature_d}, twice the width, got {config.segments}"
        )
    require_writable(out)
    with Progress("segments") as progress:
        embeddings = _embed_segments(config, embedder, lambda done: progress.show(done, total=config.segments))
    whitened = whiten(embedder.encoder, embeddings, floor=config.floor, seed=config.seed)
    described = embedder.about | describe_encoder(whitened, embedder.to_lms)
    save_encoder(out, whitened, config=described, stats=embedder.stats)
    return out


def _check(encoder: nn.Module, floor: float) -> None:
    if not isinstance(encoder, AudioNTT) or encoder.output is not None:
        kind = "a whitened one" if isinstance(encoder, AudioNTT) else type(encoder).__name__
        raise ValueError(f"encoder: expected AudioNTT2020 or AudioNTT2022, not whitened yet, got {kind}")
    if not 0 < floor < math.inf:
        raise ValueError(f"floor: expected a number above 0, got {floor}")


def _embed_segments(config: WhitenConfig, embedder: Any, show: Callable[[int], None]) -> Tensor:
    rate = embedder.sample_rate
    source = open_source(config.audio_dir, unit_sec=config.unit_sec, sample_rate=rate, seed=config.seed)
    batches = Batches(source, min(BATCH, config.segments), seed=config.seed, workers=config.workers)
    rows: list[Tensor] = []
    with torch.no_grad():
        for batch in batches.run(math.ceil(config.segments / batches.batch_size)):
            rows.append(embedder(as_float(batch.wav)))
            show(min(len(rows) * batches.batch_size, config.segments))
    return torch.cat(rows)[: config.segments]
