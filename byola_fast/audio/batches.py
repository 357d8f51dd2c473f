"""Batches of random segments, each a pure function of the seed and its step: the trainer's one face to its data."""

from __future__ import annotations

import logging
import math
from collections.abc import Generator, Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from byola_fast.audio.reading import AudioError, list_audio_files
from byola_fast.audio.segments import SegmentFolder
from byola_fast.audio.store import DeviceStore, SegmentStore
from byola_fast.audio.store_format import is_store
from byola_fast.ops.philox import MASK32, SLOT_ORDER, SLOT_REPLACEMENT, philox4x32
from byola_fast.runtime.workers import num_workers, read_in_processes, read_in_thread

logger = logging.getLogger("byola_fast")

AHEAD = 4  # batches that the thread reads before they are asked for
PROBES = 16  # random clips tried in place of a broken one, before all others in turn
INT16_SCALE = 2.0**-15


class Batch(NamedTuple):
    """What one rank trains on in one step.

    Attributes:
        step: number of the step, from 0, over all epochs.
        epoch: from 0.
        sample_offset: number of this rank's first sample in the global batch.
        wav: ``(b, samples)``, or ``(b, segments, samples)`` where ``segments`` is above 1; b is the global batch size
            divided by the number of ranks. float32 from a folder, int16 from a store (see ``as_float``).
    """

    step: int
    epoch: int
    sample_offset: int
    wav: Tensor


def as_float(wav: Tensor) -> Tensor:
    """Return a waveform as float32: int16 divided by 2^15, floats as they are.

    >>> as_float(torch.tensor([-32768, 0, 16384], dtype=torch.int16)).tolist()
    [-1.0, 0.0, 0.5]
    """
    return wav * INT16_SCALE if wav.dtype == torch.int16 else wav.float()


def open_source(
    path: str | Path, *, unit_sec: float = 0.95, sample_rate: int = 16000, seed: int = 0
) -> SegmentFolder | SegmentStore:
    """Open a folder of audio files (or one file), or a packed store, whichever it is.

    Args:
        path: the folder or file.
        unit_sec: length of a segment, in seconds.
        sample_rate: in Hz; of a packed store, the one that it was packed at.
        seed: key of the random segments.

    Raises:
        As ``SegmentStore``, or as ``list_audio_files`` and ``SegmentFolder``.
        ValueError: the store was packed at another rate.
    """
    if not is_store(Path(path)):
        return SegmentFolder(list_audio_files(path), unit_sec=unit_sec, sample_rate=sample_rate, seed=seed)
    store = SegmentStore(path, unit_sec=unit_sec, seed=seed)
    if store.sample_rate != sample_rate:
        raise ValueError(f"sample_rate: expected {store.sample_rate} Hz, at which {path} was packed, got {sample_rate}")
    return store


