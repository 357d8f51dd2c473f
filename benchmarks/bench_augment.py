"""Two views of a batch, their time by batch size, and the single ops of the augmentation."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import byola_fast
from benchmarks.contenders import MELS, Batches, backend_of, crop_one, loop_params, mix_one, view_contenders
from benchmarks.measure import CPU_PLACES, PLACES, Group, Place, places_on
from byola_fast.ops import reference
from byola_fast.ops.functional import canvas_size

BATCH = 256
SIZES = (64, 256, 2048)
TWO_VIEWS = ("loop", "reference", "compiled", "byola_fast", "byola_fast, out=", "copy", "exp + log")
SCALING = tuple(f"{name}, B = {batch}" for name in ("byola_fast", "byola_fast, out=") for batch in SIZES)
SINGLE = ("loop", "reference", "byola_fast", "copy")
INTERPOLATIONS = ("bilinear", "bicubic")


def two_views(device: str, interpolation: str) -> Group:
    """Two views of 256 samples, with post-normalisation."""
    data = Batches(BATCH, device)
    contenders = [c for place in places_on(device) for c in view_contenders(data, place, interpolation, TWO_VIEWS)]
    return Group(
        "two_views",
        f"{interpolation}, B = {BATCH}",
        contenders,
        ("loop", "reference", "compiled", "copy", "exp + log"),
    )


def scaling(device: str, threads: int) -> Group:
    """Time per sample of two bilinear views by batch size, with fresh and with reused outputs."""
    contenders = []
    for batch in SIZES:
        data = Batches(batch, device)
        for name in ("byola_fast", "byola_fast, out="):
            (made,) = view_contenders(data, Place(device, threads), "bilinear", [name])
            contenders.append(replace(made, name=f"{name}, B = {batch}"))
    return Group("scaling", f"bilinear, threads = {threads}", contenders, (f"byola_fast, out=, B = {SIZES[0]}",))


def log_mixup_exp(device: str) -> Group:
    """One mix of 256 samples with their partners."""
    data = Batches(BATCH, device)
    lam = [p[0][0] for p in data.params]
    given = [weights.tolist() for weights in lam]

    def loop(k: int) -> Tensor:
        x, z = data.x[k % data.count], data.x[(k + 1) % data.count]
        return torch.stack([mix_one(a, b, w) for a, b, w in zip(x, z, given[k % data.count], strict=True)])

    def batched(function: Callable[..., Tensor], convert: Callable[[Tensor], Tensor] = lambda x: x) -> Any:
        return lambda k: function(
            convert(data.x[k % data.count]), convert(data.x[(k + 1) % data.count]), lam[k % data.count]
        )

    runs = {
        "loop": loop,
        "reference": batched(reference.log_mixup_exp_reference),
        "byola_fast": batched(byola_fast.ops.log_mixup_exp),
    }
    exact = batched(reference.log_mixup_exp_reference, Tensor.double)
    return single_op("log_mixup_exp", f"B = {BATCH}", data, runs, exact, moved=3)


def resize_crop(device: str, interpolation: str) -> Group:
    """One random resize crop of 256 samples."""
    data = Batches(BATCH, device)
    crop = [p[2][0] for p in data.params]
    boxes = [[box for _lam, _partner, box in loop_params(p)[0]] for p in data.params]
    size = [MELS, data.shape[2]]
    canvas = list(canvas_size(size[0], size[1]))

    def loop(k: int) -> Tensor:
        x = data.x[k % data.count]
        return torch.cat(
            [crop_one(a[None], box, interpolation) for a, box in zip(x, boxes[k % data.count], strict=True)]
        )

    def exact(k: int) -> Tensor:
        return reference.resize_crop_reference(
            data.x[k % data.count].double(), crop[k % data.count], size, canvas, interpolation
        )

    runs: dict[str, Callable[[int], Tensor]] = {
        "loop": loop,
        "reference": lambda k: reference.resize_crop_reference(
            data.x[k % data.count], crop[k % data.count], size, canvas, interpolation
        ),
        "byola_fast": lambda k: byola_fast.ops.resize_crop(
            data.x[k % data.count], crop[k % data.count], interpolation=interpolation
        ),
    }
    return single_op("resize_crop", f"{interpolation}, B = {BATCH}", data, runs, exact, moved=2)


def single_op(
    op: str,
    variant: str,
    data: Batches,
    runs: dict[str, Callable[[int], Tensor]],
    exact: Callable[[int], Tensor],
    moved: int,
) -> Group:
    """Return the group of one op; every contender returns one tensor with the shape of its input."""
    out = torch.empty_like(data.x[0])
    runs = runs | {"copy": lambda k: out.copy_(data.x[k % data.count])}
    exact = functools.lru_cache(maxsize=1)(exact)
    expected = dict.fromkeys(runs, exact) | {"copy": lambda k: data.x[k % data.count]}

    def listed(run: Callable[[int], Tensor]) -> Callable[[int], Sequence[Tensor]]:
        return lambda k: (run(k),)

    contenders = [
        data.contender(
            name,
            listed(runs[name]),
            listed(expected[name]),
            place,
            2 if name == "copy" else moved,
            backend=backend_of(data.device, [op]) if name == "byola_fast" else "torch",
        )
        for place in places_on(data.device)
        for name in SINGLE
    ]
    return Group(op, variant, contenders, ("loop", "reference", "copy"), floor="copy")


@pytest.mark.parametrize("contender", TWO_VIEWS)
@pytest.mark.parametrize("place", PLACES, ids=str)
@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
def test_two_views(replay: Any, interpolation: str, place: Place, contender: str) -> None:
    replay(two_views, contender, place, interpolation=interpolation)


@pytest.mark.parametrize("contender", SCALING)
@pytest.mark.parametrize("place", [CPU_PLACES[-1], *PLACES[len(CPU_PLACES) :]], ids=str)
def test_scaling(replay: Any, place: Place, contender: str) -> None:
    replay(scaling, contender, place, threads=place.threads)


@pytest.mark.parametrize("contender", SINGLE)
@pytest.mark.parametrize("place", PLACES, ids=str)
def test_log_mixup_exp(replay: Any, place: Place, contender: str) -> None:
    replay(log_mixup_exp, contender, place)


@pytest.mark.parametrize("contender", SINGLE)
@pytest.mark.parametrize("place", PLACES, ids=str)
@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
def test_resize_crop(replay: Any, interpolation: str, place: Place, contender: str) -> None:
    replay(resize_crop, contender, place, interpolation=interpolation)
