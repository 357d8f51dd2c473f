"""Batches of random segments, each a pure function of the seed and the step: the data interface of the trainer."""

from __future__ import annotations

import logging
import math
from collections.abc import Generator, Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from byola_fast.audio.reading import AudioError
from byola_fast.audio.sources import Source
from byola_fast.ops.philox import MASK32, SLOT_ORDER, SLOT_REPLACEMENT, philox4x32
from byola_fast.runtime.progress import Progress
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


class Batches:
    """Read full batches of random segments from a source.

    An epoch takes every clip once, in an order that depends only on (seed, epoch), and drops the last incomplete
    batch. If there are fewer clips than a batch holds, each gives several segments. With ``seconds``, an epoch takes as
    many segments, but of each clip in proportion to its duration, by systematic sampling. A step does not depend on the
    steps read before it, nor on the workers; the global batch does not depend on the number of ranks. Rank r takes
    its r-th part.

    If a file cannot be read, has vanished or holds NaN or infinity, the logger ``byola_fast`` warns once and another
    clip replaces it: the first readable one of a sequence drawn from (seed, epoch, number in the epoch). The sequence
    does not depend on earlier steps, so a resumed run reads the same. A folder and the store packed from it give the
    same segments.

    Args:
        source: a ``Source``, which processes read clip by clip; or one with ``gather``, which reads many at a time: a
            ``SegmentStore``, by a thread, or a ``DeviceStore``. The seed of the source places the segments.
        batch_size: samples in the global batch, a multiple of ``world_size``.
        seed: key of the order of clips.
        rank: number of this process, from 0.
        world_size: number of processes that share a batch.
        workers: processes that read a source without ``gather``; by default one fewer than the CPU cores, at most 8.
            With 0 the calling thread reads, a store too.
        segments: independent random segments of each clip.
        device: device of the batches; copies to CUDA go through pinned memory, asynchronously. By default the device
            of the source.
        seconds: ``(clips,)``, the duration of each clip, to sample by it; 0 for clips without sound.

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
        source: Source,
        batch_size: int,
        *,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        workers: int | None = None,
        segments: int = 1,
        device: torch.device | None = None,
        seconds: Tensor | None = None,
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
        self._bulk: Any = source if hasattr(source, "gather") else None
        self._on_device = hasattr(source, "device")
        self.broken: dict[Path, str] = dict(getattr(source, "broken", {}))
        self._ends = None if seconds is None else (1000 * seconds.double()).round().long().cumsum(0)  # in ms
        if self._ends is not None and (len(self._ends) != len(source) or self._ends[-1] < 1):
            got = f"{len(self._ends)}, of {self._ends[-1] / 1000:.3f} s in all"
            raise ValueError(f"seconds: expected {len(source)} durations, not all 0, got {got}")
        self._cached_epoch: tuple[int, Tensor, Tensor, Tensor] | None = None
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
        if self._bulk is None:
            read = read_in_processes(self.read, numbers, self.workers)
        elif self._threaded and not self._on_device:
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
        part = slice(first, first + self.local_size)
        errors: list[AudioError] = []
        if self._bulk is None:
            places = zip(*(x[part].tolist() for x in self._epoch(epoch)), strict=True)
            wav = torch.stack([self._decode(errors, epoch, *each) for each in places])
        elif self._on_device:
            clips, starts = self._starts(epoch)
            local = slice(part.start * self.segments, part.stop * self.segments)
            wav = self._bulk.cut(clips[local], starts[local])
        else:
            clips, draws = self._clips(epoch, part)
            out = torch.empty(len(clips), self.source.num_samples, dtype=torch.int16, device="cpu", pin_memory=pin)
            wav = self._bulk.gather(clips, epoch, draws, out=out)
        if self.segments > 1:
            wav = wav.view(self.local_size, self.segments, -1)
        return Batch(step, epoch, self.sample_offset, wav), errors

    def _epoch(self, epoch: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return the segments of an epoch in their order: their numbers, clips, and numbers within their clip."""
        if self._cached_epoch is None or self._cached_epoch[0] != epoch:
            key = self.seed & MASK32, self.seed >> 32 & MASK32
            low, high, place, _ = philox4x32(epoch & MASK32, 0, 0, SLOT_ORDER, *key)
            generator = torch.Generator("cpu").manual_seed(high << 31 | low >> 1)
            clips = len(self.source)
            order = torch.randperm(clips * self.repeats, generator=generator, device="cpu")
            if self._ends is None:
                self._cached_epoch = epoch, order, order % clips, order // clips
            else:  # segments at equal distances along all clips, from a random place on
                numbers = torch.arange(len(order), device="cpu")
                places = (numbers + (place >> 8) * 2.0**-24) / len(order) * float(self._ends[-1])
                chosen = torch.searchsorted(self._ends.double(), places, right=True).clamp_(max=clips - 1)
                draws = numbers - torch.searchsorted(chosen, chosen)  # left: the first segment of the clip
                self._cached_epoch = epoch, order, chosen[order], draws[order]
        return self._cached_epoch[1:]

    def _candidates(self, epoch: int, number: int, clip: int) -> Iterator[int]:
        """Yield the clip of a number, then its possible replacements in order."""
        clips = len(self.source)
        yield clip
        for attempt in range(PROBES):
            counter = (epoch & MASK32, number & MASK32, attempt, SLOT_REPLACEMENT)
            yield philox4x32(*counter, self.seed & MASK32, self.seed >> 32 & MASK32)[0] * clips >> 32
        yield from ((clip + distance) % clips for distance in range(1, clips))

    def _replacing_draw(self, number: int) -> int:
        """Return the first draw of a replacement, which never shares one with the clip itself."""
        own = self.repeats if self._ends is None else len(self.source) * self.repeats
        return self.segments * (own + number)

    def _decode(self, errors: list[AudioError], epoch: int, number: int, clip: int, draw: int) -> Tensor:
        first = None
        for attempt, candidate in enumerate(self._candidates(epoch, number, clip)):
            begin = self._replacing_draw(number) if attempt else self.segments * draw
            try:
                wavs = [self.source.read(candidate, epoch, begin + extra) for extra in range(self.segments)]
                return torch.cat(wavs)
            except AudioError as error:
                first = first or error
                errors.append(error)
        assert first is not None
        others = f"; none of the {len(self.source)} files can be read" if len(self.source) > 1 else ""
        raise AudioError(first.path, first.reason + others) from first

    def _clips(self, epoch: int, part: slice) -> tuple[Tensor, Tensor]:
        """Return clips and draws of part of an epoch, ``(numbers * segments,)`` each, with broken clips replaced."""
        numbers, clips, draws = (x[part] for x in self._epoch(epoch))
        clips, draws = clips.clone(), draws * self.segments
        for place in (~self._bulk.readable[clips]).nonzero().flatten().tolist():
            number, clip = int(numbers[place]), int(clips[place])
            clips[place] = next(clip for clip in self._candidates(epoch, number, clip) if self._bulk.readable[clip])
            draws[place] = self._replacing_draw(number)
        draws = draws[:, None] + torch.arange(self.segments, device="cpu")
        return clips.repeat_interleave(self.segments), draws.flatten()

    def _starts(self, epoch: int) -> tuple[Tensor, Tensor]:
        """Return clips and starts of all segments of an epoch, on the device of the store; cached."""
        if self._cached_starts is None or self._cached_starts[0] != epoch:
            clips, draws = (x.to(self._bulk.device) for x in self._clips(epoch, slice(None)))
            self._cached_starts = epoch, clips, self._bulk.starts(clips, epoch, draws)
        return self._cached_starts[1:]


def durations(source: Source, workers: int | None = None) -> Tensor:
    """Return the duration of each clip, ``(clips,)`` float64 in seconds; 0, with a warning, if it cannot be read."""
    known: Any = source
    if hasattr(source, "lengths"):
        return known.lengths.cpu().double() / known.sample_rate
    reading = read_in_processes(partial(_duration, known), range(len(source)), num_workers(workers))
    with closing(reading), Progress("durations") as progress:
        found = []
        for seconds in reading:
            if isinstance(seconds, AudioError):
                logger.warning("skipping %s", seconds)
            found.append(0.0 if isinstance(seconds, AudioError) else seconds)
            progress.show(len(found), total=len(source))
    return torch.tensor(found, dtype=torch.float64, device="cpu")


def _duration(source: Any, index: int) -> float | AudioError:
    try:
        return float(source.seconds(index))
    except AudioError as error:
        return error
