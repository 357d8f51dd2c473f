"""Saved folders in the layout of the Hugging Face Hub: weights, configuration and a model card."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from byola_fast.networks.checkpoint import CheckpointError
from byola_fast.networks.encoder_file import save_encoder
from byola_fast.networks.hub import HUB, MODEL
from byola_fast.runtime.files import as_text, write_whole
from byola_fast.spectrograms.log_mel import FRONT_END

CONFIG, CARD = "config.json", "README.md"
MARK = "<!-- Written by byola_fast. Without this line it is yours, and is not replaced. -->"


def write_card(
    folder: Path,
    config: Mapping[str, Any],
    stats: tuple[float, float] | None,
    weights: str,
    results: Mapping[str, Any] | None = None,
) -> None:
    """Write a model card, ``README.md``, unless there is one that was not written by this function.

    Args:
        folder: of the weights.
        config: from ``describe_encoder``, perhaps with "provenance".
        stats: (mean, std).
        weights: what ``load_encoder`` is to be given.
        results: numbers of the run, by name.
    """
    path = folder / CARD
    if path.exists() and not is_ours(path):
        return
    front_end = {name: config[name] for name in FRONT_END if name in config}
    front_end |= {} if stats is None else {"mean, std of the log-mels": f"{stats[0]:.4f}, {stats[1]:.4f}"}
    others = {name: config[name] for name in config if name not in (*FRONT_END, "provenance")}
    tables = {
        "Network and front end": others | front_end,
        "Results of the run": results or {},
        "Where it comes from": config.get("provenance") or {},
    }
    text = f"""---
library_name: byola_fast
pipeline_tag: feature-extraction
tags: [audio, self-supervised, byol-a]
---
{MARK}

# {config.get("encoder")}, {config.get("feature_d")}-d

An encoder of audio: waveforms at {config.get("sample_rate")} Hz in, one embedding each out.

```python
import byola_fast

encoder = byola_fast.load_encoder("{weights}")
embedding = encoder(byola_fast.read_audio("sound.wav", encoder.sample_rate))
```

Say here what it heard, under which licence it is, and how it scores on your tasks (`byola-fast eval`).
"""
    for title, rows in tables.items():
        if rows:
            lines = "".join(f"| {name} | {_cell(value)} |\n" for name, value in rows.items())
            text += f"\n## {title}\n\n| | |\n|---|---|\n{lines}"
    write_whole(path, as_text(lambda file: file.write(text)))


def is_ours(path: Path) -> bool:
    """Return whether a file is a model card of ``write_card``."""
    return path.is_file() and MARK in path.read_text(encoding="utf-8", errors="replace")


def _cell(value: Any) -> str:
    return " ".join((f"{value:.6g}" if isinstance(value, float) else str(value)).split()).replace("|", r"\|")


def save_for_hub(folder: str | Path, encoder: nn.Module, config: Mapping[str, Any], stats: tuple[float, float]) -> None:
    """Write ``model.safetensors``, ``config.json`` and a model card to a folder; see ``Embedder.save_pretrained``."""
    folder = Path(folder)
    save_encoder(folder / MODEL, encoder, config=config, stats=stats)  # makes the folder
    content = json.dumps(dict(config) | {"stats": list(stats)}, indent=1) + "\n"
    try:
        write_whole(folder / CONFIG, as_text(lambda file: file.write(content)))
        write_card(folder, config, stats, f"{HUB}USER/{folder.resolve().name}")
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be written: {error.strerror or error}") from error
