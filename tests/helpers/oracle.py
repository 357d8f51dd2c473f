"""The method sample by sample in float64, written from the papers' definitions and sharing no code with the package.

Only drawn parameters are taken from the package; tests of the draw check those.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

EPS = 2.0**-23


def log_mixup_exp(x, z, lam):
    x, z = x.double(), z.double()
    weight = lam.double().view(-1, *[1] * (x.dim() - 1))
    return torch.log((1 - weight) * x.exp() + weight * z.exp() + EPS)


def resize_crop(x, crop, size, canvas, interpolation):
    """Build each canvas, cut each box, resize each box."""
    views = []
    for sample, (i, j, h, w) in zip(x.double().cpu(), crop.tolist(), strict=True):
        full = torch.zeros(canvas, dtype=torch.float64)
        top, left = ((c - n) // 2 for c, n in zip(canvas, sample.shape, strict=True))
        full[top : top + sample.shape[0], left : left + sample.shape[1]] = sample
        box = full[None, None, i : i + h, j : j + w]
        views.append(F.interpolate(box, size, mode=interpolation, align_corners=True)[0, 0])
    return torch.stack(views) if views else torch.zeros(0, *size, dtype=torch.float64)


def views(x, params, *, size=None, canvas=None, interpolation="bilinear", mixup="log", stats=(0.0, 1.0), bank=None):
    """All views before post-normalisation, ``(V, B, *size)``."""
    x = (x.double().cpu() - stats[0]) / max(stats[1], EPS)
    size = tuple(x.shape[1:]) if size is None else size
    canvas = (x.shape[1], int(1.5 * x.shape[2])) if canvas is None else canvas
    rows = x if bank is None else bank.double().cpu()
    result = torch.zeros(len(params.lam), x.shape[0], *size, dtype=torch.float64)
    for view in range(len(result)):
        for b in range(x.shape[0]):
            partner, lam = int(params.bank_index[view, b]), params.lam[view, b].double().cpu()
            mixed = x[b]
            if mixup == "log" and partner >= 0:
                mixed = log_mixup_exp(x[b][None], rows[partner][None], lam[None])[0]
            elif mixup == "linear" and partner >= 0:
                mixed = (1 - lam) * x[b] + lam * rows[partner]
            crop = params.crop[view, b][None].cpu()
            mixed = resize_crop(mixed[None], crop, size, canvas, interpolation)[0]
            head, tail = params.fader[view, b].tolist()
            result[view, b] = mixed + torch.linspace(head, tail, size[1], dtype=torch.float64)
    return result


def normalize(views):
    """One mean and one unbiased std over all views."""
    std = views.std() if views.numel() > 1 else torch.zeros(())
    return (views - views.mean()) / max(float(std), EPS)


def random_crops(batch, canvas, generator=None):
    """Any box that fits the canvas."""
    boxes = []
    for _ in range(batch):
        h, w = (int(torch.randint(1, c + 1, (), generator=generator)) for c in canvas)
        i = int(torch.randint(0, canvas[0] - h + 1, (), generator=generator))
        j = int(torch.randint(0, canvas[1] - w + 1, (), generator=generator))
        boxes.append((i, j, h, w))
    return torch.tensor(boxes, dtype=torch.int32).reshape(batch, 4)


def philox_normal(words):
    """Two standard normals of two 24-bit draws."""
    radius = math.sqrt(-2 * math.log((words[0] + 1) / 2**24))
    angle = 2 * math.pi * words[1] / 2**24
    return radius * math.cos(angle), radius * math.sin(angle)
