"""Files of encoders: saving, recognising and loading weights of any layout in use."""

from __future__ import annotations

import json
import logging
import math
import reprlib
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from byola_fast.networks.checkpoint import (
    CHECKSUM,
    METADATA,
    SAFETENSORS,
    CheckpointError,
    load_checkpoint,
    save_checkpoint,
    weights_sha256,
    write_checked,
)
from byola_fast.networks.encoders import ENCODERS, make_encoder
from byola_fast.networks.hub import HUB, MODEL, fetch
from byola_fast.runtime.files import some_of
from byola_fast.runtime.plugins import class_name
from byola_fast.runtime.state import mismatch
from byola_fast.spectrograms.log_mel import FRONT_END, LogMel
from byola_fast.spectrograms.statistics import RunningStats

logger = logging.getLogger("byola_fast")

IN_THE_BOX = Path(__file__).parents[1] / "weights" / "encoder.safetensors"
OF_A_FOLDER = (MODEL, "encoder.safetensors", "encoder.pth", "checkpoint.pt")  # of a run's or a saved folder
SUFFIXES = (".safetensors", ".pth", ".pt", ".ckpt", ".bin")
FIRST = "features.0.weight"
WRAPPERS = ("state_dict", "model")  # keys that files nest their weights under


class EncoderFile(NamedTuple):
    """The content of a file of weights.

    Attributes:
        encoder: the network with its weights, on the CPU, in eval mode.
        config: from ``describe_encoder``, or a training run's; empty if the file has none.
        stats: (mean, std) of the pre-normalisation; None if the file has none.
    """

    encoder: nn.Module
    config: dict[str, Any]
    stats: tuple[float, float] | None


def find_weights(path: str | Path | None) -> Path:
    """Return a file of weights: of a run's or a saved folder its encoder, without a path those that come with us.

    Of ``hf-hub:user/name`` it is the file on the Hugging Face Hub, downloaded once.

    Raises:
        CheckpointError: a folder without an encoder; no such model on the Hub; no path, and this copy of the package
            has no weights. ImportError: huggingface_hub is missing.
    """
    if path is None:
        if not IN_THE_BOX.is_file():
            raise CheckpointError(
                f"no weights given, and this copy of byola_fast comes without {IN_THE_BOX}; give some"
            )
        logger.info("no weights given: taking those that come with byola_fast, %s", IN_THE_BOX)
        return IN_THE_BOX
    if str(path).startswith(HUB):
        return fetch(str(path))
    if not Path(path).is_dir():
        return Path(path)
    found = next((file for name in OF_A_FOLDER if (file := Path(path, name)).is_file()), None)
    if found is None:
        raise CheckpointError(f"{path}: expected a file of weights, or a folder with {' or '.join(OF_A_FOLDER)}")
    return found


def names_weights(path: str | Path, folders: bool = True) -> bool:
    """Return whether a path is weights: a file by its suffix, a name on the Hub, with ``folders`` a folder.

    >>> names_weights("runs/mine/encoder.pth"), names_weights("hf-hub:user/name"), names_weights("sounds/kick.wav")
    (True, True, False)
    """
    known = str(path).startswith(HUB) or Path(path).suffix in SUFFIXES
    return known or (folders and any(Path(path, name).is_file() for name in OF_A_FOLDER))


def describe_encoder(encoder: nn.Module, to_lms: LogMel, **more: Any) -> dict[str, Any]:
    """Return the configuration for ``save_encoder``: the network and the front end.

    >>> from byola_fast import AudioNTT2020
    >>> described = describe_encoder(AudioNTT2020(d=32), LogMel(), unit_sec=0.95)
    >>> described["encoder"], described["feature_d"], described["hop_length"], described["unit_sec"]
    ('AudioNTT2020', 32, 160, 0.95)
    """
    front_end = {name: getattr(to_lms, name) for name in FRONT_END}
    feature_d = getattr(encoder, "feature_d", None)
    return {"encoder": class_name(encoder, ENCODERS), "feature_d": feature_d} | front_end | more


def read_encoder(path: str | Path, encoder: nn.Module | type[nn.Module] | str | None = None) -> EncoderFile:
    """Read an encoder from a file of ``save_encoder``, a training checkpoint, or a state dict of published layout.

    Names and shapes of the weights, under any wrapper or prefix (see ``load_encoder_weights``), tell the network: the
    number of convolutions the class, the linear layers the number of mels and the widths.

    With ``encoder``, weights are loaded into it, or into what that class (or its name, see ``make_encoder``) makes. A
    file never causes an import: the class named in it serves the error message alone.

    Raises:
        CheckpointError: as ``load_checkpoint``; or no encoder is recognised, or configuration or statistics in the file
        contradict it.
    """
    found, load = open_encoder(path, encoder)
    load()
    return EncoderFile(found.encoder.eval(), found.config, found.stats)


