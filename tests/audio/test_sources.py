"""Sources: manifests, several folders, a user's own; sampling by duration; packing any of them."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from helpers.own import Memory
from torch import Tensor

from byola_fast.audio import AudioError, read_audio, read_segment
from byola_fast.audio.batches import Batches, as_float, durations
from byola_fast.audio.pack import pack
from byola_fast.audio.sources import OwnSource, list_clips, open_source
from byola_fast.audio.store import SegmentStore

RATE, UNIT = 16000, 0.05


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Clips of 0.1 to 0.8 s, in two folders, whose samples hold their place."""
    root = tmp_path_factory.mktemp("corpus")
    for number, seconds in enumerate((0.1, 0.2, 0.4, 0.8)):
        path = root / ("a", "b")[number % 2] / f"{number}.wav"
        path.parent.mkdir(exist_ok=True)
        soundfile.write(path, np.arange(1, round(seconds * RATE) + 1).astype(np.int16), RATE)
    return root


def manifest(path: Path, rows: list[dict[str, Any]]) -> Path:
    if path.suffix == ".jsonl":
        path.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
        return path
    columns, mark = ["file_name", "start", "end", "note"], "\t" if path.suffix == ".tsv" else ","
    lines = [columns, *([str(row.get(name, "")) for name in columns] for row in rows)]
    path.write_text("\n".join(mark.join(line) for line in lines) + "\n")
    return path


ROWS = [
    {"file_name": "b/3.wav", "start": 0.5, "end": 0.7},
    {"file_name": "b/3.wav", "start": 0.6},
    {"file_name": "a/0.wav"},
]


@pytest.mark.parametrize("name", ["m.csv", "m.tsv", "m.jsonl"])
def test_a_manifest_gives_parts_of_files(corpus: Path, name: str) -> None:
    source = open_source(manifest(corpus / name, ROWS), unit_sec=UNIT)
    assert source.names == ["b/3.wav#0.5-0.7", "b/3.wav#0.6-", "a/0.wav#0-"]
    assert [source.seconds(index) for index in range(3)] == pytest.approx([0.2, 0.2, 0.1])
    for index, (first, last) in enumerate(((8000, 11200), (9600, 12800), (0, 1600))):
        whole = torch.cat(list(source.whole(index))).mul(32768)
        assert whole.tolist() == list(range(first + 1, last + 1))
        segments = torch.stack([source.read(index, epoch) for epoch in range(40)]).mul(32768)
        assert (segments.diff(dim=1) == 1).all()
        assert segments.min() > first
        assert segments.max() <= last
        assert segments.min() < first + 100


def test_a_part_shorter_than_a_segment_is_padded_and_one_beyond_the_end_is_broken(corpus: Path) -> None:
    rows = [{"file_name": "a/0.wav", "start": 0.05, "end": 0.06}, {"file_name": "a/0.wav", "start": 3}]
    source = open_source(manifest(corpus / "short.jsonl", rows), unit_sec=UNIT)
    wav = source.read(0, 0).mul(32768)
    assert wav[320:480].tolist() == list(range(801, 961))
    assert not wav[:320].any()
    assert not wav[480:].any()
    with pytest.raises(AudioError, match=r"0\.wav: nothing from 3 s on: it has 0\.10 s"):
        source.read(1, 0)


def test_several_folders_and_files_are_one_source(corpus: Path, tmp_path: Path) -> None:
    several = [corpus / "b", str(corpus / "a" / "2.wav"), manifest(corpus / "one.csv", ROWS[2:])]
    assert [clip.path.name for clip in list_clips(several)] == ["1.wav", "3.wav", "2.wav", "0.wav"]
    source = open_source(several, unit_sec=UNIT)
    assert source.names == ["b/1.wav", "b/3.wav", "a/2.wav", "a/0.wav"]
    pack(several, tmp_path / "store", workers=0)
    store = open_source(tmp_path / "store", unit_sec=UNIT)
    assert (store.names, store.listing) == (source.names, source.listing)
    with pytest.raises(ValueError, match=r"audio_dir: expected one packed store alone, got .*store among 2"):
        open_source([tmp_path / "store", corpus])
    with pytest.raises(ValueError, match="audio_dir: expected at least one folder"):
        open_source([])


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("m.csv", "path\nx.wav\n", "expected columns file_name and, if wanted, start and end, got path"),
        ("m.csv", "file_name,end,end\na/0.wav,1,2\n", "expected each column once, got end more than once"),
        ("m.csv", "", "expected columns file_name and, if wanted, start and end, got none"),
        ("m.csv", "file_name\n", "no file in this manifest"),
        ("m.csv", "file_name,start,end\na/0.wav,0.2,0.1\n", "line 2: end: expected more than the start 0.2, got 0.1"),
        ("m.csv", "file_name,start\na/0.wav,soon\n", "line 2: start: expected seconds of at least 0, got 'soon'"),
        ("m.csv", "file_name,start\na/0.wav,-1\n", "line 2: start: expected seconds of at least 0, got '-1'"),
        ("m.csv", "file_name,end\na/0.wav,nan\n", "line 2: end: expected seconds of at least 0, got 'nan'"),
        ("m.csv", "file_name\nx.wav\na/0.wav\nx.wav\ny.wav\n", r"2 of 3 files missing: \S*x.wav \(line 2\), \S*y.wav"),
        ("m.jsonl", '{"file_name": 3}\n', "line 1: file_name: expected the name of a file, got 3"),
        ("m.jsonl", '{"file_name": "a/0.wav"}\n[]\n', "line 2: file_name: expected the name of a file, got None"),
        ("m.jsonl", '{"file_name": "a/0.wav"}\n{"file', "line 2: cannot be read: "),
    ],
)
def test_faults_of_a_manifest_are_one_line_each(corpus: Path, name: str, text: str, words: str) -> None:
    path = corpus / name
    path.write_text(text)
    with pytest.raises(ValueError, match=words) as raised:
        open_source(path)
    assert str(raised.value).startswith(str(path))


