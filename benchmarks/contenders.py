"""Contenders for two views of a batch: the same inputs and parameters, with post-normalisation.

Inputs are pre-normalised; partners come from the same batch. ``loop``, ``reference`` and ``compiled`` receive the drawn
parameters (the loop as Python numbers). ``byola_fast`` is the public call, which draws the same parameters and applies
``stats`` inside the measured time; both count against it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import byola_fast
from benchmarks.measure import Contender, Place, input_sets
from byola_fast.ops import _schemas, reference
from byola_fast.ops._dispatch import backend_in_use
from byola_fast.ops.functional import canvas_size, size_range

MELS, FRAMES = 64, 96
MIXUP_RATIO, SCALE = 0.4, (0.6, 1.5)  # byola-v1
SEED = 20210311
EPS = torch.finfo(torch.float32).eps
CHUNK = 64  # samples per chunk, so that the float64 reference stays in cache
VIEW_OPS = ("draw_params", "augment_views_out", "normalize_")

Params = tuple[Tensor, Tensor, Tensor, Tensor]  # lam (2, B), bank_index (2, B), crop (2, B, 4), fader (2, B, 2)
LoopParams = list[list[tuple[float, int, list[int]]]]  # view, sample: lam, partner, (i, j, h, w)


def backend_of(device: str, ops: Sequence[str]) -> str:
    """Return the backend of these ops on a device, with the names of the ops that the reference runs."""
    names = {op: backend_in_use(device.upper(), op)[0] for op in ops if op in _schemas.OPS}
    left = [op for op, name in names.items() if name == "reference"]
    others = sorted({name for name in names.values() if name != "reference"})
    if left and others:
        return f"{', '.join(others)}; reference for {', '.join(left)}"
    return ", ".join(others) or ("reference" if left else "torch")


# the sample-by-sample pipeline


def mix_one(x: Tensor, z: Tensor, lam: float) -> Tensor:
    """Mix one spectrogram ``(1, F, T)`` with another on the linear scale."""
    return torch.log((1 - lam) * torch.exp(x) + lam * torch.exp(z) + EPS)


def crop_one(x: Tensor, box: Sequence[int], interpolation: str) -> Tensor:
    """Cut a box from the zero-padded canvas of one spectrogram ``(1, F, T)`` and resize it."""
    mels, frames = x.shape[1:]
    rows, columns = canvas_size(mels, frames)
    top, left = (rows - mels) // 2, (columns - frames) // 2
    canvas = torch.zeros(1, rows, columns, dtype=x.dtype, device=x.device)
    canvas[:, top : top + mels, left : left + frames] = x
    i, j, h, w = box
    return F.interpolate(
        canvas[None, :, i : i + h, j : j + w], size=(mels, frames), mode=interpolation, align_corners=True
    )[0]


def views_loop(x: Tensor, params: LoopParams, interpolation: str) -> tuple[Tensor, ...]:
    """Make two views of ``x (B, F, T)`` one sample at a time, as common pipelines do, by the paper's definition."""
    views = []
    for view in params:
        made = []
        for sample, (lam, partner, box) in enumerate(view):
            mixed = x[sample][None] if partner < 0 else mix_one(x[sample][None], x[partner][None], lam)
            made.append(crop_one(mixed, box, interpolation)[0])
        views.append(torch.stack(made))
    both = torch.stack(views)
    return ((both - both.mean()) / both.std().clamp_min(EPS)).unbind(0)


def loop_params(params: Params) -> LoopParams:
    """Return parameters as Python numbers."""
    lam, partner, crop, _fader = (p.tolist() for p in params)
    return [list(zip(lam[view], partner[view], crop[view], strict=True)) for view in range(2)]


# plain PyTorch over the whole batch


def draw(x: Tensor, step: int) -> Params:
    """Draw byola-v1's parameters for a batch, as ``byola_fast.augment(x, seed=SEED, step=step)`` does."""
    batch, mels, frames = x.shape
    sizes = list(size_range("freq_scale", mels, SCALE)), list(size_range("time_scale", frames, SCALE))
    rng = torch.tensor([SEED, step], device=x.device)
    canvas = list(canvas_size(mels, frames))
    return reference.draw_params_reference(rng, None, batch, batch, 0, 0, *sizes, canvas, MIXUP_RATIO, 0.0, 2, 0)


def views_sums(x: Tensor, pool: Tensor, params: Params, interpolation: str) -> tuple[Tensor, Tensor]:
    """Return views ``(2, B, F, T)`` before post-normalisation, and their sums."""
    out = x.new_empty(2, *x.shape)
    rng = params[1].new_zeros(2)  # only the Gaussian mixer reads it
    canvas = list(canvas_size(*x.shape[1:]))
    given = (x, pool, None, None, None, *params, rng, 0, 0, canvas, interpolation, "log")
    return out, reference.augment_views_out_reference(*given, out)


