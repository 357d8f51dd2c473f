"""The table of ops: each op's schema, backends and composition. Below it, each op's reference and fake.

Legend: B batch, F mels, T frames, N rows of the bank, P rows of the pool (partners come from it while the bank is
empty; None for the batch itself). Views come first: lam (V, B), crop (V, B, 4), views (V, B, F, T). No argument may be
called "mode": PyTorch passes arguments of mutating ops by keyword to a function of its own that has one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from byola_fast.ops import _ema_checks, reference

NAMESPACE = "byola_fast"
CPU_CHUNK_FRAMES = 384  # per thread: the spectra of a chunk (3 MB) stay in cache, which is 2 to 3 times as fast


class Op(NamedTuple):
    """One op: its schema, the backends that have a kernel, and its parts if it is composed of other ops."""

    schema: str
    cpu: bool = False  # a C++ kernel in csrc
    cuda: bool = False  # a CUDA C++ kernel in csrc
    triton: str | None = None  # the file in _triton with its launcher
    made_of: str | None = None


# fmt: off
TABLE = (
    Op("log_mel(Tensor wav, Tensor window, Tensor filter_bank, Tensor bands, Tensor? stats, SymInt n_fft, "
       "SymInt hop_length, bool center) -> Tensor", cpu=True, triton="log_mel"),
    Op("log_mel_backward(Tensor grad, Tensor wav, Tensor window, Tensor filter_bank, Tensor bands, Tensor? stats, "
       "SymInt n_fft, SymInt hop_length, bool center) -> Tensor"),
    Op("log_mixup_exp(Tensor x, Tensor z, Tensor lam) -> Tensor", cpu=True, triton="log_mixup_exp"),
    Op("log_mixup_exp_backward(Tensor grad, Tensor x, Tensor z, Tensor lam) -> (Tensor, Tensor)",
       cpu=True, triton="log_mixup_exp"),
    Op("resize_crop(Tensor x, Tensor crop, SymInt[2] size, SymInt[2] canvas, str interpolation) -> Tensor",
       cpu=True, triton="resize_crop"),
    Op("resize_crop_backward(Tensor grad, Tensor crop, SymInt[2] input_size, SymInt[2] canvas, str interpolation) "
       "-> Tensor", cpu=True, triton="resize_crop"),
    Op("draw_params(Tensor rng, Tensor? bank_count, SymInt batch, SymInt pool, SymInt pool_offset, "
       "SymInt sample_offset, SymInt[2] mels, SymInt[2] frames, SymInt[2] canvas, float mixup_ratio, "
       "float fader_gain, SymInt views, SymInt first_view) "
       "-> (Tensor lam, Tensor bank_index, Tensor crop, Tensor fader)", cpu=True, triton="draw_params"),
    Op("augment_views(Tensor x, Tensor? pool, Tensor? bank, Tensor? bank_count, Tensor? stats, Tensor lam, "
       "Tensor bank_index, Tensor crop, Tensor fader, Tensor rng, SymInt sample_offset, SymInt first_view, "
       "SymInt[2] size, SymInt[2] canvas, str interpolation, str mixup) -> (Tensor views, Tensor sums)",
       made_of="augment_views_out"),
    Op("augment_views_out(Tensor x, Tensor? pool, Tensor? bank, Tensor? bank_count, Tensor? stats, Tensor lam, "
       "Tensor bank_index, Tensor crop, Tensor fader, Tensor rng, SymInt sample_offset, SymInt first_view, "
       "SymInt[2] canvas, str interpolation, str mixup, Tensor(a!) out) -> Tensor", cpu=True, triton="augment_views"),
    Op("augment_views_backward(Tensor grad, Tensor x, Tensor? bank, Tensor? bank_count, Tensor? stats, Tensor lam, "
       "Tensor bank_index, Tensor crop, Tensor rng, SymInt sample_offset, SymInt first_view, SymInt[2] canvas, "
       "str interpolation, str mixup) -> (Tensor, Tensor)", made_of="resize_crop_backward and plain PyTorch"),
    Op("sample_sums(Tensor x) -> Tensor", cpu=True, triton="normalize"),
    Op("batch_stats(Tensor sums, ScalarType dtype) -> Tensor", cpu=True, triton="normalize"),
    Op("running_stats_(Tensor(a!) mean, Tensor(b!) variance, Tensor(c!) count, Tensor(d!) updates, Tensor sums, "
       "SymInt max_updates) -> Tensor", cpu=True, triton="normalize"),
    Op("normalize(Tensor x, Tensor sums) -> Tensor", cpu=True, triton="normalize"),
    Op("normalize_(Tensor(a!) x, Tensor sums) -> ()", cpu=True, triton="normalize"),
    Op("bank_push_(Tensor(a!) rows, Tensor(b!) cursor, Tensor x, Tensor? stats) -> ()", cpu=True, triton="bank_push"),
    Op("ema_update_(Tensor(a!)[] target, Tensor[] online, Tensor decay) -> ()",
       cpu=True, cuda=True, triton="ema_update"),
    Op("conv_block(Tensor x, Tensor weight, Tensor? bias, Tensor gamma, Tensor beta, Tensor? mean, Tensor? variance, "
       "float eps, ScalarType dtype, bool keep=True) -> (Tensor out, Tensor which, Tensor kept, Tensor stats)",
       cpu=True, triton="conv_block"),
    Op("conv_block_backward(Tensor grad, Tensor x, Tensor weight, Tensor gamma, Tensor which, Tensor kept, "
       "Tensor stats, bool frozen, bool needs_x) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
       cpu=True, triton="conv_block"),
    Op("batch_norm_running_(Tensor(a!) mean, Tensor(b!) variance, Tensor(c!) updates, Tensor stats, SymInt count, "
       "float? momentum) -> ()", triton="conv_block"),
)
# fmt: on

OPS = {op.schema.split("(")[0]: op for op in TABLE}
CPU_OPS = tuple(name for name, op in OPS.items() if op.cpu)
CUDA_OPS = tuple(name for name, op in OPS.items() if op.cuda)
LAUNCHERS = {name: op.triton for name, op in OPS.items() if op.triton}
MADE_OF = {name: op.made_of for name, op in OPS.items() if op.made_of}

library = torch.library.Library(NAMESPACE, "DEF")
for _op in TABLE:
    library.define(_op.schema, tags=torch.Tag.pt2_compliant_tag)


def _views(args: Sequence[Any]) -> int:
    """Return V, from the arguments of ``augment_views`` after the first."""
    lam: Tensor = args[4]
    return lam.shape[0]


def augment_views_allocate(x: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    """Allocate the views and fill them, on every device and backend."""
    *parameters, size, canvas, interpolation, mixup = args
    out = x.new_empty(_views(args), x.shape[0], *size)
    sums = torch.ops.byola_fast.augment_views_out(x, *parameters, canvas, interpolation, mixup, out)
    return out, sums


def log_mel_in_chunks(wav: Tensor, *args: Any) -> Tensor:
    """Run the reference, on the CPU in chunks of the batch."""
    if wav.device.type != "cpu" or wav.shape[0] == 0 or torch.compiler.is_compiling():
        return reference.log_mel_reference(wav, *args)
    *_tensors, n_fft, hop_length, center = args
    frames = reference.num_frames_reference(wav.shape[1], n_fft, hop_length, center)
    chunks = wav.split(max(1, CPU_CHUNK_FRAMES * torch.get_num_threads() // frames))
    return torch.cat([reference.log_mel_reference(chunk, *args) for chunk in chunks])


def augment_views_backward_composite(*args: Any) -> tuple[Tensor, Tensor]:
    """Run the reference with the backend's op for the resize."""
    definition: Callable[..., tuple[Tensor, Tensor]] = reference.augment_views_backward_reference
    return definition(*args, torch.ops.byola_fast.resize_crop_backward)