def test_a_store_of_parts_gives_the_segments_of_its_manifest(corpus: Path, tmp_path: Path) -> None:
    path = manifest(corpus / "packed.jsonl", ROWS)
    result = pack(path, tmp_path / "store", workers=0)
    assert (result.files, round(result.seconds, 3)) == (3, 0.5)
    assert pack(path, tmp_path / "store", workers=0).unchanged
    store, source = SegmentStore(tmp_path / "store", unit_sec=UNIT), open_source(path, unit_sec=UNIT)
    for index in range(3):
        assert torch.equal(as_float(store.read(index, 7)), source.read(index, 7))


def test_bytes_are_read_as_files_are(corpus: Path) -> None:
    path = corpus / "b" / "3.wav"
    where = {"seed": 1, "epoch": 2, "index": 3, "draw": 4}
    assert torch.equal(read_audio(path.read_bytes()), read_audio(path))
    assert torch.equal(read_segment(path.read_bytes(), 800, **where), read_segment(path, 800, **where))
    with pytest.raises(AudioError, match="not audio that can be decoded"):
        read_audio(b"no audio")


# sampling by duration


@pytest.mark.parametrize("kind", ["folder", "store", "device", "own"])
def test_each_clip_gives_segments_in_proportion_to_its_duration(corpus: Path, tmp_path: Path, kind: str) -> None:
    pack(corpus, tmp_path / "store", workers=0)
    source: Any = open_source(tmp_path / "store" if kind in ("store", "device") else corpus, unit_sec=UNIT, seed=3)
    source = source.to_device("cpu") if kind == "device" else OwnSource(source) if kind == "own" else source
    seconds = durations(source, workers=0)
    order = [float(name[2:-4]) for name in open_source(corpus).names]
    assert seconds.tolist() == pytest.approx([0.1 * 2**number for number in order])
    batches = Batches(source, 30, seed=5, workers=0, seconds=seconds)
    assert batches.steps_per_epoch == 1
    found = list(batches.run(3))
    for batch in found:
        clips = torch.cat([batches._epoch(batch.epoch)[1]])
        counts = clips.bincount(minlength=4) / len(clips) * 1.5
        assert (counts - seconds).abs().max() <= 1.5 / len(clips)  # one segment too many or too few
        draws = list(zip(*(x.tolist() for x in batches._epoch(batch.epoch)[1:]), strict=True))
        assert len(set(draws)) == len(draws)
    again = Batches(source, 30, seed=5, workers=0, seconds=seconds)
    assert torch.equal(as_float(next(again.run(3, start=2)).wav), as_float(found[2].wav))
    assert not torch.equal(as_float(found[0].wav), as_float(found[1].wav))


def test_every_reader_samples_alike_by_duration(corpus: Path, tmp_path: Path) -> None:
    pack(corpus, tmp_path / "store", workers=0)
    store = open_source(tmp_path / "store", unit_sec=UNIT, seed=3)
    readers: list[Any] = [open_source(corpus, unit_sec=UNIT, seed=3), store, store.to_device("cpu")]
    wavs = [
        as_float(next(Batches(each, 8, seed=1, workers=0, segments=2, seconds=durations(each, 0)).run(1)).wav)
        for each in readers
    ]
    assert torch.equal(wavs[0], wavs[1])
    assert torch.equal(wavs[1], wavs[2])