def views_reference(x: Tensor, params: Params, interpolation: str) -> tuple[Tensor, ...]:
    """Make two views with the plain PyTorch reference, called directly, so that the dispatcher picks no kernel."""
    return reference.normalize_reference(*views_sums(x, x, params, interpolation)).unbind(0)


def views_exact(x: Tensor, params: Params, interpolation: str) -> tuple[Tensor, ...]:
    """Compute both views with the float64 reference, chunk by chunk."""
    lam, partner, crop, fader = params
    wide, parts = x.double(), []
    for start in range(0, len(x), CHUNK):
        rows = slice(start, start + CHUNK)
        given = lam[:, rows], partner[:, rows], crop[:, rows], fader[:, rows]
        parts.append(views_sums(wide[rows], wide, given, interpolation))
    views, sums = (torch.cat(pieces, dim=1) for pieces in zip(*parts, strict=True))
    return reference.normalize_reference(views, sums).unbind(0)


# contenders


class Batches:
    """Rotating input sets of one batch size: fresh noise, and the parameters of each set.

    Call number k uses set ``k % count`` and step ``k % count``.
    """

    def __init__(self, batch: int, device: str, size: tuple[int, int] = (MELS, FRAMES)) -> None:
        self.samples = batch
        self.device = device
        self.shape = (batch, *size)
        self.bytes = 4 * batch * size[0] * size[1]  # of one float32 input, and of one view
        self.count = input_sets(self.bytes, device)
        self.x = [torch.randn(self.shape, device=device) for _ in range(self.count)]
        self.params = [draw(x, step) for step, x in enumerate(self.x)]
        self.stats = torch.tensor([0.0, 1.0], device=device)

        self.exact = functools.lru_cache(maxsize=1)(self._exact)

    def _exact(self, interpolation: str, number: int) -> tuple[Tensor, ...]:
        return views_exact(self.x[number % self.count], self.params[number % self.count], interpolation)

    def new_views(self) -> Tensor:
        return torch.empty(2, *self.shape, device=self.device)

    def contender(
        self, name: str, run: Callable[[int], Sequence[Tensor]], expected: Any, place: Place, moved: float, **more: Any
    ) -> Contender:
        """Return a contender that moves ``moved`` times one input's bytes."""
        shapes = {"lms": self.shape, "views": (2, *self.shape)}
        return Contender(name, run, expected, place, shapes, self.samples, round(moved * self.bytes), **more)


def view_contenders(data: Batches, place: Place, interpolation: str, names: Sequence[str]) -> list[Contender]:
    """Return the named contenders for two views; the work reads x and two partners and writes two views, 5 inputs."""
    compiled = torch.compile(views_reference, dynamic=False) if "compiled" in names else views_reference
    loop_given = [loop_params(p) for p in data.params] if "loop" in names else []
    mine = functools.partial(byola_fast.augment, stats=data.stats, seed=SEED, interpolation=interpolation)
    out, source, positive = data.new_views(), data.new_views().normal_(), torch.empty_like(data.x[0])

    def of_set(function: Callable[..., Any], given: Sequence[Any]) -> Callable[[int], Sequence[Tensor]]:
        return lambda k: function(data.x[k % data.count], given[k % data.count], interpolation)

    def fresh(k: int) -> Any:
        return mine(data.x[k % data.count], step=k % data.count)

    def reused(k: int) -> Any:
        return mine(data.x[k % data.count], step=k % data.count, out=out)

    def exp_and_log(k: int) -> Sequence[Tensor]:
        torch.exp(data.x[k % data.count], out=positive)
        torch.log(positive, out=out[0])
        return out[0], torch.log(positive, out=out[1])

    runs: dict[str, Callable[[int], Sequence[Tensor]]] = {
        "loop": of_set(views_loop, loop_given),
        "reference": of_set(views_reference, data.params),
        "compiled": of_set(compiled, data.params),
        "byola_fast": fresh,
        "byola_fast, out=": reused,
        "copy": lambda k: out.copy_(source).unbind(0),
        "exp + log": exp_and_log,
    }
    expected = {
        "copy": lambda k: source.unbind(0),
        "exp + log": lambda k: [data.x[k % data.count]] * 2,
    }
    moved = {"copy": 4.0, "exp + log": 6.0}
    backend = backend_of(data.device, VIEW_OPS)
    return [
        data.contender(
            name,
            runs[name],
            expected.get(name, functools.partial(data.exact, interpolation)),
            place,
            moved.get(name, 5.0),
            backend=backend if name.startswith("byola_fast") else "torch",
            optional=name == "compiled",
        )
        for name in names
    ]
