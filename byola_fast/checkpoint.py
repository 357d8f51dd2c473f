"""Files of weights: written whole or not at all, read without running any code in them."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor, nn

WRAPPERS = ("state_dict", "model")  # keys under which files of weights keep them
SHOWN = 5  # names in a message


class CheckpointError(ValueError):
    """A file of weights cannot be used, or not be written; the message names the file and says why."""


def save_checkpoint(path: str | Path, content: Mapping[str, Any]) -> None:
    """Write tensors and plain values so that the file is, at any moment, the whole old one or the whole new one.

    The content goes to ``<name>.tmp`` in the same folder, is flushed to the disk, and takes the name last.

    Args:
        path: file to write; its folder is made where it does not exist.
        content: tensors, numbers, strings, lists and dicts, so that ``load_checkpoint`` takes it back.

    Raises:
        CheckpointError: the file could not be written (disk full, no permission); an older one is unchanged.
    """
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            torch.save(dict(content), file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save raises RuntimeError where a write fails inside its own code
        kept = "; the file of that name is unchanged" if path.exists() else ""
        raise CheckpointError(f"{path}: cannot be written: {_one_line(error)}{kept}") from error
    finally:
        temporary.unlink(missing_ok=True)
    _sync_folder(path.parent)


def load_checkpoint(path: str | Path, map_location: str | torch.device = "cpu") -> dict[str, Any]:
    """Read a file that ``save_checkpoint`` or ``torch.save`` wrote, executing nothing in it.

    Args:
        path: the file.
        map_location: device that tensors go to.

    Raises:
        CheckpointError: the file is missing, empty, truncated, no checkpoint, or holds pickled code.
    """
    path = Path(path)
    try:
        content = torch.load(path, map_location=map_location, weights_only=True)
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror or error}") from error
    except Exception as error:  # whatever the unpickler makes of bytes that are no checkpoint
        raise CheckpointError(f"{path}: {_why_unreadable(path, error)}") from error
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path}: expected a dict of weights, got {type(content).__name__}")
    return dict(content)


def save_encoder(
    path: str | Path, encoder: nn.Module, *, config: Mapping[str, Any], stats: tuple[float, float] | None
) -> None:
    """Write an encoder alone, with what is needed to use it: ``{"state_dict", "config", "stats"}``.

    Args:
        path: file to write, by custom ``encoder.pth``; as ``save_checkpoint`` does.
        encoder: its weights are stored contiguous and on the CPU.
        config: plain values that say what the encoder is and which log-mel spectrograms it expects.
        stats: (mean, std) of the pre-normalisation that it was trained with.

    Raises:
        CheckpointError: as ``save_checkpoint``.
    """
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in encoder.state_dict().items()}
    values = None if stats is None else [float(value) for value in stats]
    save_checkpoint(path, {"state_dict": weights, "config": dict(config), "stats": values})


def load_encoder_weights(encoder: nn.Module, path: str | Path) -> None:
    """Load weights into an encoder, from a bare state dict, a wrapped one, or a whole training checkpoint.

    Wrappers ``state_dict`` and ``model`` are opened. Where every name carries a prefix ("module.", "encoder.",
    "online.encoder." and so on), the names under it are used; of several, the one that fits best and, for equals, one
    that is not the target's.

    Raises:
        CheckpointError: as ``load_checkpoint``; or weights are missing, unexpected or of another shape, with names.
            The encoder is then unchanged.
    """
    found: Any = load_checkpoint(path)
    while wrapper := next((key for key in WRAPPERS if isinstance(found.get(key), Mapping)), None):
        found = found[wrapper]
    tensors = {name: x for name, x in found.items() if isinstance(name, str) and isinstance(x, Tensor)}
    wanted = encoder.state_dict()
    prefix = _best_prefix(tensors, wanted)
    given = {name.removeprefix(prefix): x for name, x in tensors.items() if name.startswith(prefix)}

    missing = [name for name in wanted if name not in given and not name.endswith("num_batches_tracked")]
    unexpected = [name for name in given if name not in wanted]
    shapes = [
        f"{name} {tuple(given[name].shape)} instead of {tuple(wanted[name].shape)}"
        for name in wanted
        if name in given and given[name].shape != wanted[name].shape
    ]
    problems = {"missing": missing, "unexpected": unexpected, "of another shape": shapes}
    told = [f"{len(names)} {what}: {_some(names)}" for what, names in problems.items() if names]
    if told:
        raise CheckpointError(f"{path}: not the weights of this {type(encoder).__name__}; " + "; ".join(told))
    encoder.load_state_dict(given, strict=False)  # all that may be absent are counters of batches


def _best_prefix(tensors: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> str:
    """Return the prefix under which most wanted names are found; "" where none is."""
    hits: dict[str, int] = {}
    for name in tensors:
        for end in wanted:
            if name == end or name.endswith("." + end):
                prefix = name.removesuffix(end)
                hits[prefix] = hits.get(prefix, 0) + 1
    return max(hits, key=lambda prefix: (hits[prefix], "target" not in prefix, -len(prefix)), default="")


def _why_unreadable(path: Path, error: Exception) -> str:
    size = path.stat().st_size
    if size == 0:
        return "empty file (0 bytes)"
    if code := re.search(r"GLOBAL (\S+)", str(error)):
        return f"holds pickled code ({code[1]}), which is refused"
    with open(path, "rb") as file:
        is_archive = file.read(4) == b"PK\x03\x04"
    if is_archive or "EOF" in str(error):
        return f"truncated or damaged ({size} bytes)"
    if isinstance(error, UnpicklingError) and re.search("operand|instruction", str(error)):
        return "not a checkpoint, or pickled in a way that is refused"
    return "not a checkpoint"


def _some(names: list[str]) -> str:
    return ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")


def _one_line(error: Exception) -> str:
    return (getattr(error, "strerror", None) or str(error).strip() or type(error).__name__).splitlines()[0]


def _sync_folder(folder: Path) -> None:
    """Flush a folder's list of names, where the system allows it."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    except OSError:
        pass
    finally:
        os.close(descriptor)
