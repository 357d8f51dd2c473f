"""Embeddings of many audio files of any length: decoded by processes, batched by equal length, streamed where long."""

from __future__ import annotations

import math
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from byola_fast.audio.reading import AudioError, read_audio, read_blocks
from byola_fast.embedding.embedder import Embedder
from byola_fast.runtime.workers import num_workers, read_in_processes

BATCH_SEC = 60.0  # sound per batch: 0.2 GB; larger is no faster on a CPU
NOT_FINITE = "the embedding is not finite: samples far beyond full scale, or weights out of range"
LONGEST_PAD_SEC = 86400  # a day
WAITING = 8  # batches of sound that wait for clips of equal length


class Piece(NamedTuple):
    """Embeddings of a clip, or of a part of it.

    Attributes:
        number: of the clip in the list.
        rows: ``(n, d)`` float32 on the CPU, finite: one row per clip, or its frames; empty if there is an error.
        samples: number of samples covered.
        last: whether this is the clip's last piece.
        error: why the clip could not be read, or that its embedding is not finite; its earlier rows do not count then.
    """

    number: int
    rows: Tensor
    samples: int
    last: bool
    error: AudioError | None = None


def embed_clips(
    embedder: Embedder,
    files: Sequence[Path],
    *,
    frames: bool = False,
    pad_sec: float = 0.0,
    batch_sec: float = BATCH_SEC,
    workers: int | None = None,
) -> Generator[Piece]:
    """Yield the embeddings of audio files, in the order in which they are ready.

    Clips of the same length share a batch. A clip longer than a batch is read, embedded and pooled in pieces, in memory
    that does not grow with its length; the result equals that of the whole up to rounding. An encoder without
    ``running_pool`` takes each clip whole.

    Args:
        embedder: in eval mode, on the device that computes.
        files: of any format, rate and channel count.
        frames: yield frame-level embeddings instead of one per clip. The pieces of a long clip come in order, with no
            other clip between them.
        pad_sec: pad shorter clips with zeros at both ends to this length, in seconds.
        batch_sec: sound per batch, in seconds.
        workers: processes that decode; by default one fewer than CPU cores, at most 8; 0 decodes in this process.

    Raises:
        ValueError: an argument out of range. ChildProcessError: a process that decodes was killed.
    """
    workers = require_batching(pad_sec, batch_sec, workers)
    rate = embedder.sample_rate
    maximum = max(round(batch_sec * rate), 1)
    padded = round(pad_sec * rate)
    waiting: dict[int, list[tuple[int, Tensor, int]]] = {}
    held = 0
    reading = read_in_processes(partial(_read_start, sample_rate=rate, samples=maximum + 1), files, workers)
    with closing(reading) as decoded:
        for number, read in enumerate(decoded):
            if isinstance(read, AudioError):
                yield _broken(embedder, number, read)
                continue
            if len(read) > maximum:
                yield from _embed_long(embedder, files, number, frames, batch_sec)
                continue
            short = max(0, padded - len(read))
            wav = F.pad(read, (short // 2, short - short // 2))
            wav = F.pad(wav, (0, max(0, embedder.min_samples - len(wav))))  # as the embedder alone would
            group = waiting.setdefault(len(wav), [])
            group.append((number, wav, len(read)))
            held += len(wav)
            if len(group) * len(wav) >= maximum:
                length = len(wav)
            elif held > WAITING * maximum:
                length = max(waiting, key=lambda each: each * len(waiting[each]))
            else:
                continue
            batch = waiting.pop(length)
            held -= length * len(batch)
            yield from _embed_batch(embedder, files, batch, frames)
    for length in sorted(waiting):
        yield from _embed_batch(embedder, files, waiting[length], frames)


def require_batching(pad_sec: float, batch_sec: float, workers: int | None) -> int:
    """Refuse settings of ``embed_clips`` that are out of range; return the number of workers."""
    if not 0 <= pad_sec <= LONGEST_PAD_SEC:
        raise ValueError(f"pad_sec: expected 0 to {LONGEST_PAD_SEC} s, got {pad_sec}")
    if not 0 < batch_sec < math.inf:
        raise ValueError(f"batch_sec: expected more than 0 s, got {batch_sec}")
    return num_workers(workers)


def embed_blocks(embedder: Embedder, blocks: Iterable[Tensor], *, block_sec: float = BATCH_SEC) -> Iterator[Tensor]:
    """Yield the frame-level embeddings of a waveform that comes in blocks, equal to those of the whole up to rounding.

    About ``block_sec`` of sound is embedded at a time, with a margin on both sides that covers the reach of spectrum
    and convolutions; the embeddings of the margin are dropped.

    Args:
        embedder: in eval mode.
        blocks: consecutive blocks ``(samples,)`` of any length, as from ``read_blocks``.
        block_sec: sound embedded at a time, in seconds.

    Shape:
        ``(n, d)`` each, on the device of the embedder.

    Raises:
        ValueError: the blocks hold no samples.

    >>> from byola_fast import AudioNTT2020
    >>> embedder = Embedder(AudioNTT2020(d=32), stats=(-7.1, 4.2)).eval()
    >>> sum(len(frames) for frames in embed_blocks(embedder, torch.randn(5, 16000), block_sec=1.5))
    62
    """
    to_lms, stride, hop = embedder.to_lms, embedder.frame_stride, embedder.hop
    # A convolution reaches stride - 1 frames further than what it is pooled to, a spectrum half its window.
    margin = math.ceil((stride - 1 + math.ceil(to_lms.n_fft / 2 / to_lms.hop_length)) / stride)
    size = max(1, round(block_sec * embedder.sample_rate / hop))  # frame-level embeddings per block
    held = torch.empty(0, dtype=torch.float32, device="cpu")
    left = 0  # the first `left` frames of `held` were yielded already
    device = to_lms.window.device
    for block in blocks:
        held = torch.cat([held, block])
        while len(held) // hop >= left + size + margin:
            ready = left + size
            part = held[: (ready + margin) * hop]
            yield embedder(part.to(device), frames=True).frames[left:ready]
            keep = max(0, ready - margin)
            held, left = held[keep * hop :], ready - keep
    if not len(held):
        raise ValueError("blocks: expected at least one sample, got none")
    rest: Tensor = embedder(held.to(device), frames=True).frames[left:]
    if len(rest):
        yield rest


@torch.no_grad()
def _embed_wavs(embedder: Embedder, wav: Tensor, frames: bool) -> Tensor:
    """``(B, samples)`` to ``(B, n, d)`` float32 on the CPU."""
    wav = wav.to(embedder.to_lms.window.device)
    rows = embedder(wav, frames=True).frames if frames else embedder(wav)[:, None]
    return rows.float().cpu()


def _embed_batch(
    embedder: Embedder, files: Sequence[Path], batch: list[tuple[int, Tensor, int]], frames: bool
) -> Iterator[Piece]:
    rows = _embed_wavs(embedder, torch.stack([wav for _number, wav, _samples in batch]), frames)
    for (number, _wav, samples), clip_rows in zip(batch, rows, strict=True):
        if clip_rows.isfinite().all():
            yield Piece(number, clip_rows, samples, True)
        else:
            yield _broken(embedder, number, AudioError(files[number], NOT_FINITE))


def _embed_long(
    embedder: Embedder, files: Sequence[Path], number: int, frames: bool, block_sec: float
) -> Iterator[Piece]:
    """Embed a clip piece by piece. While a clip is pooled, pieces without rows report the progress.

    An encoder without ``running_pool`` takes the whole clip at once.
    """
    encoder: Any = embedder.encoder
    path = files[number]
    if not frames and not hasattr(encoder, "running_pool"):
        try:
            wav = read_audio(path, embedder.sample_rate)
        except AudioError as error:
            yield _broken(embedder, number, error)
        else:
            yield from _embed_batch(embedder, files, [(number, wav, len(wav))], frames)
        return
    pool: Any = None if frames else encoder.running_pool()
    reported, read = 0, 0

    def counted() -> Iterator[Tensor]:
        nonlocal read
        for block in read_blocks(path, embedder.sample_rate, block_sec=min(block_sec, BATCH_SEC)):
            read += len(block)
            yield block

    pieces = embed_blocks(embedder, counted(), block_sec=block_sec)
    nothing = torch.empty(0, embedder.feature_d, dtype=torch.float32, device="cpu")
    while True:
        try:
            with torch.no_grad():  # not around a yield: the caller would inherit it
                local = next(pieces, None)
                if local is not None and pool is not None:
                    pool.add(local)
                if local is not None and not local.isfinite().all():
                    raise AudioError(path, NOT_FINITE)
        except AudioError as error:
            yield _broken(embedder, number, error)
            return
        if local is None:
            break
        nothing = local.new_empty(0, local.shape[1], device="cpu").float() if frames else nothing
        yield Piece(number, local.float().cpu() if frames else nothing, read - reported, False)
        reported = read
    rows = nothing if frames else pool.result().float().cpu()[None]
    if rows.isfinite().all():
        yield Piece(number, rows, read - reported, True)
    else:
        yield _broken(embedder, number, AudioError(path, NOT_FINITE))


def _broken(embedder: Embedder, number: int, error: AudioError) -> Piece:
    return Piece(number, torch.empty(0, embedder.feature_d, dtype=torch.float32, device="cpu"), 0, True, error)


def _read_start(file: Path, sample_rate: int, samples: int) -> Tensor | AudioError:
    """Read a file, up to ``samples`` samples at ``sample_rate``; return an error instead of raising it."""
    try:
        return read_audio(file, sample_rate, duration_sec=samples / sample_rate)
    except AudioError as error:
        return error
