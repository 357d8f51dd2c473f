"""Decode audio files to mono at their own rate, to their end: by libsndfile, or by FFmpeg (PyAV) where it cannot.

A header may be wrong about the length of its file. All readers go by the number of frames that a decode from the start
to the end gives; see ``AudioFile.frames``.
"""

from __future__ import annotations

import io
import os
import shutil
import stat
import tempfile
import threading
from collections.abc import Iterator
from contextlib import suppress
from functools import lru_cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple
from zlib import crc32

from byola_fast.audio.structure import FileBytes, flac_streams, mpeg_samples, odd_end, ogg_start, ogg_streams
from byola_fast.runtime.workers import warn_once

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import soundfile

    Mono = npt.NDArray[np.float32]

AUDIO_FORMATS = "wav wave rf64 w64 flac ogg oga opus mp3 mp2 aif aiff aifc au snd caf voc sph"
FFMPEG_FORMATS = "m4a m4b aac mp4 webm weba mka wma wv ape tta ac3 amr"  # suffixes that FFmpeg alone reads
SIGNED = "mov matroska ogg asf wav w64 aiff caf au voc flac ape wv tta aac ac3 amr"  # FFmpeg finds these by a signature
BLOCK_FRAMES = 1 << 22  # decoded at a time: a long file takes the memory of its mono mix alone
OGG_PAGE_FRAMES = 1 << 18  # an Ogg page holds at most 255 packets; Vorbis encoders write 1024 frames in each
MP3_SEEK_FRAMES = 1 << 18  # decoding this many takes milliseconds
MP3_EDGE = 4 * 1152  # frames that an MP3 decoder leaves out: the table, the encoder's delay, the padding
UNKNOWN_FRAMES = 1 << 60  # libsndfile returns 2^63 - 1 if the header has no length (FLAC from a pipe)
MAX_PLANES = 8
SYSTEM_ERROR = 2  # libsndfile's code for a failed system call
LOUDEST = 2.0**20  # of full scale: 120 dB above it; anything louder is damage
NOT_AUDIO = "not audio that can be decoded"
NO_TABLE = "an MP3 without a table of its length"
BYTES = "byola_fast-bytes-"  # begins the names of files that hold what was given as bytes
MORE_FORMATS = "pip install av reads more"
KINDS = {stat.S_ISDIR: "a folder", stat.S_ISFIFO: "a named pipe", stat.S_ISSOCK: "a socket"}  # else a device


class AudioError(ValueError):
    """An audio file cannot be used. The message names the file and the reason.

    Attributes:
        path: the file.
        reason: the reason, without the name.

    >>> print(AudioError(Path("a.wav"), "empty file (0 bytes)"))
    a.wav: empty file (0 bytes)
    """

    def __init__(self, path: str | Path, reason: str) -> None:
        super().__init__(path, reason)  # both: pickling, on the way from a worker, passes them to __init__
        self.path = Path(path)
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


def has_ffmpeg() -> bool:
    """Tell whether FFmpeg's libraries are here, as the package ``av``."""
    found = find_spec("av")
    return found is not None and found.origin is not None  # a folder "av" beside a script has none


def decoders(*, versions: bool = True) -> str:
    """Return the decoders in use; the samples of damaged files depend on them, those of lossy files on their versions.

    >>> decoders(versions=False).split(", ")[0]
    'libsndfile'
    """
    import soundfile

    found = {"libsndfile": soundfile.__libsndfile_version__} | ({"PyAV": version("av")} if has_ffmpeg() else {})
    return ", ".join(f"{name} {number}" if versions else name for name, number in found.items())


