"""The picture of a training log: loss and spread over the steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from byola_fast.runtime.figures import new_figure, plain_text, save_figure
from byola_fast.views.pictures import LOSS_COLOUR, REFUSED_COLOUR, SPREAD_COLOUR


def draw_training(path: str | Path, log: Sequence[Mapping[str, Any]], loss: str = "loss") -> None:
    """Draw loss and spread over the steps of a training log.

    Args:
        path: picture to write; its suffix is the format.
        log: lines of ``log.jsonl``, with step, loss, spread and refused (samples kept out of the bank so far).
        loss: title of the loss.

    Raises:
        ImportError: matplotlib is missing; says how to install it. ValueError: an empty log.
    """
    if not log:
        raise ValueError("log: expected at least one line, got none")
    steps = [line["step"] for line in log]
    figure = new_figure(width=8.0, height=6.0)
    top, bottom = figure.subplots(2, 1, sharex=True)
    for axes, key, colour in ((top, "loss", LOSS_COLOUR), (bottom, "spread", SPREAD_COLOUR)):
        values = [float(line[key]) for line in log]
        axes.plot(steps, values, color=colour, alpha=0.3, linewidth=1, marker="." if len(log) < 3 else None)
        axes.plot(steps, _smooth(values), color=colour, linewidth=2)
        axes.grid(alpha=0.25)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    top.set_title(plain_text(loss), loc="left", fontsize=11)
    top.set_ylim(bottom=0)
    bottom.axhline(1, color=REFUSED_COLOUR, linewidth=1, linestyle="--")
    bottom.set_title("spread of the projections (1 is healthy, 0 collapsed)", loc="left", fontsize=11)
    bottom.set_ylim(0, 1.1)
    refused = log[-1].get("refused", 0)
    bottom.set_xlabel("step" + (f"  ({refused} samples with NaN or inf kept out of the bank)" if refused else ""))
    save_figure(figure, path)


def _smooth(values: Sequence[float]) -> list[float]:
    """Return a centred moving average over a twentieth of the values on each side, shorter at the ends."""
    reach, sums = len(values) // 20, [0.0, *accumulate(values)]
    ends = ((max(0, k - reach), min(len(values), k + reach + 1)) for k in range(len(values)))
    return [(sums[last] - sums[first]) / (last - first) for first, last in ends]
