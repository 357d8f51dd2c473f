"""Files of weights: written whole or not at all, read without running any code in them."""

from __future__ import annotations

import json
import os
import re
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import IO, Any

import torch

from byola_fast.runtime.files import write_whole

ZIP = b"PK\x03\x04"  # what an archive begins with
BLOCK_BYTES = 1 << 22  # read at a time for a checksum
SAFETENSORS = ".safetensors"
RUN_WEIGHTS = ("encoder.pth", "encoder.safetensors", "checkpoint.pt")  # of the folder of a run, the first to be named
METADATA = "byola_fast"  # the key of a safetensors file's metadata that holds configuration and statistics, as JSON


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
    write_checked(Path(path), lambda file: torch.save(dict(content), file))


def load_checkpoint(path: str | Path, map_location: str | torch.device = "cpu") -> dict[str, Any]:
    """Read a file that ``save_checkpoint``, ``save_encoder`` or ``torch.save`` wrote, executing nothing in it.

    Args:
        path: the file; with the suffix ``.safetensors`` it is read as such, and comes back as ``{"state_dict": ...}``
            with the ``"config"`` and ``"stats"`` that ``save_encoder`` put into it.
        map_location: device that tensors go to.

    Raises:
        CheckpointError: the file is missing, a folder, empty, truncated, damaged (a checksum in it is wrong;
        safetensors have none), no checkpoint, or holds pickled code.
    """
    path = Path(path)
    if os.path.isdir(path):  # False, too, where that cannot be known
        inside = [name for name in RUN_WEIGHTS if (path / name).is_file()]
        message = f"; give a file, as {path / inside[0]}" if inside else ", not a file of weights"
        raise CheckpointError(f"{path}: Is a directory{message}")
    if path.suffix == SAFETENSORS:
        return _load_safetensors(path, map_location)
    try:
        _check_archive(path)
        content = torch.load(path, map_location=map_location, weights_only=True)
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror or error}") from error
    except Exception as error:  # whatever the unpickler makes of bytes that are no checkpoint
        raise CheckpointError(f"{path}: {_why_unreadable(path, error)}") from error
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path}: expected a dict of weights, got {type(content).__name__}")
    return dict(content)


def _load_safetensors(path: Path, device: str | torch.device) -> dict[str, Any]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt", device=str(device)) as file:
            names = list(file.keys())
            content: dict[str, Any] = {"state_dict": {name: file.get_tensor(name) for name in names}}
            metadata = file.metadata() or {}
    except OSError as error:
        why = "No such file or directory" if not path.exists() else str(error)
        raise CheckpointError(f"{path}: {why}") from error
    except SafetensorError as error:
        size = path.stat().st_size
        why = f"truncated, damaged or no safetensors file ({size} bytes): {error}" if size else "empty file (0 bytes)"
        raise CheckpointError(f"{path}: {why}") from error
    try:
        described = json.loads(metadata.get(METADATA, "{}"))
    except ValueError as error:
        raise CheckpointError(f"{path}: the metadata {METADATA!r} is not JSON: {error}") from error
    if not isinstance(described, dict):
        raise CheckpointError(f"{path}: the metadata {METADATA!r} is no JSON object")
    return content | {name: described[name] for name in ("config", "stats") if name in described}


def _check_archive(path: Path) -> None:
    """Compare what a file of ``torch.save`` holds with its checksums, which ``torch.load`` does not look at."""
    with open(path, "rb") as file:
        if file.read(len(ZIP)) != ZIP:
            return  # of torch before 1.6
    with zipfile.ZipFile(path) as archive:
        for record in archive.infolist():
            if record.CRC:  # 0: written without
                with archive.open(record) as content:
                    while content.read(BLOCK_BYTES):
                        pass  # the end compares


def write_checked(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Write a file whole; its folder is made where it does not exist.

    Raises:
        CheckpointError: it could not be written; an older one is unchanged.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, write)
    except (OSError, RuntimeError) as error:  # torch.save raises RuntimeError where a write fails inside its own code
        kept = "; the file of that name is unchanged" if path.exists() else ""
        raise CheckpointError(f"{path}: cannot be written: {_one_line(error)}{kept}") from error


def _why_unreadable(path: Path, error: Exception) -> str:
    size = path.stat().st_size
    if size == 0:
        return "empty file (0 bytes)"
    if code := re.search(r"GLOBAL (\S+)", str(error)):
        return f"holds pickled code ({code[1]}), which is refused"
    with open(path, "rb") as file:
        is_archive = file.read(len(ZIP)) == ZIP
    if is_archive or "EOF" in str(error):
        return f"truncated or damaged ({size} bytes)"
    if isinstance(error, UnpicklingError) and re.search("operand|instruction", str(error)):
        return "not a checkpoint, or pickled in a way that is refused"
    return "not a checkpoint"


def _one_line(error: BaseException) -> str:
    if not isinstance(error, OSError) and isinstance(error.__context__, OSError):
        error = error.__context__  # torch.save's own message hides what the system said
    return (getattr(error, "strerror", None) or str(error).strip() or type(error).__name__).splitlines()[0]
