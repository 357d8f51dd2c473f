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
from torch import Tensor, nn

from byola_fast.runtime.files import some_of, write_whole

WRAPPERS = ("state_dict", "model")  # keys under which files of weights keep them
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
        told = f"; give a file, as {path / inside[0]}" if inside else ", not a file of weights"
        raise CheckpointError(f"{path}: Is a directory{told}")
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


def save_encoder(
    path: str | Path, encoder: nn.Module, *, config: Mapping[str, Any], stats: tuple[float, float] | None
) -> None:
    """Write an encoder alone, with what is needed to use it: ``state_dict``, ``config`` and ``stats``.

    Args:
        path: file to write. ``.pth`` or ``.pt``: a dict of the three, for ``torch.load``. ``.safetensors``: the
            weights, and the other two as JSON in the metadata, under "byola_fast".
        encoder: its weights are stored contiguous and on the CPU.
        config: plain values that say what the encoder is and which log-mel spectrograms it expects; see
            ``byola_fast.networks.encoder_file.describe_encoder``.
        stats: (mean, std) of the pre-normalisation that it was trained with.

    Raises:
        CheckpointError: as ``save_checkpoint``; another suffix; for safetensors, values that JSON cannot hold.
    """
    path = Path(path)
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in encoder.state_dict().items()}
    described = {"config": dict(config), "stats": None if stats is None else [float(value) for value in stats]}
    if path.suffix in (".pth", ".pt"):
        save_checkpoint(path, {"state_dict": weights} | described)
    elif path.suffix == SAFETENSORS:
        from safetensors.torch import save  # here, as importing byola_fast needs torch alone

        try:
            metadata = {METADATA: json.dumps(described)}
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"{path}: config: cannot be written as JSON: {error}") from error
        write_checked(path, lambda file: file.write(save(weights, metadata)))
    else:
        raise CheckpointError(f"{path}: expected a name ending in .pth, .pt or .safetensors, which chooses the format")


def load_encoder_weights(encoder: nn.Module, path: str | Path) -> None:
    """Load weights into an encoder, from a bare state dict, a wrapped one, or a whole training checkpoint.

    Wrappers ``state_dict`` and ``model`` are opened. Where every name carries a prefix ("module.", "encoder.",
    "online.encoder." and so on), the names under it are used; of several, the one that fits best and, for equals, one
    that is not the target's.

    Args:
        encoder: keeps its device and dtype.
        path: any file that ``load_checkpoint`` reads, safetensors included.

    Raises:
        CheckpointError: as ``load_checkpoint``; or weights are missing, unexpected or of another shape, with names.
            The encoder is then unchanged.
    """
    fit_weights(encoder, named_tensors(load_checkpoint(path)), path)


def named_tensors(content: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the weights in a loaded file, its wrappers opened.

    >>> sorted(named_tensors({"model": {"state_dict": {"a": torch.zeros(1)}}, "epoch": 3}))
    ['a']
    """
    while wrapper := next((key for key in WRAPPERS if isinstance(content.get(key), Mapping)), None):
        content = content[wrapper]
    return {name: x for name, x in content.items() if isinstance(name, str) and isinstance(x, Tensor)}


def fit_weights(encoder: nn.Module, tensors: Mapping[str, Tensor], path: str | Path) -> None:
    """Load named tensors, under whatever prefix they are, into an encoder; see ``load_encoder_weights``.

    Raises:
        CheckpointError: they do not fit; names the file they come from. The encoder is then unchanged.
    """
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
    told = [f"{len(names)} {what}: {some_of(names)}" for what, names in problems.items() if names]
    if told:
        raise CheckpointError(f"{path}: not the weights of this {type(encoder).__name__}; " + "; ".join(told))
    encoder.load_state_dict(given, strict=False)  # all that may be absent are counters of batches


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
