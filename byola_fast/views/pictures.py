"""Pictures of views and of training. matplotlib draws them, and is imported where it is used."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from byola_fast.runtime.figures import new_figure, plain_text, save_figure, short_name
from byola_fast.spectrograms.log_mel import LogMel
from byola_fast.views.explain import Panel, ViewSteps

if TYPE_CHECKING:
    from matplotlib.axes import Axes

VIEW_COLOURS = ("#ff4d5e", "#35c4ff")
LOSS_COLOUR, SPREAD_COLOUR, REFUSED_COLOUR = "#1f5fa8", "#1b8a5a", "#b0b0b0"
COLOUR_MAP = "magma"
OCTAVES = (62.5, 125, 250, 500, 1000, 2000, 4000, 8000, 16000)  # Hz


def draw_views(path: str | Path, panels: Sequence[Panel], title: str = "", to_lms: LogMel | None = None) -> None:
    """Draw, for each sample, the original, the partners, the mixes with the crop boxes, and both views.

    Args:
        path: picture to write; its suffix is the format (png, pdf, svg).
        panels: samples, two rows each.
        title: one line above all.
        to_lms: the front end, for axes in Hz and seconds; without it they count mels and frames.

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
        mels, frames = panel.original.shape
        grid = block.add_gridspec(2, 4, width_ratios=(1, 1, panel.canvas[1] / frames, 1))
        contrast = _contrast([panel.original, *(view.mix for view in panel.views)])
        scales = _scales(mels, frames, to_lms)
        axes = block.add_subplot(grid[:, 0])
        picture = _draw_lms(axes, panel.original, contrast)
        axes.set_title(short_name(panel.name), fontsize=10, fontweight="bold")
        _mark(axes, scales, labels=True)
        for row, view in enumerate(panel.views):
            _draw_steps(block, grid, row, view, panel, contrast, scales)
        bar = block.colorbar(picture, ax=block.axes, fraction=0.012, pad=0.005)
        bar.set_label("log-mel, in std from the mean", fontsize=8)
        bar.ax.tick_params(labelsize=7, length=2)
    save_figure(figure, path)


class _Scale(NamedTuple):
    """Ticks of an axis: what it shows, where, and as what."""

    label: str
    places: list[float]
    texts: list[str]


def _scales(mels: int, frames: int, to_lms: LogMel | None) -> tuple[_Scale, _Scale]:
    """Return the ticks of time and of frequency, in frames and mels from the first."""
    import numpy as np

    if to_lms is None:
        counts = [list(range(0, size, 20)) for size in (frames, mels)]
        time, frequency = ([*map(float, each)] for each in counts)
        return _Scale("frame", time, [*map(str, counts[0])]), _Scale("mel", frequency, [*map(str, counts[1])])
    seconds = frames * to_lms.hop_length / to_lms.sample_rate
    step = next(step for step in (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, seconds) if seconds / step <= 6)
    times = np.arange(0, seconds - step / 4, step)
    bank = to_lms.filter_bank.double().cpu()
    hertz = torch.arange(bank.shape[1], dtype=torch.float64) * to_lms.sample_rate / to_lms.n_fft
    centres = ((bank @ hertz) / bank.sum(1).clamp_min(1e-12)).numpy()
    shown: list[float] = []
    places: list[float] = []
    for each in OCTAVES:
        place = float(np.interp(each, centres, np.arange(mels)))
        if centres[0] <= each <= centres[-1] and (not places or place >= places[-1] + mels / 14):
            shown.append(each)
            places.append(place)
    names = [f"{each / 1000:g}k" if each >= 1000 else f"{each:g}" for each in shown]
    per_frame = to_lms.sample_rate / to_lms.hop_length
    return _Scale("s", (times * per_frame).tolist(), [f"{each:g}" for each in times]), _Scale("Hz", places, names)


