"""Pictures of views and of training. matplotlib draws them, and is imported where it is used."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from byola_fast.runtime.figures import new_figure, plain_text, save_figure, short_name
from byola_fast.views.explain import Panel, ViewSteps

if TYPE_CHECKING:
    from matplotlib.axes import Axes

VIEW_COLOURS = ("#ff4d5e", "#35c4ff")
LOSS_COLOUR, SPREAD_COLOUR, REFUSED_COLOUR = "#1f5fa8", "#1b8a5a", "#b0b0b0"
COLOUR_MAP = "magma"


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
    figure = new_figure(width=13.0, height=4.3 * len(panels) + 0.6)
    if title:
        figure.suptitle(plain_text(title), fontsize=12)
    blocks = figure.subfigures(len(panels), 1, squeeze=False)[:, 0]
    for block, panel in zip(blocks, panels, strict=True):
        frames = panel.original.shape[1]
        grid = block.add_gridspec(2, 4, width_ratios=(1, 1, panel.canvas[1] / frames, 1))
        low, high = _contrast([panel.original, *(view.mix for view in panel.views)])
        axes = block.add_subplot(grid[:, 0])
        _draw_lms(axes, panel.original, low, high)
        axes.set_title(short_name(panel.name), fontsize=10, fontweight="bold")
        axes.set_ylabel("mel")
        axes.set_xlabel("frame")
        for row, view in enumerate(panel.views):
            _draw_steps(block, grid, row, view, panel, (low, high))
    save_figure(figure, path)


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
        partner.set_title(f"partner: {short_name(view.partner_name)}", fontsize=9)

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


def _contrast(pictures: Sequence[Tensor]) -> tuple[float, float]:
    """Return values for black and white that leave out the extremes: the 1st and the 99.5th percentile."""
    import numpy as np

    values = np.concatenate([lms.detach().float().cpu().numpy().ravel() for lms in pictures])
    values = values[np.isfinite(values)]
    if not len(values):
        return 0.0, 1.0
    low, high = np.percentile(values, (1, 99.5))
    return float(low), float(max(high, low + 1e-3))
