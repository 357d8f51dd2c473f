"""Settings in published config.yaml files, under our names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from difflib import get_close_matches
from typing import Any

from byola_fast.training.config import PretrainConfig, renamed

# Names in published config.yaml files, and ours. "shape" (mels, frames) stands for n_mels and unit_sec.
PUBLISHED_NAMES = {
    "AUDIO_DIR": "audio_dir",  # what --print_config calls the argument that is no flag
    "bs": "batch_size",
    "num_workers": "workers",
    "moving_average_decay": "ema_decay",
    "projection_size": "proj_size",
    "projection_hidden_size": "proj_dim",
    "learning_rate": "lr",
    "max_epochs": "epochs",
    "checkpoint_folder": "out",
    "runpath": "out",
}
PUBLISHED_SHAPES = ("shape", "image_size")


def from_published(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a ``config.yaml`` with our names or the published ones, under our names.

    ``shape: [64, 96]`` becomes n_mels and the unit_sec that gives so many frames. ``resume`` may be null.

    Raises:
        ValueError: an unknown key, two keys of one meaning, or a shape other than (mels, frames).

    >>> from_published({"bs": 128, "shape": [64, 96], "lr": 0.0003})
    {'batch_size': 128, 'lr': 0.0003, 'n_mels': 64, 'unit_sec': 0.95}
    """
    ours, values = {field.name for field in fields(PretrainConfig)}, renamed(values)
    settings: dict[str, Any] = {}
    shape = None
    for key, value in values.items():
        if key in PUBLISHED_SHAPES:
            shape = value
            continue
        name = key if key in ours else PUBLISHED_NAMES.get(key)
        if name is None:
            alike = get_close_matches(str(key), sorted(ours | PUBLISHED_NAMES.keys() | set(PUBLISHED_SHAPES)))
            message = f"; like it are {', '.join(alike)}" if alike else ""
            raise ValueError(f"{key}: not a setting{message}; byola-fast pretrain --help lists all")
        if name == "audio_dir" and isinstance(value, list) and len(value) < 2:  # what AUDIO_DIR is on the command line
            value = value[0] if value else None
        if None not in (value, settings.get(name)) and settings[name] != value:
            raise ValueError(f"{key}: expected one value of {name}, got {settings[name]} and {value}")
        settings[name] = settings.get(name) if value is None else value
    if settings.get("resume", 0) is None:
        settings["resume"] = False
    if shape is not None:
        settings = settings | _shape_settings(shape, settings)
    return settings


def _shape_settings(shape: Any, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return n_mels and unit_sec of ``[mels, frames]``, checked against the settings given with it."""
    if not (isinstance(shape, (list, tuple)) and len(shape) == 2 and all(isinstance(n, int) and n > 0 for n in shape)):
        raise ValueError(f"shape: expected [mels, frames], got {shape}")
    hop, rate = (settings.get(name, getattr(PretrainConfig, name)) for name in ("hop_length", "sample_rate"))
    made = {"n_mels": shape[0], "unit_sec": (shape[1] - 1) * hop / rate}
    if settings.get("n_mels", shape[0]) != shape[0]:
        raise ValueError(f"shape: expected [n_mels, frames] = [{settings['n_mels']}, ...], got {shape}")
    if "unit_sec" in settings:
        made["unit_sec"] = settings["unit_sec"]
        frames = 1 + round(made["unit_sec"] * rate) // hop
        if frames != shape[1]:
            raise ValueError(f"shape: expected the {frames} frames of unit_sec {made['unit_sec']}, got {shape}")
    return made
