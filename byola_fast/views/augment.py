"""Views of every sample: the function ``augment``, for two, and the module ``Augment`` with a memory.

lms -> pre-norm -> mixup -> random resize crop (-> fader) -> post-norm, once per view, per sample
"""

from __future__ import annotations

import hashlib
from collections.abc import Hashable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, TypedDict, overload

import torch
from torch import Tensor
from typing_extensions import Unpack  # which torch depends on

from byola_fast.ops import _checks as check
from byola_fast.ops._replay import freeze, may_replay, numbers_of, write_inputs
from byola_fast.ops._replay import run as replay
from byola_fast.ops._two_views import has_cpu_op, two_views
from byola_fast.ops.functional import pair, size_range, without_channel
from byola_fast.runtime.buffers import FixedDtype
from byola_fast.runtime.distributed import concat_ranks, loader_worker, own_rank
from byola_fast.runtime.recomputation import is_outside, is_recomputed, recall, remember
from byola_fast.runtime.workers import warn_once
from byola_fast.spectrograms.statistics import RunningStats, batch_stats, given_stats
from byola_fast.views.at_once import augment_at_once, call_at_once, flat, with_channel
from byola_fast.views.memory_bank import MemoryBank
from byola_fast.views.op_by_op import Group, draw, make_views, normalized
from byola_fast.views.params import AugmentParams, Settings, SettingsByName, resolve_settings

Views = tuple[Tensor, Tensor]
ViewsAndParams = tuple[Tensor, Tensor, AugmentParams]
AllViews = tuple[Tensor, ...]
AllViewsAndParams = tuple[Any, ...]  # mypy cannot unpack tuple[*tuple[Tensor, ...], AugmentParams] into names


class _Keywords(SettingsByName, total=False):
    """The keywords of ``augment`` but for ``return_params``, on which its result depends."""

    preset: str
    stats: tuple[float, float] | Tensor | None
    seed: int | Tensor | None
    step: int | Tensor
    sample_offset: int | None
    generator: torch.Generator | None
    out: Tensor | None
    params: AugmentParams | None
    post_norm: bool


class _CallKeywords(TypedDict, total=False):
    """Likewise, of a call of ``Augment``."""

    sample_offset: int | None
    params: AugmentParams | None
    out: Tensor | None


