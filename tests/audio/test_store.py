"""The packed store: same segments as the folder, in one part or several; errors name the damaged file."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from byola_fast.audio.pack import pack
from byola_fast.audio.reading import list_audio_files, read_audio
from byola_fast.audio.segments import SegmentFolder
from byola_fast.audio.store import SegmentStore
from byola_fast.audio.store_format import StoreError

RATE = 16000
HALF_STEP = 0.5 / 32768 + 1e-6  # rounding to int16, and resampling a part
CLIPS = {
    "a.wav": (RATE, None),
    "b.flac": (RATE, None),
    "c.ogg": (RATE, None),
    "d/ünï çödé 日本.wav": (44100, "PCM_24"),
}
CLIPS |= {"d/e f.flac": (22050, None), "g.mp3": (RATE, None), "short.wav": (8000, None), "x.wav": (48000, "FLOAT")}
BROKEN = {"d/empty.wav": "empty file (0 bytes)", "text.flac": "not audio", "nan.wav": "NaN or infinite samples"}


def write_corpus(folder: Path, seed: int = 0) -> Path:
    """Write eight clips of several formats, rates and lengths, one of 10 ms, and three broken files."""
    rng = np.random.default_rng(seed)
    (folder / "d").mkdir(parents=True)
    for name, (rate, subtype) in CLIPS.items():
        seconds = 0.01 if name == "short.wav" else rng.uniform(1, 3)
        wav = 0.2 * rng.standard_normal(round(seconds * rate))
        with soundfile.SoundFile(folder / name, "w", rate, 1, subtype) as file:
            for start in range(0, len(wav), 8192):  # long blocks overflow the stack of libvorbis
                file.write(wav[start : start + 8192].clip(-1, 0.999))
    (folder / "d/empty.wav").touch()
    (folder / "text.flac").write_text("no audio")
    soundfile.write(folder / "nan.wav", np.full(RATE, np.nan), RATE, "FLOAT")
    return folder


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus") / "audio")


@pytest.fixture(scope="module")
def packed(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("packed") / "one"
    pack(corpus, out, workers=0)
    return out


@pytest.fixture(scope="module")
def in_three(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("packed") / "three"
    for part in (2, 0, 1):
        pack(corpus, out, part=(part, 3), workers=0)
    return out


@pytest.fixture
def copied(packed: Path, tmp_path: Path) -> Path:
    """A copy of the store, to damage."""
    out = tmp_path / "copied"
    out.mkdir()
    for path in packed.iterdir():
        (out / path.name).write_bytes(path.read_bytes())
    return out


def part_file(folder: Path, suffix: str) -> Path:
    (path,) = folder.glob(f"*{suffix}")
    return path


def test_attributes_describe_the_files(corpus: Path, packed: Path) -> None:
    store = SegmentStore(packed)
    assert store.names == [path.relative_to(corpus).as_posix() for path in list_audio_files(corpus)]
    assert (len(store), store.sample_rate, store.num_samples) == (11, RATE, 15200)
    assert {path.as_posix() for path in store.broken} == set(BROKEN)
    for path, reason in store.broken.items():
        assert BROKEN[path.as_posix()] in reason
    assert store.lengths[store.names.index("short.wav")] == 160
    assert store.readable.tolist() == [name not in BROKEN for name in store.names]
    store.verify()


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 2**64 - 1), epoch=st.integers(0, 2**33), draw=st.integers(0, 2**33), unit=st.floats(1e-4, 4.0),
    picked=st.lists(st.integers(0, 10), min_size=1, max_size=12), parts=st.booleans(),
)  # fmt: skip
def test_segments_equal_those_of_the_folder(
    corpus: Path, packed: Path, in_three: Path, seed: int, epoch: int, draw: int, unit: float, picked: list[int],
    parts: bool,
) -> None:  # fmt: skip
    store = SegmentStore(in_three if parts else packed, unit_sec=unit, seed=seed)
    folder = SegmentFolder(list_audio_files(corpus), unit_sec=unit, seed=seed)
    clips = [clip for clip in picked if store.readable[clip]]
    found = store.gather(clips, epoch, draw)
    assert found.shape == (len(clips), folder.num_samples)
    assert found.dtype == torch.int16
    for clip, wav in zip(clips, found, strict=True):
        wanted = folder.read(clip, epoch, draw)
        torch.testing.assert_close(wav / 32768, wanted.clamp(-1, 1), atol=HALF_STEP, rtol=0)
    assert torch.equal(store.to_device("cpu").gather(clips, epoch, draw), found)


def test_parts_equal_one_store(packed: Path, in_three: Path) -> None:
    one, three = SegmentStore(packed, seed=7), SegmentStore(in_three, seed=7)
    assert (one.names, one.broken.keys(), one.clipped) == (three.names, three.broken.keys(), three.clipped)
    assert torch.equal(one.lengths, three.lengths)
    clips = one.readable.nonzero().flatten()
    draws = torch.arange(len(clips))
    assert torch.equal(one.gather(clips, 3, draws), three.gather(clips, 3, draws))
    three.verify()


def test_segments_differ_by_epoch_draw_and_seed_and_cover_all_starts(packed: Path) -> None:
    store = SegmentStore(packed, unit_sec=0.1)
    clip = store.names.index("a.wav")
    drawn = [store.gather([clip], epoch, draw) for epoch in range(3) for draw in range(3)]
    drawn.append(SegmentStore(packed, unit_sec=0.1, seed=1).gather([clip], 0))
    assert len({wav.numpy().tobytes() for wav in drawn}) == 10
    store.num_samples = int(store.lengths[clip]) - 3
    starts = store.starts(torch.full((4000,), clip), 0, torch.arange(4000))
    assert 900 < min(starts.bincount()) <= max(starts.bincount()) < 1100
    assert len(starts.bincount()) == 4


def test_a_store_on_the_device_gives_the_same_segments(packed: Path, in_three: Path, device: torch.device) -> None:
    for path in (packed, in_three):
        for unit in (0.5, 0.005):  # with a clip that is padded, and without
            store = SegmentStore(path, unit_sec=unit, seed=5)
            clips = store.readable.nonzero().flatten().repeat(5)
            there = store.to_device(device).gather(clips, 2, torch.arange(len(clips), device=device))
            assert there.device.type == device.type
            assert torch.equal(there.cpu(), store.gather(clips, 2, torch.arange(len(clips))))


def test_gather_writes_to_out_and_checks_arguments(packed: Path) -> None:
    store = SegmentStore(packed)
    clips = store.readable.nonzero().flatten()
    out = torch.empty(len(clips), 15200, dtype=torch.int16)
    assert store.gather(clips, 0, out=out) is out
    assert torch.equal(out, store.gather(clips.tolist(), 0))
    assert store.gather([], 0).shape == (0, 15200)
    for bad in (out[:2], out.float(), out.T.contiguous().T):
        with pytest.raises(ValueError, match="out: expected"):
            store.gather(clips, 0, out=bad)
    for number in (-1, 11):
        with pytest.raises(IndexError, match="expected 0 to 10"):
            store.gather([0, number], 0)
    with pytest.raises(StoreError, match=r"no samples of text\.flac: not audio"):
        store.gather([store.names.index("text.flac")], 0)
    with pytest.raises(ValueError, match="unit_sec"):
        SegmentStore(packed, unit_sec=0)


def test_a_store_survives_pickling_and_closes_its_files(packed: Path) -> None:
    store = SegmentStore(packed, unit_sec=0.2, seed=9)
    again = pickle.loads(pickle.dumps(store))
    assert torch.equal(again.gather([0], 1), store.gather([0], 1))
    before = len(os.listdir("/proc/self/fd"))
    del store, again
    assert len(os.listdir("/proc/self/fd")) == before - 2


def test_int16_is_exact_and_clips_at_full_scale(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    exact = np.arange(-32768, 32768, dtype=np.int16)
    soundfile.write(tmp_path / "exact.wav", exact, RATE)
    soundfile.write(tmp_path / "loud.wav", np.array([1.0, -1.0, 1.5, -7.0, 0.25] * 40), RATE, "FLOAT")
    result = pack(tmp_path, tmp_path / "out", workers=0)
    assert result.clipped == 80
    assert "80 samples of 1 files were clipped to full scale: loud.wav" in caplog.text
    assert SegmentStore(tmp_path / "out", unit_sec=65536 / RATE).gather([0], 0)[0].tolist() == exact.tolist()
    loud = SegmentStore(tmp_path / "out", unit_sec=5 / RATE)
    assert loud.cut(torch.tensor([1]), torch.tensor([0]))[0].tolist() == [32767, -32768, 32767, -32768, 8192]


def test_truncated_files_are_packed_as_far_as_they_decode(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.flac", 0.1 * np.random.default_rng(0).standard_normal(4 * RATE), RATE)
    content = (tmp_path / "a.flac").read_bytes()
    (tmp_path / "a.flac").write_bytes(content[: len(content) // 2])
    pack(tmp_path, tmp_path / "out", workers=0)
    whole = read_audio(tmp_path / "a.flac")
    store = SegmentStore(tmp_path / "out", unit_sec=len(whole) / RATE)
    assert store.lengths.tolist() == [len(whole)]
    torch.testing.assert_close(store.gather([0], 0)[0] / 32768, whole, atol=HALF_STEP, rtol=0)


# damage


@pytest.mark.parametrize("change", [-2, -100000, 2, None])
def test_a_data_file_of_another_size_is_refused(copied: Path, change: int | None) -> None:
    data = part_file(copied, ".int16")
    size = data.stat().st_size
    if change is None:
        data.unlink()
        with pytest.raises(StoreError, match=rf"{data.name}: No such file"):
            SegmentStore(copied)
    else:
        os.truncate(data, size + change)
        with pytest.raises(StoreError, match=rf"{data.name}: expected {size} bytes, .* got {size + change}"):
            SegmentStore(copied)


def test_a_data_file_cut_short_after_opening_is_an_error(copied: Path) -> None:
    store = SegmentStore(copied)
    clips = store.readable.nonzero().flatten()
    os.truncate(part_file(copied, ".int16"), 1000)
    for read in (lambda: store.gather(clips, 0), lambda: store.to_device("cpu")):
        with pytest.raises(StoreError, match=r"int16: cut short since the store was opened"):
            read()


def test_changed_samples_are_found(copied: Path) -> None:
    data = part_file(copied, ".int16")
    content = bytearray(data.read_bytes())
    content[12345] ^= 1
    data.write_bytes(content)
    store = SegmentStore(copied)
    with pytest.raises(StoreError, match=r"int16: samples have changed"):
        store.verify()


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_any_change_of_a_header_is_found(packed: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject):
    text = part_file(packed, ".json").read_bytes()
    place = data.draw(st.one_of(st.integers(0, 120), st.integers(0, len(text) - 1)))
    kind = data.draw(st.sampled_from(["byte", "cut", "insert"]))
    byte = data.draw(st.integers(0, 255).filter(lambda value: value != text[place]))
    changed = {
        "byte": text[:place] + bytes([byte]) + text[place + 1 :],
        "cut": text[:place],
        "insert": text[:place] + bytes([byte]) + text[place:],
    }[kind]
    folder = tmp_path_factory.mktemp("changed")
    (folder / part_file(packed, ".json").name).write_bytes(changed)
    (folder / part_file(packed, ".int16").name).symlink_to(part_file(packed, ".int16"))
    with pytest.raises(StoreError, match=r"part-00000-of-00001\.json"):
        SegmentStore(folder)


def forge(folder: Path, changes: dict[str, object], drop: str = "") -> None:
    """Change fields of a header, with a correct checksum."""
    path = part_file(folder, ".json")
    content = json.loads(path.read_bytes())
    content.pop("header_sha256")
    content = {name: value for name, value in (content | changes).items() if name != drop}
    rest = json.dumps(content)[1:].encode()
    path.write_bytes(b'{"header_sha256": "%s",\n' % hashlib.sha256(rest).hexdigest().encode() + rest)


FIELDS = "part parts sample_rate files listing_sha256 data samples samples_sha256 clipped names offsets "
FIELDS += "source_bytes source_times broken"
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 2**70) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=12) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=12,
)


@pytest.mark.slow
@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=st.sampled_from(FIELDS.split()), value=VALUES)
def test_a_forged_header_is_refused_or_read_within_bounds(copied: Path, name: str, value: object) -> None:
    path = part_file(copied, ".json")
    text = path.read_bytes()
    forge(copied, {name: value})
    try:
        store = SegmentStore(copied)
        store.gather(store.readable.nonzero().flatten(), 0)
    except StoreError:
        pass  # any other exception fails the test
    finally:
        path.write_bytes(text)


@settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.integers(0, 11), value=st.integers(-5, 10**6))
def test_forged_offsets_never_read_out_of_bounds(copied: Path, place: int, value: int) -> None:
    path = part_file(copied, ".json")
    text = path.read_bytes()
    offsets = json.loads(text)["offsets"]
    valid = [*offsets[:place], value, *offsets[place + 1 :]]
    forge(copied, {"offsets": valid})
    message = ""
    try:
        store = SegmentStore(copied)
        store.gather(store.readable.nonzero().flatten(), 0)
    except StoreError as error:
        message = str(error)
    finally:
        path.write_bytes(text)
    if message:
        assert valid != offsets
        assert "damaged" in message
    else:
        assert valid == sorted(valid)
        assert (valid[0], valid[-1]) == (0, offsets[-1])


@pytest.mark.parametrize("name", FIELDS.split())
def test_a_header_without_a_field_is_refused(copied: Path, name: str) -> None:
    forge(copied, {}, drop=name)
    with pytest.raises(StoreError, match=f"damaged: no {name}"):
        SegmentStore(copied)


def test_other_versions_and_names_outside_the_folder_are_refused(copied: Path) -> None:
    forge(copied, {"version": 99})
    with pytest.raises(StoreError, match="packed store 1, got byola_fast packed store 99; pack again"):
        SegmentStore(copied)
    forge(copied, {"version": 1, "data": "../x.int16"})
    with pytest.raises(StoreError, match="not the name of a file"):
        SegmentStore(copied)


def test_missing_and_foreign_parts_are_named(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        SegmentStore(tmp_path / "nowhere")
    with pytest.raises(StoreError, match=r"no packed store in this folder$"):
        SegmentStore(tmp_path)
    out = tmp_path / "out"
    for part in (0, 2):
        pack(corpus, out, part=(part, 4), workers=0)
    with pytest.raises(StoreError, match="2 of 4 parts missing: part-00001-of-00004, part-00003-of-00004"):
        SegmentStore(out)
    for part in (1, 3):
        pack(corpus, out, part=(part, 4), sample_rate=RATE if part == 1 else 8000, workers=0)
    with pytest.raises(StoreError, match=r"part-00003-of-00004\.json: sample_rate 8000, unlike part-00000"):
        SegmentStore(out)
    (corpus / "late.wav").write_bytes((corpus / "a.wav").read_bytes())
    try:
        pack(corpus, out, part=(3, 4), workers=0)
    finally:
        (corpus / "late.wav").unlink()
    with pytest.raises(StoreError, match=r"part-00003-of-00004\.json: was packed from 12 files"):
        SegmentStore(out)
    (out / "part-00000-of-00001.json").touch()
    with pytest.raises(StoreError, match="parts of several stores, of 1 and of 4 parts"):
        SegmentStore(out)


@pytest.mark.parametrize("name", ["part-00000-of-00000.json", "part-00007-of-00003.json"])
def test_impossible_part_names_are_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("{}")
    with pytest.raises(StoreError, match="part"):
        SegmentStore(tmp_path)
