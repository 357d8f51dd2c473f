"""The moving average of a network, BYOL's target."""

from __future__ import annotations

import contextlib
import copy
import itertools
import math
import numbers
import operator
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from byola_fast.ops import _checks as check
from byola_fast.ops._ema_checks import HALF, ema_decay
from byola_fast.ops._route import ema_update_without_grad
from byola_fast.ops.reference import sums_dtype
from byola_fast.runtime.state import require_state

T = TypeVar("T")
BUFFERS = ("none", "copy", "ema")
# added to the names of tensors by torch.compile, DistributedDataParallel, FSDP and activation checkpointing
NAME_WRAPPERS = ("_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


@dataclass(frozen=True)
class CosineDecay:
    """A decay that rises to 1: ``1 - (1 - base) (cos(pi k / total_steps) + 1) / 2`` at update k, counted from 0.

    Args:
        base: decay of the first update, in [0, 1].
        total_steps: number of updates until the decay reaches 1. Later updates leave the target unchanged.

    Source:
        BYOL, arXiv:2006.07733, section 3.2: base 0.996.

    >>> decay = CosineDecay(base=0.9, total_steps=100)
    >>> [round(float(decay(torch.tensor(k))), 4) for k in (0, 50, 100, 200)]
    [0.9, 0.95, 1.0, 1.0]
    """

    base: float = 0.996
    total_steps: int = 100_000

    def __post_init__(self) -> None:
        if not 0 <= self.base <= 1:
            raise ValueError(f"base: expected a number in [0, 1], got {self.base}")
        if isinstance(self.total_steps, bool) or not isinstance(self.total_steps, int) or self.total_steps < 1:
            raise ValueError(f"total_steps: expected an integer of at least 1, got {self.total_steps!r}")

    def __call__(self, step: Tensor) -> Tensor:
        """Return the decay at a step (0-d integer) as a 0-d float64 tensor on the step's device, without a sync."""
        progress = step.clamp(0, self.total_steps).to(sums_dtype(step.device)) / self.total_steps
        return 1 - (1 - self.base) * (torch.cos(math.pi * progress) + 1) / 2


class _Plan(NamedTuple):
    """The tensors of one update, valid as long as both networks hold the same modules and tensor objects."""

    networks: tuple[nn.Module, nn.Module]
    empty: list[Mapping[str, Any]]  # dictionaries of modules: of parameters, of children, and of buffers
    filled: list[Mapping[str, Any]]
    seen: list[Any]  # what the filled ones hold
    pairs: list[tuple[Tensor, Tensor]]  # averaged or copied
    names: list[str]  # of the averaged pairs
    target: list[Tensor]
    online: list[Tensor]
    copied_target: list[Tensor]
    copied_online: list[Tensor]


class _Watched(NamedTuple):
    """A buffer of both networks, with the versions it had."""

    name: str
    target: Tensor
    target_version: int
    online: Tensor
    online_version: int


class EMA(nn.Module):
    """Keep a moving average of a network: ``target <- decay * target + (1 - decay) * online`` at every ``update()``.

    Args:
        online: the network to follow. It is not a submodule and not in the ``state_dict``.
        decay: in [0, 1]; 0 copies, 1 keeps; may be changed between updates. Or a schedule ``decay(step)`` such as
            ``CosineDecay``: a function of the updates so far, a 0-d int64 tensor on the device, to a number or a 0-d
            tensor. If it does not read the step's value, each replay of a CUDA graph that contains ``update()``
            advances it.
        buffers: treatment of buffers such as BatchNorm's. "copy": copied at every update, also if they appear,
            disappear or change shape; right for evaluation. "ema": averaged like parameters, integers copied; also
            right for evaluation. "none": no change, for a target that computes its own statistics from data that it
            sees in training mode, as BYOL's does.

    Attributes:
        target: a deep copy of ``online`` that needs no gradient. Half-precision weights are kept in float32, even after
            ``.half()``: the small steps of an average would round to zero in half precision.
        step: number of updates so far, 0-d int64, in ``state_dict``; None unless ``decay`` is a schedule.

    Copies:
        A deep copy follows the same network, or the network's copy if one ``deepcopy`` copies both. A pickle contains
        the network, so a loaded ``EMA`` follows the loaded network.

    Shape:
        A call runs the target; half-precision arguments are widened to float32, the target's dtype.

    Raises:
        ValueError: an unknown ``buffers``, a decay outside [0, 1], or an online network whose parameter names or shapes
        differ from the target's (a network that grew or shrank needs a new ``EMA``). TypeError: a network that cannot
        be copied, is quantised or sharded (DTensor), or has lazy parameters; dtypes that ``ops.ema_update_`` refuses.
        RuntimeError: ``update()`` or another ``swapped()`` inside ``swapped()``. An error leaves the target unchanged.
        It warns once if the target of ``buffers="none"`` runs in eval mode with buffers of the first day, while
        training changed the online network's.

    Numerics:
        As ``ops.ema_update_``: one call for all parameters, including frozen ones (``requires_grad=False``). Tied
        weights move once. Names are matched without the prefixes of torch.compile, DistributedDataParallel, FSDP and
        activation checkpointing, so either network may be wrapped later. Storages may be replaced at any time
        (``.to()``, ``.data =``, ``load_state_dict(assign=True)``): the next update checks the new ones.

    Autograd:
        None to the target's parameters; use ``torch.no_grad()`` if its input needs no gradient either.

    Source:
        BYOL, arXiv:2006.07733, eq. (1).

    >>> online = nn.Linear(2, 2)
    >>> ema = EMA(online, decay=0.5)
    >>> _ = nn.init.constant_(online.bias, 1.0), nn.init.constant_(ema.target.bias, 0.0)
    >>> ema.update()
    >>> ema.target.bias
    Parameter containing:
    tensor([0.5000, 0.5000])
    >>> with ema.swapped():
    ...     online.bias.tolist()
    [0.5, 0.5]
    >>> online.bias.tolist()
    [1.0, 1.0]
    """

    step: Tensor | None

    @torch.inference_mode(False)  # tensors made in inference mode could not be updated outside
    def __init__(
        self,
        online: nn.Module,
        decay: float | Callable[[Tensor], float | Tensor] = 0.99,
        buffers: str = "copy",
    ) -> None:
        super().__init__()
        if not isinstance(online, nn.Module):
            raise TypeError(f"online: expected a torch.nn.Module, got {type(online).__name__}")
        check.require_one_of("buffers", buffers, BUFFERS)
        if not callable(decay) and not isinstance(decay, (numbers.Real, Tensor)):
            raise TypeError(f"decay: expected a number in [0, 1] or a schedule decay(step), got {decay!r}")
        if not callable(decay) and not 0 <= decay <= 1:
            raise ValueError(f"decay: expected a number in [0, 1], got {decay}")
        self.decay = decay
        self.buffers_mode = buffers
        self._online = (online,)  # a tuple, so that it does not become a submodule
        self._memo: dict[int, Any] | None = None
        self._plan: _Plan | None = None
        self._swapped = False
        self._watched: list[_Watched] | None = None
        self._stale: str | None = None
        self.target = _copy_of(_unwrap(online)).requires_grad_(False)
        self._apply(lambda tensor: tensor)
        self._watch_buffers()
        device = next((p.device for p in self.target.parameters()), None)
        self.register_buffer("step", torch.zeros((), dtype=torch.int64, device=device) if callable(decay) else None)

    def current_decay(self) -> float | Tensor:
        """Return the decay of the next update: a number or a 0-d tensor."""
        if not callable(self.decay):
            return self.decay if isinstance(self.decay, Tensor) else float(self.decay)
        if self.step is None:
            raise RuntimeError("decay: expected a number; a schedule counts steps and must be given to EMA(...) itself")
        return self.decay(self.step)

    @torch.no_grad()
    def update(self) -> None:
        """Move the target towards the online network by one step."""
        if self._swapped:
            raise RuntimeError("update: the averaged weights are swapped in; leave 'with ema.swapped()' first")
        plan = self._current_plan()
        try:
            decay = ema_decay(self.current_decay(), plan.target)
            ema_update_without_grad(plan.target, plan.online, decay)
        except (TypeError, ValueError) as error:
            named = re.sub(r"\b(target|online)\[(\d+)\]", lambda m: f"{m[1]}.{plan.names[int(m[2])]}", str(error))
            raise type(error)(named) from None
        if plan.copied_target:
            torch._foreach_copy_(plan.copied_target, plan.copied_online)
        if self.step is not None:
            self.step += 1

    @contextlib.contextmanager
    def swapped(self) -> Iterator[nn.Module]:
        """Lend the averaged weights to the online network, to evaluate or save it, and restore its own afterwards.

        Buffers are lent too unless ``buffers="none"``. The online network's tensors stay the same objects, so
        optimisers keep them; inside the block they share the target's memory (a copy if dtypes or devices differ). Do
        not train inside: a write to one network changes both. CUDA graphs of the online network that were captured
        outside keep their weights.
        """
        if self._swapped:
            raise RuntimeError("swapped: the averaged weights are swapped in already; leave 'with ema.swapped()' first")
        pairs = self._current_plan().pairs
        online_data = [(online, online.data) for _, online in pairs]
        self._swapped = True
        try:
            for target, online in pairs:
                online.data = target.data.to(online.device, online.dtype)
            torch.clear_autocast_cache()  # it holds the weights by tensor object, whose data are now others
            yield self._followed()
        finally:
            for online, data in online_data:
                online.data = data
            torch.clear_autocast_cache()
            self._swapped = False

    def _followed(self) -> nn.Module:
        """Return the online network; of a deep copy, the network's copy if the same ``deepcopy`` made one."""
        if self._memo is not None:  # complete only now
            self._online, self._memo = (self._memo.get(id(self._online[0]), self._online[0]),), None
        return self._online[0]

    def _current_plan(self) -> _Plan:
        """Return the pairs to average and to copy; matched again only after a tensor object was replaced.

        Matching the names of a thousand tensors costs several times the update itself. Changes within a tensor
        (storage, shape, dtype) are noticed by the op at every update.
        """
        plan = self._plan
        if (
            plan is None
            or not _are_same(plan.networks, (self.target, self._followed()))
            or any(plan.empty)
            or not _are_same(plan.seen, _held_by(plan.filled))
            or any(t.shape != o.shape for t, o in zip(plan.copied_target, plan.copied_online, strict=True))
        ):
            if self.buffers_mode == "copy":
                self._adopt_buffers()
            self._plan = plan = self._make_plan()
        return plan

    @torch.inference_mode(False)
    def _adopt_buffers(self) -> None:
        """Give the target the buffers that the online network gained, lost or gave another shape."""
        targets = _without_wrappers(dict(self.target.named_modules()))
        for path, theirs in _without_wrappers(dict(self._followed().named_modules())).items():
            if (ours := targets.get(path)) is None:
                continue
            for name in ours._buffers.keys() | theirs._buffers.keys():
                t, o = ours._buffers.get(name), theirs._buffers.get(name)
                if (t is None) != (o is None) or (t is not None and o is not None and t.shape != o.shape):
                    place = next((p.device for p in self.target.parameters()), None)
                    made = None if o is None else _widen(o.detach().clone()).to(place)
                    ours.register_buffer(name, made, name not in theirs._non_persistent_buffers_set)

    def _make_plan(self) -> _Plan:
        if self._watched is None:
            self._watch_buffers()
        networks = self.target, self._followed()
        kinds = ["_parameters", "_modules"] + ["_buffers"] * (self.buffers_mode != "none")
        held = [getattr(module, kind) for network in networks for module in network.modules() for kind in kinds]
        empty, filled = [x for x in held if not x], [x for x in held if x]
        plan = _Plan(networks, empty, filled, _held_by(filled), [], [], [], [], [], [])
        parameters = _pairs("parameter", self.target.named_parameters(), self._followed().named_parameters())
        buffers: list[tuple[str, Tensor, Tensor]] = []
        if self.buffers_mode != "none":
            buffers = _pairs("buffer", self.target.named_buffers(), self._followed().named_buffers())
        for number, (name, t, o) in enumerate(parameters + buffers):
            plan.pairs.append((t, o))
            continuous = t.is_floating_point() or t.is_complex()
            if continuous and (number < len(parameters) or self.buffers_mode == "ema"):
                plan.names.append(name)
                plan.target.append(t)
                plan.online.append(o)
            else:
                plan.copied_target.append(t)
                plan.copied_online.append(o)
        return plan

    def forward(self, *args: Any, **kwargs: Any) -> object:
        """Run the target."""
        if self.buffers_mode == "none" and not self.target.training and not torch.compiler.is_compiling():
            self._warn_of_old_buffers()
        return self.target(*map(_widen, args), **{name: _widen(value) for name, value in kwargs.items()})

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> EMA:
        """Apply ``fn`` as ``nn.Module`` does, but keep float32 if it asks for half precision."""
        self._stale, self._watched = self._old_buffer(), None  # watched again from the next update on
        self._plan = None  # parameters stay the same objects, with new data

        def keep_wide(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return tensor.to(moved.device, torch.float32) if moved.dtype in HALF else moved

        super()._apply(keep_wide, recurse)
        return self

    def _watch_buffers(self) -> None:
        """Note versions of buffers that no update changes; a version counts writes, and is read without a sync."""
        self._watched = []
        if self.buffers_mode == "none":
            online = _without_wrappers(dict(self._followed().named_buffers()))
            for name, t in _without_wrappers(dict(self.target.named_buffers())).items():
                o = online.get(name)
                if o is not None and not t.is_inference() and not o.is_inference():
                    self._watched.append(_Watched(name, t, t._version, o, o._version))

    def _old_buffer(self) -> str | None:
        """Return the name of a buffer that the online network changed and the target, since updated, did not."""
        watched = self._watched if self._plan is not None else None
        for w in watched or ():
            if w.online._version != w.online_version and w.target._version == w.target_version:
                return w.name
        return self._stale

    def _warn_of_old_buffers(self) -> None:
        if (name := self._old_buffer()) is not None:
            self._watched, self._stale = [], None
            warnings.warn(
                f"target.{name}: the target runs in eval mode with buffers of before the training, as buffers='none' "
                "and it saw no data in training mode; use EMA(..., buffers='copy')",
                stacklevel=5,  # the call of this module
            )

    def __deepcopy__(self, memo: dict[int, Any]) -> EMA:
        memo[id(self)] = other = self.__class__.__new__(self.__class__)
        own = {"_online": (self._followed(),), "_memo": memo}  # follow the same network, see _followed
        vars(other).update(own)
        for name, value in self.__getstate__().items():
            if name not in own:
                vars(other)[name] = copy.deepcopy(value, memo)
        return other

    def __getstate__(self) -> dict[str, Any]:
        self._followed()
        return vars(self) | {"_plan": None, "_swapped": False, "_watched": None, "_stale": self._old_buffer()}

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        require_state(self, state_dict, prefix)  # of all submodules, before anything changes
        self._watched = self._stale = None
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        return f"decay={self.decay}, buffers={self.buffers_mode!r}"


def _copy_of(network: nn.Module) -> nn.Module:
    """Return a deep copy; refuse a network whose weights an average cannot follow."""
    for path, module in network.named_modules():
        if hasattr(module, "_packed_params"):
            raise TypeError(f"online.{path}: expected floating-point weights, got quantised ones")
    for name, x in itertools.chain(network.named_parameters(), network.named_buffers()):
        if nn.parameter.is_lazy(x):
            raise TypeError(f"online.{name}: expected values, got a lazy tensor; call the network once before EMA(...)")
    # deepcopy refuses the weights that torch.nn.utils.weight_norm and spectral_norm compute at each call
    computed = {
        id(x): x.detach().clone()
        for module in network.modules()
        for x in vars(module).values()
        if isinstance(x, Tensor) and not x.is_leaf
    }
    try:
        return copy.deepcopy(network, computed)
    except Exception as error:
        raise TypeError(f"online: expected a network that copy.deepcopy can copy: {error}") from error


def _unwrap(module: nn.Module) -> nn.Module:
    """Return the network inside torch.compile and DistributedDataParallel."""
    while True:
        if isinstance(inner := getattr(module, "_orig_mod", None), nn.Module):
            module = inner
        elif isinstance(module, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            module = module.module
        else:
            return module


def _held_by(holders: list[Mapping[str, Any]]) -> list[Any]:
    return [x for holder in holders for x in holder.values()]


def _are_same(before: Sequence[object], now: Sequence[object]) -> bool:
    return len(before) == len(now) and all(map(operator.is_, before, now))


def _pairs(
    kind: str, target: Iterable[tuple[str, Tensor]], online: Iterable[tuple[str, Tensor]]
) -> list[tuple[str, Tensor, Tensor]]:
    """Pair tensors of the same name."""
    targets, onlines = dict(target), dict(online)
    if targets.keys() != onlines.keys():
        plain = _without_wrappers(targets), _without_wrappers(onlines)
        if (len(plain[0]), len(plain[1])) == (len(targets), len(onlines)):  # no two names became one
            targets, onlines = plain
    if targets.keys() != onlines.keys():
        names = ", ".join(sorted(targets.keys() ^ onlines.keys())[:5])
        raise ValueError(f"online: expected the {kind} names of the target; only one of the two has {names}")
    for name, t in targets.items():
        for side, x in (("target", t), ("online", onlines[name])):
            if hasattr(x, "__tensor_flatten__"):  # sharded by FSDP, or quantised
                raise TypeError(f"{side}.{name}: expected a plain tensor, got {type(x).__name__}")
        check.require_shape(f"online.{name}", onlines[name], tuple(t.shape))
    return [(name, t, onlines[name]) for name, t in targets.items()]


def _without_wrappers(named: Mapping[str, T]) -> dict[str, T]:
    return {".".join(part for part in name.split(".") if part not in NAME_WRAPPERS): x for name, x in named.items()}


def _widen(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.dtype in HALF else value
