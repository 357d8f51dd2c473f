"""Encoders: log-mel spectrograms in, embeddings out."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from byola_fast import ops
from byola_fast.ops import _checks as check
from byola_fast.ops.reference import sums_dtype
from byola_fast.runtime.plugins import find_class

CHANNELS = 64
DROPOUT = 0.3
BLOCKS: list[list[type]] = [[nn.Conv2d, norm, nn.ReLU, nn.MaxPool2d] for norm in (nn.BatchNorm2d, nn.SyncBatchNorm)]
GEOMETRY = ((3, 3), (1, 1), (1, 1), (1, 1), 1, "zeros")


class AudioNTT(nn.Module):
    """Base of both encoders: blocks of [Conv3x3, BatchNorm, ReLU, MaxPool2], and pooling over time.

    Attributes:
        frame_stride: mels and frames of the input per local feature; ``10 * frame_stride`` ms at the default hop.
        output: linear layer after the pooling, from ``byola_fast.networks.whitening.whiten``; None without.
    """

    frame_stride: int
    feature_d: int
    fc: nn.Sequential
    pretrain_d: int  # the width that training takes by default

    def __init__(self, n_mels: int) -> None:
        super().__init__()
        self.output: nn.Linear | None = None
        if n_mels < self.frame_stride:
            raise ValueError(f"n_mels: expected at least {self.frame_stride}, got {n_mels}")
        self.n_mels = n_mels
        self.local_d = CHANNELS * (n_mels // self.frame_stride)  # all mels and channels of one time
        layers: list[nn.Module] = []
        for block in range(self.frame_stride.bit_length() - 1):
            layers += [
                nn.Conv2d(CHANNELS if block else 1, CHANNELS, 3, padding=1),
                nn.BatchNorm2d(CHANNELS),
                nn.ReLU(),
                nn.MaxPool2d(2),
            ]
        self.features = nn.Sequential(*layers)

    def forward_frames(self, x: Tensor) -> Tensor:
        """Return frame-level features: ``(B, 1, F, T)`` to ``(B, T // frame_stride, feature_d)``."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """Return one embedding per sample: ``(B, 1, F, T)`` to ``(B, feature_d)``."""
        return self.pool(self.forward_frames(x))

    def pool(self, frames: Tensor) -> Tensor:
        """Return the embedding of frame-level features: ``(B, T, feature_d)`` to ``(B, feature_d)``."""
        pooled = pool_frames(frames)
        return pooled if self.output is None else self.output(pooled)

    def running_pool(self) -> RunningMaxMean:
        """Return an accumulator for the frames of a long sound, which come in pieces."""
        return RunningMaxMean(self.output)

    def _local(self, x: Tensor) -> Tensor:
        """``(B, 1, F, T)`` to ``(B, T // frame_stride, local_d)``, mels outermost, channels innermost."""
        check.require_float("x", x)
        check.require_shape("x", x, ("B", 1, self.n_mels, "T"))
        if x.shape[3] < self.frame_stride:
            raise ValueError(f"x: expected at least {self.frame_stride} frames, got {x.shape[3]}")
        layers: list[Any] = list(self.features)
        for first in range(0, len(layers), 4):
            x = _conv_block(x, layers[first : first + 4])
        return x.permute(0, 3, 2, 1).flatten(2)

    def extra_repr(self) -> str:
        return f"n_mels={self.n_mels}, d={self.feature_d}"

    def add_output(self) -> None:
        """Add a linear layer after the pooling, with dtype and device of the others."""
        last: Any = self.fc[3]
        self.output = nn.Linear(self.feature_d, self.feature_d).to(last.weight)

    @classmethod
    def has_width(cls, d: int, n_mels: int) -> bool:
        """Return whether the embedding can be d wide."""
        raise NotImplementedError

    @classmethod
    def recognise(cls, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int] | None:
        """Return the constructor's arguments that fit the shapes of a state dict; None for another network."""
        blocks = sum(f"features.{4 * block}.weight" in shapes for block in range(4))
        first, last = shapes.get("fc.0.weight", ()), shapes.get("fc.3.weight", ())
        if cls.frame_stride != 2**blocks or len(first) != 2 or len(last) != 2 or first[1] % CHANNELS or not first[1]:
            return None
        more = {"whitened": True} if "output.weight" in shapes else {}
        return {"n_mels": first[1] // CHANNELS * cls.frame_stride} | cls._widths(first, last) | more

    @classmethod
    def _widths(cls, first: tuple[int, ...], last: tuple[int, ...]) -> dict[str, int]:
        """Return the widths that fit the shapes of the first and the last linear layer."""
        raise NotImplementedError


def _conv_block(x: Tensor, layers: list[Any]) -> Tensor:
    """Convolution, BatchNorm, ReLU, MaxPool2: ``(B, C, F, T)`` to ``(B, C', F // 2, T // 2)``."""
    conv, norm = layers[:2]
    group = _joint_group(norm)
    library_wins = group is not None and x.is_cuda and x.shape[1] > 1  # SyncBatchNorm has kernels for CUDA
    if library_wins or not _is_as_built(layers):
        for layer in layers:
            x = layer(x)
        return x
    return ops.conv_block(
        x,
        conv.weight,
        conv.bias,
        norm.weight,
        norm.bias,
        norm.running_mean,
        norm.running_var,
        norm.num_batches_tracked,
        training=norm.training,
        momentum=norm.momentum,
        eps=norm.eps,
        group=group,
    )


def _joint_group(norm: Any) -> Any:
    """Return the process group over which a layer takes statistics; None for its own batch."""
    if type(norm) is not nn.SyncBatchNorm or not norm.training:
        return None
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return None
    group = norm.process_group or torch.distributed.group.WORLD
    return group if torch.distributed.get_world_size(group) > 1 else None


def _is_as_built(layers: list[Any]) -> bool:
    """Return whether a block's layers are the constructor's, with no hook to call."""
    if [type(layer) for layer in layers] not in BLOCKS:
        return False
    if not torch.compiler.is_compiling() and nn.modules.module._has_any_global_hook():
        return False
    if any(
        layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks
        for layer in layers
    ):
        return False
    conv, norm, _relu, pool = layers
    geometry = (conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups, conv.padding_mode)
    return geometry == GEOMETRY and norm.weight is not None and (pool.kernel_size, pool.stride) == (2, 2)


class AudioNTT2020(AudioNTT):
    """Encode log-mel spectrograms with three convolutions and an MLP over time: the encoder of BYOL-A's first version.

    3 x [Conv3x3, BatchNorm, ReLU, MaxPool2] -> at each of T // 8 times, all mels and channels -> Linear d, ReLU,
    Dropout 0.3, Linear d, ReLU -> max over time + mean over time.

    Args:
        n_mels: mel bins F of the input, at least 8.
        d: width of the embedding; 512, 1024 and 2048 make 600,192, 1,649,792 and 5,321,856 parameters (F = 64).
        whitened: add the linear layer that ``byola_fast.networks.whitening.whiten`` sets.

    Attributes:
        feature_d: width of the embedding, d.
        frame_stride: 8 input frames for each output frame: 80 ms at the default hop of 10 ms.

    Shape:
        ``(B, 1, F, T)`` with T of at least 8 to ``(B, d)``; ``forward_frames`` gives ``(B, T // 8, d)``, of which
        frame t covers input frames 8 t to 8 t + 7 (and a margin). Mels and frames beyond a multiple of 8 serve as
        margin only.

    Raises:
        ValueError: a wrong rank or number of mels, too few frames; ``n_mels`` or ``d`` out of range.
        TypeError: an input that is no floating-point tensor.

    Numerics:
        State dict keys are ``features.N.*`` and ``fc.N.*``, N counting every layer. Each local feature holds mels
        outermost and channels innermost.

    Autograd:
        To the input and all parameters.

    Source:
        BYOL-A, arXiv:2103.06695, its audio encoder.

    >>> encoder = AudioNTT2020(d=512)
    >>> encoder(torch.zeros(2, 1, 64, 96)).shape, encoder.forward_frames(torch.zeros(2, 1, 64, 96)).shape
    (torch.Size([2, 512]), torch.Size([2, 12, 512]))
    """

    frame_stride, pretrain_d = 8, 2048

    def __init__(self, n_mels: int = 64, d: int = 512, *, whitened: bool = False) -> None:
        super().__init__(n_mels)
        if d < 1:
            raise ValueError(f"d: expected at least 1, got {d}")
        self.feature_d = d
        self.fc = nn.Sequential(nn.Linear(self.local_d, d), nn.ReLU(), nn.Dropout(DROPOUT), nn.Linear(d, d), nn.ReLU())
        if whitened:
            self.add_output()

    def forward_frames(self, x: Tensor) -> Tensor:
        frames: Tensor = self.fc(self._local(x))
        return frames

    @classmethod
    def has_width(cls, d: int, n_mels: int) -> bool:
        return d >= 1

    @classmethod
    def _widths(cls, first: tuple[int, ...], last: tuple[int, ...]) -> dict[str, int]:
        return {"d": last[0]}


class AudioNTT2022(AudioNTT):
    """Encode log-mel spectrograms with two convolutions and an MLP beside them: the encoder of BYOL-A's second version.

    2 x [Conv3x3, BatchNorm, ReLU, MaxPool2] -> at each of T // 4 times, all mels and channels: the local features,
    64 * (F // 4) of them -> an MLP of these: Linear hidden_d, ReLU, Dropout 0.3, Linear, ReLU -> both side by side,
    local features first -> max over time + mean over time.

    Args:
        n_mels: mel bins F of the input, at least 4.
        d: width of the embedding, local features included. The MLP fills what they leave, so that d must exceed
            ``64 * (n_mels // 4)`` (1024 for 64 mels): 3072 is published, 2048 leaves an MLP output of 1024, and 512 and
            1024 leave none (``AudioNTT2020`` has those).
        hidden_d: hidden width of the MLP. The defaults make 6,333,376 parameters.
        whitened: as ``AudioNTT2020``.

    Attributes:
        feature_d: width of the embedding, d.
        local_d: width of the local features in it.
        frame_stride: 4 input frames for each output frame: 40 ms at the default hop of 10 ms.

    Shape:
        ``(B, 1, F, T)`` with T of at least 4 to ``(B, d)``; ``forward_frames`` gives ``(B, T // 4, d)``, of which
        frame t covers input frames 4 t to 4 t + 3 (and a margin). Mels and frames beyond a multiple of 4 serve as
        margin only.

    Raises:
        ValueError: a wrong rank or number of mels, too few frames; ``n_mels``, ``d`` or ``hidden_d`` out of range.
        TypeError: an input that is no floating-point tensor.

    Numerics:
        As ``AudioNTT2020``.

    Autograd:
        To the input and all parameters.

    Source:
        BYOL-A, second version, arXiv:2204.07402, its audio encoder.

    >>> encoder = AudioNTT2022()
    >>> encoder(torch.zeros(2, 1, 64, 96)).shape, encoder.forward_frames(torch.zeros(2, 1, 64, 96)).shape
    (torch.Size([2, 3072]), torch.Size([2, 24, 3072]))
    """

    frame_stride, pretrain_d = 4, 3072

    def __init__(self, n_mels: int = 64, d: int = 3072, hidden_d: int = 2048, *, whitened: bool = False) -> None:
        super().__init__(n_mels)
        if d <= self.local_d:
            raise ValueError(
                f"d (feature_d): expected more than the {self.local_d} local features that {n_mels} mels make and that "
                f"are part of it, got {d}; AudioNTT2020 takes any width"
            )
        if hidden_d < 1:
            raise ValueError(f"hidden_d: expected at least 1, got {hidden_d}")
        self.feature_d, self.hidden_d = d, hidden_d
        self.fc = nn.Sequential(
            nn.Linear(self.local_d, hidden_d),
            nn.ReLU(),
            nn.Dropout(DROPOUT),
            nn.Linear(hidden_d, d - self.local_d),
            nn.ReLU(),
        )
        if whitened:
            self.add_output()

    def forward_frames(self, x: Tensor) -> Tensor:
        local = self._local(x)
        return torch.cat([local, self.fc(local)], dim=-1)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, hidden_d={self.hidden_d}"

    @classmethod
    def has_width(cls, d: int, n_mels: int) -> bool:
        return d > CHANNELS * (n_mels // cls.frame_stride)

    @classmethod
    def _widths(cls, first: tuple[int, ...], last: tuple[int, ...]) -> dict[str, int]:
        return {"d": first[1] + last[0], "hidden_d": first[0]}


ENCODERS: dict[str, type[AudioNTT]] = {each.__name__: each for each in (AudioNTT2020, AudioNTT2022)}


def make_encoder(
    name: str | type[nn.Module], *, n_mels: int | None = None, feature_d: int | None = None, **settings: Any
) -> nn.Module:
    """Return an encoder with fresh weights, by name or class.

    Args:
        name: "AudioNTT2020" (BYOL-A's first version), "AudioNTT2022" (its second), ``"package.module:Class"`` for a
            class of your own, or the class itself: any ``nn.Module`` from ``(B, 1, F, T)`` to ``(B, feature_d)`` with
            an attribute ``feature_d``. For frame-level embeddings it also has ``forward_frames`` (``(B, T', d)``) and
            ``frame_stride`` (input frames for each output frame).
        n_mels: mel bins F of the log-mel spectrograms; 64 if None.
        feature_d: width of the embedding; the encoder's own default if None, 512 and 3072. A class of your own is given
            ``n_mels`` and ``feature_d`` if its constructor names them.
        **settings: passed to the constructor.

    Raises:
        ValueError: an unknown name, a width that the encoder cannot have, or a class that makes no ``nn.Module`` with
            an integer ``feature_d``.

    >>> make_encoder("AudioNTT2022").feature_d
    3072
    """
    build = find_class("encoder", name, ENCODERS)
    parameters = inspect.signature(build).parameters
    width = "d" if issubclass(build, AudioNTT) else "feature_d"
    for argument, value in (("n_mels", n_mels), (width, feature_d)):
        if value is not None and argument in parameters:
            settings[argument] = value
    encoder = build(**settings)
    if not isinstance(encoder, nn.Module) or not isinstance(getattr(encoder, "feature_d", None), int):
        raise ValueError(f"encoder: expected a class of nn.Module with an integer feature_d, got {build.__name__}")
    if feature_d is not None and encoder.feature_d != feature_d:
        raise ValueError(f"feature_d: expected the {encoder.feature_d} of {build.__name__}, got {feature_d}")
    if n_mels is not None and getattr(encoder, "n_mels", n_mels) != n_mels:
        raise ValueError(f"n_mels: expected the {encoder.n_mels} of {build.__name__}, got {n_mels}")
    return encoder


def feature_width(encoder: nn.Module) -> int:
    """Return the width of an encoder's embedding.

    Raises:
        TypeError: it is no module, or has no ``feature_d``.
    """
    if not isinstance(encoder, nn.Module):
        raise TypeError(f"encoder: expected a module, got {encoder!r}")
    feature_d = getattr(encoder, "feature_d", None)
    if not isinstance(feature_d, int):
        raise TypeError(f"encoder: expected an attribute feature_d, the width of its output, got {feature_d!r}")
    return feature_d


def require_embeddings(encoder: nn.Module, shape: tuple[int, int]) -> None:
    """Refuse an encoder that does not map two inputs of a shape to ``(2, feature_d)``; tried once, in eval mode.

    Raises:
        ValueError: the encoder fails, or gives another shape or dtype.
    """
    weight = next(encoder.parameters(), torch.empty(0, device="cpu"))
    training = encoder.training
    try:
        with torch.no_grad():
            answer = encoder.eval()(torch.zeros(2, 1, *shape, dtype=weight.dtype, device=weight.device))
    except Exception as error:  # whatever a user's own network raises
        lines = str(error).splitlines() or [type(error).__name__]
        raise ValueError(f"encoder: fails on an input (2, 1, {shape[0]}, {shape[1]}): {lines[0]}") from error
    finally:
        encoder.train(training)
    wanted = (2, feature_width(encoder))
    if not isinstance(answer, Tensor) or tuple(answer.shape) != wanted or not answer.is_floating_point():
        given = tuple(answer.shape) if isinstance(answer, Tensor) else type(answer).__name__
        raise ValueError(f"encoder: expected embeddings of shape {wanted} for {(2, 1, *shape)}, got {given}")


def pool_frames(frames: Tensor) -> Tensor:
    """Pool frames over time, ``max + mean``: ``(B, T, d)`` to ``(B, d)``.

    >>> pool_frames(torch.tensor([[[1.0], [3.0]]]))
    tensor([[5.]])
    """
    return frames.amax(1) + frames.mean(1)


class RunningMaxMean:
    """Pool frames that come in pieces: the ``max + mean`` of ``pool_frames``, with the sum in float64.

    Args:
        output: linear layer after the pooling.
    """

    def __init__(self, output: nn.Linear | None = None) -> None:
        self.output, self.count = output, 0
        self.largest = self.total = torch.zeros((), device="cpu")

    def add(self, frames: Tensor) -> None:
        """Add ``(n, d)``."""
        largest, total = frames.float().amax(0), frames.to(sums_dtype(frames.device)).sum(0)
        self.largest = torch.maximum(self.largest, largest) if self.count else largest
        self.total = self.total + total if self.count else total
        self.count += len(frames)

    def result(self) -> Tensor:
        """Return ``(d,)`` float32."""
        pooled = self.largest + (self.total / self.count).float()
        if self.output is None:
            return pooled
        return F.linear(pooled, self.output.weight.float(), self.output.bias.float())