def open_encoder(
    path: str | Path, encoder: nn.Module | type[nn.Module] | str | None = None
) -> tuple[EncoderFile, Callable[[], None]]:
    """Return what ``read_encoder`` does, but with the encoder unchanged, and the function that loads its weights."""
    content = load_checkpoint(path)
    tensors = named_tensors(content)
    config = _plain_dict(content.get("config"))
    stats = _read_stats(content, path)
    if encoder is None:
        encoder = _recognise(tensors, config, path)
    elif not isinstance(encoder, nn.Module):
        widths: dict[str, Any] = {
            name: config[name] for name in ("n_mels", "feature_d") if type(config.get(name)) is int
        }
        if encoder in (*ENCODERS, *ENCODERS.values()) and any(name.endswith("output.weight") for name in tensors):
            widths["whitened"] = True
        encoder = _make(encoder, widths, tensors, path)
    return EncoderFile(encoder, config, stats), partial(fit_weights, encoder, tensors, path)


def _make(
    kind: type[nn.Module] | str, widths: Mapping[str, Any], tensors: Mapping[str, Tensor], path: str | Path
) -> nn.Module:
    """Return an encoder with fresh weights; one of ours is compared with the file before memory is allocated."""
    try:
        if kind in (*ENCODERS, *ENCODERS.values()):
            with torch.device("meta"):
                sketch = make_encoder(kind, **widths)
            _fitting(sketch, tensors, path)
        return make_encoder(kind, **widths)
    except CheckpointError:
        raise
    except (TypeError, ValueError, ArithmeticError, RuntimeError, MemoryError) as error:
        raise CheckpointError(f"{path}: {error}") from error


def _recognise(tensors: Mapping[str, Tensor], config: Mapping[str, Any], path: str | Path) -> nn.Module:
    """Return the encoder, with fresh weights, that fits the shapes of the weights."""
    named = config.get("encoder")
    if isinstance(named, str) and ":" in named:
        raise CheckpointError(
            f"{path}: holds weights of the class {named}; give that class as encoder= (--encoder {named}): no code is "
            "imported because a file names it"
        )
    prefixes = [name.removesuffix(FIRST) for name in tensors if name == FIRST or name.endswith("." + FIRST)]
    prefix = min(prefixes, key=lambda each: ("target" in each, len(each)), default=None)
    if prefix is None:
        raise CheckpointError(f"{path}: no weights of an encoder (features.N.*, fc.N.*) among {len(tensors)} tensors")
    shapes = {name.removeprefix(prefix): tuple(x.shape) for name, x in tensors.items() if name.startswith(prefix)}
    for kind in ENCODERS.values():
        widths = kind.recognise(shapes)
        if widths is not None:
            n_mels = config.get("n_mels", widths["n_mels"])
            if not isinstance(n_mels, int) or n_mels // kind.frame_stride != widths["n_mels"] // kind.frame_stride:
                message = f"n_mels {shown(n_mels)} contradicts weights for {widths['n_mels']} mels"
                raise CheckpointError(f"{path}: config: {message}")
            return _make(kind, widths | {"n_mels": n_mels}, tensors, path)
    convolutions = sum(name.startswith("features.") and len(shape) == 4 for name, shape in shapes.items())
    first, last = shapes.get("fc.0.weight", "missing"), shapes.get("fc.3.weight", "missing")
    raise CheckpointError(
        f"{path}: not the layers of {' or '.join(ENCODERS)}: found {convolutions} convolutions, fc.0.weight {first}, "
        f"fc.3.weight {last}"
    )


def _read_stats(content: Mapping[str, Any], path: str | Path) -> tuple[float, float] | None:
    """Return the statistics of an encoder's file or, failing that, of a checkpoint's ``Augment``."""
    given = content.get("stats")
    try:
        if given is None:
            given = _augment_stats(_plain_dict(content.get("augment")))
        if given is None:
            return None
        if isinstance(given, Tensor) and given.shape != (2,):
            raise ValueError("not two numbers")
        mean, std = (float(value) for value in given)
    except (TypeError, ValueError, ArithmeticError, RuntimeError) as error:
        got = "a damaged augment" if given is None else shown(given)
        raise CheckpointError(f"{path}: stats: expected (mean, std), got {got}") from error
    if not math.isfinite(mean) or not 0 < std < math.inf:
        raise CheckpointError(f"{path}: stats: expected (mean, std), finite, std above 0, got {(mean, std)}")
    return mean, std


def shown(value: Any) -> str:
    """Return a short form of a value of any kind and depth."""
    try:
        return reprlib.repr(value)
    except ValueError:  # an integer of too many digits
        return type(value).__name__


def _augment_stats(augment: Mapping[str, Any]) -> Any:
    if isinstance(augment.get("fixed_stats"), Tensor):
        return augment["fixed_stats"]
    prefix = "running_stats."
    state = {name.removeprefix(prefix): x for name, x in augment.items() if name.startswith(prefix)}
    running = RunningStats()
    if state.keys() != running.state_dict().keys():
        return None
    running.load_state_dict(state)
    return running.stats() if int(running.count) else None


def _plain_dict(value: Any) -> dict[str, Any]:
    return dict(value) if isinstance(value, Mapping) else {}


