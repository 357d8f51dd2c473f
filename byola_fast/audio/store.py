"""The packed store: audio that was decoded once, read as random segments, tens of thousands a second.

Samples are read with ``preadv``, which is as fast as a memory map. If the file is cut short meanwhile, it raises an
error; a memory map would kill the process.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from byola_fast.audio.segments import LONGEST_SAMPLES
from byola_fast.audio.store_format import PartHeader, StoreError, find_headers, read_header
from byola_fast.ops.philox import segment_u24
from byola_fast.runtime.files import file_sha256

UPLOAD_SAMPLES = 1 << 25  # copied to the device at a time


class _Clips:
    """Segment starts of clips, drawn on the device of ``lengths``."""

    num_samples: int
    seed: int
    lengths: Tensor
    gather: Any

    def starts(self, clips: Tensor, epoch: int, draw: int | Tensor = 0) -> Tensor:
        """Draw the starts of segments within their clips, as ``SegmentFolder`` does.

        Args:
            clips: ``(b,)`` int64 numbers of clips.
            epoch: at least 0.
            draw: number of the segment within its clip and epoch; one for all, or ``(b,)``.

        Shape:
            ``(b,)`` int64, in samples; negative for clips shorter than a segment, which are padded in front.
        """
        spare = self.lengths[clips] - self.num_samples
        drawn = segment_u24(self.seed, epoch, clips, draw) * (spare + 1) >> 24
        return torch.where(spare < 0, -(-spare // 2), drawn)

    def read(self, index: int, epoch: int, draw: int = 0) -> Tensor:
        """Return one segment ``(num_samples,)`` int16; see ``gather``."""
        segment: Tensor = self.gather([index], epoch, draw)[0]
        return segment


class SegmentStore(_Clips):
    """Read random segments of a packed store, without decoding.

    Clips are numbered in the order of ``list_audio_files``, and the same seed gives the same segments as
    ``SegmentFolder``. A file that was broken when it was packed keeps its number and has no samples.

    Args:
        path: folder that holds all parts of the store, as written by ``pack``.
        unit_sec: length of a segment, in seconds, above 0.
        seed: key of the random numbers.

    Attributes:
        num_samples: length of a segment, in samples.
        sample_rate: in Hz.
        names: names of all files, relative to the packed folder.
        lengths: ``(clips,)`` int64, in samples; 0 for broken files.
        readable: ``(clips,)`` bool.
        broken: the files without samples, and the reasons.
        clipped: number of samples clipped to full scale.
        listing: checksum of all names.

    Raises:
        FileNotFoundError: no such folder.
        StoreError: no store, missing parts (names them), or parts of several stores; a damaged or changed header or
            data file; no readable clip.
        ValueError: ``unit_sec`` out of range.
    """

    def __init__(self, path: str | Path, *, unit_sec: float = 0.95, seed: int = 0) -> None:
        self.path, self.unit_sec, self.seed = Path(path), unit_sec, seed
        paths = find_headers(self.path)
        headers = [read_header(header_path) for header_path in paths]
        for header_path, header in zip(paths[1:], headers[1:], strict=True):
            _check_same_store(header_path, header, headers[0], paths[0].name)
        self.sample_rate, files, parts = headers[0].sample_rate, headers[0].files, len(headers)
        if not 0.5 < unit_sec * self.sample_rate < LONGEST_SAMPLES:
            raise ValueError(f"unit_sec: expected 1 to 2^31 samples (1 / {self.sample_rate} s each), got {unit_sec}")
        self.num_samples = round(unit_sec * self.sample_rate)
        self.names = [""] * files
        self.lengths, self._begins = torch.zeros(2, files, dtype=torch.int64, device="cpu").unbind()
        self.broken: dict[Path, str] = {}
        for number, header in enumerate(headers):
            self.names[number::parts] = header.names
            offsets = torch.tensor(header.offsets, dtype=torch.int64, device="cpu")
            self.lengths[number::parts], self._begins[number::parts] = offsets.diff(), offsets[:-1]
            self.broken |= {Path(name): reason for name, reason in header.broken.items()}
        self.readable = self.lengths > 0
        if not self.readable.any():
            raise StoreError(self.path, f"holds no audio: none of {files} files could be read when it was packed")
        self.listing = headers[0].listing_sha256
        self.clipped = sum(header.clipped for header in headers)
        self._data = [self.path / header.data for header in headers]
        self._sizes = [header.samples for header in headers]
        self._checksums = [header.samples_sha256 for header in headers]
        self._descriptors = [os.open(data, os.O_RDONLY) for data in self._data]
        self._opened = [_state(descriptor) for descriptor in self._descriptors]
        weakref.finalize(self, _close, self._descriptors)

    def __len__(self) -> int:
        return len(self.names)

    def __reduce__(self) -> tuple[Any, ...]:  # descriptors are not valid in another process
        return partial(SegmentStore, self.path, unit_sec=self.unit_sec, seed=self.seed), ()

    def gather(
        self, indices: Tensor | Sequence[int], epoch: int, draw: int | Tensor = 0, *, out: Tensor | None = None
    ) -> Tensor:
        """Return one random segment of each given clip.

        Args:
            indices: ``(b,)`` numbers of readable clips.
            epoch: at least 0.
            draw: number of the segment within its clip and epoch; one for all, or ``(b,)``.
            out: tensor to write to: ``(b, num_samples)`` int16, contiguous, on the CPU.

        Shape:
            ``(b, num_samples)`` int16: ``round(32768 * wav)``. Clips shorter than a segment are centred in zeros.

        Raises:
            IndexError: a number out of range.
            StoreError: the number of a broken file (names it), or a data file that was cut short, written to or cannot
                be read.
            ValueError: ``out`` has another shape or type.
        """
        clips = torch.as_tensor(indices, dtype=torch.int64, device="cpu")
        if len(clips) and not 0 <= int(clips.min()) <= int(clips.max()) < len(self):
            raise IndexError(f"indices: expected 0 to {len(self) - 1}, got {int(clips.min())} to {int(clips.max())}")
        if len(bad := clips[~self.readable[clips]]):
            name = self.names[int(bad[0])]
            raise StoreError(self.path, f"no samples of {name}: {self.broken[Path(name)]}")
        return self.cut(clips, self.starts(clips, epoch, draw), out=out)

    def cut(self, clips: Tensor, starts: Tensor, *, out: Tensor | None = None) -> Tensor:
        """Return the segments at the starts that ``starts`` drew; otherwise as ``gather``."""
        shape = (len(clips), self.num_samples)
        if out is None:
            out = torch.empty(shape, dtype=torch.int16, device="cpu")
        if out.shape != shape or out.dtype != torch.int16 or out.device.type != "cpu" or not out.is_contiguous():
            raise ValueError(
                f"out: expected {shape}, int16, contiguous, on the CPU, got {tuple(out.shape)} {out.dtype}"
            )
        if not len(clips):
            return out
        first = starts.clamp_min(0)
        ends = torch.minimum(self.lengths[clips], starts + self.num_samples)
        begins = 2 * (self._begins[clips] + first)
        content = out.numpy().data.cast("B")
        whole = 2 * self.num_samples
        plan = zip(
            (clips % len(self._descriptors)).tolist(),
            begins.tolist(),
            (2 * (ends - first)).tolist(),
            (2 * (first - starts)).tolist(),
            range(0, len(content), whole),
            strict=True,
        )
        self._check_unchanged()
        for part, begin, count, front, row in plan:
            if count < whole:
                content[row : row + whole] = bytes(whole)
            self._read(part, content[row + front : row + front + count], begin)
        return out

    def _check_unchanged(self) -> None:
        """Raise if an open data file was written to. A replaced file does no harm: the old one stays open."""
        for path, descriptor, opened in zip(self._data, self._descriptors, self._opened, strict=True):
            if (now := _state(descriptor)) != opened:
                change = "cut short" if now < opened else "written to"
                raise StoreError(path, f"{change} since the store was opened; verify it, or pack it again")

    def _read(self, part: int, content: memoryview, begin: int) -> None:
        """Fill ``content`` with bytes of a part's data file, from byte ``begin`` on."""
        done = 0
        while got := os.preadv(self._descriptors[part], [content[done:]], begin + done):
            done += got
            if done == len(content):
                return
        if len(content):
            message = f"cut short since the store was opened: needed {begin + len(content)} bytes, has {begin + done}"
            raise StoreError(self._data[part], message)

    def verify(self, progress: Callable[[int, int], None] | None = None) -> None:
        """Read all samples and compare them with their checksums.

        Args:
            progress: called with (parts done, number of parts).

        Raises:
            StoreError: samples changed since they were packed, or cannot be read.
        """
        for number, (path, checksum) in enumerate(zip(self._data, self._checksums, strict=True), 1):
            try:
                found = file_sha256(path)
            except OSError as error:
                raise StoreError(path, error.strerror or str(error)) from error
            if found != checksum:
                raise StoreError(path, "samples have changed since they were packed; pack this part again")
            if progress is not None:
                progress(number, len(self._data))

    def to_device(self, device: str | torch.device) -> DeviceStore:
        """Copy all samples to the memory of a device: 2 bytes a sample, 115 MB an hour at 16 kHz.

        Raises:
            StoreError: not enough memory; a data file that was cut short, written to or cannot be read.
        """
        return DeviceStore(self, torch.device(device))


