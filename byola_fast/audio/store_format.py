"""The files of a packed store: one data file and one header for each part.

    part-00000-of-00002.json               header: names, offsets, sizes, checksums
    part-00000-of-00002-<checksum>.int16   samples of all clips, one after the other, little-endian, nothing else

The header's first line holds the checksum of the lines after it. The header is written last and renamed atomically, and
the data file's name holds its checksum: if writing stops at any point, the existing header still names its own data.
File number k of the sorted listing is clip ``k // parts`` of part ``k % parts``.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields
from itertools import islice, pairwise
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from byola_fast.runtime.files import SHOWN, close_to_rename, open_locked, some_of, sync_folder

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

MAX_RATE = 10_000_000  # Hz; no converter is faster
FORMAT, VERSION = "byola_fast packed store", 1
HEADER_NAME = re.compile(r"part-(\d{5,})-of-(\d{5,})\.json")
PART_NAME = re.compile(r"part-\d{5,}-of-\d{5,}[.-].*(json|int16|tmp)$")


class StoreError(ValueError):
    """A packed store cannot be read or written. The message names the file and the reason.

    Attributes:
        path: the file or folder.
        reason: the reason, without the name.
    """

    def __init__(self, path: str | Path, reason: str) -> None:
        super().__init__(path, reason)
        self.path = Path(path)
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


@dataclass(frozen=True)
class PartHeader:
    """Contents of the header of one part.

    Attributes:
        part: number of the part, from 0.
        parts: number of parts in the store.
        sample_rate: rate of all clips, in Hz.
        files: number of audio files in all parts.
        listing_sha256: checksum of the names of all files; equal in all parts of one store.
        data: name of the data file.
        samples: number of samples in the data file.
        samples_sha256: checksum of the data file.
        clipped: number of samples clipped to full scale.
        names: names of this part's files, relative to the packed folder, with "/".
        offsets: start of each clip and end of the last one, in samples; clip j is ``offsets[j]`` to
            ``offsets[j + 1]``, and empty if its file is broken.
        source_bytes: size of each file when it was packed.
        source_times: modification time of each file when it was packed, in ns.
        broken: the reason for each file without samples, by name.
        decoders: names of the decoders in use; "" in stores of version 0.1.
    """

    part: int
    parts: int
    sample_rate: int
    files: int
    listing_sha256: str
    data: str
    samples: int
    samples_sha256: str
    clipped: int
    names: list[str]
    offsets: list[int]
    source_bytes: list[int]
    source_times: list[int]
    broken: dict[str, str]
    decoders: str = ""


def part_name(part: int, parts: int) -> str:
    """Return the beginning of the file names of a part.

    >>> part_name(2, 4)
    'part-00002-of-00004'
    """
    return f"part-{part:05}-of-{parts:05}"


def read_header(path: Path) -> PartHeader:
    """Read the header of a part. Check its checksum and fields, and the size of its data file.

    Raises:
        StoreError: the header or the data file is missing, damaged, changed, or has another version.
    """
    try:
        text = path.read_bytes()
    except OSError as error:
        raise StoreError(path, error.strerror or str(error)) from error
    first, _, rest = text.partition(b"\n")
    if not (match := re.fullmatch(rb'\{"header_sha256": "([0-9a-f]{64})",', first)):
        raise StoreError(path, "not the header of a packed store")
    if hashlib.sha256(rest).hexdigest() != match[1].decode():
        raise StoreError(path, "damaged, or changed since it was written; pack again")
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise StoreError(path, f"not JSON: {error}") from error
    if content.get("format") != FORMAT or content.get("version") != VERSION:
        found = f"{content.get('format')} {content.get('version')}"
        raise StoreError(path, f"expected {FORMAT} {VERSION}, got {found}; pack again")
    content.setdefault("decoders", "")
    names = {field.name for field in fields(PartHeader)}
    if missing := sorted(names - content.keys()):
        raise StoreError(path, f"damaged: no {', '.join(missing)}")
    header = PartHeader(**{name: content[name] for name in names})
    if problem := _problem(header, path.name):
        raise StoreError(path, f"damaged: {problem}")
    data = path.parent / header.data
    try:
        size = data.stat().st_size
    except OSError as error:
        raise StoreError(data, f"{error.strerror or error} (the samples of {path.name})") from error
    if size != 2 * header.samples:
        raise StoreError(data, f"expected {2 * header.samples} bytes, as {path.name} says, got {size}; pack again")
    return header


def _problem(header: PartHeader, name: str) -> str:
    """Name a field that would read out of bounds or fail later; "" if there is none.

    The checksum already excludes damage; this finds a faulty writer or a forgery.
    """
    counts = (header.part, header.parts, header.sample_rate, header.files, header.samples, header.clipped)
    if (
        not all(type(count) is int and 0 <= count < 1 << 62 for count in counts)
        or not 0 < header.sample_rate <= MAX_RATE
    ):
        return "a count is not a number, or out of range"
    if not header.part < header.parts or name != f"{part_name(header.part, header.parts)}.json":
        return f"its content is of part {header.part} of {header.parts}"
    if not isinstance(header.data, str) or not re.fullmatch(r"[\w.-]+\.int16", header.data):
        return "data is not the name of a file in this folder"
    names, offsets = header.names, header.offsets
    count = len(range(header.part, header.files, header.parts))
    kinds = {"names": str, "offsets": int, "source_bytes": int, "source_times": int}
    for field, kind in kinds.items():  # millions of values: a set of types is the fastest check
        values, length = getattr(header, field), count + (field == "offsets")
        if not isinstance(values, list) or len(values) != length or not set(map(type, values)) <= {kind}:
            return f"{field} is not a list of {length} {kind.__name__}"
    if offsets[0] != 0 or offsets[-1] != header.samples or offsets != sorted(offsets):
        return "offsets do not rise from 0 to the number of samples"
    empty = {name for name, (a, b) in zip(names, pairwise(offsets), strict=True) if a == b}
    if not isinstance(header.broken, dict) or header.broken.keys() != empty:
        return "broken does not list the empty clips"
    return ""


def is_store(folder: Path) -> bool:
    """Tell whether a folder holds a packed store, finished or not."""
    return folder.is_dir() and any(PART_NAME.match(path.name) for path in folder.iterdir())


def find_headers(folder: Path) -> list[Path]:
    """Return the headers of all parts of a store, in order.

    Raises:
        FileNotFoundError: no such folder.
        StoreError: no store, missing parts (names them), or parts of several stores.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"no such folder: {folder}")
    files = sorted(path.name for path in folder.iterdir() if PART_NAME.match(path.name))
    found = {match.groups() for name in files if (match := HEADER_NAME.fullmatch(name))}
    unfinished = [name for name in files if name.endswith(".tmp") or (not found and name.endswith(".int16"))]
    message = f"; packing has not finished: {some_of(unfinished)}" if unfinished else ""
    if not found:
        raise StoreError(folder, f"no packed store in this folder{message}")
    counts = sorted({int(parts) for _part, parts in found})
    if len(counts) > 1:
        raise StoreError(folder, f"parts of several stores, of {' and of '.join(map(str, counts))} parts; remove one")
    parts, present = counts[0], {int(part) for part, _parts in found}
    if missing := list(islice((part for part in range(parts) if part not in present), SHOWN + 1)):
        names = [part_name(part, parts) for part in missing]
        raise StoreError(folder, f"{parts - len(present)} of {parts} parts missing: {some_of(names)}{message}")
    return [folder / f"{part_name(part, parts)}.json" for part in sorted(present)]