@overload
def augment(lms: Tensor, *, return_params: Literal[False] = False, **keywords: Unpack[_Keywords]) -> Views: ...
@overload
def augment(lms: Tensor, *, return_params: Literal[True], **keywords: Unpack[_Keywords]) -> ViewsAndParams: ...
def augment(
    lms: Tensor,
    *,
    preset: str = "byola-v1",
    stats: tuple[float, float] | Tensor | None = None,
    seed: int | Tensor | None = None,
    step: int | Tensor = 0,
    sample_offset: int | None = None,
    generator: torch.Generator | None = None,
    out: Tensor | None = None,
    params: AugmentParams | None = None,
    return_params: bool = False,
    post_norm: bool = True,
    **settings: Unpack[SettingsByName],
) -> Views | ViewsAndParams:
    """Return two random views of a batch of log-mel spectrograms, every sample with its own parameters.

    Pre-normalise, mix with another sample of the batch (log-mixup-exp), random resize crop, random linear fader
    (``byola-v2``), post-normalise over both views jointly.

    Args:
        lms: log-mel spectrograms, natural logarithm.
        preset: "byola-v1" (mixup_ratio 0.4) or "byola-v2" (mixup_ratio 0.2, fader_gain 1).
        stats: (mean, std) for the pre-normalisation; by default the batch's, ``(0, 1)`` for none.
        seed: in [0, 2^63), or a 0-d int64 tensor; by default drawn from ``generator`` or torch's default generator.
        step: in [0, 2^32), or a 0-d int64 tensor, taken modulo 2^32; each step of a seed draws other parameters.
        sample_offset: number of the first sample in the global batch, in [0, 2^63) and taken modulo 2^32; by default
            B times the rank in torch.distributed, which fits batches of equal size.
        generator: draws the seed; on the CPU or on the batch's device.
        out: a contiguous ``(2, B, ...)`` tensor that receives the views, with memory of its own.
        params: parameters to replay instead of drawing; their partners must be rows of this batch.
        return_params: return ``view1, view2, params``.
        post_norm: normalise both views jointly to mean 0 and std 1.
        **settings: any of ``byola_fast.views.params.Settings``: mixup_ratio, mixup, freq_scale, time_scale,
            virtual_crop_scale, interpolation, fader_gain, size.

    Shape:
        lms ``(B, F, T)`` or ``(B, 1, F, T)`` with any strides; both views of the same rank, ``size`` or (F, T).

    Raises:
        TypeError: wrong dtype, unknown keyword. ValueError: wrong shape, device or value.

    Numerics:
        Half precision is computed in float32. Parameters are bit-identical on every device for one seed. NaN or inf in
        a sample spreads through joint statistics and partners; give ``stats=`` and ``post_norm=False`` to contain it.

    Autograd:
        To lms (and stats), except with ``out=``.

    Source:
        BYOL-A, arXiv:2103.06695 and arXiv:2204.07402. Differs: partners come from the same batch (no memory; see
        ``Augment``), never the sample itself, and a batch of one is not mixed; bilinear interpolation by default
        (published: ``interpolation="bicubic"``).

    >>> view1, view2 = augment(torch.randn(8, 1, 64, 96), seed=0)
    >>> view1.shape, view2.shape
    (torch.Size([8, 1, 64, 96]), torch.Size([8, 1, 64, 96]))
    """
    if params is None and not return_params and sample_offset is None and has_cpu_op(lms):
        views12 = augment_at_once(lms, preset, stats, seed, step, generator, out, post_norm, dict(settings))
        if views12 is not None:
            return views12
    chosen = resolve_settings(preset, settings)
    both = Group(chosen)
    check.require_float("lms", lms)
    x = without_channel("lms", lms)
    check.require_spectrogram("lms", x)
    if params is not None:
        if seed is not None or generator is not None:
            raise ValueError("params: expected neither seed nor generator beside them, which would have no effect")
        params.check(x.shape[0], x.device, [(2, both.canvas(x))], x.shape[0])
        held = params.bank_count
        if held is not None and check.is_readable(held) and int(held):
            raise ValueError(
                f"params: expected partners from the batch, got rows of a bank of {int(held)}; see Augment"
            )
    elif generator is not None and is_recomputed():
        raise RuntimeError("generator: expected none under activation checkpointing, which does not restore it")

    def make(rng: Tensor | None, of_pre_norm: Tensor | None) -> tuple[Tensor, AugmentParams]:
        of_pre_norm = batch_stats(x) if of_pre_norm is None else of_pre_norm
        drawn = params
        if drawn is None:
            assert rng is not None
            drawn = draw(rng, x, [both], sample_offset=_offset(sample_offset, x))
        views, sums = make_views(x, drawn, both, stats=of_pre_norm, out=_flat_out(out, lms, chosen))
        return with_channel(normalized(views, sums) if post_norm else views, lms), drawn

    def make_at_once(rng: Tensor, of_pre_norm: Tensor | None) -> Tensor:
        flat_out = _flat_out(out, lms, chosen)
        if flat_out is not None:
            check.require_own_memory("out", flat_out, lms=x, rng=rng, stats=of_pre_norm)
        of_pre_norm = batch_stats(x) if of_pre_norm is None else of_pre_norm
        offset = _offset(None, x)
        views = two_views(x, rng, of_pre_norm, **vars(chosen), post_norm=post_norm, sample_offset=offset, out=flat_out)
        return with_channel(views, lms)

    signature = None
    if params is None and not return_params and sample_offset is None and may_replay(lms) and len(x):
        signature = freeze((preset, settings, post_norm, own_rank(), stats is None))
    numbers = None if signature is None else numbers_of(seed, step, stats)
    if numbers is not None:
        has_stats = stats is not None
        view1, view2 = replay(
            lambda: make_at_once(*write_inputs(x, numbers, has_stats)),
            lambda: make(*write_inputs(x, numbers, has_stats))[0],
            signature,
            (lms, out),
            numbers,
        ).unbind(0)
        return view1, view2
    of_pre_norm = None if stats is None else given_stats(stats, x.device)
    rng = _fresh_rng(x.device, seed, step, generator) if params is None else None
    if signature is not None and rng is not None:
        at_once, op_by_op = (lambda: make_at_once(rng, of_pre_norm)), (lambda: make(rng, of_pre_norm)[0])
        view1, view2 = replay(at_once, op_by_op, signature, (lms, rng, of_pre_norm, out)).unbind(0)
        return view1, view2
    views, drawn = make(rng, of_pre_norm)
    view1, view2 = views.unbind(0)
    return (view1, view2, drawn) if return_params else (view1, view2)


