"""From waveform to embedding: front end, statistics and encoder in one module."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Union, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from byola_fast.audio.reading import resample
from byola_fast.networks.checkpoint import CheckpointError
from byola_fast.networks.encoder_file import describe_encoder, find_weights, open_encoder, shown
from byola_fast.networks.encoders import feature_width
from byola_fast.networks.model_card import save_for_hub
from byola_fast.ops import _checks as check
from byola_fast.ops.reference import EPS, compute_dtype
from byola_fast.spectrograms.log_mel import FRONT_END, FrontEnd, LogMel

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

SIZES = ("sample_rate", "n_fft", "win_length", "hop_length", "n_mels")  # settings of a file's front end
LARGEST = 1 << 24  # of each, and of the filter bank: a damaged file must not ask for all memory


Waveform = Union[Tensor, "npt.NDArray[np.floating[Any] | np.int16]"]


class FrameEmbeddings(NamedTuple):
    """Frame-level embeddings.

    Attributes:
        frames: ``(B, T', feature_d)``.
        timestamps: ``(T',)`` float32, centre of each frame in ms from the start of the waveform; beyond 4.6 hours
            rounded to a few ms.
    """

    frames: Tensor
    timestamps: Tensor


class Embedder(nn.Module):
    """Turn waveforms into embeddings: log-mel spectrogram, pre-normalisation, encoder.

        wav (B, samples) -> LogMel -> (lms - mean) / std -> encoder -> (B, feature_d)

    Args:
        encoder: the network: ``(B, 1, F, T)`` to ``(B, feature_d)``, with an attribute ``feature_d``. If it has
            ``n_mels``, the front end must agree. For frame-level embeddings it also has ``forward_frames``
            (``(B, T', feature_d)``) and ``frame_stride`` (input frames for each output frame). Its weights take
            channels-last layout, which is twice as fast.
        stats: (mean, std) of the log-mels that it was trained on.
        to_lms: the front end that it was trained with; by default ``LogMel()`` with the encoder's number of mels.

    Attributes:
        sample_rate: of the waveforms, in Hz.
        feature_d: width of the embeddings.
        stats: (mean, std).
        about: what the file of its weights says besides, such as where it comes from.
        has_frames: whether the encoder gives frame-level embeddings.
        hop: samples from one frame-level embedding to the next: 1280 for AudioNTT2020, 640 for AudioNTT2022.
        frame_period_ms: the same in ms: 80 and 40.
        min_samples: length to which shorter waveforms are padded with zeros at their end: one frame-level embedding.

    Call: ``embedder(wav, *, frames=False, sample_rate=None)``.
        wav: mono waveforms, nominally in [-1, 1]: a floating-point or int16 tensor on the module's device, or a NumPy
            array; int16 counts as ``wav / 32768``. A list holds waveforms of any lengths, each embedded as if alone:
            padding would change the embedding.
        frames: return ``FrameEmbeddings``.
        sample_rate: rate of the waveforms; another rate than the module's is resampled by soxr, as ``read_audio`` does.

    Shape:
        ``(..., samples)`` to ``(..., feature_d)``, on the device of the module; a list of N waveforms ``(samples,)`` to
        ``(N, feature_d)``.
        With ``frames=True``: frames ``(..., T', feature_d)``, timestamps ``(T',)``; of a list, one ``FrameEmbeddings``
        each. A last part shorter than ``hop`` samples has no frame.

    Raises:
        TypeError: the waveform is neither floating-point nor int16. ValueError: another device, or no samples; an
        encoder and a front end that do not match; statistics that are not finite; frames of an encoder that has none;
        a waveform to resample that requires a gradient.

    State: ``state_dict`` holds the statistics, and the front end, which a state dict of another one is refused for.

    Numerics:
        Half-precision waveforms are computed in float32 up to the encoder, which computes in and returns the dtype of
        its weights. NaN and infinity stay in their own waveform. In eval mode, which ``load_encoder`` sets, the result
        does not depend on the rest of the batch. Memory grows by about 0.2 GB per minute of sound in a float32 batch;
        ``byola_fast.embedding.streaming.embed_blocks`` embeds sound of any length in pieces.

    Autograd:
        To the waveform, and to weights that require a gradient (``load_encoder`` turns that off).

    Source:
        BYOL-A, arXiv:2103.06695 and arXiv:2204.07402.

    >>> from byola_fast import AudioNTT2020
    >>> embedder = Embedder(AudioNTT2020(d=32), stats=(-7.1, 4.2)).eval()
    >>> embedder(torch.zeros(2, 16000)).shape
    torch.Size([2, 32])
    >>> frames, timestamps = embedder(torch.zeros(2, 16000), frames=True)
    >>> frames.shape, timestamps[:3]
    (torch.Size([2, 12, 32]), tensor([ 35., 115., 195.]))
    """

    if TYPE_CHECKING:  # nn.Module's own says Any

        @overload
        def __call__(
            self, wav: Waveform | list[Waveform], *, frames: Literal[False] = False, sample_rate: int | None = None
        ) -> Tensor: ...
        @overload
        def __call__(
            self, wav: Waveform, *, frames: Literal[True], sample_rate: int | None = None
        ) -> FrameEmbeddings: ...
        @overload
        def __call__(
            self, wav: list[Waveform], *, frames: Literal[True], sample_rate: int | None = None
        ) -> list[FrameEmbeddings]: ...
        @overload
        def __call__(
            self, wav: Waveform, *, frames: bool, sample_rate: int | None = None
        ) -> Tensor | FrameEmbeddings: ...
        def __call__(self, wav: Any, *, frames: bool = False, sample_rate: int | None = None) -> Any: ...

    def __init__(self, encoder: nn.Module, *, stats: tuple[float, float], to_lms: LogMel | None = None) -> None:
        super().__init__()
        n_mels: Any = getattr(encoder, "n_mels", 64 if to_lms is None else to_lms.n_mels)
        to_lms = LogMel(n_mels=n_mels) if to_lms is None else to_lms
        if to_lms.n_mels != n_mels:
            raise ValueError(f"to_lms: expected {n_mels} mels, as the encoder, got {to_lms.n_mels}")
        if not to_lms.center:
            raise ValueError("to_lms: expected center=True, which says where in time a frame lies, got False")
        mean, std = (float(value) for value in stats) if check.is_pair(stats) else (math.nan, math.nan)
        if not math.isfinite(mean) or not 0 <= std < math.inf:
            raise ValueError(f"stats: expected (mean, std), finite, std at least 0, got {stats}")
        self.to_lms, self.stats = to_lms, (mean, std)
        self.about: dict[str, Any] = {}
        self.encoder = encoder.to(memory_format=torch.channels_last)  # twice as fast
        self.sample_rate, self.feature_d = to_lms.sample_rate, feature_width(encoder)
        self.has_frames = hasattr(encoder, "forward_frames") and hasattr(encoder, "frame_stride")
        shortest = (self.frame_stride - 1) * to_lms.hop_length if self.has_frames else 0
        self.min_samples = max(shortest, to_lms.n_fft // 2 + 1)

    @property
    def frame_stride(self) -> int:
        """Input frames for each frame-level embedding."""
        stride: Any = self._frame_encoder().frame_stride
        return int(stride)

    @property
    def hop(self) -> int:
        """Samples from one frame-level embedding to the next."""
        return self.to_lms.hop_length * self.frame_stride

    @property
    def frame_period_ms(self) -> float:
        """The same in ms."""
        return 1000 * self.hop / self.sample_rate

    def forward_frames(self, lms: Tensor) -> Tensor:
        """Return the frame-level embeddings ``(B, T', feature_d)`` of an output of ``log_mels``."""
        frames: Tensor = self._frame_encoder().forward_frames(lms)
        return frames

    def _frame_encoder(self) -> Any:
        if not self.has_frames:
            name = type(self.encoder).__name__
            raise ValueError(f"frames: {name} has no forward_frames and frame_stride, so no frame-level embeddings")
        return self.encoder

    def log_mels(self, wav: Tensor) -> Tensor:
        """Return the encoder's input: normalised log-mels ``(B, 1, F, T)`` of ``(B, samples)``, in its dtype."""
        short = self.min_samples - wav.shape[-1]
        wide = wav.to(compute_dtype(wav.dtype))
        lms = self.to_lms(F.pad(wide, (0, short)) if short > 0 else wide)
        mean, std = self.stats
        return ((lms - mean) / max(std, EPS)).to(next(self.encoder.parameters(), lms).dtype)

    def timestamps(self, count: int) -> Tensor:
        """Return the centres of the first ``count`` frames, in ms, on the device of the module."""
        stride, hop_ms = self.frame_stride, 1000 * self.to_lms.hop_length / self.sample_rate
        frames = torch.arange(count, device=self.to_lms.window.device) * stride
        return (frames.float() + (stride - 1) / 2) * hop_ms

    def forward(
        self, wav: Any, *, frames: bool = False, sample_rate: int | None = None
    ) -> Tensor | FrameEmbeddings | list[FrameEmbeddings]:
        """Return one embedding per waveform, or with ``frames`` the ``FrameEmbeddings``; see the class."""
        if isinstance(wav, list | tuple):
            if not wav:
                raise ValueError("wav: expected at least one waveform, got an empty list")
            if odd := [tuple(each.shape) for each in wav if getattr(each, "ndim", 1) != 1]:
                raise ValueError(f"wav: expected waveforms (samples,) in a list, got one of shape {odd[0]}")
            answers: list[Any] = [self(each, frames=frames, sample_rate=sample_rate) for each in wav]
            return answers if frames else torch.stack(answers)
        wav = self._waveform(wav, sample_rate)
        lms = self.log_mels(wav.flatten(0, -2) if wav.ndim > 2 else wav if wav.ndim == 2 else wav[None])
        answer: Tensor = self.forward_frames(lms) if frames else self.encoder(lms)
        if wav.ndim != 2:
            answer = answer.reshape(*wav.shape[:-1], *answer.shape[1:])
        return FrameEmbeddings(answer, self.timestamps(answer.shape[-2])) if frames else answer

    def _waveform(self, wav: Any, sample_rate: int | None) -> Tensor:
        """Return floating-point samples ``(..., samples)`` at the module's rate, on its device."""
        device = self.to_lms.window.device
        if type(wav).__module__ == "numpy":
            wav = torch.from_numpy(wav.copy()).to(device)
        check.require_tensor("wav", wav)
        if wav.dtype == torch.int16:
            wav = wav * 2.0**-15
        check.require_float("wav", wav)
        if wav.device != device:
            raise ValueError(f"wav: expected a tensor on {device}, as the module, got {wav.device}")
        if wav.ndim < 1 or wav.shape[-1] < 1:
            raise ValueError(f"wav: expected shape (..., samples), not empty, got {tuple(wav.shape)}")
        return wav if sample_rate is None else resample(wav, sample_rate, self.sample_rate)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write a folder in the layout of the Hugging Face Hub, which ``load_encoder`` loads.

        It holds ``model.safetensors``, with front end and statistics inside, ``config.json`` and a model card,
        ``README.md``. ``hf upload USER/NAME FOLDER`` puts it on the Hub; then ``load_encoder("hf-hub:USER/NAME")``.

        Raises:
            CheckpointError: the folder cannot be written.
        """
        described = describe_encoder(self.encoder, self.to_lms)
        save_for_hub(folder, self.encoder, self.about | described, self.stats)

    def get_extra_state(self) -> Tensor:
        """Return what ``state_dict`` holds besides tensors: statistics and front end, as numbers."""
        return torch.tensor([*self.stats, *_as_numbers(self.to_lms).values()], dtype=torch.float64, device="cpu")

    def set_extra_state(self, state: Tensor) -> None:
        """Take the statistics of ``get_extra_state``.

        Raises:
            ValueError: the state is of another front end.
        """
        mean, std, *front_end = state.tolist()
        for (name, value), saved in zip(_as_numbers(self.to_lms).items(), front_end, strict=True):
            if value != saved:
                raise ValueError(f"to_lms: {name}: expected {saved:g}, as where the state was saved, got {value:g}")
        self.stats = mean, std

    def extra_repr(self) -> str:
        return f"sample_rate={self.sample_rate}, feature_d={self.feature_d}, stats={self.stats}"


def _as_numbers(to_lms: LogMel) -> dict[str, float]:
    named = {name: getattr(to_lms, name) for name in FRONT_END}
    words = {"mel_scale": named["mel_scale"] == "htk", "norm": named["norm"] is not None}
    return {name: float(value) for name, value in (named | words).items()}


def load_encoder(
    path: str | Path | None = None,
    *,
    encoder: nn.Module | type[nn.Module] | str | None = None,
    device: str | torch.device | None = None,
    stats: tuple[float, float] | None = None,
    to_lms: LogMel | None = None,
) -> Embedder:
    """Load an encoder, with its front end and statistics, from a file of weights: wav in, embedding out.

    Args:
        path: a file that training wrote (``encoder.pth``, ``encoder.safetensors``, ``checkpoint.pt``, of which the
            online encoder is taken), a run's folder, or a state dict of published layout (``features.N.*``,
            ``fc.N.*``; bare, wrapped or prefixed). AudioNTT2020 or AudioNTT2022 and their widths are recognised by the
            shapes. Or a folder of ``save_pretrained``, here or on the Hugging Face Hub: ``"hf-hub:user/name"``, which
            needs huggingface_hub; nothing else asks the network. By default the weights that come with the package;
            ``byola_fast/weights/README.md`` is their card.
        encoder: for weights of another network: its class, ``"package.module:Class"``, or a module to load them into.
            A file never causes an import, whatever class it names.
        device: by default the CPU.
        stats: (mean, std) of the log-mels of the training data; overrides the file's. Files of published layout hold
            none.
        to_lms: the front end; overrides the file's. By default ``LogMel()`` with the encoder's number of mels.

    Returns:
        An ``Embedder`` in eval mode whose weights require no gradient. ``.requires_grad_(True)`` undoes that for
        fine-tuning.

    Raises:
        CheckpointError: the file cannot be read or is not understood (see ``read_encoder``), its front end is out of
        range, or there are no statistics. Nothing in a file is executed.

    >>> import tempfile
    >>> import byola_fast
    >>> from byola_fast import describe_encoder, save_encoder
    >>> path = tempfile.mkdtemp() + "/encoder.safetensors"
    >>> encoder = byola_fast.AudioNTT2020(d=32)
    >>> save_encoder(path, encoder, config=describe_encoder(encoder, LogMel()), stats=(-7.1, 4.2))

    >>> embedder = load_encoder(path)
    >>> wav = torch.randn(3, 2 * embedder.sample_rate)  # mono, at that rate, in [-1, 1]
    >>> embedder(wav).shape
    torch.Size([3, 32])
    """
    path = find_weights(path)
    with torch.device("cpu"):  # whatever torch's default is: meta takes no weights
        (network, config, saved_stats), load_weights = open_encoder(path, encoder)
    if stats is None:
        stats = saved_stats
    if stats is None:
        raise CheckpointError(
            f"{path}: holds no statistics of the log-mels that it was trained on; give stats=(mean, std), as published "
            "with the weights or computed from that data (--stats FILE)"
        )
    if to_lms is None:
        settings = {name: config[name] for name in FRONT_END if name in config}
        if hasattr(network, "n_mels"):
            settings["n_mels"] = network.n_mels
        for name in SIZES:
            value = settings.setdefault(name, getattr(FrontEnd, name))
            if not isinstance(value, (int, float)) or not 1 <= value <= LARGEST:
                raise CheckpointError(f"{path}: config: {name}: expected 1 to {LARGEST}, got {shown(value)}")
        if settings["n_mels"] * settings["n_fft"] > LARGEST:
            product = f"{settings['n_mels']} * {settings['n_fft']}"
            raise CheckpointError(f"{path}: config: n_mels * n_fft: expected at most {LARGEST}, got {product}")
        try:
            with torch.device("cpu"):
                to_lms = LogMel(**settings)
        except ValueError as error:
            raise CheckpointError(f"{path}: config: {error}") from error
        except Exception as error:  # values of any kind
            raise CheckpointError(f"{path}: config: expected settings of LogMel: {error}") from error
        if not to_lms.center:
            raise CheckpointError(f"{path}: config: expected center True, as embeddings have times, got False")
    embedder = Embedder(network, stats=stats, to_lms=to_lms)
    embedder.about = config
    load_weights()  # after every check
    network.requires_grad_(False)
    return embedder.eval().to(torch.device("cpu" if device is None else device))
