"""The steps that lead to each view, for pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from byola_fast import ops
from byola_fast.ops import _checks as check
from byola_fast.ops.reference import pre_norm_reference
from byola_fast.spectrograms.statistics import batch_stats, given_stats
from byola_fast.views.augment import augment
from byola_fast.views.params import resolve_settings


@dataclass(frozen=True)
class ViewSteps:
    """The steps that lead to one view.

    Attributes:
        lam: weight of the partner.
        partner: ``(F, T)``; None for no partner.
        partner_name: its segment.
        mix: ``(F, T)``.
        crop: the box (i, j, h, w) on the virtual canvas.
        fader: values added at the first and the last frame.
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


def explain_views(
    lms: Tensor,
    names: Sequence[str],
    *,
    samples: int,
    preset: str,
    seed: int,
    stats: tuple[float, float] | None = None,
    **settings: Any,
) -> list[Panel]:
    """Augment a batch and return, for its first samples, the steps that lead to their views.

    Args:
        lms: ``(B, 1, F, T)``.
        names: of the B segments.
        samples: number of panels, at most B.
        preset, seed, stats, settings: as in ``augment``.
    """
    chosen = resolve_settings(preset, settings)
    check.require_one_of("mixup", chosen.mixup, ("log",))  # a panel shows one partner and its log-mix
    view1, view2, params = augment(lms, preset=preset, stats=stats, seed=seed, return_params=True, **settings)
    views = torch.stack([view1, view2])[:, :, 0]
    x = pre_norm_reference(lms, batch_stats(lms) if stats is None else given_stats(stats, lms.device))[:, 0]
    canvas = ops.canvas_size(x.shape[1], x.shape[2], chosen.virtual_crop_scale)

    def steps(view: int, sample: int) -> ViewSteps:
        row, lam = int(params.bank_index[view, sample]), params.lam[view, sample]
        partner = x[row] if row >= 0 else None
        mix = x[sample] if partner is None else ops.log_mixup_exp(x[sample, None], partner[None], lam[None])[0]
        i, j, h, w = params.crop[view, sample].tolist()
        head, tail = params.fader[view, sample].tolist()
        name = names[row] if row >= 0 else ""
        return ViewSteps(float(lam), partner, name, mix, (i, j, h, w), (head, tail), views[view, sample])

    return [
        Panel(names[sample], x[sample], (steps(0, sample), steps(1, sample)), canvas)
        for sample in range(min(samples, len(lms)))
    ]
