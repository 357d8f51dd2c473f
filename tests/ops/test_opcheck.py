"""torch.library.opcheck of every op: schema, autograd registration, fake tensors, and AOT dispatch."""

from __future__ import annotations

import pytest
import torch

from byola_fast import ops
from byola_fast.ops import _schemas

OPS = torch.ops.byola_fast


def samples(device):
    """Yield (op, arguments), one or more per op."""
    rng = torch.tensor([3, 4], device=device)
    count = torch.tensor(4, device=device)
    lam, index, crop, fader = ops.draw_params(rng, 3, (5, 7), fader_gain=1.0, bank_count=count)
    bank = torch.randn(6, 5, 7, device=device)
    stats = torch.tensor([0.5, 2.0], device=device)
    cursor = torch.zeros(3, dtype=torch.int64, device=device)
    canvas = [5, 10]
    spread = torch.tensor([[0, 5]] * 3, device=device)
    for dtype in (torch.float32, torch.float64, torch.bfloat16):

        def x(dtype=dtype, grad=False, shape=(3, 5, 7)):
            return torch.randn(shape, device=device).to(dtype).requires_grad_(grad)

        mel = (torch.hann_window(6, device=device), torch.rand(3, 5, device=device), spread, stats, 8, 3, True)
        yield "log_mel", (x(grad=True, shape=(2, 20)), *mel)
        yield "log_mel", (x(shape=(20, 2)).T, *mel[:3], None, 8, 3, False)
        yield "log_mel", ((1000 * torch.randn(2, 20, device=device)).short(), *mel)
        longer = (
            torch.hann_window(64, device=device),
            torch.rand(3, 33, device=device),
            6 * spread,
            None,
            64,
            30,
            True,
        )
        yield "log_mel", (x(shape=(2, 100)), *longer)
        yield "log_mel_backward", (x(shape=(2, 3, 7)), x(shape=(2, 20)), *mel)
        yield "log_mixup_exp", (x(grad=True), x(grad=True), lam[0])
        yield "log_mixup_exp", (x().transpose(1, 2), x(shape=(3, 7, 5)), lam[0])
        yield "log_mixup_exp_backward", (x(), x(), x(), lam[0])
        for interpolation in ("bilinear", "bicubic"):
            yield "resize_crop", (x(grad=True), crop[0], [4, 6], canvas, interpolation)
            yield "resize_crop_backward", (x(), crop[0], [5, 7], canvas, interpolation)
        for source in ((None, None, None), (None, bank, count), (x(shape=(9, 5, 7)), bank, count * 0)):
            tail = (*source, stats, lam, index, crop, fader, rng, 7, 0)
            yield "augment_views", (x(grad=source[0] is None), *tail, [4, 6], canvas, "bilinear", "log")
            yield "augment_views_out", (x(), *tail, canvas, "bicubic", "linear", x(shape=(2, 3, 4, 6)))
            more = (*(drawn.repeat(3, *[1] * (drawn.dim() - 1))[:5] for drawn in (lam, index, crop, fader)), rng, 7, 2)
            yield "augment_views", (x(grad=source[0] is None), *source, stats, *more, [2, 3], canvas, "bilinear", "log")
            one = (*(drawn[:1] for drawn in (lam, index, crop, fader)), rng, 7, 1, canvas, "bilinear", "gaussian")
            yield "augment_views_out", (x(), *source, stats, *one, x(shape=(1, 3, 4, 6)))
        backward = (bank, count, stats, lam, index, crop, rng, 7, 0, canvas, "bilinear", "gaussian")
        yield "augment_views_backward", (torch.randn(2, 3, 5, 7, device=device), x(), *backward)
        sums = torch.rand(2, 3, 3, dtype=torch.float64, device=device) + torch.tensor([8.0, 0, 8], device=device)
        yield "sample_sums", (x(grad=True),)
        yield "sample_sums", (x().transpose(0, 2),)
        yield "batch_stats", (sums.clone().requires_grad_(), dtype)
        running = [torch.zeros((), device=device) for _ in range(2)]
        counts = [torch.zeros((), dtype=torch.int64, device=device) for _ in range(2)]
        yield "running_stats_", (*running, *counts, sums[0], 2)
        yield "normalize", (x(grad=True), sums)
        yield "normalize", (x().transpose(1, 2), sums)
        yield "normalize_", (x(), sums)
        for inputs, frozen in ((1, True), (1, False), (2, True), (2, False)):
            images, weight = x(grad=True, shape=(2, inputs, 5, 7)), x(grad=True, shape=(4, inputs, 3, 3))
            bias, gamma, beta = (x(grad=True, shape=(4,)) for _ in range(3))
            mean, variance = x(shape=(4,)), x(shape=(4,)).square() + 0.5
            known = (mean, variance) if frozen else (None, None)
            call = (images, weight, bias if frozen else None, gamma, beta, *known, 1e-5, dtype)
            yield "conv_block", call
            out, *kept = OPS.conv_block(*call)
            for needs_x in (True, False):
                grads = (torch.randn_like(out), images, weight, gamma)
                yield "conv_block_backward", (*(t.detach() for t in (*grads, *kept)), frozen, needs_x)
            state = (torch.zeros(4, device=device), torch.ones(4, device=device), torch.tensor(2, device=device))
            yield "batch_norm_running_", (*state, kept[2].detach(), 70, None if frozen else 0.1)
        yield "bank_push_", (bank.to(torch.float16), cursor, x(), stats)
    yield "draw_params", (rng, count, 3, 3, 0, 7, [2**42, 2**18], [2**42, 2**18], canvas, 0.4, 1.0, 2, 0)
    yield "draw_params", (rng, None, 3, 3, 0, 7, [2**42, 2**18], [2**42, 2**18], canvas, 0.4, 0.0, 3, 2)
    pair = [torch.randn(5, device=device), torch.randn(2, 3, device=device)]
    yield "ema_update_", (pair, [t + 1 for t in pair], torch.tensor(0.9, device=device))


@pytest.mark.slow
@pytest.mark.parametrize("op", _schemas.OPS)
def test_opcheck(op, device):
    calls = [arguments for name, arguments in samples(device) if name == op]
    assert calls
    for arguments in calls:
        torch.library.opcheck(getattr(OPS, op).default, arguments)
