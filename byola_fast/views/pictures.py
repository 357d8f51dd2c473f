"""Pictures of views and of training. matplotlib draws them, and is imported where it is used."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from byola_fast.runtime.files import write_whole

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

VIEW_COLOURS = ("#ff4d5e", "#35c4ff")
LOSS_COLOUR, COLLAPSE_COLOUR, REFUSED_COLOUR = "#1f5fa8", "#1b8a5a", "#b0b0b0"
COLOUR_MAP = "magma"
NAME_LENGTH = 28  # characters of a name that fit above a picture
WRITTEN_CLASSES = 30  # of a confusion matrix whose shares are written as numbers too


@dataclass(frozen=True)
class ViewSteps:
    """How one view came about.

    Attributes:
        lam: weight of the partner.
        partner: ``(F, T)`` what was mixed in; None where there was no partner.
        partner_name: where it comes from.
        mix: ``(F, T)``.
        crop: the box (i, j, h, w) on the virtual canvas.
        fader: what was added at the first and the last frame.
        view: the result.
    """

    lam: float
    partner: Tensor | None
    partner_name: str
    mix: Tensor
    crop: tuple[int, int, int, int]
    fader: tuple[float, float]
    view: Tensor


@dataclass(frozen=True)
class Panel:
    """One sample: ``(F, T)`` pre-normalised input, its name, both its views, and the (mels, frames) of the canvas."""

    name: str
    original: Tensor
    views: tuple[ViewSteps, ViewSteps]
    canvas: tuple[int, int]


def draw_views(path: str | Path, panels: Sequence[Panel], title: str = "") -> None:
    """Draw, for each sample, the original, the partners, the mixes with the crop boxes, and both views.

    Args:
        path: picture to write; its suffix is the format (png, pdf, svg).
        panels: samples, two rows each.
        title: one line above all.

    Raises:
        ImportError: matplotlib is missing; says how to install it. ValueError: no panels, or an unknown suffix.
    """
    if not panels:
        raise ValueError("panels: expected at least one sample, got none")
    figure = _new_figure(width=13.0, height=4.3 * len(panels) + 0.6)
    if title:
        figure.suptitle(title, fontsize=12)
    blocks = figure.subfigures(len(panels), 1, squeeze=False)[:, 0]
    for block, panel in zip(blocks, panels, strict=True):
        frames = panel.original.shape[1]
        grid = block.add_gridspec(2, 4, width_ratios=(1, 1, panel.canvas[1] / frames, 1))
        low, high = _contrast([panel.original, *(view.mix for view in panel.views)])
        axes = block.add_subplot(grid[:, 0])
        _draw_lms(axes, panel.original, low, high)
        axes.set_title(_short(panel.name), fontsize=10, fontweight="bold")
        axes.set_ylabel("mel")
        axes.set_xlabel("frame")
        for row, view in enumerate(panel.views):
            _draw_steps(block, grid, row, view, panel, (low, high))
    _save(figure, path)


def draw_training(path: str | Path, log: Sequence[Mapping[str, Any]], loss: str = "loss") -> None:
    """Draw loss and collapse over the steps of a training log.

    Args:
        path: picture to write; its suffix is the format.
        log: lines of ``log.jsonl``: step, loss and collapse each, and refused (samples kept out of the bank so far).
        loss: what the loss is.

    Raises:
        ImportError: matplotlib is missing; says how to install it. ValueError: an empty log.
    """
    if not log:
        raise ValueError("log: expected at least one line, got none")
    steps = [line["step"] for line in log]
    figure = _new_figure(width=8.0, height=6.0)
    top, bottom = figure.subplots(2, 1, sharex=True)
    for axes, key, colour in ((top, "loss", LOSS_COLOUR), (bottom, "collapse", COLLAPSE_COLOUR)):
        values = [float(line[key]) for line in log]
        axes.plot(steps, values, color=colour, alpha=0.3, linewidth=1, marker="." if len(log) < 3 else None)
        axes.plot(steps, _smooth(values), color=colour, linewidth=2)
        axes.grid(alpha=0.25)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    top.set_title(loss, loc="left", fontsize=11)
    top.set_ylim(bottom=0)
    bottom.axhline(1, color=REFUSED_COLOUR, linewidth=1, linestyle="--")
    bottom.set_title("spread of the projections (1 is healthy, 0 collapsed)", loc="left", fontsize=11)
    bottom.set_ylim(0, 1.1)
    refused = log[-1].get("refused", 0)
    bottom.set_xlabel("step" + (f"  ({refused} samples with NaN or inf kept out of the bank)" if refused else ""))
    _save(figure, path)


def draw_confusion(path: str | Path, matrix: Any, classes: Sequence[str], title: str = "") -> None:
    """Draw a confusion matrix: for each class (row), which share of its clips was taken for which class (column).

    Args:
        path: picture to write; its suffix is the format.
        matrix: ``(classes, classes)`` counts.
        classes: their names.
        title: one line above it.

    Raises:
        ImportError: matplotlib is missing; says how to install it.
    """
    import numpy as np

    counts = np.asarray(matrix)
    share = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    size = min(2.5 + 0.42 * len(classes), 24.0)
    figure = _new_figure(width=size + 1.0, height=size)
    axes = figure.subplots()
    picture = axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    places = range(len(classes))
    names = [_short(name) for name in classes]
    axes.set_xticks(places, names, rotation=90, fontsize=8)
    axes.set_yticks(places, names, fontsize=8)
    axes.set_xlabel("taken for")
    axes.set_ylabel("is")
    if len(classes) <= WRITTEN_CLASSES:
        for row, column in np.argwhere(counts > 0):
            colour = "white" if share[row, column] > 0.5 else "black"
            told = f"{100 * share[row, column]:.0f}"
            axes.text(column, row, told, ha="center", va="center", fontsize=7, color=colour)
    figure.colorbar(picture, ax=axes, shrink=0.7, label="share of the class")
    if title:
        axes.set_title(title, fontsize=10, loc="left")
    _save(figure, path)


def _draw_steps(block: Any, grid: Any, row: int, view: ViewSteps, panel: Panel, contrast: tuple[float, float]) -> None:
    """Draw one row: partner, mix on the canvas with its crop box, view."""
    from matplotlib import colormaps
    from matplotlib.patches import Rectangle

    colour = VIEW_COLOURS[row]
    partner, mix, result = (block.add_subplot(grid[row, column]) for column in (1, 2, 3))
    if view.partner is None:
        partner.set_axis_off()
        partner.text(0.5, 0.5, "no partner", ha="center", va="center", transform=partner.transAxes, color="gray")
    else:
        _draw_lms(partner, view.partner, *_contrast([view.partner]))
        partner.set_title(f"partner: {_short(view.partner_name)}", fontsize=9)

    mels, frames = view.mix.shape
    i, j, h, w = view.crop
    top, left = (panel.canvas[0] - mels) // 2, (panel.canvas[1] - frames) // 2
    _draw_lms(mix, view.mix, *contrast, extent=(left - 0.5, left + frames - 0.5, top - 0.5, top + mels - 0.5))
    mix.set_facecolor(colormaps[COLOUR_MAP]((0 - contrast[0]) / (contrast[1] - contrast[0])))  # the canvas' zeros
    mix.vlines((left - 0.5, left + frames - 0.5), top - 0.5, top + mels - 0.5, colors="white", linestyles=":", lw=1)
    mix.set_xlim(-0.5, panel.canvas[1] - 0.5)
    mix.set_ylim(-0.5, panel.canvas[0] - 0.5)
    mix.add_patch(Rectangle((j - 0.5, i - 0.5), w, h, fill=False, edgecolor=colour, linewidth=2.5, clip_on=False))
    mixed = "not mixed" if view.partner is None else f"mix, lam {view.lam:.2f}"
    mix.set_title(f"{mixed}   crop: mels {i}+{h}, frames {j}+{w}", fontsize=9)

    _draw_lms(result, view.view, *_contrast([view.view]))
    head, tail = view.fader
    faded = f", fader {head:+.2f} to {tail:+.2f}" if (head, tail) != (0, 0) else ""
    result.set_title(f"view {row + 1}{faded}", fontsize=9, color=colour, fontweight="bold")
    for spine in result.spines.values():
        spine.set_edgecolor(colour)
        spine.set_linewidth(2.5)
    if row == 0:
        for axes in (partner, mix, result):
            axes.tick_params(labelbottom=False)


def _draw_lms(
    axes: Axes, lms: Tensor, low: float, high: float, extent: tuple[float, float, float, float] | None = None
) -> None:
    axes.imshow(
        lms.detach().float().cpu().numpy(),
        cmap=COLOUR_MAP,
        aspect="auto",
        origin="lower",
        interpolation="nearest",
        vmin=low,
        vmax=high,
        extent=extent,
    )
    axes.tick_params(labelsize=7, length=2)


def _short(name: str) -> str:
    """Leave out the middle of a long name."""
    half = (NAME_LENGTH - 1) // 2
    return name if len(name) <= NAME_LENGTH else f"{name[:half]}\N{HORIZONTAL ELLIPSIS}{name[-half:]}"


def _contrast(pictures: Sequence[Tensor]) -> tuple[float, float]:
    """Return values for black and white that leave out the extremes: the 1st and the 99.5th percentile."""
    import numpy as np

    values = np.concatenate([lms.detach().float().cpu().numpy().ravel() for lms in pictures])
    values = values[np.isfinite(values)]
    if not len(values):
        return 0.0, 1.0
    low, high = np.percentile(values, (1, 99.5))
    return float(low), float(max(high, low + 1e-3))


def _smooth(values: Sequence[float]) -> list[float]:
    """Return a centred moving average over a twentieth of the values to each side; shorter at the ends."""
    reach, sums = len(values) // 20, [0.0, *accumulate(values)]
    ends = ((max(0, k - reach), min(len(values), k + reach + 1)) for k in range(len(values)))
    return [(sums[last] - sums[first]) / (last - first) for first, last in ends]


def _new_figure(width: float, height: float) -> Figure:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('pictures need matplotlib: pip install "byola_fast[eval]"') from error
    return Figure(figsize=(width, height), layout="constrained")


def _save(figure: Figure, path: str | Path) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    kind = Path(path).suffix[1:] or "png"
    # a Figure outside pyplot renders by Agg, and stays in no global list
    write_whole(Path(path), lambda file: figure.savefig(file, format=kind, dpi=110), writer=f".{os.getpid()}")
