"""Encoders by their name on the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path

from byola_fast.networks.checkpoint import CheckpointError

HUB = "hf-hub:"  # timm's prefix of a name on the Hub
MODEL = "model.safetensors"  # the file of weights there


def fetch(name: str) -> Path:
    """Return the file of ``hf-hub:user/name`` or ``hf-hub:user/name@revision``, downloaded once.

    Raises:
        ImportError: huggingface_hub is missing. CheckpointError: no such model, or none of this package.
    """
    try:
        from huggingface_hub import hf_hub_download
    except ImportError as error:
        raise ImportError(f"{name}: needs huggingface_hub: pip install huggingface_hub") from error
    model, _, revision = name.removeprefix(HUB).partition("@")
    try:
        return Path(hf_hub_download(model, MODEL, revision=revision or None, library_name="byola_fast"))
    except Exception as error:  # of the network, the Hub, the cache, or the name
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise CheckpointError(f"{name}: no {MODEL} can be had from the Hub: {reason}") from error
