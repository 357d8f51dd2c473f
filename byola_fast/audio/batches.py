"""Batches of random segments, each a pure function of the seed and the step: the data interface of the trainer."""

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

AHEAD = 4  # batches that the thread reads ahead from a store
PROBES = 16  # random replacements tried for a broken clip, before all others in turn
INT16_SCALE = 2.0**-15


class Batch(NamedTuple):
    """The batch of one rank for one step.

    Attributes:
        step: number of the step, from 0, counted over all epochs.
        epoch: from 0.
        sample_offset: number of this rank's first sample in the global batch.
        wav: ``(b, samples)``, or ``(b, segments, samples)`` if ``segments`` is above 1; b is the global batch size
            divided by the number of ranks. float32 from a folder, int16 from a store (see ``as_float``).
    """

    step: int
    epoch: int
    sample_offset: int
    wav: Tensor


def as_float(wav: Tensor) -> Tensor:
    """Return a waveform as float32: int16 is divided by 2^15, float32 stays unchanged.

    >>> as_float(torch.tensor([-32768, 0, 16384], dtype=torch.int16)).tolist()
    [-1.0, 0.0, 0.5]
    """
    return wav * INT16_SCALE if wav.dtype == torch.int16 else wav.float()


def open_source(
    path: str | Path, *, unit_sec: float = 0.95, sample_rate: int = 16000, seed: int = 0
) -> SegmentFolder | SegmentStore:
    """Open a folder of audio files, a single file, or a packed store.

    Args:
        path: the folder or file.
        unit_sec: length of a segment, in seconds.
        sample_rate: in Hz; a packed store must have this rate.
        seed: key of the random segments.

    Raises:
        The errors of ``SegmentStore``, or of ``list_audio_files`` and ``SegmentFolder``.
        ValueError: the store was packed at another rate.
    """
    if not is_store(Path(path)):
        return SegmentFolder(list_audio_files(path), unit_sec=unit_sec, sample_rate=sample_rate, seed=seed)
    store = SegmentStore(path, unit_sec=unit_sec, seed=seed)
    if store.sample_rate != sample_rate:
        raise ValueError(f"sample_rate: expected {store.sample_rate} Hz, the rate of {path}, got {sample_rate}")
    return store


class Batches:
    """Read full batches of random segments from a folder or a packed store.

    An epoch takes every clip once, in an order that depends only on (seed, epoch), and drops the last incomplete
    batch. If there are fewer clips than a batch holds, each gives several segments. A step does not depend on the
    steps read before it, nor on the workers; the global batch does not depend on the number of ranks. Rank r takes
    its r-th part.

    If a file cannot be read, has vanished or holds NaN or infinity, the logger ``byola_fast`` warns once and another
    clip replaces it: the first readable one of a sequence drawn from (seed, epoch, number in the epoch). The sequence
    does not depend on earlier steps, so a resumed run reads the same. A folder and the store packed from it give the
    same segments.

    Args:
        source: a ``SegmentFolder`` (decoded by processes), a ``SegmentStore`` (read by a thread) or a ``DeviceStore``.
            The seed of the source places the segments.
        batch_size: samples in the global batch, a multiple of ``world_size``.
        seed: key of the order of clips.
        rank: number of this process, from 0.
        world_size: number of processes that share a batch.
        workers: processes that decode a folder; by default one fewer than the CPU cores, at most 8. With 0 the calling
            thread reads, a store too.
        segments: independent random segments of each clip.
        device: device of the batches; copies to CUDA go through pinned memory, asynchronously. By default the device
            of the source.

    Attributes:
        steps_per_epoch: at least 1.
        repeats: maximum number of segments of a clip in an epoch; 1 unless there are fewer clips than a batch holds.
        listing: checksum of the names of all files, to detect that a run is resumed on other files.
        broken: reasons of the files found broken so far.

    Raises:
        ValueError: an argument is out of range; the message names it.
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
        self._threaded = workers != 0  # for a store; also on a single core, where the default is 0 workers
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
        """Yield the batches of steps ``start`` to ``steps - 1``, read ahead; closing the iterator ends the readers.

        Raises:
            AudioError: no file can be read. StoreError: a store was cut short or cannot be read.
            ChildProcessError: a worker process was killed.
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
        """Return the batch of one step, on the device of the source, and the errors of its broken files.

        Args:
            step: at least 0.
            pin: read into pinned memory, from a store.

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
            local = slice(first * self.segments, (first + self.local_size) * self.segments)
            wav = self.source.cut(clips[local], starts[local])
        else:
            clips, draws = self._clips(epoch, self._order(epoch)[first : first + self.local_size])
            out = torch.empty(len(clips), self.source.num_samples, dtype=torch.int16, device="cpu", pin_memory=pin)
            wav = self.source.gather(clips, epoch, draws, out=out)
        if self.segments > 1:
            wav = wav.view(self.local_size, self.segments, -1)
        return Batch(step, epoch, self.sample_offset, wav), errors

    def _order(self, epoch: int) -> Tensor:
        """Return the order of the numbers of an epoch; number k is clip ``k % len(source)``."""
        if self._cached_order is None or self._cached_order[0] != epoch:
            low, high, *_ = philox4x32(epoch & MASK32, 0, 0, SLOT_ORDER, self.seed & MASK32, self.seed >> 32 & MASK32)
            generator = torch.Generator("cpu").manual_seed(high << 31 | low >> 1)
            numbers = len(self.source) * self.repeats
            self._cached_order = epoch, torch.randperm(numbers, generator=generator, device="cpu")
        return self._cached_order[1]

    def _candidates(self, epoch: int, number: int) -> Iterator[int]:
        """Yield the clip of a number, then its possible replacements in order."""
        clips = len(self.source)
        yield number % clips
        for attempt in range(PROBES):
            counter = (epoch & MASK32, number & MASK32, attempt, SLOT_REPLACEMENT)
            yield philox4x32(*counter, self.seed & MASK32, self.seed >> 32 & MASK32)[0] * clips >> 32
        yield from ((number + distance) % clips for distance in range(1, clips))

    def _draw(self, number: int, replaced: bool) -> int:
        """Return the number of the first draw of a clip; a replacement never shares a draw with the clip itself."""
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
        others = f"; none of the {len(self.source)} files can be read" if len(self.source) > 1 else ""
        raise AudioError(first.path, first.reason + others) from first

    def _clips(self, epoch: int, numbers: Tensor) -> tuple[Tensor, Tensor]:
        """Return clips and draws of a store, ``(numbers * segments,)`` each, with broken clips replaced."""
        assert not isinstance(self.source, SegmentFolder)
        clips, draws = numbers % len(self.source), numbers // len(self.source) * self.segments
        for place in (~self.source.readable[clips]).nonzero().flatten().tolist():
            number = int(numbers[place])
            clips[place] = next(clip for clip in self._candidates(epoch, number) if self.source.readable[clip])
            draws[place] = self._draw(number, True)
        draws = draws[:, None] + torch.arange(self.segments, device="cpu")
        return clips.repeat_interleave(self.segments), draws.flatten()

    def _starts(self, epoch: int) -> tuple[Tensor, Tensor]:
        """Return clips and starts of all segments of an epoch, on the device of the store; cached."""
        assert isinstance(self.source, DeviceStore)
        if self._cached_starts is None or self._cached_starts[0] != epoch:
            clips, draws = (x.to(self.source.device) for x in self._clips(epoch, self._order(epoch)))
            self._cached_starts = epoch, clips, self.source.starts(clips, epoch, draws)
        return self._cached_starts[1:]
