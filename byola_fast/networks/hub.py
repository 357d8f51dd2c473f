"""Encoders by their name on the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from byola_fast.networks.checkpoint import CheckpointError

HUB = "hf-hub:"  # timm's prefix of a name on the Hub
MODEL = "model.safetensors"  # the file of weights there


def fetch(path: Any) -> Any:
    """Return the file of a name on the Hub, downloaded once, or of a saved folder; anything else unchanged.

    Args:
        path: ``hf-hub:user/name``, or ``hf-hub:user/name@revision``. Only these ask the network.

    Raises:
        ImportError: huggingface_hub is missing. CheckpointError: no such model, or none of this package.
    """
    if not str(path).startswith(HUB):
        saved = isinstance(path, str | Path) and Path(path, MODEL).is_file()
        return Path(path, MODEL) if saved else path
    try:
        from huggingface_hub import hf_hub_download
    except ImportError as error:
        raise ImportError(f"{path}: needs huggingface_hub: pip install huggingface_hub") from error
    name, _, revision = str(path).removeprefix(HUB).partition("@")
    try:
        return Path(hf_hub_download(name, MODEL, revision=revision or None, library_name="byola_fast"))
    except Exception as error:  # of the network, the Hub, the cache, or the name
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise CheckpointError(f"{path}: no {MODEL} can be had from the Hub: {reason}") from error
