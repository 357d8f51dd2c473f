"""Matplotlib figures: import on first use, atomic writes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from byola_fast.runtime.files import write_whole

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NAME_LENGTH = 28  # characters that fit above a picture


def short_name(name: str) -> str:
    """Shorten a long name in the middle."""
    half = (NAME_LENGTH - 1) // 2
    return name if len(name) <= NAME_LENGTH else f"{name[:half]}\N{HORIZONTAL ELLIPSIS}{name[-half:]}"


def new_figure(width: float, height: float) -> Figure:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('pictures need matplotlib: pip install "byola_fast[eval]"') from error
    return Figure(figsize=(width, height), layout="constrained")


def save_figure(figure: Figure, path: str | Path) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    kind = Path(path).suffix[1:] or "png"
    # a Figure made without pyplot renders with Agg and needs no close()
    write_whole(Path(path), lambda file: figure.savefig(file, format=kind, dpi=110))