def save_encoder(
    path: str | Path, encoder: nn.Module, *, config: Mapping[str, Any], stats: tuple[float, float] | None
) -> None:
    """Write an encoder with everything needed to use it: ``state_dict``, ``config`` and ``stats``.

    Args:
        path: file to write. ``.pth`` or ``.pt``: a dict of the three, for ``torch.load``. ``.safetensors``: the
            weights, and the other two as JSON in the metadata, under "byola_fast", with a checksum of all three.
        encoder: its weights are stored contiguous and on the CPU.
        config: network and front end as plain values, from ``describe_encoder``.
        stats: (mean, std) of the pre-normalisation in training.

    Raises:
        CheckpointError: as ``save_checkpoint``; another suffix; for safetensors, values that JSON cannot hold.
    """
    path = Path(path)
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in encoder.state_dict().items()}
    described = {"config": dict(config), "stats": None if stats is None else [float(value) for value in stats]}
    if path.suffix in (".pth", ".pt"):
        save_checkpoint(path, {"state_dict": weights} | described)
    elif path.suffix == SAFETENSORS:
        from safetensors.torch import save  # here: importing byola_fast needs torch alone

        try:
            text = json.dumps(described)
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"{path}: config: cannot be written as JSON: {error}") from error
        metadata = {METADATA: text, CHECKSUM: weights_sha256(weights, text)}
        write_checked(path, lambda file: file.write(save(weights, metadata)))
    else:
        raise CheckpointError(f"{path}: expected a name ending in .pth, .pt or .safetensors")


def load_encoder_weights(encoder: nn.Module, path: str | Path) -> None:
    """Load weights into an encoder, from a bare state dict, a wrapped one, or a whole training checkpoint.

    Wrappers ``state_dict`` and ``model`` are opened. Names may have a prefix ("module.", "encoder.", "online.encoder."
    and so on). Of several prefixes the best fit is used; ties go to a prefix other than the target's.

    Args:
        encoder: keeps its device and dtype.
        path: any file that ``load_checkpoint`` reads, safetensors included.

    Raises:
        CheckpointError: as ``load_checkpoint``; or weights are missing, unexpected, not finite, or of another shape or
            kind of dtype, with names. The encoder is then unchanged.
    """
    fit_weights(encoder, named_tensors(load_checkpoint(path)), path)


def named_tensors(content: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the weights in a loaded file, with wrappers opened.

    >>> import torch
    >>> sorted(named_tensors({"model": {"state_dict": {"a": torch.zeros(1)}}, "epoch": 3}))
    ['a']
    """
    while wrapper := next((key for key in WRAPPERS if isinstance(content.get(key), Mapping)), None):
        content = content[wrapper]
    return {name: x for name, x in content.items() if isinstance(name, str) and isinstance(x, Tensor)}


def fit_weights(encoder: nn.Module, tensors: Mapping[str, Tensor], path: str | Path) -> None:
    """Load named tensors under any prefix into an encoder; see ``load_encoder_weights``.

    Raises:
        CheckpointError: they do not fit; names the file. The encoder is then unchanged.
    """
    given = _fitting(encoder, tensors, path)
    before = {name: x.clone() for name, x in encoder.state_dict().items()}
    try:
        encoder.load_state_dict(given, strict=False)  # only counters of batches may be absent
    except Exception as error:  # whatever a user's own network raises
        encoder.load_state_dict(before)
        raise CheckpointError(f"{path}: not the weights of this {type(encoder).__name__}; {error}") from error


def _fitting(encoder: nn.Module, tensors: Mapping[str, Tensor], path: str | Path) -> dict[str, Tensor]:
    """Return the tensors of an encoder under its own names, after a check of everything."""
    wanted = encoder.state_dict()
    prefix = _best_prefix(tensors, wanted)
    given = {name.removeprefix(prefix): x for name, x in tensors.items() if name.startswith(prefix)}
    problems: dict[str, list[str]] = {
        "missing": [name for name in wanted if name not in given and not name.endswith("num_batches_tracked")],
        "unexpected": [name for name in given if name not in wanted],
    }
    for name, x in given.items():
        if name in wanted and (problem := mismatch(name, x, wanted[name])):
            problems.setdefault(problem[0], []).append(f"{name} {problem[1]}")
    mismatches = [f"{len(names)} {what}: {some_of(names)}" for what, names in problems.items() if names]
    if mismatches:
        raise CheckpointError(f"{path}: not the weights of this {type(encoder).__name__}; " + "; ".join(mismatches))
    return given


def _best_prefix(tensors: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> str:
    """Return the prefix of most wanted names; "" if there is none."""
    hits: dict[str, int] = {}
    for name in tensors:
        for end in wanted:
            if name == end or name.endswith("." + end):
                prefix = name.removesuffix(end)
                hits[prefix] = hits.get(prefix, 0) + 1
    return max(hits, key=lambda prefix: (hits[prefix], "target" not in prefix, -len(prefix)), default="")