class AudioFile:
    """An open audio file, to be read once: by ``blocks`` or by ``read``. A context manager.

    libsndfile reads the file if it can and if the file's structure agrees with its header; else FFmpeg does, which
    cannot seek here. Without FFmpeg, libsndfile reads as far as it can and ``blocks`` warns.

    Args:
        path: of the file; or its content, which is read from a temporary file.

    Attributes:
        path: of the file.
        rate: in Hz.

    Raises:
        AudioError: the file is missing, empty, not a regular file (which is never opened), or not audio.
    """

    def __init__(self, path: str | Path | bytes) -> None:
        self._copy, self._name = None, ""
        if isinstance(path, bytes):  # every decoder opens names
            self._copy = tempfile.NamedTemporaryFile(prefix=BYTES)  # noqa: SIM115
            self._copy.write(path)
            self._copy.flush()
            self._name = f"{len(path)} bytes of audio, CRC-32 {crc32(path):08x}"
            path = self._copy.name
        self.path = Path(path)
        self._name = self._name or str(path)
        status = _require_regular(self.path)
        self._state = (str(path), status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
        try:
            self._facts = _examine(*self._state)
        except OSError as error:
            raise AudioError(path, error.strerror or str(error)) from error
        self.rate = self._facts.rate
        self._whole = False  # whether libsndfile alone decoded all of it
        self._file = None if self._facts.by_ffmpeg else _open_libsndfile(self.path)
        if self._facts.note:
            warn_once(f"{self._name}: {self._facts.note}")

    def __enter__(self) -> AudioFile:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        if self._copy is not None:
            self._copy.close()

    @property
    def frames(self) -> int:
        """Number of frames that decoding to the end gives.

        The size of the file proves it (PCM), or intact Ogg pages or MP3 frames do. Other files are decoded once, those
        of floats too, to find NaN; each process remembers the number by path, size and time.

        Raises:
            AudioError: as in ``blocks``.
        """
        return self._length()[0]

    def blocks(self, maximum: int = BLOCK_FRAMES) -> Iterator[Mono]:
        """Yield the whole file, mixed to mono, in blocks of at most ``maximum`` frames; warn of what cannot be decoded.

        Raises:
            AudioError: NaN, infinity or samples beyond 2^20 times full scale, when their block is reached.
        """
        got, damaged = 0, 0
        if self._file is not None:
            for block in _libsndfile_blocks(self._from_start(), UNKNOWN_FRAMES, maximum):
                got += len(block)
                yield self._mono(block)
            self._whole = got == self._facts.header and not self._facts.reason
            if self._whole:
                return
        if self._file is None or (has_ffmpeg() and _ffmpeg_rate(self.path, True) == self.rate):
            # libsndfile stops at damage in a FLAC; FFmpeg reads on
            for block in _ffmpeg_blocks(self.path, self._facts.header > 0, got, maximum):
                got += len(block)
                damaged += not len(block)
                yield self._mono(block)
        self._report(got, damaged)

    def read(self, start: int, count: int) -> Mono:
        """Return frames ``[start, start + count)`` mixed to mono, or fewer if the file ends.

        Raises:
            AudioError: as in ``blocks``, for the frames that must be decoded.
        """
        import numpy as np

        blocks, place = self.blocks(min(BLOCK_FRAMES, start + count)), 0
        if start > 0:
            frames, seeks = self._length()
            count = max(0, min(count, frames - start))
            if seeks and count and self._file is not None:
                file, place = _seek(self._file, start)
                blocks = map(self._mono, _libsndfile_blocks(file, start + count - place, BLOCK_FRAMES))
        parts = [np.empty(0, np.float32)]
        for block in blocks if count else ():
            if place + len(block) > start:  # an empty part would keep its block in memory
                parts.append(block[max(0, start - place) : start + count - place])
            place += len(block)
            if place >= start + count:
                break
        return np.concatenate(parts)

    def _length(self) -> tuple[int, bool]:
        """Return the number of frames, and whether libsndfile can seek to each of them."""
        facts = self._facts
        if not facts.by_ffmpeg and not facts.reason and facts.proof in ("size", "ogg", "mpeg"):
            return facts.header, True
        return _count(*self._state)

    def _from_start(self) -> soundfile.SoundFile:
        """Return the file as libsndfile reads most of it: an MP3 of unknown length is read to its end from a pipe."""
        import soundfile

        assert self._file is not None
        if self._facts.reason and self._facts.proof == "mpeg":
            with suppress(soundfile.SoundFileError):
                return _open_through_pipe(self.path)
        return self._file

    def _mono(self, block: Mono) -> Mono:
        """``(frames, channels)`` to ``(frames,)``, the mean of all channels."""
        import numpy as np

        loudest = float(np.abs(block).max(initial=0))
        if not np.isfinite(loudest):
            raise AudioError(self.path, "NaN or infinite samples")
        if loudest > LOUDEST:
            raise AudioError(self.path, f"samples up to {loudest:.3g} times full scale; expected at most 2^20")
        mono: Mono = block.mean(axis=1)
        return mono

    def _report(self, got: int, damaged: int) -> None:
        """Warn if the file was not read to its end, or holds less than its header promises."""
        facts, seconds = self._facts, got / self.rate
        edge = MP3_EDGE / self.rate if facts.proof in ("ogg", "mpeg") else 0
        if seconds + edge < facts.promised_sec:
            message = f"its header promises {facts.promised_sec:.2f} s; only {seconds:.2f} s can be decoded"
        elif damaged:
            reason = f"{facts.reason}; " if facts.reason else ""
            message = f"{reason}damaged packets left out: {damaged}; {seconds:.2f} s were read"
        elif self._file is not None and got + MP3_EDGE < facts.frames:
            message = f"{facts.reason}; only {seconds:.2f} s were read ({MORE_FORMATS})"
        else:
            return
        warn_once(f"{self._name}: {message}")


def _require_regular(path: Path) -> os.stat_result:
    """Return the status of a regular file with content. A pipe or device would wait or never end, if opened."""
    try:
        status = path.stat()
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise AudioError(path, getattr(error, "strerror", None) or str(error)) from error
    if not stat.S_ISREG(status.st_mode):
        kind = next((name for test, name in KINDS.items() if test(status.st_mode)), "a device")
        raise AudioError(path, f"{kind}, not a regular file")
    if not status.st_size:
        raise AudioError(path, "empty file (0 bytes)")
    return status


def _open_libsndfile(path: Path) -> soundfile.SoundFile | None:
    """Open a file; return None if libsndfile does not know its format."""
    import soundfile

    try:
        with open(path, "rb"):  # for the reason, if it may not be read
            return soundfile.SoundFile(os.fsencode(path))  # bytes: a name need not be UTF-8
    except OSError as error:
        raise AudioError(path, error.strerror or str(error)) from error
    except (soundfile.SoundFileError, TypeError):  # TypeError: a .raw file, which has no header
        return None


def _open_through_pipe(path: Path) -> soundfile.SoundFile:
    import soundfile

    ours, theirs = os.pipe()

    def feed() -> None:
        with suppress(OSError), open(theirs, "wb") as pipe, open(path, "rb") as file:
            shutil.copyfileobj(file, pipe)

    threading.Thread(target=feed, daemon=True).start()
    return soundfile.SoundFile(ours, closefd=True)


def _proof(file: soundfile.SoundFile) -> str:
    """Return the proof of a header's length: the "size" of the file, "ogg" pages, "mpeg" frames, or a "decode".

    A "stream" is decoded too, and is never sought in: in a damaged ALAC file libsndfile decodes noise, another after
    each seek.
    """
    if "MPEG" in file.subtype:
        return "mpeg"
    if file.subtype in ("VORBIS", "OPUS"):
        return "ogg"
    if "ALAC" in file.subtype:
        return "stream"
    return "decode" if file.subtype in ("FLOAT", "DOUBLE") or file.format in ("FLAC", "OGG") else "size"


class Facts(NamedTuple):
    """What is known of a file from its header and its structure.

    Attributes:
        by_ffmpeg: whether FFmpeg reads it, and not libsndfile.
        rate: in Hz, of the decoder that reads it.
        header: number of frames that the header gives, as libsndfile understands it; 0 if it does not.
        promised_sec: length in seconds that the header promises; 0 if it gives none, or libsndfile guessed it.
        proof: see ``_proof``.
        reason: why libsndfile may not read the file to its end; "" if it does.
        frames: number of frames in a file that libsndfile may not read to its end, if known.
        note: what no decoder reads.
    """

    by_ffmpeg: bool
    rate: int
    header: int = 0
    promised_sec: float = 0.0
    proof: str = ""
    reason: str = ""
    frames: int = 0
    note: str = ""


@lru_cache(maxsize=1 << 17)
def _examine(path: str, *_state: int) -> Facts:
    file = _open_libsndfile(Path(path))
    if file is None:
        rate = _ffmpeg_rate(Path(path), known=False)
        with open(path, "rb") as raw:
            return Facts(True, rate, note=odd_end(raw))
    with file:
        header, rate, proof = int(file.frames), int(file.samplerate), _proof(file)
    if header < 1:
        if not has_ffmpeg():
            raise AudioError(path, f"its header says that it holds no samples ({MORE_FORMATS})")
        return Facts(True, _ffmpeg_rate(Path(path), known=False))
    reason, frames, note = _doubt(path, proof, header)
    guessed = header >= UNKNOWN_FRAMES or reason == NO_TABLE
    facts = Facts(False, rate, header, 0.0 if guessed else header / rate, proof, reason, frames, note)
    if reason and has_ffmpeg():
        with suppress(AudioError):  # then libsndfile reads what it can
            return facts._replace(by_ffmpeg=True, rate=_ffmpeg_rate(Path(path), known=True))
    return facts


def _doubt(path: str, proof: str, header: int) -> tuple[str, int, str]:
    """Return ``reason``, ``frames`` and ``note`` of a file that libsndfile opens."""
    with open(path, "rb") as file:
        return _doubt_of(path, file, proof, header)


def _doubt_of(path: str, file: BinaryIO, proof: str, header: int) -> tuple[str, int, str]:
    content = FileBytes(file)
    if proof not in ("mpeg", "ogg"):
        streams = max(ogg_streams(content)[0], flac_streams(content)) if proof == "decode" else 1
        note = odd_end(file)
        return (f"holds {streams} streams", UNKNOWN_FRAMES, note) if streams > 1 else ("", 0, note)
    if proof == "mpeg":
        frames, tables, whole = mpeg_samples(content)
        if whole and 0 <= frames - header <= MP3_EDGE and _reaches(path, header):
            return "", 0, ""
        return "a joined or damaged MP3" if tables else NO_TABLE, frames, ""
    streams, whole, cut = ogg_streams(content)
    note = "breaks off inside its last page" if cut else ""
    if streams > 1:
        return f"holds {streams} streams", UNKNOWN_FRAMES, note
    if not _counts_from_zero(content):
        return "an Opus stream that does not begin at 0", 0, note
    return ("", 0, note) if whole and _reaches(path, header) else ("damaged Ogg pages", header, note)


def _counts_from_zero(content: FileBytes) -> bool:
    """Tell whether an Opus file counts samples from 0. In others, as in recorded streams, libsndfile seeks wrongly."""
    import soundfile

    end, position = ogg_start(content)
    beginning = content[0:end]
    if beginning[28:36] != b"OpusHead":
        return True
    with suppress(soundfile.SoundFileError), soundfile.SoundFile(io.BytesIO(beginning)) as file:
        decoded = sum(map(len, _libsndfile_blocks(file, UNKNOWN_FRAMES, BLOCK_FRAMES)))
        pre_skip = int.from_bytes(beginning[38:40], "little")
        return position == decoded * 48000 // file.samplerate + pre_skip
    return True


def _reaches(path: str, frames: int) -> bool:
    """Tell whether libsndfile decodes the last frame that the header promises."""
    file = _open_libsndfile(Path(path))
    if file is None:
        return False
    with file:
        file, place = _seek(file, frames - 1)
        return sum(map(len, _libsndfile_blocks(file, frames - place, BLOCK_FRAMES))) == frames - place


@lru_cache(maxsize=1 << 17)
def _count(path: str, *_state: int) -> tuple[int, bool]:
    with AudioFile(path) as file:
        frames = sum(map(len, file.blocks()))
        return frames, file._whole and file._facts.proof != "stream"


def _seek(file: soundfile.SoundFile, start: int) -> tuple[soundfile.SoundFile, int]:
    """Return the file at ``start``, or so far before it that decoding is correct from ``start`` on, and the place."""
    import soundfile

    place = start
    if "VORBIS" in file.subtype:  # in the last page libsndfile 1.2 seeks a block too far (its issue 885)
        place = max(0, min(start, int(file.frames) - OGG_PAGE_FRAMES))
    elif "MPEG" in file.subtype and start < MP3_SEEK_FRAMES:  # a seek makes libmpg123 write to stderr
        place = 0
    elif "OPUS" in file.subtype or "MPEG" in file.subtype:  # half a second for the decoder to settle
        place = max(0, start - int(file.samplerate) // 2)
    try:
        if place:
            file.seek(place)
        return file, place
    except soundfile.SoundFileError:  # damaged, or a codec that cannot seek: decode from the beginning
        return soundfile.SoundFile(file.name), 0


def _libsndfile_blocks(file: soundfile.SoundFile, wanted: int, maximum: int) -> Iterator[Mono]:
    """The next ``wanted`` frames ``(frames, channels)``, at most ``maximum`` at a time, as far as decoding succeeds."""
    import numpy as np
    import soundfile

    # After every read of a seekable file, soundfile seeks to its position, and an MP3 decoder loses its bit reservoir.
    file.seekable = lambda: False
    wanted = min(wanted, int(file.frames))
    while wanted > 0:
        block = np.full((min(wanted, maximum), file.channels), np.nan, np.float32)
        try:
            got = len(file.read(out=block))
        except soundfile.SoundFileError as error:
            if getattr(error, "code", 0) == SYSTEM_ERROR:  # the disk failed; this is not the end of the file
                raise AudioError(os.fsdecode(file.name), "read error") from error
            # The file breaks off inside this block, which holds the decoded frames.
            got = int(np.count_nonzero(~np.isnan(block[:, -1])))
            wanted = 0
        if got:
            yield block[:got]
        wanted = wanted - got if got == len(block) else 0


def _ffmpeg_frames(path: Path, known: bool) -> Iterator[Any]:
    """Yield PyAV's frames of the first audio stream, and None for each packet that cannot be decoded.

    Args:
        path: of the file.
        known: whether it is audio for sure. Else the container must have a signature: FFmpeg also guesses.
    """
    if not has_ffmpeg():
        raise AudioError(path, f"{NOT_AUDIO} ({MORE_FORMATS})")
    import av
    import av.error

    descriptor = os.open(path, os.O_RDONLY)
    # A file without a name: FFmpeg would go by the suffix. No protocols: a playlist would open other files.
    with open(descriptor, "rb") as file:
        try:
            container: Any = av.open(file, options={"protocol_whitelist": "none"})
        except (av.error.FFmpegError, OSError, ValueError) as error:
            raise AudioError(path, NOT_AUDIO) from error
        with container:
            if not known and container.format.name.split(",")[0] not in SIGNED.split():
                raise AudioError(path, NOT_AUDIO)
            if not container.streams.audio:
                raise AudioError(path, f"no audio in this file ({container.format.name})")
            stream = container.streams.audio[0]
            decoder = stream.codec_context
            if decoder is None:
                raise AudioError(path, "no decoder for its codec")
            if decoder.name == "flac":  # else frames with a wrong checksum are given as sound
                decoder.options = {"err_detect": "crccheck+explode"}
            if decoder.name == "opus" and "libopus" in av.codecs_available:  # FFmpeg's own decoder gives noise at times
                extradata, decoder = decoder.extradata, av.CodecContext.create("libopus", "r")
                decoder.extradata = extradata
            try:
                for packet in container.demux(stream):
                    try:
                        frames: list[Any] = decoder.decode(packet)
                    except av.error.FFmpegError:
                        frames = [None]
                    yield from frames
            except av.error.FFmpegError:  # the container breaks off
                yield None
            except OSError as error:
                raise AudioError(path, f"read error: {error.strerror or error}") from error


def _ffmpeg_rate(path: Path, known: bool) -> int:
    """Return the rate of the first frame, which may differ from the header's (HE-AAC)."""
    for frame in _ffmpeg_frames(path, known):
        if frame is not None:
            return int(frame.sample_rate)
    raise AudioError(path, "the file holds no samples")


def _ffmpeg_blocks(path: Path, known: bool, skip: int, maximum: int) -> Iterator[Mono]:
    """Frames ``(frames, channels)`` from ``skip`` on, up to about ``maximum`` at a time; none for a damaged packet."""
    import numpy as np

    held: list[Mono] = []
    rate = length = 0
    for frame in _ffmpeg_frames(path, known):
        if frame is None:
            yield np.empty((0, 1), np.float32)
            continue
        rate = rate or frame.sample_rate
        if frame.sample_rate != rate:
            raise AudioError(path, f"its rate changes from {rate} to {frame.sample_rate} Hz; expected one rate")
        if frame.format.is_planar and frame.layout.nb_channels > MAX_PLANES:  # PyAV reads beyond the list of planes
            raise AudioError(path, f"{frame.layout.nb_channels} channels; expected at most {MAX_PLANES} of FFmpeg")
        block = _samples(frame)
        block, skip = block[skip:], max(0, skip - len(block))
        if held and (held[0].shape[1] != block.shape[1] or length + len(block) > maximum):
            yield np.concatenate(held)
            held, length = [], 0
        if len(block):
            held.append(block)
            length += len(block)
    if held:
        yield np.concatenate(held)


def _samples(frame: Any) -> Mono:
    """Samples of a PyAV frame as ``(frames, channels)`` float32, full scale 1."""
    import numpy as np

    samples = frame.to_ndarray()
    samples = samples.T if frame.format.is_planar else samples.reshape(-1, frame.layout.nb_channels)
    if samples.dtype.kind == "u":
        return (samples.astype(np.float32) - 128) / 128
    if samples.dtype.kind == "i":
        return samples.astype(np.float32) / np.float32(-float(np.iinfo(samples.dtype).min))
    return samples.astype(np.float32, copy=False)