class DeviceStore(_Clips):
    """A packed store in the memory of a device, which draws and cuts the segments; returned by ``to_device``.

    Segments equal those of the store on disk, bit for bit. Attributes are those of ``SegmentStore``, with ``lengths``
    on the device and the others on the CPU, and ``samples``: all clips, one after the other.
    """

    def __init__(self, store: SegmentStore, device: torch.device) -> None:
        self.path, self.listing, self.device = store.path, store.listing, device
        self.seed, self.num_samples, self.sample_rate = store.seed, store.num_samples, store.sample_rate
        self.names, self.readable, self.broken, self.clipped = store.names, store.readable, store.broken, store.clipped
        self._padded = bool((store.lengths[store.readable] < store.num_samples).any())
        sizes = store._sizes
        parts = torch.arange(len(store), device="cpu") % len(sizes)
        bases = torch.tensor([0, *sizes], device="cpu").cumsum(0)[:-1]
        try:
            self.lengths = store.lengths.to(device)
            self._begins = (store._begins + bases[parts]).to(device)
            self.samples = torch.empty(sum(sizes), dtype=torch.int16, device=device)
            pin = device.type == "cuda"
            buffer = torch.empty(min(sum(sizes), UPLOAD_SAMPLES), dtype=torch.int16, device="cpu", pin_memory=pin)
        except RuntimeError as error:  # torch.OutOfMemoryError and the error of the CPU
            message = f"{2 * sum(sizes) / 2**30:.1f} GiB of samples do not fit in the memory of {device}"
            raise StoreError(store.path, f"{message}: {error}") from error
        for number, size in enumerate(sizes):
            for first in range(0, size, len(buffer)):
                chunk = buffer[: size - first]
                store._read(number, chunk.numpy().data.cast("B"), 2 * first)
                self.samples[bases[number] + first :][: len(chunk)].copy_(chunk)
        store._check_unchanged()

    def __len__(self) -> int:
        return len(self.names)

    def gather(self, indices: Tensor | Sequence[int], epoch: int, draw: int | Tensor = 0) -> Tensor:
        """Return one random segment of each given clip, as ``SegmentStore.gather``, on the device.

        The clips must be readable: a check would wait for the device.
        """
        on = indices.device if isinstance(indices, Tensor) else "cpu"
        clips = torch.as_tensor(indices, dtype=torch.int64, device=on)
        clips = clips.to(self.device, non_blocking=self.device.type == "cuda")
        return self.cut(clips, self.starts(clips, epoch, draw))

    def cut(self, clips: Tensor, starts: Tensor) -> Tensor:
        """Return the segments at given starts, all on the device."""
        begins = self._begins[clips] + starts
        if not self._padded:
            windows = self.samples.as_strided((len(self.samples) - self.num_samples + 1, self.num_samples), (1, 1))
            return windows[begins]
        place = starts[:, None] + torch.arange(self.num_samples, device=self.device)
        inside = (place >= 0) & (place < self.lengths[clips, None])
        wav = self.samples[(begins[:, None] + (place - starts[:, None])).clamp_(0, len(self.samples) - 1)]
        return wav.where(inside, 0)


def _state(descriptor: int) -> tuple[int, int]:
    status = os.fstat(descriptor)
    return status.st_size, status.st_mtime_ns


def _close(descriptors: list[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)


def _check_same_store(path: Path, header: PartHeader, first: PartHeader, first_name: str) -> None:
    for name in ("parts", "sample_rate", "files", "listing_sha256"):
        found, wanted = getattr(header, name), getattr(first, name)
        if found != wanted:
            message = {"listing_sha256": "was packed from other files", "files": f"was packed from {found} files"}
            raise StoreError(path, f"{message.get(name, f'{name} {found}')}, unlike {first_name} ({name} {wanted})")
