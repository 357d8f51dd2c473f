"""The streams, pages and frames that a compressed file holds, counted without decoding, to check its header.

Formats: Ogg, RFC 3533; MPEG audio, ISO/IEC 11172-3 and 13818-3; FLAC, RFC 9639; RIFF (WAV) and IFF (AIFF) chunks.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator
from functools import lru_cache
from typing import BinaryIO

BLOCK_BYTES = 1 << 20  # in memory at a time
REVERSED_BITS = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))
ENDLESS = 0x7FFF0000  # lengths from here on are written to pipes, whose length is unknown
MPEG_SYNC = re.compile(rb"\xff[\xe2-\xff][\x10-\xef]", re.DOTALL)  # the bitrate is neither free nor reserved
MPEG_RUN = 3  # consecutive frames; pictures in tags hold two by chance
# kbit/s by (MPEG-1 or not, layer)
BITRATES = {
    (True, 1): (0, 32, 64, 96, 128, 160, 192, 224, 256, 288, 320, 352, 384, 416, 448),
    (True, 2): (0, 32, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384),
    (True, 3): (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    (False, 1): (0, 32, 48, 56, 64, 80, 96, 112, 128, 144, 160, 176, 192, 224, 256),
    (False, 2): (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}
BITRATES[False, 3] = BITRATES[False, 2]


class FileBytes:
    """The content of an open file, sliced like ``bytes``, with one block of it in memory.

    A memory map would kill the process if the file were cut short.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._size, self._begin, self._block = file, file.seek(0, 2), 0, b""

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, part: slice) -> bytes:
        begin, end = part.start, part.stop
        if begin < self._begin or end > self._begin + len(self._block):
            self._begin = self._file.seek(begin)
            self._block = self._file.read(max(BLOCK_BYTES, end - begin))
        return self._block[begin - self._begin : end - self._begin]


Content = FileBytes | bytes


def _blocks(content: Content, at: int, overlap: int = 0) -> Iterator[tuple[int, bytes]]:
    """Yield places and bytes of blocks from ``at`` on; each but the first begins ``overlap`` bytes before its turn."""
    while at < len(content):
        yield at, content[at : at + BLOCK_BYTES]
        at += BLOCK_BYTES - overlap


def ogg_streams(content: Content) -> tuple[int, bool, bool]:
    """Return the number of streams, whether all pages are there and undamaged, and whether the last one is cut short.

    >>> ogg_streams(b"")
    (0, True, False)
    """
    at, streams, numbers = 0, 0, dict[bytes, int]()
    while len(head := content[at : at + 27]) == 27 and head.startswith(b"OggS"):
        lengths = content[at + 27 : at + 27 + head[26]]
        body = content[at + 27 + head[26] : at + 27 + head[26] + sum(lengths)]
        end = at + 27 + head[26] + sum(lengths)
        if end > len(content) or len(lengths) < head[26]:
            return streams, b"OggS" not in body, True
        serial, number = head[14:18], int.from_bytes(head[18:22], "little")
        first = bool(head[5] & 2)
        streams += first
        page = head[:22] + bytes(4) + head[26:] + lengths + body
        # Ogg's checksum is zlib's with the bits of bytes and result reversed, and without inversion
        checksum = zlib.crc32(page.translate(REVERSED_BITS), 0xFFFFFFFF) ^ 0xFFFFFFFF
        if int(f"{checksum:032b}"[::-1], 2) != int.from_bytes(head[22:26], "little"):
            return streams, False, False
        if number != (0 if first else numbers.get(serial, -2) + 1):
            return streams, False, False
        numbers[serial], at = number, end
    return streams, not any(block.strip(b"\0") for _at, block in _blocks(content, at)), False


def ogg_start(content: Content) -> tuple[int, int]:
    """Return the end of the first page with sound, and its granule position: the number of samples so far.

    >>> ogg_start(b"")
    (0, 0)
    """
    at = 0
    while len(head := content[at : at + 27]) == 27 and head.startswith(b"OggS"):
        at += 27 + head[26] + sum(content[at + 27 : at + 27 + head[26]])
        position = int.from_bytes(head[6:14], "little", signed=True)
        if position > 0:
            return at, position
    return at, 0


def mpeg_samples(content: Content) -> tuple[int, int, bool]:
    """Return the samples in all MPEG audio frames, the number of length tables, and whether it is one unbroken stream.

    Bytes in front of the first frame break nothing: tags, and their padding.

    >>> mpeg_samples(b"no frames")
    (0, 0, False)
    """
    at, samples, tables, gaps = _after_id3(content, 0), 0, 0, 0
    while at < len(content):
        head = content[at : at + 40]
        size, count, table = _mpeg_frame(head[:4])
        if not size or (not samples and at + size < len(content) and not _frame_size(content, at + size)):
            following = _next_frame(content, at)
            gaps += samples > 0 and following < len(content)
            at = following
            continue
        if at + size <= len(content):  # else cut short
            samples += count
            tables += head[table : table + 4] in (b"Xing", b"Info")
        at += size
    return samples, tables, samples > 0 and not gaps and tables <= 1


