"""Files of weights: written whole or not at all, read without executing code."""

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

ZIP = b"PK\x03\x04"  # first bytes of an archive
BLOCK_BYTES = 1 << 22  # read at a time for a checksum
SAFETENSORS = ".safetensors"
RUN_WEIGHTS = ("encoder.pth", "encoder.safetensors", "checkpoint.pt")  # files of a run, in order of preference
METADATA = "byola_fast"  # key of a safetensors file's metadata with config and statistics, as JSON


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
        CheckpointError: the file is missing, a folder, empty, truncated, damaged (a wrong checksum; safetensors have
        none), no checkpoint, or holds pickled code.
    """
    path = Path(path)
    if os.path.isdir(path):  # False also if that cannot be known
        inside = [name for name in RUN_WEIGHTS if (path / name).is_file()]
        message = f"; give a file, such as {path / inside[0]}" if inside else ", not a file of weights"
        raise CheckpointError(f"{path}: Is a directory{message}")
    if path.suffix == SAFETENSORS:
        return _load_safetensors(path, map_location)
    try:
        _check_archive(path)
        content = torch.load(path, map_location=map_location, weights_only=True)
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror or error}") from error
    except Exception as error:  # the unpickler may raise anything on bytes that are no checkpoint
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
    """Verify the checksums of a file of ``torch.save``, which ``torch.load`` ignores."""
    with open(path, "rb") as file:
        if file.read(len(ZIP)) != ZIP:
            return  # of torch before 1.6
    with zipfile.ZipFile(path) as archive:
        for record in archive.infolist():
            if record.CRC:  # 0: none
                with archive.open(record) as content:
                    while content.read(BLOCK_BYTES):
                        pass  # reading to the end verifies the checksum


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
        error = error.__context__  # torch.save's message hides the system's
    return (getattr(error, "strerror", None) or str(error).strip() or type(error).__name__).splitlines()[0]
