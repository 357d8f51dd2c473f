"""Matplotlib figures: import on first use, atomic writes."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from byola_fast.runtime.files import printable, write_whole

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from matplotlib.figure import Figure

logger = logging.getLogger("byola_fast")

NAME_LENGTH = 28  # characters that fit above a picture


def short_name(name: str) -> str:
    """Return a name as plain text, shortened in the middle if it is long."""
    half = (NAME_LENGTH - 1) // 2
    return plain_text(name if len(name) <= NAME_LENGTH else f"{name[:half]}\N{HORIZONTAL ELLIPSIS}{name[-half:]}")


def plain_text(text: str) -> str:
    """Return text that matplotlib draws as it is: between two dollars it would see a formula."""
    return printable(text).replace("$", r"\$")


def new_figure(width: float, height: float) -> Figure:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("pictures need matplotlib: pip install matplotlib") from error
    return Figure(figsize=(width, height), layout="constrained")


def read_picture(path: Path) -> npt.NDArray[np.uint8]:
    """Return a PNG as an array ``(height, width, 3)`` uint8."""
    import matplotlib.image

    pixels: npt.NDArray[np.uint8] = (matplotlib.image.imread(path)[..., :3] * 255).round().astype("uint8")
    return pixels


def save_figure(figure: Figure, path: str | Path) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    kind, kinds = Path(path).suffix[1:].lower() or "png", figure.canvas.get_supported_filetypes()
    if kind not in kinds:
        raise ValueError(f"{path}: expected a name ending in .{', .'.join(sorted(kinds))}")
    with warnings.catch_warnings(record=True) as caught:
        warnings.filterwarnings("always", "Glyph .* missing")  # one for each character and size
        # a Figure made without pyplot renders with Agg and needs no close()
        write_whole(Path(path), lambda file: figure.savefig(file, format=kind, dpi=110))
    others = [each for each in caught if not str(each.message).startswith("Glyph ")]
    for each in others:
        warnings.warn_explicit(each.message, each.category, each.filename, each.lineno)
    if len(others) < len(caught):
        logger.warning("%s: some characters are drawn as boxes: matplotlib's font.family lacks them", path)
