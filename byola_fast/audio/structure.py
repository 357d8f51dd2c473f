"""The streams, pages and frames that a compressed file holds, counted without decoding, to check its header.

Formats: Ogg, RFC 3533; MPEG audio, ISO/IEC 11172-3 and 13818-3; FLAC, RFC 9639; RIFF (WAV) and IFF (AIFF) chunks.
"""

from __future__ import annotations

import re
import zlib
from typing import BinaryIO

REVERSED_BITS = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))
ENDLESS = 0x7FFF0000  # lengths from here on are written to pipes, whose length is unknown
MPEG_SYNC = re.compile(rb"\xff[\xe2-\xff]")
# kbit/s by (MPEG-1 or not, layer)
BITRATES = {
    (True, 1): (0, 32, 64, 96, 128, 160, 192, 224, 256, 288, 320, 352, 384, 416, 448),
    (True, 2): (0, 32, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384),
    (True, 3): (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    (False, 1): (0, 32, 48, 56, 64, 80, 96, 112, 128, 144, 160, 176, 192, 224, 256),
    (False, 2): (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}
BITRATES[False, 3] = BITRATES[False, 2]


def ogg_streams(content: bytes) -> tuple[int, bool, bool]:
    """Return the number of streams, whether all pages are there and undamaged, and whether the last one is cut short.

    >>> ogg_streams(b"")
    (0, True, False)
    """
    at, streams, numbers = 0, 0, dict[bytes, int]()
    while content.startswith(b"OggS", at) and at + 27 <= len(content):
        body = at + 27 + content[at + 26]
        end = body + sum(content[at + 27 : body])
        if end > len(content):
            return streams, b"OggS" not in content[body:], True
        serial, number = content[at + 14 : at + 18], int.from_bytes(content[at + 18 : at + 22], "little")
        first = bool(content[at + 5] & 2)
        streams += first
        page = content[at : at + 22] + bytes(4) + content[at + 26 : end]
        # Ogg's checksum is zlib's with the bits of bytes and result reversed, and without inversion
        checksum = zlib.crc32(page.translate(REVERSED_BITS), 0xFFFFFFFF) ^ 0xFFFFFFFF
        if int(f"{checksum:032b}"[::-1], 2) != int.from_bytes(content[at + 22 : at + 26], "little"):
            return streams, False, False
        if number != (0 if first else numbers.get(serial, -2) + 1):
            return streams, False, False
        numbers[serial], at = number, end
    return streams, not content[at:].strip(b"\0"), False


def mpeg_samples(content: bytes) -> tuple[int, int, bool]:
    """Return the samples in all MPEG audio frames, the number of length tables, and whether it is one unbroken stream.

    >>> mpeg_samples(b"no frames")
    (0, 0, False)
    """
    at, samples, tables, gaps = _after_id3(content, 0), 0, 0, 0
    while at < len(content):
        size, count, table = _mpeg_frame(content, at)
        if not size or (at + size < len(content) and not samples and not _mpeg_frame(content, at + size)[0]):
            following = _next_frame(content, at + 1)
            gaps += following < len(content)
            at = following
            continue
        if at + size <= len(content):  # else cut short
            samples += count
            tables += content[at + table : at + table + 4] in (b"Xing", b"Info")
        at += size
    return samples, tables, samples > 0 and not gaps and tables <= 1


def flac_streams(content: bytes) -> int:
    """Return the number of FLAC streams: markers before a STREAMINFO block of 34 bytes.

    >>> flac_streams(b"fLaC" + bytes([0, 0, 0, 34]))
    1
    """
    return len(re.findall(rb"fLaC[\x00\x80]\x00\x00\x22", content))


def odd_end(file: BinaryIO) -> str:
    """Return what is wrong with the end of a WAV or AIFF file by its chunks, "" if nothing.

    An interrupted recorder leaves a length that is too small, an interrupted copy one that is too large; joined files
    have a second header.
    """
    kind = file.read(12)[:4]
    end, at = file.seek(0, 2), 12
    while kind in (b"RIFF", b"FORM") and at + 8 <= end:
        file.seek(at)
        head = file.read(8)
        size = int.from_bytes(head[4:], "little" if kind == b"RIFF" else "big")
        following = at + 8 + size + size % 2
        if head[:4] in (b"data", b"SSND"):
            if end < at + 8 + size < ENDLESS:
                return f"{at + 8 + size - end} bytes that its header promises are missing"
        elif following > end + 1 or head[:4] == kind or not all(32 <= byte < 127 for byte in head[:4]):
            follows = any(head + file.read(4096))
            return f"{end - at} bytes behind the end that its header gives are not read" if follows else ""
        at = following
    return ""


def _mpeg_frame(content: bytes, at: int) -> tuple[int, int, int]:
    """Return bytes, samples and place of a length table of the frame that begins here; zeros if none does."""
    head = content[at : at + 4]
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


def _next_frame(content: bytes, at: int) -> int:
    """Return the start of the next two consecutive frames, or the end of the content."""
    if content.startswith(b"ID3", at - 1):
        at = _after_id3(content, at - 1)
    while found := MPEG_SYNC.search(content, at):
        size = _mpeg_frame(content, found.start())[0]
        if size and _mpeg_frame(content, found.start() + size)[0]:
            return found.start()
        at = found.start() + 1
    return len(content)


def _after_id3(content: bytes, at: int) -> int:
    """Return the end of an ID3v2 tag that begins here, or the same place if none does."""
    head = content[at : at + 10]
    if len(head) < 10 or not head.startswith(b"ID3"):
        return at
    size = head[6] << 21 | head[7] << 14 | head[8] << 7 | head[9]
    return at + 10 + size + (10 if head[5] & 16 else 0)