@dataclass(eq=False)
class _Call:
    """What a call needs to make its views again, for activation checkpointing."""

    params: AugmentParams
    stats: Tensor | None
    rows: Tensor
    pool: Tensor | None
    sums: list[Tensor] = field(default_factory=list)  # of all ranks, by group


class Augment(FixedDtype):
    """Make random views of each batch, two by default, mixing in past inputs from a memory bank.

    The bank, the statistics of the pre-normalisation and the random state (seed and step) are buffers, so that a new
    ``Augment`` with the same ``state_dict`` continues the stream of views. A call advances step and bank once and never
    syncs a GPU. In eval mode a call changes no state: calls with equal arguments give equal views, ranks exchange
    nothing, and validation does not change training. Under activation checkpointing, the backward pass sees the views
    of the forward pass. In a data loader's worker, the stream follows from ``seed`` and the worker's own seed, and the
    state ends with the worker; see "In your own training code" in the documentation.

    Args:
        preset: "byola-v1" or "byola-v2".
        n_memory: rows of the memory bank; with 0, partners always come from the same batch.
        shape: (mels, frames) of the inputs; by default that of the first batch.
        bank_dtype: float32, or float16 for half the memory.
        seed: in [0, 2^63); by default drawn from torch's default generator.
        stats: (mean, std); a ``RunningStats``; None for running statistics (first version of the paper), updated in
            training mode only.
        post_norm: normalise the views jointly to mean 0 and std 1, local ones apart from the others.
        sync: with torch.distributed initialised, in training mode, push the inputs of all ranks and use joint
            statistics, so that views do not depend on the world size. Ranks must give batches of equal size.
        n_views: number of views of the settings' ``size``.
        local_views: number of further views, which see a small part of the input: multi-crop, as in DINO.
        local_size: (mels, frames) of local views.
        local_scale: minimum and maximum of both sides of their crops, times mel bins and frames; at most 1, because
            these crops lie inside the input, where a canvas's margin could be all that they show.
        **settings: any of ``byola_fast.views.params.Settings``.

    Shape:
        As ``augment``. Returns ``n_views + local_views`` tensors; ``out`` is ``(n_views, B, ...)``, and refused with
        local views.

    Numerics:
        As ``augment``; inputs that are not finite are kept out of the bank and counted in ``bank.refused``. Buffers
        keep their dtype, even after ``.half()``.

    Autograd:
        As ``augment``; partners from the bank get none. With ``sync`` over several ranks, an error.

    Source:
        arXiv:2103.06695; multi-crop, arXiv:2104.14294. Differs: all views draw from the bank before the batch is
        pushed, once; while the bank is empty, partners come from the batch, as in ``augment``.

    >>> aug = Augment("byola-v2", seed=0)
    >>> view1, view2 = aug(torch.randn(4, 64, 96))
    >>> len(aug.bank)
    4
    >>> crops = Augment(local_views=4, local_size=(32, 32), seed=0)(torch.randn(4, 64, 96))
    >>> [tuple(view.shape[1:]) for view in crops]
    [(64, 96), (64, 96), (32, 32), (32, 32), (32, 32), (32, 32)]
    """

    rng: Tensor
    fixed_stats: Tensor | None

    if TYPE_CHECKING:  # nn.Module.__call__ returns Any

        @overload
        def __call__(
            self, lms: Tensor, *, return_params: Literal[False] = False, **keywords: Unpack[_CallKeywords]
        ) -> AllViews: ...
        @overload
        def __call__(
            self, lms: Tensor, *, return_params: Literal[True], **keywords: Unpack[_CallKeywords]
        ) -> AllViewsAndParams: ...
        def __call__(self, lms: Tensor, **keywords: Any) -> AllViews | AllViewsAndParams: ...

    def __init__(
        self,
        preset: str = "byola-v1",
        *,
        n_memory: int = 2048,
        shape: tuple[int, int] | None = None,
        bank_dtype: torch.dtype = torch.float32,
        seed: int | None = None,
        stats: tuple[float, float] | Tensor | RunningStats | None = None,
        post_norm: bool = True,
        sync: bool = True,
        n_views: int = 2,
        local_views: int = 0,
        local_size: tuple[int, int] | None = None,
        local_scale: tuple[float, float] = (0.2, 0.6),
        **settings: Unpack[SettingsByName],
    ) -> None:
        super().__init__()
        self.settings = resolve_settings(preset, settings)
        self.post_norm = post_norm
        self.sync = sync
        self.n_views = check.whole("n_views", n_views, 1, 2**16)
        self.local_views = check.whole("local_views", local_views, 0, 2**16)
        if local_size is not None:
            local_size = pair("local_size", local_size, (1, 1))
        elif local_views:
            raise ValueError("local_size: expected the (mels, frames) of local views, got None")
        size_range("local_scale", 1, local_scale)
        if local_scale[1] > 1:
            raise ValueError(f"local_scale: expected (min, max) with max <= 1, inside the input, got {local_scale}")
        self.local_size, self.local_scale = local_size, local_scale
        self.bank = MemoryBank(n_memory, shape, bank_dtype)
        device = self.bank.cursor.device  # torch's default
        self.register_buffer("rng", _fresh_rng(device, seed, 0, None))
        self._worker_seed: int | None = None  # of the worker that this copy belongs to
        self.running_stats: RunningStats | None = None
        if stats is None or isinstance(stats, RunningStats):
            self.running_stats = RunningStats() if stats is None else stats
            self.register_buffer("fixed_stats", None)
        else:
            self.register_buffer("fixed_stats", given_stats(stats, device).clone())

    def forward(
        self,
        lms: Tensor,
        *,
        sample_offset: int | None = None,
        params: AugmentParams | None = None,
        return_params: bool = False,
        out: Tensor | None = None,
    ) -> AllViews | AllViewsAndParams:
        """Return the views (and params), and advance step and bank."""
        if params is None and not return_params and sample_offset is None and has_cpu_op(lms) and self._is_plain():
            views12 = call_at_once(self, lms, out)
            if views12 is not None:
                return views12
        check.require_float("lms", lms)
        x = without_channel("lms", lms)
        check.require_spectrogram("lms", x)
        check.require_same_device("lms", x, "Augment", self.rng)
        signature = None
        if params is None and not return_params and sample_offset is None and may_replay(lms) and len(x):
            signature = self._signature()
        if signature is not None:
            op_by_op = lambda: self._make(lms, x, None, None, False, out)[0][0]  # noqa: E731
            made = [replay(lambda: self._make_at_once(lms, x, out), op_by_op, signature, (lms, *self._state(), out))]
        else:
            made, drawn = self._make(lms, x, sample_offset, params, return_params, out)
        views = tuple(view for views in made for view in views.unbind(0))
        return (*views, drawn) if return_params else views

    def _make(
        self,
        lms: Tensor,
        x: Tensor,
        sample_offset: int | None,
        params: AugmentParams | None,
        return_params: bool,
        out: Tensor | None,
    ) -> tuple[list[Tensor], AugmentParams]:
        """Return each group's views, and all parameters; unless a backward pass makes them again, go a step on."""
        if out is not None and self.local_views:
            raise ValueError("out: expected none with local views, which have a size of their own, got a tensor")
        flat_out = _flat_out(out, lms, self.settings, self.n_views)
        differentiable = torch.is_grad_enabled() and lms.requires_grad
        call, around = recall(self)
        again = call is not None
        if not again:
            call = self._next_call(x, sample_offset, params, flat_out)
            backward = bool(around) or differentiable
            if return_params or backward:  # copy what later calls change
                held = call.params.bank_count
                assert held is not None
                call.params = replace(call.params, rng=call.params.rng.clone(), bank_count=held.clone())
            if backward:
                call.rows = call.rows.clone()
        _refuse_gradient_across_ranks(x, call.pool)
        bank = call.rows if len(call.rows) else None
        made = []
        for number, group in enumerate(self._groups()):
            views, sums = make_views(x, call.params, group, stats=call.stats, out=flat_out, bank=bank, pool=call.pool)
            if self.post_norm:
                if call.pool is not None:
                    if not again:
                        call.sums.append(_gather_sums(sums))
                    sums = call.sums[number]
                views = normalized(views, sums)
            made.append(with_channel(views, lms))
        if not again:
            remember(self, call, around)
            if self.training:
                self.bank.push(x if call.pool is None else call.pool, call.stats)
                self.rng[1:].add_(1)
        return made, call.params

    def _groups(self) -> list[Group]:
        whole = Group(self.settings, self.n_views)
        if not self.local_views:
            return [whole]
        size, scale = self.local_size, self.local_scale
        settings = replace(self.settings, size=size, freq_scale=scale, time_scale=scale, virtual_crop_scale=(1.0, 1.0))
        return [whole, Group(settings, self.local_views, self.n_views)]

    def _make_at_once(self, lms: Tensor, x: Tensor, out: Tensor | None) -> Tensor:
        """Do what ``_make`` does, without gradients, on one rank and outside of workers, in as few launches."""
        flat_out = _flat_out(out, lms, self.settings)
        rows = self.bank.prepare(x, allocate=self.training)
        if flat_out is not None:
            check.require_own_memory("out", flat_out, lms=x, **dict(self.named_buffers()))
        has_rows = len(rows) > 0
        views = two_views(
            x,
            self.rng,
            self._stats(x),
            **vars(self.settings),
            post_norm=self.post_norm,
            sample_offset=_offset(None, x),
            out=flat_out,
            rows=rows if has_rows else None,
            cursor=self.bank.cursor if has_rows else None,
            advance=self.training,
        )
        return with_channel(views, lms)

    def _is_plain(self) -> bool:
        """Return whether a call may be made at once: two views, own parts, one rank, no worker, no checkpoint."""
        bank = self.bank
        return (
            self.n_views == 2
            and not self.local_views
            and type(bank) is MemoryBank
            and bank.rows is not None
            and bank.rows.is_contiguous()
            and type(self.running_stats) in (RunningStats, type(None))
            and loader_worker() is None
            and not self._spans_ranks()
            and is_outside()
        )

    def _signature(self) -> Hashable:
        """Return what decides, with the tensors' layouts, what a call launches; None if it may not be replayed."""
        if not self._is_plain():
            return None
        most = getattr(self.running_stats, "max_updates", None)
        rest = (self.post_norm, self.training, most, self.bank.n_memory, own_rank())
        return freeze((vars(self.settings), *rest))

    def _state(self) -> list[Tensor | None]:
        own = [self.rng, self.fixed_stats, self.bank.rows if self.bank.n_memory else None, self.bank.cursor]
        return own if self.running_stats is None else own + list(self.running_stats._buffers.values())

    def _next_call(
        self,
        x: Tensor,
        sample_offset: int | None,
        params: AugmentParams | None,
        out: Tensor | None,
    ) -> _Call:
        """Draw or check the parameters of the next call."""
        if self.training:
            self._enter_worker()
        rows = self.bank.prepare(x, allocate=self.training)
        held = self.bank.count if self.training or len(rows) else torch.zeros_like(self.bank.count)
        if out is not None:
            given = {} if params is None else {k: v for k, v in vars(params).items() if isinstance(v, Tensor)}
            check.require_own_memory("out", out, lms=x, **given, **dict(self.named_buffers()))
        rank, pool = self._gather(x)
        _refuse_gradient_across_ranks(x, pool)
        everyone = x if pool is None else pool
        if params is not None:
            held = held if params.bank_count is None else params.bank_count
            check.require_count("params.bank_count", held, "lms", x)
            partners = len(rows)
            if check.is_readable(held):
                filled = len(self.bank)
                if not 0 <= int(held) <= filled:
                    raise ValueError(f"params.bank_count: expected at most the bank's {filled} rows, got {int(held)}")
                partners = int(held) or len(everyone)
            canvases = [(group.views, group.canvas(x)) for group in self._groups()]
            params.check(x.shape[0], x.device, canvases, partners)
            params = replace(params, bank_count=held)

        stats = self._stats(everyone)
        if params is None:
            offsets = {"sample_offset": _offset(sample_offset, x), "pool_offset": rank * x.shape[0]}
            params = draw(self.rng, x, self._groups(), bank_count=held, pool=everyone.shape[0], **offsets)
        return _Call(params, stats, rows, pool)

    def _stats(self, x: Tensor) -> Tensor | None:
        """Return mean and std for the pre-normalisation of x, which running statistics take in first."""
        if self.running_stats is None:
            return self.fixed_stats
        return self.running_stats.update(x) if self.training else self.running_stats.stats()

    def _enter_worker(self) -> None:
        """In a data loader's worker: take a copy of all buffers, and a stream that no other worker and epoch has.

        By fork, workers of all epochs begin with the same state; by spawn, they share its memory.
        """
        worker = loader_worker()
        if worker is None or worker.seed == self._worker_seed:
            return
        if torch.compiler.is_compiling():  # without fullgraph, Python then runs this call
            raise RuntimeError("Augment: expected a first call in this worker before torch.compile traces it")
        self._worker_seed = worker.seed
        for module in self.modules():
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, buffer.clone())
        digest = hashlib.sha256(f"{int(self.rng[0])} {worker.seed}".encode()).digest()
        self.rng[0] = int.from_bytes(digest[:8], "little") >> 1
        if worker.id == 0 and (self.bank.n_memory or self.running_stats is not None):
            warn_once(
                "Augment: in a data loader's worker, memory and running statistics are the worker's own and end with "
                "it; call it after the loader, or give n_memory=0 and stats=(mean, std)"
            )

    def _gather(self, x: Tensor) -> tuple[int, Tensor | None]:
        """Return this rank and the inputs of all ranks in order; ``(0, None)`` with one process, and in eval mode."""
        if not self._spans_ranks() or loader_worker() is not None:
            return 0, None
        return torch.distributed.get_rank(), concat_ranks(x)

    def _spans_ranks(self) -> bool:
        distributed = torch.distributed
        if not (self.sync and self.training and distributed.is_available() and distributed.is_initialized()):
            return False
        return distributed.get_world_size() > 1

    def extra_repr(self) -> str:
        names = ("post_norm", "n_views", "local_views", "local_size", "local_scale")
        return ", ".join([str(self.settings), *(f"{name}={getattr(self, name)}" for name in names)])