def flac_streams(content: Content) -> int:
    """Return the number of FLAC streams: markers before a STREAMINFO block of 34 bytes, outside of the first metadata.

    A picture may hold such a marker.

    >>> flac_streams(b"fLaC" + bytes([0, 0, 0, 34]))
    1
    """
    at = _after_id3(content, 0)
    if content[at : at + 4] != b"fLaC":
        return 0
    at, last = at + 4, False
    while not last and len(head := content[at : at + 4]) == 4:
        last, at = head[0] > 127, at + 4 + int.from_bytes(head[1:], "big")
    markers = [b"fLaC" + bytes([kind, 0, 0, 34]) for kind in (0, 128)]
    return 1 + sum(block.count(marker) for _at, block in _blocks(content, at, 7) for marker in markers)


def odd_end(file: BinaryIO) -> str:
    """Return what is wrong with the end of a WAV or AIFF file by its chunks, "" if nothing.

    An interrupted recorder leaves a length that is too small, an interrupted copy one that is too large; joined files
    have a second header. Tags behind the end are no sound.
    """
    end, at, sound = file.seek(0, 2), 12, 0
    file.seek(0)
    kind = file.read(4)
    while kind in (b"RIFF", b"FORM") and at + 8 <= end:
        file.seek(at)
        head = file.read(8)
        size = int.from_bytes(head[4:], "little" if kind == b"RIFF" else "big")
        sound += head[:4] in (b"data", b"SSND")
        file.seek(at + 8 + size)
        padded = size % 2 and file.read(1) in (b"\0", b"")  # some writers leave the zero out
        following = at + 8 + size + padded
        if sound > 1:
            return "holds several chunks of sound, of which one is read"
        if head[:4] in (b"data", b"SSND"):
            if end < at + 8 + size < ENDLESS:
                return f"{at + 8 + size - end} bytes that its header promises are missing"
        elif head[:3] in (b"TAG", b"ID3"):
            return ""
        elif following > end + 1 or head[:4] == kind or not all(32 <= byte < 127 for byte in head[:4]):
            file.seek(at)
            follows = any(file.read(4096))
            return f"{end - at} bytes behind the end that its header gives are not read" if follows else ""
        at = following
    return ""


@lru_cache(maxsize=1 << 12)
def _mpeg_frame(head: bytes) -> tuple[int, int, int]:
    """Return bytes, samples and place of a length table of the frame with this head; zeros if it is none."""
    if len(head) < 4 or head[0] != 0xFF or head[1] < 0xE0:
        return 0, 0, 0
    version, layer = head[1] >> 3 & 3, 4 - (head[1] >> 1 & 3)  # version 3: MPEG-1, 2: MPEG-2, 0: MPEG-2.5
    bitrate, rate, padding = head[2] >> 4, head[2] >> 2 & 3, head[2] >> 1 & 1
    if version == 1 or layer == 4 or bitrate in (0, 15) or rate == 3:  # reserved; a free bitrate has no size
        return 0, 0, 0
    mpeg1 = version == 3
    hertz = (44100, 48000, 32000)[rate] // {3: 1, 2: 2, 0: 4}[version]
    bits = 1000 * BITRATES[mpeg1, layer][bitrate]
    if layer == 1:
        return (12 * bits // hertz + padding) * 4, 384, 0
    samples = 1152 if mpeg1 or layer == 2 else 576
    mono = head[3] >> 6 == 3
    table = (21 if mono else 36) if mpeg1 else (13 if mono else 21)
    return samples // 8 * bits // hertz + padding, samples, table


def _frame_size(content: Content, at: int) -> int:
    return _mpeg_frame(content[at : at + 4])[0]


def _next_frame(content: Content, at: int) -> int:
    """Return the start of the next run of frames behind ``at``, or the end of the content."""
    for begin, block in _blocks(content, max(at + 1, _after_id3(content, at)), 2):
        for found in MPEG_SYNC.finditer(block):
            if _is_run(content, begin + found.start()):
                return begin + found.start()
    return len(content)


def _is_run(content: Content, at: int) -> bool:
    for number in range(MPEG_RUN):
        size = _frame_size(content, at)
        at += size
        if not size or at >= len(content):
            return size > 0 and number > 0
    return True


def _after_id3(content: Content, at: int) -> int:
    """Return the end of an ID3v2 tag that begins here, or the same place if none does."""
    head = content[at : at + 10]
    if len(head) < 10 or not head.startswith(b"ID3"):
        return at
    size = (head[6] & 127) << 21 | (head[7] & 127) << 14 | (head[8] & 127) << 7 | head[9] & 127
    return at + 10 + size + (10 if head[5] & 16 else 0)