def test_a_broken_clip_has_no_duration(corpus: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [{"file_name": "a/0.wav"}, {"file_name": "a/0.wav", "start": 9}]
    source = open_source(manifest(corpus / "broken.jsonl", rows), unit_sec=UNIT)
    assert durations(source, workers=0).tolist() == pytest.approx([0.1, 0])
    assert "skipping" in caplog.text
    batches = Batches(source, 4, seed=0, workers=0, seconds=torch.tensor([0.1, 0.0]))
    assert not batches._epoch(0)[1].any()
    with pytest.raises(ValueError, match="seconds: expected 2 durations, not all 0"):
        Batches(source, 4, seed=0, seconds=torch.zeros(2))


# a user's own


class Faulty(Memory):
    """Faulty from clip 2 on."""

    def __init__(self, fault: Any) -> None:
        super().__init__(6, num_samples=800)
        self.fault = fault

    def read(self, index: int, epoch: int, draw: int) -> Tensor:
        wav = super().read(index, epoch, draw)
        return wav if index < 2 else self.fault(wav)


def fail(_wav: Tensor) -> Tensor:
    raise KeyError("audio")


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (fail, "KeyError: 'audio'"),
        (lambda wav: wav / 0, "NaN or infinite samples"),
        (lambda wav: 1e29 + wav, "samples up to 1e+29 times full scale; expected at most 2^20"),
    ],
)
def test_clips_that_cannot_be_read_are_named_once_and_replaced(
    fault: Any, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    batches = Batches(OwnSource(Faulty(fault)), 3, seed=0, workers=0)
    clips = {round(float(wav[0])) for batch in batches.run(8) for wav in batch.wav}
    assert clips == {0, 1}
    assert sorted(record.message for record in caplog.records) == [
        f"skipping clip {index} of the source: {reason}" for index in range(2, 6)
    ]


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (lambda wav: wav[1:], r"source: read\(\d, ...\): expected a tensor \(800,\), got \(799,\)"),
        (lambda wav: wav[None], r"expected a tensor \(800,\), got \(1, 800\)"),
        (lambda wav: wav.numpy(), r"expected a tensor \(800,\), got ndarray"),
        (lambda wav: wav.double(), "expected torch.float32, as of other clips, got torch.float64"),
        (lambda wav: wav.to(torch.int16), "expected torch.float32, as of other clips, got torch.int16"),
    ],
)
def test_a_wrong_answer_is_an_error(fault: Any, words: str) -> None:
    with pytest.raises((TypeError, ValueError), match=words):
        list(Batches(OwnSource(Faulty(fault)), 3, seed=0, workers=0).run(4))


def test_what_is_wrong_from_the_start_is_known_at_the_start() -> None:
    class Bytes(Memory):
        def read(self, index: int, epoch: int, draw: int) -> Tensor:
            return super().read(index, epoch, draw).to(torch.uint8)

    with pytest.raises(
        TypeError, match=r"source: read\(0, ...\): expected float32 or int16 on the CPU, got torch.uint8"
    ):
        OwnSource(Bytes(3))
    with pytest.raises(
        TypeError, match="source: expected __len__, num_samples, listing, read, got list without num_sa"
    ):
        OwnSource([1, 2])
    with pytest.raises(ValueError, match="source: expected at least one clip"):
        OwnSource(Memory(0))
    with pytest.raises(ValueError, match="source: num_samples: expected a number of at least 1, got 0"):
        OwnSource(Memory(3, num_samples=0))
    with pytest.raises(TypeError, match="read, seconds, got Memory without seconds"):
        OwnSource(Memory(3), "seconds")
    with pytest.raises(TypeError, match="read, whole, got Memory without whole"):
        pack(Memory(3), "nowhere", workers=0)
    assert not Path("nowhere").exists()


@pytest.mark.parametrize("answer", [None, "long", float("nan"), -1])
def test_a_duration_that_is_none_is_named(answer: Any) -> None:
    class Timed(Memory):
        def seconds(self, index: int) -> Any:
            return answer

    with pytest.raises(ValueError, match=r"source: seconds\(0\): expected a number of at least 0, got "):
        durations(OwnSource(Timed(3), "seconds"), workers=0)


def test_a_source_must_not_grow() -> None:
    source = Memory(6)
    batches = Batches(OwnSource(source), 3, seed=0, workers=0)
    source.count = 7
    with pytest.raises(ValueError, match="source: expected 6 clips, as at the start, got 7"):
        list(batches.run(9))


def test_your_own_source_is_packed(tmp_path: Path) -> None:
    class Whole(Memory):
        def whole(self, index: int) -> Tensor:
            if index == 2:
                raise OSError("gone")
            return torch.full((100 * (index + 1),), index / 8)

    result = pack(Whole(4), tmp_path / "store", workers=0)
    assert result.broken == {"clip 2 of the source": "OSError: gone"}
    store = SegmentStore(tmp_path / "store", unit_sec=100 / RATE)
    assert store.lengths.tolist() == [100, 200, 0, 400]
    assert as_float(store.read(3, 0)).unique().tolist() == [0.375]
    assert pack(Whole(4), tmp_path / "store", workers=0).unchanged