def old_data(folder: Path, header: PartHeader) -> list[Path]:
    """Return data files of earlier packings of a part, which a killed process may have left."""
    files = folder.glob(f"{part_name(header.part, header.parts)}-*.int16")
    return [path for path in files if path.name != header.data]


class PartWriter:
    """Write the samples of a part and replace the old part at the end: a context manager.

    The old part stays whole until ``finish`` has run, even if the process is killed. A killed process leaves
    ``*.tmp`` files, which the next attempt replaces.

    Args:
        folder: folder of the store; created if missing.
        part: number of the part, from 0.
        parts: number of parts in the store.

    Raises:
        StoreError: the folder cannot be written to or the disk is full (raised by all methods); another process is
            writing this part; the folder holds a store with another number of parts.
    """

    def __init__(self, folder: Path, part: int, parts: int) -> None:
        self.folder, self.name = folder, part_name(part, parts)
        self.samples, self._checksum, self._finished = 0, hashlib.sha256(), False
        self._temporary = folder / f"{self.name}.int16.tmp", folder / f"{self.name}.json.tmp"
        with self._store_errors():
            folder.mkdir(parents=True, exist_ok=True)
            others = {int(match[2]) for path in folder.iterdir() if (match := HEADER_NAME.fullmatch(path.name))}
            if others - {parts}:
                message = (
                    f"holds a store of {max(others - {parts})} parts, not {parts}; remove it or choose another folder"
                )
                raise StoreError(folder, message)
            self._file = _open_locked(self._temporary[0])

    def write(self, wav: npt.NDArray[np.int16]) -> None:
        """Add the samples of a clip."""
        with self._store_errors():
            content = wav.astype("<i2", copy=False).data
            self._file.write(content)
            self._checksum.update(content)
            self.samples += len(wav)

    def finish(self, **described: Any) -> PartHeader:
        """Flush the samples to the disk, then rename them and their header into place.

        Args:
            described: the other fields of the header.
        """
        checksum = self._checksum.hexdigest()
        data = f"{self.name}-{checksum[:12]}.int16"
        header = PartHeader(data=data, samples=self.samples, samples_sha256=checksum, **described)
        content = json.dumps({"format": FORMAT, "version": VERSION} | vars(header))[1:].encode() + b"\n"
        first = f'{{"header_sha256": "{hashlib.sha256(content).hexdigest()}",\n'.encode()
        with self._store_errors():
            self._file.flush()
            os.fsync(self._file.fileno())
            close_to_rename(self._file)
            with open(self._temporary[1], "wb") as file:
                file.write(first + content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(self._temporary[0], self.folder / data)
            os.replace(self._temporary[1], self.folder / f"{self.name}.json")
            self._finished = True
            sync_folder(self.folder)
        self.remove_old(header)
        return header

    def remove_old(self, header: PartHeader) -> None:
        """Remove data files of earlier packings of this part."""
        with self._store_errors():
            for path in old_data(self.folder, header):
                path.unlink()

    def __enter__(self) -> PartWriter:
        return self

    def __exit__(self, *_exception: object) -> None:
        with suppress(OSError):  # on a full disk the last flush fails again
            if not self._finished:
                close_to_rename(self._file)
                for path in self._temporary:
                    path.unlink(missing_ok=True)
        with suppress(OSError):
            self._file.close()  # releases the lock

    @contextmanager
    def _store_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            kept = "; what was packed before is unchanged" if (self.folder / f"{self.name}.json").exists() else ""
            raise StoreError(self.folder, f"cannot be written: {error.strerror or error}{kept}") from error


def _open_locked(path: Path) -> IO[bytes]:
    """Open an empty file and lock it. The system releases the lock when the process ends, even if killed."""
    file = open_locked(path)
    if file is None:
        raise StoreError(path, "another process is packing this part")
    file.truncate(0)
    return file