class Batches:
    """Give every step its full batch of random segments, from a folder or a packed store.

    An epoch takes every clip once, in an order that depends on (seed, epoch) alone, and leaves out what does not fill
    a batch. Clips fewer than a batch give several segments each. Step s is the same whether the steps before it were
    read or not, whatever the workers, and the global batch is the same whatever the number of ranks; rank r takes the
    r-th part of it.

    A file that cannot be read, has vanished or holds NaN or infinity is reported once, by the logger ``byola_fast``,
    and another clip takes its place: the first readable one of a sequence drawn from (seed, epoch, number in the
    epoch). Nothing of it is remembered, so that a resumed run reads the same. A folder and a store packed from it give
    the same segments.

    Args:
        source: a ``SegmentFolder`` (processes decode it), a ``SegmentStore`` (a thread reads it), or what
            ``SegmentStore.to_device`` returns. Its own seed places the segments.
        batch_size: samples in the global batch, a multiple of ``world_size``.
        seed: of the order of clips.
        rank: number of this process, from 0.
        world_size: number of processes that share a batch.
        workers: processes that decode a folder; by default one fewer than there are CPU cores, at most 8. 0 reads in
            the calling thread, a store too.
        segments: independent random segments of each clip.
        device: where batches are put; CUDA by way of pinned memory, without waiting. By default where they are read.

    Attributes:
        steps_per_epoch: at least 1.
        repeats: the most segments that a clip gives in an epoch; 1 unless there are fewer clips than a batch has.
        listing: checksum of the names of all files: a run resumed on others is not the run that was stopped.
        broken: the files found broken so far, and why.

    Raises:
        ValueError: an argument out of range; names it.
    """

    def __init__(
        self,
        source: SegmentFolder | SegmentStore | DeviceStore,
        batch_size: int,
        *,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        workers: int | None = None,
        segments: int = 1,
        device: torch.device | None = None,
    ) -> None:
        for name, value in (("world_size", world_size), ("segments", segments)):
            if value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
        if batch_size < 1 or batch_size % world_size:
            raise ValueError(f"batch_size: expected a multiple of world_size {world_size}, got {batch_size}")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank: expected 0 to {world_size - 1} (world_size - 1), got {rank}")
        self.source, self.batch_size, self.seed, self.segments = source, batch_size, seed, segments
        self.local_size = batch_size // world_size
        self.sample_offset = rank * self.local_size
        self.workers = num_workers(workers)
        self._threaded = workers != 0  # of a store; on a single core too
        self.device = device
        self.repeats = math.ceil(batch_size / len(source))
        self.steps_per_epoch = len(source) * self.repeats // batch_size
        self.broken: dict[Path, str] = {} if isinstance(source, SegmentFolder) else dict(source.broken)
        self._cached_order: tuple[int, Tensor] | None = None
        self._cached_starts: tuple[int, Tensor, Tensor] | None = None

    @property
    def listing(self) -> str:
        return self.source.listing

    def run(self, steps: int, start: int = 0) -> Iterator[Batch]:
        """Yield the batches of steps ``start`` to ``steps - 1``, reading ahead; closing the iterator ends its readers.

        Raises:
            AudioError: no file can be read. StoreError: a store was cut short or cannot be read.
            ChildProcessError: a process that decodes audio was killed.
        """
        numbers = range(start, steps)
        read: Generator[tuple[Batch, list[AudioError]]]
        pin = self.device is not None and self.device.type == "cuda"
        if isinstance(self.source, SegmentFolder):
            read = read_in_processes(self.read, numbers, self.workers)
        elif self._threaded and isinstance(self.source, SegmentStore):
            read = read_in_thread(partial(self.read, pin=pin), numbers, AHEAD)
        else:
            read = (self.read(step, pin) for step in numbers)
        with closing(read):
            for batch, errors in read:
                for error in errors:
                    if error.path not in self.broken:
                        self.broken[error.path] = error.reason
                        logger.warning("skipping %s", error)
                wav = batch.wav
                if self.device is not None:
                    wav = wav.pin_memory() if pin and wav.device.type == "cpu" else wav
                    wav = wav.to(self.device, non_blocking=pin)  # a copy to the CPU must wait
                yield batch._replace(wav=wav)

    def read(self, step: int, pin: bool = False) -> tuple[Batch, list[AudioError]]:
        """Return the batch of one step, where it is read, and what is wrong with files that were to be in it.

        Args:
            step: at least 0.
            pin: from a store, into pinned memory.

        Raises:
            AudioError: no file can be read.
        """
        epoch, place = divmod(step, self.steps_per_epoch)
        first = place * self.batch_size + self.sample_offset
        errors: list[AudioError] = []
        if isinstance(self.source, SegmentFolder):
            numbers = self._order(epoch)[first : first + self.local_size].tolist()
            wav = torch.stack([self._decode(epoch, number, errors) for number in numbers])
        elif isinstance(self.source, DeviceStore):
            clips, starts = self._starts(epoch)
            own = slice(first * self.segments, (first + self.local_size) * self.segments)
            wav = self.source.cut(clips[own], starts[own])
        else:
            clips, draws = self._clips(epoch, self._order(epoch)[first : first + self.local_size])
            out = torch.empty(len(clips), self.source.num_samples, dtype=torch.int16, pin_memory=pin)
            wav = self.source.gather(clips, epoch, draws, out=out)
        if self.segments > 1:
            wav = wav.view(self.local_size, self.segments, -1)
        return Batch(step, epoch, self.sample_offset, wav), errors

    def _order(self, epoch: int) -> Tensor:
        """The numbers of an epoch's clips in their order; number k is clip ``k % len(source)``."""
        if self._cached_order is None or self._cached_order[0] != epoch:
            low, high, *_ = philox4x32(epoch & MASK32, 0, 0, SLOT_ORDER, self.seed & MASK32, self.seed >> 32 & MASK32)
            generator = torch.Generator().manual_seed(high << 31 | low >> 1)
            self._cached_order = epoch, torch.randperm(len(self.source) * self.repeats, generator=generator)
        return self._cached_order[1]

    def _candidates(self, epoch: int, number: int) -> Iterator[int]:
        """The clip of a number, and then all those that may stand in for it."""
        clips = len(self.source)
        yield number % clips
        for attempt in range(PROBES):
            counter = (epoch & MASK32, number & MASK32, attempt, SLOT_REPLACEMENT)
            yield philox4x32(*counter, self.seed & MASK32, self.seed >> 32 & MASK32)[0] * clips >> 32
        yield from ((number + distance) % clips for distance in range(1, clips))

    def _draw(self, number: int, replaced: bool) -> int:
        """The number of the first segment drawn of a clip; a replacement draws others than the clip itself does."""
        return self.segments * (self.repeats + number if replaced else number // len(self.source))

    def _decode(self, epoch: int, number: int, errors: list[AudioError]) -> Tensor:
        assert isinstance(self.source, SegmentFolder)
        first = None
        for attempt, clip in enumerate(self._candidates(epoch, number)):
            draw = self._draw(number, attempt > 0)
            try:
                wavs = [self.source.read(clip, epoch, draw + extra) for extra in range(self.segments)]
                return torch.cat(wavs)
            except AudioError as error:
                first = first or error
                errors.append(error)
        assert first is not None
        others = f"; cannot be read, nor can any other of {len(self.source)} files" if len(self.source) > 1 else ""
        raise AudioError(first.path, first.reason + others) from first

    def _clips(self, epoch: int, numbers: Tensor) -> tuple[Tensor, Tensor]:
        """Clips and draws of a store, ``(numbers * segments,)`` each, with others in place of the broken."""
        assert not isinstance(self.source, SegmentFolder)
        clips, draws = numbers % len(self.source), numbers // len(self.source) * self.segments
        for place in (~self.source.readable[clips]).nonzero().flatten().tolist():
            number = int(numbers[place])
            clips[place] = next(clip for clip in self._candidates(epoch, number) if self.source.readable[clip])
            draws[place] = self._draw(number, True)
        draws = draws[:, None] + torch.arange(self.segments)
        return clips.repeat_interleave(self.segments), draws.flatten()

    def _starts(self, epoch: int) -> tuple[Tensor, Tensor]:
        """Clips and starts of an epoch's segments, on the store's device: drawn once, a slice for each step."""
        assert isinstance(self.source, DeviceStore)
        if self._cached_starts is None or self._cached_starts[0] != epoch:
            clips, draws = (x.to(self.source.device) for x in self._clips(epoch, self._order(epoch)))
            self._cached_starts = epoch, clips, self.source.starts(clips, epoch, draws)
        return self._cached_starts[1:]
