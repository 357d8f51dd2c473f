"""Files are read to their end, whatever their header says; folder and store agree; what is not read is reported."""

from __future__ import annotations

import os
import socket
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch

from byola_fast.audio import decoding, reading, structure
from byola_fast.audio.decoding import AudioFile
from byola_fast.audio.pack import pack
from byola_fast.audio.reading import AudioError, audio_duration, list_audio_files, read_audio, read_blocks
from byola_fast.audio.segments import SegmentFolder
from byola_fast.audio.store import SegmentStore
from byola_fast.audio.structure import flac_streams, mpeg_samples, ogg_streams
from byola_fast.runtime import workers

RATE = 22050
SECONDS = 4
SUFFIXES = {"PCM_16": "wav", "FLOAT": "wav", "IMA_ADPCM": "wav", "ALAC_16": "caf", "FLAC": "flac"}
SUFFIXES |= {"VORBIS": "ogg", "OPUS": "opus", "MPEG_LAYER_III": "mp3"}
LENGTHS = ["MPEG_LAYER_III", "VORBIS", "OPUS", "FLAC"]  # decoded, so that a header may be wrong about the length


@pytest.fixture(autouse=True)
def _nothing_warned_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "_warned", set())


@pytest.fixture
def no_ffmpeg(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (decoding, reading):
        monkeypatch.setattr(module, "has_ffmpeg", lambda: False)


def chirp(seconds: float = SECONDS, rate: int = RATE, start: float = 200.0) -> np.ndarray:
    t = np.arange(round(seconds * rate)) / rate
    return (0.3 * np.sin(2 * np.pi * (start + 300 * t) * t)).astype(np.float32)


def encode(path: Path, wav: np.ndarray, subtype: str, rate: int = RATE, **options: object) -> bytes:
    form = "OGG" if subtype == "OPUS" else None
    rate = 24000 if subtype == "OPUS" else rate
    with soundfile.SoundFile(
        path, "w", rate, 1 if wav.ndim == 1 else wav.shape[1], None if subtype == "FLAC" else subtype,
        format=form, **options,
    ) as file:  # fmt: skip
        for start in range(0, len(wav), 8192):  # long blocks overflow the stack of libvorbis
            file.write(wav[start : start + 8192])
    return path.read_bytes()


def with_av(path: Path, form: str, codec: str, wav: np.ndarray, rate: int = 44100) -> Path:
    """Encode by FFmpeg."""
    import av

    with av.open(str(path), "w", format=form) as container:
        stream = container.add_stream(codec, rate=rate, layout="mono")
        frame = av.AudioFrame.from_ndarray(wav[None], format="fltp", layout="mono")
        frame.sample_rate, frame.pts = rate, 0
        size = stream.codec_context.frame_size or 1024
        resampler = av.AudioResampler(stream.codec_context.format, "mono", rate, frame_size=size)
        for part in [*resampler.resample(frame), *resampler.resample(None), None]:
            container.mux(stream.encode(part))
    return path


def joined(path: Path, subtype: str) -> Path:
    second = encode(path, chirp(2, start=900), subtype)
    return path.write_bytes(encode(path, chirp(), subtype) + second) and path


def mp3_without_table(path: Path, wav: np.ndarray) -> Path:
    """A variable bitrate and no Xing frame, as a stream that was recorded."""
    content = encode(path, wav, "MPEG_LAYER_III", bitrate_mode="VARIABLE", compression_level=0.3)
    assert b"Xing" in content[:200]
    path.write_bytes(content[structure._mpeg_frame(content[:4])[0] :])
    return path


def zero_length_wav(path: Path, wav: np.ndarray | None = None) -> Path:
    content = bytearray(encode(path, chirp() if wav is None else wav, "PCM_16"))
    at = content.index(b"data")
    content[at + 4 : at + 8] = bytes(4)
    return path.write_bytes(content) and path


TO_THE_END: dict[str, tuple[float, Callable[[Path], Path]]] = {
    "table.mp3": (SECONDS, lambda path: mp3_without_table(path, chirp())),
    "quiet.mp3": (6, lambda path: mp3_without_table(path, np.concatenate([np.zeros(2 * RATE, np.float32), chirp()]))),
    "joined.mp3": (6, lambda path: joined(path, "MPEG_LAYER_III")),
    "chained.ogg": (6, lambda path: joined(path, "VORBIS")),
    "chained.opus": (6 * RATE / 24000, lambda path: joined(path, "OPUS")),
    "joined.flac": (6, lambda path: joined(path, "FLAC")),
    "zero.wav": (SECONDS, zero_length_wav),
    "ogg_flac.oga": (SECONDS, lambda path: with_av(path, "ogg", "flac", chirp(rate=44100))),
    "aac.m4a": (SECONDS, lambda path: with_av(path, "ipod", "aac", chirp(rate=44100))),
    "alac.m4a": (SECONDS, lambda path: with_av(path, "ipod", "alac", chirp(rate=44100))),
    "opus.webm": (SECONDS, lambda path: with_av(path, "webm", "libopus", chirp(rate=48000), 48000)),
    "raw.aac": (SECONDS, lambda path: with_av(path, "adts", "aac", chirp(rate=44100))),
    "flac.mka": (SECONDS, lambda path: with_av(path, "matroska", "flac", chirp(rate=44100))),
}


@pytest.mark.parametrize("name", TO_THE_END)
def test_files_are_read_to_their_end(tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture) -> None:
    seconds, make = TO_THE_END[name]
    path = make(tmp_path / name)
    wav = read_audio(path, RATE)
    assert abs(len(wav) / RATE - seconds) < 0.12  # encoders pad a lossy file by some frames
    assert audio_duration(path) == pytest.approx(len(wav) / RATE, abs=1 / RATE)
    torch.testing.assert_close(torch.cat(list(read_blocks(path, RATE, block_sec=0.7))), wav, atol=1e-5, rtol=0)
    end = read_audio(path, RATE, start_sec=seconds - 0.5, duration_sec=0.25)
    start = round((seconds - 0.5) * RATE)
    torch.testing.assert_close(end, wav[start : start + len(end)], atol=1e-5, rtol=0)
    assert wav[-RATE // 2 : -RATE // 4].abs().max() > 0.25  # the end holds sound
    if name not in ("joined.mp3",):  # its second part begins with a frame that needs bits of a missing one
        assert not caplog.records


def test_the_samples_of_ffmpeg_are_those_of_libsndfile(tmp_path: Path) -> None:
    for subtype in ("FLAC", "MPEG_LAYER_III", "VORBIS"):
        path = tmp_path / f"a.{SUFFIXES[subtype]}"
        encode(path, np.stack([chirp(), 0.5 * chirp()], 1), subtype)
        first = read_audio(path, RATE).numpy()
        other = np.concatenate([block.mean(1) for block in decoding._ffmpeg_blocks(path, True, 0, 1 << 20)])
        np.testing.assert_allclose(other[: len(first)], first, atol=1e-4)


def test_channels_beyond_eight_are_refused_where_pyav_reads_out_of_bounds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wav = chirp(0.5)
    path = with_av(tmp_path / "a.m4a", "ipod", "aac", chirp(0.5, 44100))
    planar = SimpleNamespace(is_planar=True)  # PyAV crashes when it makes such frames, too
    frame = SimpleNamespace(format=planar, layout=SimpleNamespace(nb_channels=16), sample_rate=RATE)
    monkeypatch.setattr(decoding, "_ffmpeg_frames", lambda *_: iter([frame]))
    with pytest.raises(AudioError, match="16 channels; expected at most 8"):
        read_audio(path)
    encode(tmp_path / "c.wav", np.stack([wav] * 20, 1), "PCM_16")
    np.testing.assert_allclose(read_audio(tmp_path / "c.wav", RATE).numpy(), wav, atol=1e-4)


def test_streams_that_ffmpeg_cannot_join_are_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "a.ogg"
    content = encode(path, np.stack([chirp(1), np.zeros(RATE, np.float32)], 1), "VORBIS")
    path.write_bytes(encode(path, chirp(1), "VORBIS") + content)
    seconds = audio_duration(path)
    assert seconds < 1.1  # mono, then stereo
    assert f"holds 2 streams; damaged packets left out: 1; {seconds:.2f} s were read" in caplog.text


@pytest.mark.usefixtures("no_ffmpeg")
def test_without_ffmpeg_what_is_read_is_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = mp3_without_table(tmp_path / "table.mp3", chirp())
    assert abs(audio_duration(path) - SECONDS) < 0.12  # read to the end through a pipe
    assert not caplog.records
    for subtype in LENGTHS:
        path = joined(tmp_path / f"joined.{SUFFIXES[subtype]}", subtype)
        seconds = audio_duration(path)
        (message,) = [record.getMessage() for record in caplog.records]
        assert message.startswith(f"{path}: ")
        assert f"{seconds:.2f} s were read" in message
        assert "pip install av" in message
        caplog.clear()
    for name in ("zero.wav", "aac.m4a", "ogg_flac.oga"):
        with pytest.raises(AudioError, match=r"pip install av"):
            read_audio(TO_THE_END[name][1](tmp_path / name))


DAMAGE: dict[str, Callable[[bytes, int], bytes]] = {
    "whole": lambda content, _middle: content,
    "cut": lambda content, middle: content[:middle],
    "end cut": lambda content, _middle: content[:-5],
    "byte": lambda content, middle: content[:middle] + bytes([content[middle] ^ 255]) + content[middle + 1 :],
    "zeros": lambda content, middle: content[:middle] + bytes(2000) + content[middle + 2000 :],
    "gap": lambda content, middle: content[:middle] + content[middle + 2000 :],
    "junk": lambda content, _middle: content + bytes(range(256)) * 20,
    "twice": lambda content, _middle: content + content,
}


@pytest.mark.parametrize("ffmpeg", [True, False])
@pytest.mark.parametrize("subtype", SUFFIXES)
def test_a_folder_and_its_store_give_the_same_segments(
    tmp_path: Path, subtype: str, ffmpeg: bool, caplog: pytest.LogCaptureFixture, request: pytest.FixtureRequest
) -> None:
    if not ffmpeg:
        request.getfixturevalue("no_ffmpeg")
    content = encode(tmp_path / f"whole.{SUFFIXES[subtype]}", chirp(), subtype)
    folder = tmp_path / "folder"
    folder.mkdir()
    for name, damage in DAMAGE.items():
        (folder / f"{name}.{SUFFIXES[subtype]}").write_bytes(damage(content, len(content) // 2))
    files = list_audio_files(folder)
    pack(folder, tmp_path / "store", workers=0)
    store, source = SegmentStore(tmp_path / "store", unit_sec=0.5), SegmentFolder(files, unit_sec=0.5)
    for index, path in enumerate(files):
        if not store.readable[index]:
            with pytest.raises(AudioError):
                source.read(index, 0)
            continue
        assert int(store.lengths[index]) == len(read_audio(path))
        for epoch in range(12):
            stored, read = store.gather([index], epoch)[0] / 2**15, source.read(index, epoch)
            atol = 6e-3 if subtype == "OPUS" else 5e-5  # Opus settles after a seek; int16 rounds
            torch.testing.assert_close(stored, read.clip(-1, 1 - 2**-15), atol=atol, rtol=0)
        lost = soundfile.info(path).duration - audio_duration(path) if _has_length(path) else 0.0
        assert lost < 0.05 or str(path) in caplog.text, f"{path.name}: {lost:.2f} s are lost without a word"


def _has_length(path: Path) -> bool:
    try:
        return soundfile.info(path).frames < decoding.UNKNOWN_FRAMES
    except soundfile.SoundFileError:
        return False


def test_a_wav_of_another_length_than_its_header_says_is_reported(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    content = bytearray(encode(tmp_path / "a.wav", chirp(), "PCM_16"))
    (tmp_path / "short.wav").write_bytes(content[:-1000])
    assert audio_duration(tmp_path / "short.wav") == SECONDS - 500 / RATE
    assert "short.wav: 1000 bytes that its header promises are missing" in caplog.text
    at = content.index(b"data")
    content[at + 4 : at + 8] = (2 * RATE).to_bytes(4, "little")  # the length that a recorder wrote after a second
    (tmp_path / "a.wav").write_bytes(content)
    assert audio_duration(tmp_path / "a.wav") == 1.0
    assert f"a.wav: {2 * (SECONDS - 1) * RATE} bytes behind the end that its header gives are not read" in caplog.text
    caplog.clear()
    for name, extra in (
        ("chunk.wav", b"LIST\x06\0\0\0INFOab"), ("zeros.wav", bytes(4000)), ("tag.wav", b"TAG" + b"x" * 125),
        ("id3.wav", b"ID3\3\0\0" + b"x" * 99), ("unpadded.wav", b"note\3\0\0\0abcLIST\x06\0\0\0INFOab"),
    ):  # fmt: skip
        (tmp_path / name).write_bytes(encode(tmp_path / name, chirp(), "PCM_16") + extra)
        assert audio_duration(tmp_path / name) == SECONDS
    content[at + 4 : at + 8] = b"\xff\xff\xff\xff"  # written to a pipe
    (tmp_path / "pipe.wav").write_bytes(content)
    assert audio_duration(tmp_path / "pipe.wav") == SECONDS
    assert not caplog.records
    content = encode(tmp_path / "two.wav", chirp(), "PCM_16")
    (tmp_path / "two.wav").write_bytes(content + b"data\x04\0\0\0abcd")
    assert audio_duration(tmp_path / "two.wav") == 2 / RATE
    assert "two.wav: holds several chunks of sound, of which one is read" in caplog.text


@pytest.mark.parametrize("workers_", [0, 2])
def test_a_worker_reports_once_through_the_main_process(
    tmp_path: Path, workers_: int, caplog: pytest.LogCaptureFixture
) -> None:
    for number in range(3):
        path = tmp_path / f"{number}.flac"
        path.write_bytes(encode(path, chirp(), "FLAC")[:-20000])
    for out in ("one", "two"):
        pack(tmp_path, tmp_path / out, workers=workers_)
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == len(set(messages)) == 3
    assert all("its header promises 4.00 s; only" in message for message in messages)


@pytest.mark.parametrize("value", [1e29, -1e29, 2.0**20 * 1.01, np.nan, np.inf])
@pytest.mark.parametrize("subtype", ["FLOAT", "DOUBLE"])
def test_samples_out_of_all_proportion_are_refused_everywhere(tmp_path: Path, value: float, subtype: str) -> None:
    wav = np.zeros((3 * RATE, 2))
    wav[100] = value, -value  # the channels cancel each other
    path = tmp_path / "a.wav"
    encode(path, wav, subtype)
    folder = SegmentFolder([path], unit_sec=0.1)
    readers: list[Callable[[], object]] = [
        lambda: read_audio(path),
        lambda: read_audio(path, start_sec=2.0),
        lambda: list(read_blocks(path)),
        lambda: audio_duration(path),
        lambda: [folder.read(0, epoch) for epoch in range(3)],  # though these segments are elsewhere
        lambda: pack(path, tmp_path / "store", workers=0),
    ]
    for read in readers:
        with pytest.raises(AudioError, match="NaN or infinite" if not np.isfinite(value) else "times full scale"):
            read()
    loud = np.zeros(RATE)
    loud[7] = 2.0**20
    encode(path, loud, subtype)
    assert read_audio(path, RATE).max() == 2.0**20


def test_pipes_sockets_folders_and_dead_links_are_named_and_not_opened(tmp_path: Path) -> None:
    encode(tmp_path / "a.wav", chirp(1), "PCM_16")
    os.mkfifo(tmp_path / "b.wav")
    (tmp_path / "c.wav").symlink_to("/dev/zero")
    (tmp_path / "d.wav").symlink_to(tmp_path / "nowhere.wav")
    (tmp_path / "e.wav").symlink_to(tmp_path / "b.wav")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.path.relpath(tmp_path / "f.wav"))
    (tmp_path / "g.wav").symlink_to(tmp_path / "g.wav")
    packed = pack(tmp_path, tmp_path / "store", workers=2)
    assert packed.files == 7
    assert {name: reason.split(",")[0] for name, reason in packed.broken.items()} == {
        "b.wav": "a named pipe", "c.wav": "a device", "d.wav": "No such file or directory", "e.wav": "a named pipe",
        "f.wav": "a socket", "g.wav": "Too many levels of symbolic links",
    }  # fmt: skip
    assert list_audio_files(tmp_path / "b.wav") == [tmp_path / "b.wav"]
    with pytest.raises(AudioError, match="a folder, not a regular file"):
        read_audio(tmp_path)


def test_files_left_out_for_their_suffix_are_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a.wav", "b.txt", "c.TXT", "d.m4a", "e", ".hidden.txt"):
        (tmp_path / name).touch()
    caplog.set_level("INFO")
    assert [path.name for path in list_audio_files(tmp_path)] == ["a.wav", "d.m4a"]
    assert caplog.messages == [f"{tmp_path}: 3 files left out for their suffix: 2 txt, 1 no suffix"]
    caplog.clear()
    monkeypatch.setattr(reading, "has_ffmpeg", lambda: False)
    assert [path.name for path in list_audio_files(tmp_path)] == ["a.wav"]
    assert "4 files left out for their suffix: 2 txt, 1 m4a, 1 no suffix" in caplog.text
    assert "pip install av" in caplog.text
    assert caplog.records[0].levelname == "WARNING"


@pytest.mark.parametrize(
    "playlist",
    ["#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{}\n#EXT-X-ENDLIST\n", "ffconcat version 1.0\nfile {}\n"],
)
def test_a_playlist_opens_no_other_file(tmp_path: Path, playlist: str) -> None:
    encode(tmp_path / "secret.flac", chirp(), "FLAC")
    for name in ("a.mp3", "a.m4a", "a.wav"):
        (tmp_path / name).write_text(playlist.format(tmp_path / "secret.flac"))
        with pytest.raises(AudioError, match="not audio that can be decoded"):
            read_audio(tmp_path / name)


def test_noise_is_not_taken_for_a_format_without_a_signature(tmp_path: Path) -> None:
    for seed in range(20):
        path = tmp_path / "a.mp3"
        path.write_bytes(np.random.default_rng(seed).bytes(60000))
        with pytest.raises(AudioError):
            read_audio(path)


def test_a_failed_disk_is_an_error_and_not_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.wav"
    encode(path, chirp(), "PCM_16")

    def fail(*_args: object, **_kwargs: object) -> None:
        raise soundfile.LibsndfileError(2)

    with monkeypatch.context() as patched:
        patched.setattr(soundfile.SoundFile, "read", fail)
        with pytest.raises(AudioError, match="read error"):
            read_audio(path)
    assert len(read_audio(path, RATE)) == SECONDS * RATE


@pytest.mark.parametrize("rate", [8000, 11025, 16000, 22050, 24000, 32000, 44100, 48000])
def test_mp3_frames_are_counted(tmp_path: Path, rate: int) -> None:
    for mode in ("CONSTANT", "VARIABLE"):
        wav = np.stack([chirp(2, rate)] * 2, 1) if mode == "VARIABLE" else chirp(2, rate)
        content = encode(tmp_path / "a.mp3", wav, "MPEG_LAYER_III", rate, bitrate_mode=mode, compression_level=0.3)
        samples, tables, whole = mpeg_samples(content)
        assert whole
        assert tables == 1
        assert 2 * rate <= samples <= 2 * rate + decoding.MP3_EDGE
        tagged = b"ID3\x04\0\0\0\0\x01\x00" + bytes(128) + content + b"TAG" + bytes(125)
        assert mpeg_samples(tagged) == (samples, 1, True)
        assert mpeg_samples(content + content) == (2 * samples, 2, False)
        third = len(content) // 3
        assert not mpeg_samples(content[:third] + bytes(third) + content[2 * third :])[2]


def test_tags_of_an_mp3_are_no_damage(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    content = encode(tmp_path / "a.mp3", chirp(), "MPEG_LAYER_III")
    picture = np.random.default_rng(0).bytes(3_000_000)  # holds two frames in a row by chance
    ape = b"APETAGEX" + (2000).to_bytes(4, "little") + len(picture).to_bytes(4, "little") + bytes(16)
    id3 = b"ID3\x03\0\0\0\0\x01\x00" + bytes(128)
    for number, tagged in enumerate(
        (content + ape + picture + ape, content + ape + b"\xff" * 3_000_000, id3 + id3 + bytes(5000) + content)
    ):
        path = tmp_path / f"{number}.mp3"
        path.write_bytes(tagged)
        with AudioFile(path) as file:
            assert not file._facts.reason
        assert audio_duration(path) == audio_duration(tmp_path / "a.mp3")
    assert not caplog.records


def test_every_flipped_bit_of_an_ogg_file_is_found(tmp_path: Path) -> None:
    content = encode(tmp_path / "a.ogg", chirp(0.3), "VORBIS")
    assert ogg_streams(content) == (1, True, False)
    for at in np.random.default_rng(0).choice(len(content), 300, replace=False).tolist() + list(range(60)):
        for bit in range(8):
            flipped = content[:at] + bytes([content[at] ^ 1 << bit]) + content[at + 1 :]
            assert ogg_streams(flipped) != (1, True, False), (at, bit)
    assert ogg_streams(content[:-5]) == (1, True, True)
    assert ogg_streams(content + content) == (2, True, False)
    pages = encode(tmp_path / "a.ogg", chirp(), "VORBIS").split(b"OggS")[1:]
    assert ogg_streams(b"".join(b"OggS" + page for page in [*pages[:2], *pages[3:]]))[1] is False


@pytest.mark.parametrize("ffmpeg", [True, False])
@pytest.mark.parametrize("subtype", ["VORBIS", "OPUS"])
def test_an_ogg_recorded_from_the_middle_of_a_stream_is_not_sought_in(
    tmp_path: Path, subtype: str, ffmpeg: bool, caplog: pytest.LogCaptureFixture, request: pytest.FixtureRequest
) -> None:
    if not ffmpeg:
        request.getfixturevalue("no_ffmpeg")
    path = tmp_path / "a.ogg"
    content, pages = encode(path, chirp(20), subtype), []
    for page in (b"OggS" + part for part in content.split(b"OggS")[1:]):
        position = int.from_bytes(page[6:14], "little", signed=True)
        moved = (position + 300 * (position > 0)).to_bytes(8, "little", signed=True)
        body = page[:6] + moved + page[14:22] + bytes(4) + page[26:]
        checksum = zlib.crc32(body.translate(structure.REVERSED_BITS), 0xFFFFFFFF) ^ 0xFFFFFFFF
        pages.append(body[:22] + int(f"{checksum:032b}"[::-1], 2).to_bytes(4, "little") + body[26:])
    path.write_bytes(b"".join(pages))
    assert ogg_streams(b"".join(pages)) == (1, True, False)
    wav = read_audio(path, RATE)
    for start in (1, 4, 8):
        part = read_audio(path, RATE, start_sec=start, duration_sec=0.5)
        torch.testing.assert_close(part, wav[start * RATE :][: len(part)], atol=1e-5, rtol=0)
    assert not caplog.records


def test_reading_takes_no_memory_for_the_whole_file(tmp_path: Path) -> None:
    import tracemalloc

    noise = np.random.default_rng(0).normal(scale=0.2, size=(20 * 44100, 2)).astype(np.float32)
    for subtype, repeats in (("FLAC", 1), ("MPEG_LAYER_III", 4), ("FLOAT", 1), ("VORBIS", 1)):
        path = tmp_path / f"a.{SUFFIXES[subtype]}"
        content = encode(path, noise, subtype, 44100)
        path.write_bytes(content * repeats)
        tracemalloc.start()
        AudioFile(path).close()
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 3 * structure.BLOCK_BYTES, subtype


def test_a_part_at_the_end_takes_the_memory_of_some_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import tracemalloc

    monkeypatch.setattr(decoding, "BLOCK_FRAMES", 1 << 16)
    path = zero_length_wav(tmp_path / "a.wav", np.zeros(120 * RATE, np.float32))
    assert audio_duration(path) == 120  # counted once, in longer blocks
    tracemalloc.start()
    assert len(read_audio(path, RATE, start_sec=119.5, duration_sec=0.1)) == round(0.1 * RATE)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 * 20 * RATE


def test_flac_streams_are_counted(tmp_path: Path) -> None:
    content = encode(tmp_path / "a.flac", chirp(0.3), "FLAC")
    assert flac_streams(content) == 1
    assert flac_streams(content + content) == 2
    picture = bytes(100) + content
    tagged = content[:42] + b"\x06" + len(picture).to_bytes(3, "big") + picture + content[42:]
    assert flac_streams(tagged) == flac_streams(b"ID3\x04\0\0\0\0\x01\x00" + bytes(128) + tagged) == 1
    assert flac_streams(tagged + tagged) > 1
    marker = b"fLaC\0\0\0\x22"
    for at in (structure.BLOCK_BYTES - 3, structure.BLOCK_BYTES, 2 * structure.BLOCK_BYTES - 7):
        assert flac_streams(content[:86] + b"\x81\0\0\0" + bytes(at) + marker) <= 2


def test_a_changed_file_is_measured_again(tmp_path: Path) -> None:
    path = tmp_path / "a.flac"
    encode(path, chirp(1), "FLAC")
    assert audio_duration(path) == 1.0
    encode(path, chirp(2), "FLAC")
    assert audio_duration(path) == 2.0


def test_a_warning_names_a_file_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = encode(tmp_path / "a.wav", chirp(), "FLOAT")
    (tmp_path / "a.wav").write_bytes(content[:-1000])
    monkeypatch.chdir(tmp_path)
    audio_duration("a.wav")
    assert len(read_audio("a.wav", RATE)) == SECONDS * RATE - 250
    assert caplog.messages == ["a.wav: 1000 bytes that its header promises are missing"]


def test_a_folder_named_av_is_no_ffmpeg(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "av").mkdir()
    monkeypatch.delitem(sys.modules, "av", raising=False)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    assert not decoding.has_ffmpeg()


def test_voc_files_of_ffmpeg_are_read(tmp_path: Path) -> None:
    import av

    with av.open(str(tmp_path / "a.voc"), "w", format="voc") as container:
        stream = container.add_stream("pcm_u8", rate=RATE, layout="mono")
        frame = av.AudioFrame.from_ndarray((chirp()[None] * 127 + 128).astype(np.uint8), format="u8", layout="mono")
        frame.sample_rate, frame.pts = RATE, 0
        for part in (frame, None):
            container.mux(stream.encode(part))
    assert audio_duration(tmp_path / "a.voc") == pytest.approx(SECONDS, abs=0.1)  # its rates are coarse
