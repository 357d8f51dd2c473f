"""The picture of a training log."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from byola_fast.runtime.figures import new_figure, plain_text, save_figure
from byola_fast.views.pictures import LOSS_COLOUR, REFUSED_COLOUR, SPREAD_COLOUR

PROBE_COLOUR = "#b3541e"


def draw_training(path: str | Path, log: Sequence[Mapping[str, Any]], loss: str = "loss", name: str = "") -> None:
    """Draw a training log over the steps: loss, spread, effective rank, learning rate and the probe's score.

    Args:
        path: picture to write; its suffix is the format.
        log: lines of ``log.jsonl``, with step, loss, spread and refused (samples kept out of the bank so far); what no
            line has gets no panel.
        loss: title of the loss.
        name: of the run, above all.

    Raises:
        ImportError: matplotlib is missing; says how to install it. ValueError: an empty log.
    """
    if not log:
        raise ValueError("log: expected at least one line, got none")
    panels = {
        "loss": (plain_text(loss), LOSS_COLOUR),
        "spread": ("spread of the projections (1 is healthy, 0 collapsed)", SPREAD_COLOUR),
        "effective_rank": ("effective rank of the projections (1 collapsed onto a line)", SPREAD_COLOUR),
        "lr": ("learning rate", LOSS_COLOUR),
        "probe": ("score of the probe, on clips that it did not learn from", PROBE_COLOUR),
    }
    shown = {key: panel for key, panel in panels.items() if any(key in line for line in log)}
    figure = new_figure(width=8.0, height=0.4 + 2.1 * len(shown))
    if name:
        figure.suptitle(plain_text(name), fontsize=12)
    axes = figure.subplots(len(shown), 1, sharex=True, squeeze=False)[:, 0]
    for each, (key, (title, colour)) in zip(axes, shown.items(), strict=True):
        lines = [line for line in log if key in line]
        steps, values = [line["step"] for line in lines], [float(line[key]) for line in lines]
        rare = len(lines) < 3 or key == "probe"
        smooth = key not in ("lr", "probe")
        each.plot(steps, values, color=colour, alpha=0.3 if smooth else 1, linewidth=1, marker="." if rare else None)
        if smooth:
            each.plot(steps, _smooth(values), color=colour, linewidth=2)
        each.set_title(title, loc="left", fontsize=11)
        each.grid(alpha=0.25)
        for side in ("top", "right"):
            each.spines[side].set_visible(False)
        if key != "probe":
            each.set_ylim(bottom=0, top=1.1 if key == "spread" else None)
        if key == "spread":
            each.axhline(1, color=REFUSED_COLOUR, linewidth=1, linestyle="--")
    refused = log[-1].get("refused", 0)
    axes[-1].set_xlabel("step" + (f"  ({refused} samples with NaN or inf kept out of the bank)" if refused else ""))
    save_figure(figure, path)


def _smooth(values: Sequence[float]) -> list[float]:
    """Return a centred moving average over a twentieth of the values on each side, shorter at the ends."""
    reach, sums = len(values) // 20, [0.0, *accumulate(values)]
    ends = ((max(0, k - reach), min(len(values), k + reach + 1)) for k in range(len(values)))
    return [(sums[last] - sums[first]) / (last - first) for first, last in ends]