def _mark(axes: Axes, scales: tuple[_Scale, _Scale], *, labels: bool, left: int = 0, top: int = 0) -> None:
    """Put ticks on both axes of a spectrogram whose first frame and mel lie at ``left`` and ``top``."""
    time, frequency = scales
    axes.set_xticks([place + left for place in time.places], time.texts)
    axes.set_yticks([place + top for place in frequency.places], frequency.texts)
    axes.set_xlabel(time.label if labels else "", fontsize=8)
    axes.set_ylabel(frequency.label if labels else "", fontsize=8)


def _draw_steps(
    block: Any,
    grid: Any,
    row: int,
    view: ViewSteps,
    panel: Panel,
    contrast: tuple[float, float],
    scales: tuple[_Scale, _Scale],
) -> None:
    """Draw one row: partner, mix on the canvas with its crop box, view."""
    from matplotlib import colormaps
    from matplotlib.patches import Rectangle

    colour = VIEW_COLOURS[row]
    partner, mix, result = (block.add_subplot(grid[row, column]) for column in (1, 2, 3))
    if view.partner is None:
        partner.set_axis_off()
        partner.text(0.5, 0.5, "no partner", ha="center", va="center", transform=partner.transAxes, color="gray")
    else:
        _draw_lms(partner, view.partner, contrast)
        partner.set_title(f"partner: {short_name(view.partner_name)}", fontsize=9)
        _mark(partner, scales, labels=False)

    mels, frames = view.mix.shape
    i, j, h, w = view.crop
    top, left = (panel.canvas[0] - mels) // 2, (panel.canvas[1] - frames) // 2
    zero = colormaps[COLOUR_MAP]((0 - contrast[0]) / (contrast[1] - contrast[0]))
    whole = (-0.5, -0.5), panel.canvas[1], panel.canvas[0]
    mix.add_patch(Rectangle(*whole, facecolor=zero, edgecolor="gray", hatch="///", linewidth=0, zorder=0))
    _draw_lms(mix, view.mix, contrast, extent=(left - 0.5, left + frames - 0.5, top - 0.5, top + mels - 0.5))
    mix.set_xlim(-0.5, panel.canvas[1] - 0.5)
    mix.set_ylim(-0.5, panel.canvas[0] - 0.5)
    _mark(mix, scales, labels=False, left=left, top=top)
    mix.add_patch(Rectangle((j - 0.5, i - 0.5), w, h, fill=False, edgecolor=colour, linewidth=2.5, clip_on=False))
    mixed = "not mixed" if view.partner is None else f"mix, lam {view.lam:.2f}"
    mix.set_title(f"{mixed}   crop: mels {i}+{h}, frames {j}+{w}", fontsize=9)

    _draw_lms(result, view.view, contrast)
    head, tail = view.fader
    faded = f", fader {head:+.2f} to {tail:+.2f}" if (head, tail) != (0, 0) else ""
    result.set_title(f"view {row + 1}{faded}", fontsize=9, color=colour, fontweight="bold")
    result.set_xticks([])  # the crop is resized
    result.set_yticks([])
    for spine in result.spines.values():
        spine.set_edgecolor(colour)
        spine.set_linewidth(2.5)
    if row == 0:
        for axes in (partner, mix):
            axes.tick_params(labelbottom=False)


def _draw_lms(
    axes: Axes, lms: Tensor, contrast: tuple[float, float], extent: tuple[float, float, float, float] | None = None
) -> Any:
    picture = axes.imshow(
        lms.detach().float().cpu().numpy(),
        cmap=COLOUR_MAP,
        aspect="auto",
        origin="lower",
        interpolation="nearest",
        vmin=contrast[0],
        vmax=contrast[1],
        extent=extent,
    )
    axes.tick_params(labelsize=7, length=2)
    return picture


def _contrast(pictures: Sequence[Tensor]) -> tuple[float, float]:
    """Return values for black and white that leave out the extremes: the 1st and the 99.5th percentile."""
    import numpy as np

    values = np.concatenate([lms.detach().float().cpu().numpy().ravel() for lms in pictures])
    values = values[np.isfinite(values)]
    if not len(values):
        return 0.0, 1.0
    low, high = np.percentile(values, (1, 99.5))
    return float(low), float(max(high, low + 1e-3))
