"""Audio files: formats, rates, channels, parts of files, damage, and random segments."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from byola_fast.audio import decoding
from byola_fast.audio.reading import AudioError, audio_duration, list_audio_files, read_audio
from byola_fast.audio.segments import SegmentFolder, fit_segment
from byola_fast.ops.philox import segment_u24

RATE = 16000
SUBTYPES = {"wav": "PCM_16", "flac": "PCM_16", "ogg": "VORBIS", "opus": "OPUS", "mp3": "MPEG_LAYER_III"}
LOSSLESS = [(form, rate) for form in ("wav", "flac") for rate in (8000, 16000, 22050, 44100, 48000)]
LOSSY = [(form, rate) for form in ("ogg", "mp3") for rate in (8000, 16000, 22050, 44100, 48000)]
LOSSY += [("opus", 16000), ("opus", 48000)]


def write(path: Path, wav: np.ndarray, rate: int, subtype: str | None = None) -> Path:
    """Write (samples,) or (samples, channels), in blocks: long ones overflow the stack of libvorbis."""
    form = "OGG" if path.suffix == ".opus" else None
    channels = 1 if wav.ndim == 1 else wav.shape[1]
    subtype = subtype or SUBTYPES.get(path.suffix[1:])
    with soundfile.SoundFile(path, "w", rate, channels, subtype, format=form) as file:
        for start in range(0, len(wav), 8192):
            file.write(wav[start : start + 8192])
    return path


def sine(frequency: float, seconds: float, rate: int, amplitude: float = 0.5) -> np.ndarray:
    return amplitude * np.sin(2 * np.pi * frequency * np.arange(round(seconds * rate)) / rate)


def chirp(seconds: float, rate: int, seed: int = 0) -> np.ndarray:
    """A sweep with a little noise: no two places are equal."""
    t = np.arange(round(seconds * rate)) / rate
    noise = np.random.default_rng(seed).standard_normal(len(t))
    return 0.4 * np.sin(2 * np.pi * (300 * t + 1200 / (2 * seconds) * t**2)) + 0.01 * noise


def sine_fit(wav: np.ndarray, frequency: float, rate: int) -> tuple[float, float, float]:
    """Least-squares amplitude, delay in seconds, and RMS of the residual."""
    t = np.arange(len(wav)) / rate
    basis = np.stack([np.sin(2 * np.pi * frequency * t), np.cos(2 * np.pi * frequency * t)], 1)
    (a, b), *_ = np.linalg.lstsq(basis, wav, rcond=None)
    delay = -np.arctan2(b, a) / (2 * np.pi * frequency)
    return float(np.hypot(a, b)), float(delay), float(np.std(wav - basis @ (a, b)))


@pytest.mark.parametrize(("form", "rate"), LOSSLESS)
def test_lossless_files_give_the_mono_sine_at_16_khz(tmp_path: Path, form: str, rate: int) -> None:
    stereo = np.stack([sine(440, 1.0, rate, 0.6), sine(440, 1.0, rate, 0.2)], axis=1)
    wav = read_audio(write(tmp_path / f"a.{form}", stereo, rate))
    assert wav.dtype == torch.float32
    assert wav.shape == (RATE,)
    # 16-bit rounding in the file is 1.5e-5 for each channel, soxr HQ's ripple 1e-5. It rings at both ends of the sine.
    inside = slice(800, -800)
    np.testing.assert_allclose(wav.numpy()[inside], sine(440, 1.0, RATE, 0.4)[inside], atol=5e-5, rtol=0)


@pytest.mark.parametrize(("form", "rate"), LOSSY)
def test_lossy_files_give_the_mono_sine_at_16_khz(tmp_path: Path, form: str, rate: int) -> None:
    stereo = np.stack([sine(440, 1.5, rate, 0.6), sine(440, 1.5, rate, 0.2)], axis=1)
    wav = read_audio(write(tmp_path / f"a.{form}", stereo, rate)).numpy()
    assert wav.shape == (24000,)
    amplitude, delay, rest = sine_fit(wav[4000:20000], 440, RATE)  # 4000 samples are 110 whole periods
    assert amplitude == pytest.approx(0.4, rel=0.03)  # coding noise: within 0.3 dB
    assert rest < 0.02  # 23 dB below the sine
    assert abs(delay) < 1 / RATE  # the encoder's delay is removed


@pytest.mark.parametrize("channels", [1, 2, 4])
def test_channels_are_averaged(tmp_path: Path, channels: int) -> None:
    wav = np.stack([sine(100 * (channel + 1), 0.2, RATE, 0.8) for channel in range(channels)], axis=1)
    read = read_audio(write(tmp_path / "a.wav", wav, RATE, "FLOAT"))
    np.testing.assert_allclose(read.numpy(), wav.mean(axis=1), atol=1e-7, rtol=0)  # float32 rounding of a mean below 1


@pytest.mark.parametrize("rate", [8000, 22050, 44100, 48000])
def test_resampling_passes_the_band_and_removes_aliases(tmp_path: Path, rate: int) -> None:
    top = 0.9 * min(rate, RATE) / 2
    wav = read_audio(write(tmp_path / "in.wav", sine(top, 1.0, rate), rate, "FLOAT")).numpy()[2000:-2000]
    assert np.sqrt(2) * wav.std() == pytest.approx(0.5, rel=0.001)
    if rate > RATE:
        above = sine(min(9500, 0.98 * rate / 2), 1.0, rate)
        wav = read_audio(write(tmp_path / "above.wav", above, rate, "FLOAT")).numpy()[2000:-2000]
        assert np.abs(wav).max() < 5e-5  # 80 dB down; soxr HQ specifies 120 for float input


@pytest.mark.parametrize("sample_rate", [8000, 16000, 44100])
@pytest.mark.parametrize(("form", "rate"), [*LOSSLESS, *LOSSY])
def test_a_part_equals_the_slice_of_the_whole(tmp_path: Path, form: str, rate: int, sample_rate: int) -> None:
    path = write(tmp_path / f"a.{form}", chirp(3.0, rate), rate)
    whole = read_audio(path, sample_rate)
    # The last parts begin in the last page of an Ogg file, where libsndfile seeks a block too far.
    for start_sec, seconds in [(0.0, 0.1), (0.01, 0.5), (0.7654321, 0.3), (2.4, 0.25), (2.8, 0.2)]:
        start, count = round(start_sec * sample_rate), round(seconds * sample_rate)
        part = read_audio(path, sample_rate, start_sec=start_sec, duration_sec=seconds)
        assert part.shape == (count,)
        # Resampling sums about 200 terms in float32. The Opus decoder converges after a seek; it does not restart.
        atol = 5e-3 if form == "opus" else 1e-6
        torch.testing.assert_close(part, whole[start : start + count], atol=atol, rtol=0)
    torch.testing.assert_close(
        read_audio(path, sample_rate, start_sec=2.25), whole[round(2.25 * sample_rate) :],
        atol=5e-3 if form == "opus" else 1e-6, rtol=0,
    )  # fmt: skip


@pytest.mark.parametrize("form", ["ogg", "mp3", "flac"])
def test_parts_of_a_longer_file_are_reached_by_seeking(
    tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoding, "OGG_PAGE_FRAMES", 1 << 16)  # 4 s instead of 16; pages of these files hold 1 s
    monkeypatch.setattr(decoding, "MP3_SEEK_FRAMES", 1 << 16)
    monkeypatch.setattr(decoding, "BLOCK_FRAMES", 5000)
    path = write(tmp_path / f"a.{form}", chirp(12.0, RATE), RATE)
    whole = read_audio(path)
    np.testing.assert_allclose(whole.numpy(), soundfile.read(path, dtype="float32")[0], atol=1e-6, rtol=0)
    for start in (0, 70001, 100003, 128000, 180000):
        part = read_audio(path, start_sec=start / RATE, duration_sec=0.5)
        torch.testing.assert_close(part, whole[start : start + 8000], atol=1e-6, rtol=0)  # mp3: 2e-7 after a seek


def test_only_the_needed_part_is_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.wav", chirp(5.0, 44100), 44100)
    decoded = []
    read = soundfile.SoundFile.read
    monkeypatch.setattr(soundfile.SoundFile, "read", lambda file, out: decoded.append(len(out)) or read(file, out=out))
    read_audio(path, start_sec=2.0, duration_sec=0.5)
    assert 22050 <= sum(decoded) <= 22050 + 2 * 256 * 44100 // RATE + 500  # margins of the filter and the grid


def test_a_part_ends_with_its_file(tmp_path: Path) -> None:
    path = write(tmp_path / "a.wav", chirp(1.0, 44100), 44100)
    assert read_audio(path, start_sec=0.75, duration_sec=5.0).shape == (4000,)
    with pytest.raises(AudioError, match="nothing can be decoded from 1 s on"):
        read_audio(path, start_sec=1.0)


@pytest.mark.parametrize("arguments", [{"start_sec": -0.1}, {"duration_sec": 0.0}, {"start_sec": float("nan")}])
def test_read_audio_refuses_times_out_of_range(tmp_path: Path, arguments: dict[str, float]) -> None:
    path = write(tmp_path / "a.wav", chirp(0.1, RATE), RATE)
    with pytest.raises(ValueError, match=next(iter(arguments))):
        read_audio(path, **arguments)
    with pytest.raises(ValueError, match="sample_rate"):
        read_audio(path, 0)


def cut(path: Path, fraction: float) -> Path:
    """Cut a file short, as a broken download does."""
    content = path.read_bytes()
    path.write_bytes(content[: int(fraction * len(content))])
    return path


@pytest.mark.parametrize("form", list(SUBTYPES))
def test_a_truncated_file_is_read_as_far_as_it_decodes(tmp_path: Path, form: str) -> None:
    path = write(tmp_path / f"a.{form}", chirp(3.0, RATE), RATE)
    whole = read_audio(path)
    rest = read_audio(cut(path, 0.5))
    assert 0.2 * len(whole) < len(rest) < 0.8 * len(whole)
    # A codec blends its last block with the missing one. FFmpeg decodes the rest of the MP3, libsndfile the whole.
    atol = 2e-6 if form == "mp3" else 1e-6
    torch.testing.assert_close(rest[:-4096], whole[: len(rest) - 4096], atol=atol, rtol=0)
    part = read_audio(path, start_sec=0.25, duration_sec=0.25)
    torch.testing.assert_close(part, whole[4000:8000], atol=5e-3 if form == "opus" else atol, rtol=0)
    with pytest.raises(AudioError, match="nothing can be decoded"):
        read_audio(path, start_sec=2.9)


def test_a_flac_without_a_length_in_its_header_is_counted(tmp_path: Path) -> None:
    path = write(tmp_path / "a.flac", chirp(1.0, RATE), RATE)
    whole = read_audio(path)
    content = bytearray(path.read_bytes())
    content[21] &= 0xF0  # the 36-bit number of samples in STREAMINFO; 0 from an encoder that wrote to a pipe
    content[22:26] = bytes(4)
    path.write_bytes(content)
    assert soundfile.info(path).frames > 1 << 60
    torch.testing.assert_close(read_audio(path), whole, atol=0, rtol=0)
    assert audio_duration(path) == 1.0
    segment = SegmentFolder([path], unit_sec=0.5).read(0, 0)
    start = segment_u24(0, 0, 0) * 8001 >> 24
    torch.testing.assert_close(segment, whole[start : start + 8000], atol=0, rtol=0)


@pytest.fixture
def bad_files(tmp_path: Path) -> dict[str, Path]:
    """One file for each kind of bad input, by the expected reason."""
    files = {
        "No such file": tmp_path / "missing.wav",
        "empty file": tmp_path / "empty.wav",
        "not audio": tmp_path / "text.wav",
        "not audio that": tmp_path / "text.mp3",
        "holds no samples": write(tmp_path / "header_only.wav", np.zeros(0), RATE),
    }
    files["empty file"].touch()
    files["not audio"].write_text("hello world\n" * 100)
    files["not audio that"].write_text("hello world\n" * 100)
    return files


def test_unusable_files_are_named_with_the_reason(bad_files: dict[str, Path]) -> None:
    for reason, path in bad_files.items():
        for function in (read_audio, audio_duration):
            with pytest.raises(AudioError, match=reason) as raised:
                function(path)
            assert raised.value.path == path
            assert str(raised.value) == f"{path}: {raised.value.reason}"


def test_audio_error_survives_pickling(tmp_path: Path) -> None:
    error = pickle.loads(pickle.dumps(AudioError(tmp_path, "why")))
    assert (error.path, error.reason) == (tmp_path, "why")


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_non_finite_samples_are_refused(tmp_path: Path, bad: float) -> None:
    wav = np.zeros((2000, 2))
    wav[1500, 1] = bad
    path = write(tmp_path / "a.wav", wav, RATE, "FLOAT")
    with pytest.raises(AudioError, match="NaN or infinite"):
        read_audio(path)
    assert read_audio(path, duration_sec=0.05).shape == (800,)  # this part is finite


def test_tiny_and_silent_clips_are_read(tmp_path: Path) -> None:
    assert read_audio(write(tmp_path / "one.wav", np.array([0.5]), RATE)).tolist() == [0.5]
    assert read_audio(write(tmp_path / "ten_ms.wav", sine(440, 0.01, 44100), 44100)).shape == (160,)
    assert not read_audio(write(tmp_path / "silent.wav", np.zeros(1000), RATE)).any()


def test_audio_duration_is_that_of_the_sound(tmp_path: Path) -> None:
    for form, rate in [("wav", 22050), ("flac", 44100), ("ogg", 16000), ("opus", 48000), ("mp3", 44100)]:
        path = write(tmp_path / f"a.{form}", sine(440, 0.5, rate), rate)
        assert audio_duration(path) == pytest.approx(0.5, abs=1 / rate)


def test_list_audio_files_is_sorted(tmp_path: Path) -> None:
    wanted = ["B/x.FLAC", "a.wav", "b/c/d.Mp3", "b/z.opus", "c.aiff", "d.w64", "e.caf"]
    for name in [*wanted, "notes.txt", "b/.hidden.wav", ".cache/x.wav", "wav"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert list_audio_files(tmp_path) == sorted(tmp_path / name for name in wanted)
    assert list_audio_files(str(tmp_path / "notes.txt")) == [tmp_path / "notes.txt"]


def test_list_audio_files_follows_links_once(tmp_path: Path) -> None:
    (tmp_path / "corpus").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "a.wav").touch()
    (tmp_path / "corpus" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "corpus" / "loop").symlink_to(tmp_path / "corpus")
    assert list_audio_files(tmp_path / "corpus") == [tmp_path / "corpus" / "link" / "a.wav"]


def test_list_audio_files_names_the_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        list_audio_files(tmp_path / "nowhere")
    with pytest.raises(AudioError, match="no audio file"):
        list_audio_files(tmp_path)


def test_fit_segment_reaches_both_ends_and_every_start() -> None:
    wav = torch.arange(10.0)
    starts = [int(fit_segment(wav, 7, u24)[0]) for u24 in range(0, 1 << 24, 1 << 12)]
    assert np.bincount(starts).tolist() == [1024, 1024, 1024, 1024]
    assert fit_segment(wav, 7, 0).tolist() == list(range(7))
    assert fit_segment(wav, 7, (1 << 24) - 1).tolist() == list(range(3, 10))
    assert fit_segment(wav, 10, (1 << 24) - 1).tolist() == wav.tolist()


def test_fit_segment_centres_short_clips() -> None:
    assert fit_segment(torch.ones(2), 5, 123).tolist() == [0, 1, 1, 0, 0]
    assert fit_segment(torch.ones(1), 4, 123).tolist() == [0, 1, 0, 0]
    assert fit_segment(torch.ones(0), 2, 123).tolist() == [0, 0]


@pytest.mark.parametrize(
    ("wav", "num_samples", "u24", "named"),
    [
        (torch.ones(1, 5), 2, 0, "wav"),
        (torch.ones(5), 0, 0, "num_samples"),
        (torch.ones(5), 2, 1 << 24, "u24"),
        (torch.ones(5), 2, -1, "u24"),
    ],
)
def test_fit_segment_names_a_bad_argument(wav: torch.Tensor, num_samples: int, u24: int, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        fit_segment(wav, num_samples, u24)


@pytest.fixture
def corpus(tmp_path: Path) -> list[Path]:
    """Clips longer and shorter than a segment, at several rates, and a broken one."""
    write(tmp_path / "a.wav", chirp(2.0, 44100, 1), 44100)
    write(tmp_path / "b.flac", chirp(0.25, 22050, 2), 22050)
    write(tmp_path / "c.ogg", chirp(3.0, 16000, 3), 16000)
    write(tmp_path / "d.wav", np.array([0.5]), 16000)
    (tmp_path / "e.wav").write_text("no audio")
    write(tmp_path / "f.wav", chirp(0.95, 16000, 4), 16000)
    return list_audio_files(tmp_path)


def test_segments_are_slices_of_the_whole_clip(corpus: list[Path]) -> None:
    folder = SegmentFolder(corpus, seed=3)
    assert folder.num_samples == 15200
    assert len(folder) == 6
    for epoch, draw in ((0, 0), (1, 0), (1, 2), (7, 1)):
        for index in (0, 1, 2, 3, 5):
            wanted = fit_segment(read_audio(corpus[index]), 15200, segment_u24(3, epoch, index, draw))
            read = folder.read(index, epoch, draw)
            torch.testing.assert_close(read, wanted, atol=1e-6, rtol=0)  # resampling a part
    assert not torch.equal(folder.read(0, 0), SegmentFolder(corpus, seed=4).read(0, 0))
    with pytest.raises(AudioError, match="not audio that can be decoded"):
        folder.read(4, 0)


@pytest.mark.parametrize("form", ["flac", "mp3"])
def test_segments_of_a_truncated_clip_come_from_its_decodable_part(tmp_path: Path, form: str) -> None:
    path = cut(write(tmp_path / f"a.{form}", chirp(4.0, RATE), RATE), 0.4)
    whole = read_audio(path)
    assert soundfile.info(path).duration == 4.0
    assert audio_duration(path) == len(whole) / RATE < 2.0
    folder = SegmentFolder([path])
    for epoch in range(10):
        start = segment_u24(0, epoch, 0) * (len(whole) - 15200 + 1) >> 24
        torch.testing.assert_close(folder.read(0, epoch), whole[start : start + 15200], atol=1e-6, rtol=0)


@pytest.mark.parametrize("arguments", [{"unit_sec": 0.0}, {"sample_rate": 0}, {"unit_sec": -1.0}])
def test_segment_folder_refuses_settings_out_of_range(arguments: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(arguments))):
        SegmentFolder([Path("a.wav")], **arguments)
    with pytest.raises(ValueError, match="files"):
        SegmentFolder([])