def ema_update__checked(target: list[Tensor], online: list[Tensor], decay: Tensor) -> None:
    """Check the lists before anything is written, as every backend does, and run the reference."""
    _ema_checks.require_valid_lists(target, online)
    _ema_checks.require_decay(decay, target)
    reference.ema_update__reference(target, online, decay)


COMPOSITES: dict[str, Callable[..., Any]] = {  # in place of the plain reference
    "log_mel": log_mel_in_chunks,
    "augment_views": augment_views_allocate,
    "augment_views_backward": augment_views_backward_composite,
    "ema_update_": ema_update__checked,
}
for _name in OPS:
    _function = COMPOSITES.get(_name) or getattr(reference, f"{_name}_reference")
    library.impl(_name, _function, "CompositeExplicitAutograd")

# not public: the C++ of ema_update_ calls them for lists that are new to it
library.define("_ema_have_clash(Tensor ranges, int targets) -> bool")
library.define("_ema_require_separate_memory(Tensor[] target, Tensor[] online) -> ()")
library.impl("_ema_have_clash", _ema_checks.have_clash, "CompositeExplicitAutograd")
library.impl("_ema_require_separate_memory", _ema_checks.require_separate_memory, "CompositeExplicitAutograd")
# not public: the checks of _checks.py in one pass, where the C++ kernels are loaded
library.define("_all_weights(Tensor x) -> bool")
library.define("_all_inside(Tensor boxes, int mels, int frames) -> bool")
library.impl("_all_weights", reference.all_weights_reference, "CompositeExplicitAutograd")
library.impl("_all_inside", reference.all_inside_reference, "CompositeExplicitAutograd")

# not public: a whole call on the CPU; see _two_views.py
library.define(
    "_two_views_(Tensor x, Tensor settings, Tensor(a!) rng, Tensor? stats, Tensor(b!)? rows, Tensor(c!)? cursor, "
    "Tensor(d!)? mean, Tensor(e!)? variance, Tensor(f!)? count, Tensor(g!)? updates, Tensor(h!) out) -> ()"
)


