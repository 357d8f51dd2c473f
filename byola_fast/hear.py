"""The HEAR interface (hearbenchmark.com), for its evaluators and validator."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from byola_fast.embedding.embedder import Embedder, load_encoder
from byola_fast.embedding.streaming import BATCH_SEC
from byola_fast.ops import _checks as check

LONGEST_MS = 50.0  # between two timestamps


class HearModel(nn.Module):
    """Hold an encoder under the attributes that HEAR asks for.

    Args:
        embedder: as ``load_encoder`` returns it.

    Attributes:
        sample_rate: of the audio, in Hz; HEAR accepts 16000, 22050, 32000, 44100 and 48000.
        scene_embedding_size: width of the embedding of a whole sound.
        timestamp_embedding_size: width of each embedding in time.
        offsets: number of shifted pooling grids that together give timestamps at most 50 ms apart: 2 for AudioNTT2020
            (80 ms each, 40 ms together), 1 for AudioNTT2022 (40 ms).

    Raises:
        ValueError: frames of the front end more than 50 ms apart, or an encoder without frames.
    """

    def __init__(self, embedder: Embedder) -> None:
        super().__init__()
        self.embedder = embedder
        self.sample_rate, stride = embedder.sample_rate, embedder.frame_stride
        self.scene_embedding_size = self.timestamp_embedding_size = embedder.feature_d
        fine = [count for count in range(1, stride + 1) if not stride % count]
        fits = [count for count in fine if embedder.frame_period_ms / count <= LONGEST_MS]
        if not fits:
            hop_ms = embedder.frame_period_ms / stride
            raise ValueError(f"embedder: expected frames at most {LONGEST_MS:g} ms apart, got {hop_ms:g} ms")
        self.offsets = fits[0]

    def forward(self, wav: Tensor) -> Tensor:
        """Return ``(B, scene_embedding_size)`` float32 of ``(B, samples)``."""
        embeddings: Tensor = self.embedder(wav)
        return embeddings.float()

    def forward_frames(self, wav: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``(B, n, timestamp_embedding_size)`` float32 and ``(n,)`` timestamps in ms of ``(B, samples)``.

        All grids see one log-mel spectrogram. Its last frame is repeated so that timestamps reach the end of the sound.
        """
        stride = self.embedder.frame_stride
        lms, shift = self.embedder.log_mels(wav), stride // self.offsets
        period_ms = self.embedder.frame_period_ms / self.offsets
        first_ms, length_ms = float(self.embedder.timestamps(1)), 1000 * wav.shape[1] / self.sample_rate
        count = max(1, int((length_ms - first_ms) // period_ms) + 1)
        rows = -(-count // self.offsets)
        missing = rows * stride + (self.offsets - 1) * shift - lms.shape[3]
        if missing > 0:
            lms = F.pad(lms, (0, missing, 0, 0), mode="replicate")
        grids = [self.embedder.forward_frames(lms[..., shift * k :])[:, :rows] for k in range(self.offsets)]
        frames = torch.stack(grids, dim=2).flatten(1, 2)[:, :count]
        return frames.float(), first_ms + period_ms * torch.arange(count, device=frames.device)


def load_model(model_file_path: str = "") -> HearModel:
    """Load a model for HEAR.

    Args:
        model_file_path: file of an encoder, as ``byola_fast.load_encoder`` takes it; it must hold its statistics, as
            files of ``save_encoder`` and of training do. By default the weights that come with the package.

    Raises:
        CheckpointError: the weights cannot be used.
    """
    return HearModel(load_encoder(model_file_path or None)).eval()


def get_scene_embeddings(audio: Tensor, model: HearModel) -> Tensor:
    """Return one embedding for each sound: ``(n_sounds, n_samples)`` to ``(n_sounds, scene_embedding_size)`` float32.

    Args:
        audio: in [-1, 1], mono, at ``model.sample_rate``, on the model's device. A sound with NaN or infinity has such
            embeddings; other sounds are not affected.
        model: of ``load_model``.

    Raises:
        TypeError or ValueError: audio of another type or rank, or no samples.
    """
    _check(audio)
    with torch.no_grad():
        return torch.cat([model(part) for part in _split(audio, model)])


def get_timestamp_embeddings(audio: Tensor, model: HearModel) -> tuple[Tensor, Tensor]:
    """Return frame-level embeddings and their timestamps.

    Args:
        audio: as ``get_scene_embeddings``.
        model: of ``load_model``.

    Shape:
        ``(n_sounds, n_samples)`` to embeddings ``(n_sounds, n, timestamp_embedding_size)`` float32 and timestamps
        ``(n_sounds, n)`` in ms: the centre of each frame, evenly spaced, at most 50 ms apart.

    Raises:
        TypeError or ValueError: as ``get_scene_embeddings``.
    """
    _check(audio)
    with torch.no_grad():
        parts = [model.forward_frames(part) for part in _split(audio, model)]
    embeddings, timestamps = torch.cat([frames for frames, _times in parts]), parts[0][1]
    return embeddings, timestamps.expand(len(audio), -1).contiguous()


def _check(audio: Tensor) -> None:
    check.require_float("audio", audio)
    if audio.ndim != 2 or not audio.numel():
        raise ValueError(f"audio: expected shape (n_sounds, n_samples), not empty, got {tuple(audio.shape)}")


def _split(audio: Tensor, model: HearModel) -> tuple[Tensor, ...]:
    """Split a batch into parts of about a minute of sound."""
    return audio.split(max(1, int(BATCH_SEC * model.sample_rate / audio.shape[1])))