def _fresh_rng(
    device: torch.device, seed: int | Tensor | None, step: int | Tensor, generator: torch.Generator | None
) -> Tensor:
    """Return ``(2,)`` int64 seed and step on a device, without a sync."""
    rng = torch.empty(2, dtype=torch.int64, device=device)
    if seed is None:
        if generator is not None and generator.device.type not in ("cpu", device.type):
            raise ValueError(f"generator: expected on the CPU or on {device}, got {generator.device}")
        source = device if generator is None else generator.device
        seed = torch.randint(2**63 - 1, (), generator=generator, device=source)
    _set_word(rng[0], "seed", seed, 2**63)
    _set_word(rng[1], "step", step, 2**32)
    return rng


def _set_word(word: Tensor, name: str, value: int | Tensor, limit: int) -> None:
    if isinstance(value, Tensor):
        check.require_integer(name, value)
        check.require_shape(name, value, ())
        word.copy_(value, non_blocking=True)
    else:
        word.fill_(check.whole(name, value, 0, limit))


def _offset(sample_offset: int | None, x: Tensor) -> int:
    return own_rank() * x.shape[0] if sample_offset is None else sample_offset


def _refuse_gradient_across_ranks(x: Tensor, pool: Tensor | None) -> None:
    if pool is not None and torch.is_grad_enabled() and x.requires_grad:
        raise RuntimeError("Augment: gives no gradient across ranks; use sync=False, or call under torch.no_grad()")


def _gather_sums(sums: Tensor) -> Tensor:
    """Return the ``(V, B, 3)`` sums of all ranks in sample order, so that adding them rounds as in one process."""
    return concat_ranks(sums).unflatten(0, (-1, len(sums))).transpose(0, 1).flatten(1, 2).contiguous()


def _flat_out(out: Tensor | None, lms: Tensor, settings: Settings, views: int = 2) -> Tensor | None:
    return None if out is None else flat(out, lms, settings.size, views)
