"""Encoders from files: which network it is, what it was trained on, and its weights, from any layout in use."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from byola_fast.networks.checkpoint import CheckpointError, fit_weights, load_checkpoint, named_tensors
from byola_fast.networks.encoders import CHANNELS, ENCODERS, AudioNTT2020, AudioNTT2022
from byola_fast.spectrograms.log_mel import FRONT_END, LogMel
from byola_fast.spectrograms.statistics import RunningStats

FIRST = "features.0.weight"


class EncoderFile(NamedTuple):
    """What a file of weights holds.

    Attributes:
        encoder: the network with its weights, on the CPU, in eval mode.
        config: as ``describe_encoder`` made it, or a training run's; empty where the file has none.
        stats: (mean, std) of the pre-normalisation; None where the file has none.
    """

    encoder: AudioNTT2020 | AudioNTT2022
    config: dict[str, Any]
    stats: tuple[float, float] | None


def describe_encoder(encoder: nn.Module, to_lms: LogMel, **more: Any) -> dict[str, Any]:
    """Return the configuration that ``save_encoder`` stores beside weights: the network and the front end.

    >>> described = describe_encoder(AudioNTT2020(d=32), LogMel(), unit_sec=0.95)
    >>> described["encoder"], described["feature_d"], described["hop_length"], described["unit_sec"]
    ('AudioNTT2020', 32, 160, 0.95)
    """
    front_end = {name: getattr(to_lms, name) for name in FRONT_END}
    return {"encoder": type(encoder).__name__, "feature_d": getattr(encoder, "feature_d", None)} | front_end | more


def read_encoder(path: str | Path) -> EncoderFile:
    """Read an encoder from a file of ``save_encoder``, a training checkpoint, or a state dict of published layout.

    The network is recognised by the names and shapes of its weights, whatever wrappers and prefixes they have (see
    ``load_encoder_weights``): two or three convolutions tell ``AudioNTT2022`` from ``AudioNTT2020``, the linear layers
    the number of mels and the widths.

    Raises:
        CheckpointError: as ``load_checkpoint``; or no encoder is recognised, or configuration or statistics in the file
        contradict it.
    """
    content = load_checkpoint(path)
    tensors = named_tensors(content)
    config = _plain_dict(content.get("config"))
    name, widths = _recognise(tensors, path)
    stride = ENCODERS[name].frame_stride
    n_mels = config.get("n_mels", widths["n_mels"])
    if not isinstance(n_mels, int) or n_mels // stride != widths["n_mels"] // stride:
        raise CheckpointError(f"{path}: config: n_mels {n_mels!r} contradicts weights for {widths['n_mels']} mels")
    encoder = ENCODERS[name](**widths | {"n_mels": n_mels})
    fit_weights(encoder, tensors, path)
    return EncoderFile(encoder.eval(), config, _read_stats(content, path))


def _recognise(tensors: Mapping[str, Tensor], path: str | Path) -> tuple[str, dict[str, int]]:
    """Return the name of an encoder and its arguments, from the shapes of its weights."""
    prefixes = [name.removesuffix(FIRST) for name in tensors if name == FIRST or name.endswith("." + FIRST)]
    prefix = min(prefixes, key=lambda each: ("target" in each, len(each)), default=None)
    if prefix is None:
        raise CheckpointError(f"{path}: no weights of an encoder (features.N.*, fc.N.*) among {len(tensors)} tensors")
    shapes = {name.removeprefix(prefix): tuple(x.shape) for name, x in tensors.items() if name.startswith(prefix)}
    convolutions = [shapes.get(f"features.{4 * block}.weight") for block in range(4)]
    depth = convolutions.index(None) if None in convolutions else 4
    first, last = shapes.get("fc.0.weight", ()), shapes.get("fc.3.weight", ())
    name = {2: "AudioNTT2022", 3: "AudioNTT2020"}.get(depth)
    if name is None or len(first) != 2 or len(last) != 2 or first[1] % CHANNELS or not first[1]:
        raise CheckpointError(
            f"{path}: not the layers of AudioNTT2020 (3 convolutions) or AudioNTT2022 (2): found {depth} "
            f"convolutions, fc.0.weight {first or 'missing'}, fc.3.weight {last or 'missing'}"
        )
    n_mels = first[1] // CHANNELS * ENCODERS[name].frame_stride
    if name == "AudioNTT2020":
        return name, {"n_mels": n_mels, "d": last[0]}
    return name, {"n_mels": n_mels, "d": first[1] + last[0], "hidden_d": first[0]}


def _read_stats(content: Mapping[str, Any], path: str | Path) -> tuple[float, float] | None:
    """Return the statistics of an encoder's file or, failing that, of a checkpoint's ``Augment``."""
    given = content.get("stats")
    if given is None:
        given = _augment_stats(_plain_dict(content.get("augment")))
    if given is None:
        return None
    try:
        mean, std = (float(value) for value in given)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: stats: expected (mean, std), got {given!r}") from error
    if not math.isfinite(mean) or not 0 <= std < math.inf:
        raise CheckpointError(f"{path}: stats: expected (mean, std), finite, std at least 0, got {(mean, std)}")
    return mean, std


def _augment_stats(augment: Mapping[str, Any]) -> Any:
    if isinstance(augment.get("fixed_stats"), Tensor):
        return augment["fixed_stats"].tolist()
    prefix = "running_stats."
    state = {name.removeprefix(prefix): x for name, x in augment.items() if name.startswith(prefix)}
    running = RunningStats()
    if state.keys() != running.state_dict().keys():
        return None
    running.load_state_dict(state)
    return running.stats().tolist() if int(running.count) else None


def _plain_dict(value: Any) -> dict[str, Any]:
    return dict(value) if isinstance(value, Mapping) else {}
