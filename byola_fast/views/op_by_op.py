"""A call op by op: draw the parameters of all views, make the views of one size at a time, normalise them jointly."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from byola_fast import ops
from byola_fast.views.params import AugmentParams, Settings


class Group(NamedTuple):
    """Views of one size: their settings, their number, and the number of the first."""

    settings: Settings
    views: int = 2
    first: int = 0

    def canvas(self, x: Tensor) -> tuple[int, int]:
        """Return (mels, frames) of the virtual canvas of ``x (B, F, T)``."""
        return ops.canvas_size(x.shape[1], x.shape[2], self.settings.virtual_crop_scale)


def draw(
    rng: Tensor,
    x: Tensor,
    groups: Sequence[Group],
    *,
    sample_offset: int,
    bank_count: Tensor | None = None,
    pool: int | None = None,
    pool_offset: int = 0,
) -> AugmentParams:
    """Draw the parameters of all groups."""
    drawn = [
        ops.draw_params(
            rng,
            x.shape[0],
            (x.shape[1], x.shape[2]),
            mixup_ratio=settings.mixup_ratio,
            freq_scale=settings.freq_scale,
            time_scale=settings.time_scale,
            virtual_crop_scale=settings.virtual_crop_scale,
            fader_gain=settings.fader_gain,
            bank_count=bank_count,
            pool=pool,
            pool_offset=pool_offset,
            sample_offset=sample_offset,
            views=views,
            first_view=first,
        )
        for settings, views, first in groups
    ]
    lam, bank_index, crop, fader = drawn[0] if len(drawn) == 1 else map(torch.cat, zip(*drawn, strict=True))
    return AugmentParams(lam, bank_index, crop, fader, rng, bank_count, sample_offset)


def make_views(
    x: Tensor,
    params: AugmentParams,
    group: Group,
    *,
    stats: Tensor | None,
    out: Tensor | None,
    bank: Tensor | None = None,
    pool: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Make a group's views, ``(views, B, *size)``, not yet post-normalised, and their sums."""
    lam, bank_index, crop, fader = params.lam, params.bank_index, params.crop, params.fader
    if group.views != len(lam):
        own = slice(group.first, group.first + group.views)
        lam, bank_index, crop, fader = lam[own], bank_index[own], crop[own], fader[own]
    return ops.augment_views(
        x,
        lam,
        bank_index,
        crop,
        fader,
        params.rng,
        pool=pool,
        bank=bank,
        bank_count=None if bank is None else params.bank_count,
        stats=stats,
        sample_offset=params.sample_offset,
        first_view=group.first,
        size=group.settings.size,
        canvas=group.canvas(x),
        interpolation=group.settings.interpolation,
        mixup=group.settings.mixup,
        out=out,
    )


def normalized(views: Tensor, sums: Tensor) -> Tensor:
    """Return the views post-normalised, in place unless a gradient needs them."""
    return ops.normalize(views, sums, inplace=not (torch.is_grad_enabled() and views.requires_grad))
