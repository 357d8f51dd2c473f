"""Files of weights: written whole or not at all, read without executing code."""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from collections.abc import Callable, Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import IO, Any

import torch
from torch import Tensor

from byola_fast.networks.torch_file import RefusedError, check_torch_file
from byola_fast.runtime.files import write_whole

SAFETENSORS = ".safetensors"
RUN_WEIGHTS = ("encoder.pth", "encoder.safetensors", "checkpoint.pt")  # files of a run, in order of preference
METADATA = "byola_fast"  # key of a safetensors file's metadata with config and statistics, as JSON
CHECKSUM = METADATA + "_sha256"  # key of its checksum


class CheckpointError(ValueError):
    """A file of weights cannot be read or written; the message names the file and the reason."""


def save_checkpoint(path: str | Path, content: Mapping[str, Any]) -> None:
    """Write tensors and plain values atomically: the file is always the whole old one or the whole new one.

    Args:
        path: file to write; its folder is made if missing.
        content: tensors, numbers, strings, lists and dicts, for ``load_checkpoint``.

    Raises:
        CheckpointError: the file could not be written (disk full, no permission); an older one is unchanged.
    """
    write_checked(Path(path), lambda file: torch.save(dict(content), file))


def load_checkpoint(path: str | Path, map_location: str | torch.device = "cpu") -> dict[str, Any]:
    """Read a file of ``save_checkpoint``, ``save_encoder`` or ``torch.save`` without executing code in it.

    Args:
        path: the file. A ``.safetensors`` file gives ``{"state_dict": ...}`` with the ``"config"`` and ``"stats"`` of
            ``save_encoder``.
        map_location: device of the tensors.

    Raises:
        CheckpointError: the file is missing, a folder or pipe, empty, truncated, damaged (a wrong checksum, sizes that
        contradict each other), no checkpoint, or holds pickled code or other than dense float, integer or bool tensors.
        Files of torch before 1.6 and safetensors of other programs have no checksum.
    """
    path = Path(path)
    _check_kind(path)
    if path.suffix == SAFETENSORS:
        return _load_safetensors(path, map_location)
    try:
        with open(path, "rb") as file:  # one file, even if another replaces it meanwhile
            check_torch_file(file)
            content = torch.load(file, map_location=map_location, weights_only=True)
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror or error}") from error
    except Exception as error:  # the unpickler may raise anything on bytes that are no checkpoint
        raise CheckpointError(f"{path}: {_why_unreadable(path, error)}") from error
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path}: expected a dict of weights, got {type(content).__name__}")
    return dict(content)


def _load_safetensors(path: Path, device: str | torch.device) -> dict[str, Any]:
    from safetensors import safe_open

    try:
        with safe_open(path, "pt", device=str(device)) as file:
            weights: dict[str, Tensor] = {name: file.get_tensor(name) for name in list(file.keys())}
            metadata = file.metadata() or {}
    except OSError as error:
        raise CheckpointError(f"{path}: {error}") from error
    except Exception as error:  # SafetensorError, or another for dtypes and sizes out of range
        size = path.stat().st_size
        why = f"truncated, damaged or no safetensors file ({size} bytes): {error}" if size else "empty file (0 bytes)"
        raise CheckpointError(f"{path}: {why}") from error
    described = metadata.get(METADATA, "{}")
    if CHECKSUM in metadata and metadata[CHECKSUM] != weights_sha256(weights, described):
        raise CheckpointError(
            f"{path}: damaged, or changed by a program that kept the checksum (metadata {CHECKSUM!r})"
        )
    try:
        values = json.loads(described)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: the metadata {METADATA!r} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: the metadata {METADATA!r} is no JSON object")
    return {"state_dict": weights} | {name: values[name] for name in ("config", "stats") if name in values}


def weights_sha256(weights: Mapping[str, Tensor], described: str) -> str:
    """Return the checksum of named tensors and of what describes them."""
    digest = hashlib.sha256(described.encode())
    for name, tensor in sorted(weights.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _check_kind(path: Path) -> None:
    """Refuse what is no file; a pipe would block."""
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError) as error:  # ValueError: a null in the name
        raise CheckpointError(f"{path}: {getattr(error, 'strerror', error)}") from error
    if stat.S_ISDIR(mode):
        inside = [name for name in RUN_WEIGHTS if (path / name).is_file()]
        message = f"; give a file, such as {path / inside[0]}" if inside else ", not a file of weights"
        raise CheckpointError(f"{path}: Is a directory{message}")
    if not stat.S_ISREG(mode):
        raise CheckpointError(f"{path}: expected a file of weights, got a pipe, socket or device")


def write_checked(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Write a file whole; its folder is made if missing.

    Raises:
        CheckpointError: it could not be written; an older one is unchanged.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, write)
    except (OSError, RuntimeError) as error:  # torch.save turns a failed write into RuntimeError
        kept = "; the file of that name is unchanged" if path.exists() else ""
        raise CheckpointError(f"{path}: cannot be written: {_one_line(error)}{kept}") from error


def _why_unreadable(path: Path, error: Exception) -> str:
    size = path.stat().st_size
    if size == 0:
        return "empty file (0 bytes)"
    if isinstance(error, RefusedError):
        return str(error)
    if isinstance(error, UnpicklingError) and re.search("operand|instruction", str(error)):
        return "pickled in a way that is refused; expected that of torch.save by default"
    return f"truncated or damaged ({size} bytes)"


def _one_line(error: BaseException) -> str:
    if not isinstance(error, OSError) and isinstance(error.__context__, OSError):
        error = error.__context__  # torch.save's message hides the system's
    return (getattr(error, "strerror", None) or str(error).strip() or type(error).__name__).splitlines()[0]