def _fake(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    return torch.library.register_fake(f"{NAMESPACE}::{name}", lib=library)


def _contiguous_like(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


@_fake("log_mel")
def _(
    wav: Tensor,
    window: Tensor,
    filter_bank: Tensor,
    bands: Tensor,
    stats: Tensor | None,
    n_fft: int,
    hop_length: int,
    center: bool,
) -> Tensor:
    frames = reference.num_frames_reference(wav.shape[1], n_fft, hop_length, center)
    dtype = wav.dtype if wav.is_floating_point() else torch.float32
    return wav.new_empty(wav.shape[0], filter_bank.shape[0], frames, dtype=dtype)


@_fake("log_mel_backward")
def _(grad: Tensor, wav: Tensor, *args: Any) -> Tensor:
    return _contiguous_like(wav)


@_fake("log_mixup_exp")
def _(x: Tensor, z: Tensor, lam: Tensor) -> Tensor:
    return _contiguous_like(x)


@_fake("log_mixup_exp_backward")
def _(grad: Tensor, x: Tensor, z: Tensor, lam: Tensor) -> tuple[Tensor, Tensor]:
    return _contiguous_like(x), _contiguous_like(z)


@_fake("resize_crop")
def _(x: Tensor, crop: Tensor, size: Sequence[int], canvas: Sequence[int], interpolation: str) -> Tensor:
    return x.new_empty(x.shape[0], *size)


@_fake("resize_crop_backward")
def _(grad: Tensor, crop: Tensor, input_size: Sequence[int], canvas: Sequence[int], interpolation: str) -> Tensor:
    return grad.new_empty(grad.shape[0], *input_size)


@_fake("draw_params")
def _(rng: Tensor, bank_count: Tensor | None, batch: int, *args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *_settings, views, _first_view = args
    return (
        rng.new_empty(views, batch, dtype=torch.float32),
        rng.new_empty(views, batch, dtype=torch.int64),
        rng.new_empty(views, batch, 4, dtype=torch.int32),
        rng.new_empty(views, batch, 2, dtype=torch.float32),
    )


def _empty_sums(x: Tensor, views: int) -> Tensor:
    return x.new_empty(views, x.shape[0], 3, dtype=reference.sums_dtype(x.device))


@_fake("augment_views")
def _(x: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    *_parameters, size, _canvas, _interpolation, _mixup = args
    return x.new_empty(_views(args), x.shape[0], *size), _empty_sums(x, _views(args))


@_fake("augment_views_out")
def _(x: Tensor, *args: Any) -> Tensor:
    return _empty_sums(x, _views(args))


@_fake("augment_views_backward")
def _(
    grad: Tensor, x: Tensor, bank: Tensor | None, bank_count: Tensor | None, stats: Tensor | None, *args: Any
) -> tuple[Tensor, Tensor]:
    return _contiguous_like(x), x.new_empty(2) if stats is None else stats.new_empty(2)


@_fake("sample_sums")
def _(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], 3, dtype=reference.sums_dtype(x.device))


@_fake("batch_stats")
def _(sums: Tensor, dtype: torch.dtype) -> Tensor:
    return sums.new_empty(2, dtype=dtype)


@_fake("running_stats_")
def _(mean: Tensor, variance: Tensor, count: Tensor, updates: Tensor, sums: Tensor, max_updates: int) -> Tensor:
    return mean.new_empty(2)


@_fake("normalize")
def _(x: Tensor, sums: Tensor) -> Tensor:
    return _contiguous_like(x)


@_fake("normalize_")
def _(x: Tensor, sums: Tensor) -> None:
    return None


@_fake("bank_push_")
def _(rows: Tensor, cursor: Tensor, x: Tensor, stats: Tensor | None) -> None:
    return None


@_fake("ema_update_")
def _(target: list[Tensor], online: list[Tensor], decay: Tensor) -> None:
    _ema_checks.require_matching_lists(target, online)


def _channels_last(shape: Sequence[int], like: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=like.device, memory_format=torch.channels_last)


@_fake("conv_block")
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gamma: Tensor,
    beta: Tensor,
    mean: Tensor | None,
    variance: Tensor | None,
    eps: float,
    dtype: torch.dtype,
    keep: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    shape = (x.shape[0], weight.shape[0], x.shape[2] // 2, x.shape[3] // 2)
    out, which = _channels_last(shape, x, dtype), _channels_last(shape, x, torch.uint8)
    kept = x.new_empty(56, dtype=torch.float64)
    if x.shape[1] != 1:
        kept = _channels_last((x.shape[0], weight.shape[0], *x.shape[2:]), x, dtype)
    if not keep:
        which, kept = which.new_empty(0), kept.new_empty(0)
    return out, which, kept, x.new_empty(4, weight.shape[0], dtype=reference.compute_dtype(x.dtype))


@_fake("conv_block_backward")
def _(grad: Tensor, x: Tensor, weight: Tensor, gamma: Tensor, *args: Any) -> tuple[Tensor, ...]:
    *_kept, needs_x = args
    to_x = _channels_last(x.shape if needs_x else (0, 1, 1, 1), x, x.dtype)
    return to_x, torch.empty_like(weight), *(gamma.new_empty(len(gamma)) for _ in range(3))


@_fake("batch_norm_running_")
def _(mean: Tensor, variance: Tensor, updates: Tensor, stats: Tensor, count: int, momentum: float | None) -> None:
    return None
