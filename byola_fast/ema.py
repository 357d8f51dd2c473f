"""The moving average of a network: BYOL's target."""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version

from byola_fast.ops import _checks as check
from byola_fast.ops.functional import check_ema, ema_decay

BUFFERS = ("none", "copy", "ema")
HALF = (torch.float16, torch.bfloat16)
WRAPPERS = ("_orig_mod", "module")  # what torch.compile and DistributedDataParallel put into names


class _Plan(NamedTuple):
    """What one update does, for as long as both networks hold the very tensors ``seen``."""

    seen: list[Tensor | None]
    target: list[Tensor]
    online: list[Tensor]
    copied: list[tuple[Tensor, Tensor]]


class EMA(nn.Module):
    """Keep a moving average of a network: ``target <- decay * target + (1 - decay) * online`` at every ``update()``.

    Args:
        online: the network to follow. It is remembered, but is no part of this module or its ``state_dict``.
        decay: in [0, 1]; 0 copies, 1 keeps. May be changed between updates.
        buffers: what happens to buffers, as of BatchNorm. "none": nothing (published behaviour: the target's BatchNorm
            counts what passes through it); "copy": copied at every update; "ema": averaged as parameters are, integers
            copied.

    Attributes:
        target: a deep copy of ``online`` that needs no gradient. Half-precision weights are kept in float32, in which
            the small steps of an average are not lost, whatever ``.half()`` asks for.

    Shape:
        A call is a call of the target; half-precision arguments are widened to float32, its own dtype.

    Raises:
        ValueError: an unknown ``buffers``, a decay outside [0, 1], or an online network that no longer has the target's
        parameters.

    Numerics:
        As ``ops.ema_update_``: one call for all parameters. Tied weights move once. Names are matched without the
        prefixes of torch.compile and DistributedDataParallel, so either network may be wrapped later.

    Autograd:
        None to the target's parameters; use ``torch.no_grad()`` where its input needs none either.

    Source:
        BYOL, arXiv:2006.07733, eq. (1).

    >>> online = nn.Linear(2, 2)
    >>> ema = EMA(online, decay=0.5)
    >>> _ = nn.init.constant_(online.bias, 1.0), nn.init.constant_(ema.target.bias, 0.0)
    >>> ema.update()
    >>> ema.target.bias
    Parameter containing:
    tensor([0.5000, 0.5000])
    """

    def __init__(self, online: nn.Module, decay: float = 0.99, buffers: str = "none") -> None:
        super().__init__()
        check.is_one_of("buffers", buffers, BUFFERS)
        if not 0 <= decay <= 1:
            raise ValueError(f"decay: expected a number in [0, 1], got {decay}")
        self.decay = decay
        self.buffers_mode = buffers
        self._online = (online,)  # in a tuple, so that it is no submodule
        self._plan: _Plan | None = None
        self.target = copy.deepcopy(_unwrap(online)).requires_grad_(False)
        self._apply(lambda tensor: tensor)

    @torch.no_grad()
    def update(self) -> None:
        """Move the target towards the online network by one step."""
        plan = self._current_plan()
        for t, o in plan.copied:
            t.copy_(o)
        torch.ops.byola_fast.ema_update_(plan.target, plan.online, ema_decay(self.decay, plan.target))
        increment_version(plan.target)

    def _current_plan(self) -> _Plan:
        """Return the pairs to move and to copy; matched and checked anew only after a tensor was replaced.

        Walking names of a thousand tensors and checking each would cost several times the update itself.
        """
        online = self._online[0]
        buffers = self.buffers_mode != "none"
        seen = _held(self.target, buffers) + _held(online, buffers)
        plan = self._plan
        if plan is None or len(plan.seen) != len(seen) or not all(map(operator.is_, plan.seen, seen)):
            moved = _pairs("parameter", self.target.named_parameters(), online.named_parameters())
            copied: list[tuple[Tensor, Tensor]] = []
            if buffers:
                for t, o in _pairs("buffer", self.target.named_buffers(), online.named_buffers()):
                    averaged = self.buffers_mode == "ema" and t.is_floating_point()
                    (moved if averaged else copied).append((t, o))
            plan = _Plan(seen, [t for t, _ in moved], [o for _, o in moved], copied)
            check_ema(plan.target, plan.online)
            self._plan = plan
        return plan

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the target makes of the arguments."""
        return self.target(*map(_widen, args), **{name: _widen(value) for name, value in kwargs.items()})

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> EMA:
        """Follow ``fn`` to another device, but keep half precision out of the target."""
        self._plan = None  # parameters stay the same objects, with other data

        def keep_wide(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return tensor.to(moved.device, torch.float32) if moved.dtype in HALF else moved

        super()._apply(keep_wide, recurse)
        return self

    def extra_repr(self) -> str:
        return f"decay={self.decay}, buffers={self.buffers_mode!r}"


def _unwrap(module: nn.Module) -> nn.Module:
    """Return the network inside torch.compile and DistributedDataParallel."""
    while True:
        if isinstance(inner := getattr(module, "_orig_mod", None), nn.Module):
            module = inner
        elif isinstance(module, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            module = module.module
        else:
            return module


def _held(module: nn.Module, buffers: bool) -> list[Tensor | None]:
    """Return every parameter, and buffer if asked for, in the order that modules hold them; shared ones repeatedly."""
    held: list[Tensor | None] = []
    waiting: list[nn.Module | None] = [module]
    while waiting:
        if (inner := waiting.pop()) is not None:
            held.extend(inner._parameters.values())
            if buffers:
                held.extend(inner._buffers.values())
            waiting.extend(inner._modules.values())
    return held


def _pairs(
    kind: str, target: Iterable[tuple[str, Tensor]], online: Iterable[tuple[str, Tensor]]
) -> list[tuple[Tensor, Tensor]]:
    """Pair tensors of the same name."""
    targets, onlines = dict(target), dict(online)
    if targets.keys() != onlines.keys():
        targets, onlines = _without_wrappers(targets), _without_wrappers(onlines)
    if targets.keys() != onlines.keys():
        names = ", ".join(sorted(targets.keys() ^ onlines.keys())[:5])
        raise ValueError(f"online: expected the {kind} names of the target; only one of the two has {names}")
    return [(tensor, onlines[name]) for name, tensor in targets.items()]


def _without_wrappers(named: dict[str, Tensor]) -> dict[str, Tensor]:
    return {".".join(part for part in name.split(".") if part not in WRAPPERS): x for name, x in named.items()}


def _widen(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.dtype in HALF else value
