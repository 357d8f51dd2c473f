"""Statistics of a corpus: against plain numpy in float64, and the file that carries them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile

from byola_fast.audio.batches import Batches
from byola_fast.audio.pack import pack
from byola_fast.audio.reading import AudioError, list_audio_files
from byola_fast.audio.segments import SegmentFolder
from byola_fast.audio.sources import open_source
from byola_fast.spectrograms.corpus_statistics import Stats, StatsConfig, read_stats, run_stats, take_stats, write_stats
from byola_fast.spectrograms.log_mel import LogMel

RATE = 16000


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stats") / "audio"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(12):
        wav = 10 ** rng.uniform(-3, -1) * rng.standard_normal(rng.integers(4000, 40000))
        soundfile.write(folder / f"{number}.wav", wav, RATE)
    (folder / "broken.wav").touch()
    pack(folder, folder.parent / "store", workers=0)
    return folder


def test_mean_and_std_are_those_of_the_segments(corpus: Path) -> None:
    source = SegmentFolder(list_audio_files(corpus), unit_sec=0.3, seed=4)
    to_lms = LogMel()
    message: list[tuple[int, int]] = []
    stats = take_stats(source, to_lms, segments=100, seed=5, workers=0, progress=lambda *now: message.append(now))
    assert stats.segments == 100
    assert message == [(64, 100), (100, 100)]
    lms = [to_lms(batch.wav) for batch in Batches(source, 64, seed=5, workers=0).run(2)]
    exact = np.concatenate([some.numpy().astype(np.float64) for some in lms])[:100]
    assert stats.mean == pytest.approx(exact.mean(), abs=1e-5)  # float32 sums
    assert stats.std == pytest.approx(exact.std(ddof=1), rel=1e-5)


def test_a_store_gives_the_statistics_of_its_folder(corpus: Path) -> None:
    found = [
        take_stats(open_source(path, unit_sec=0.3), LogMel(), seed=1, workers=0)
        for path in (corpus, corpus.parent / "store")
    ]
    assert found[0].segments == found[1].segments == 1000  # of few clips several segments each
    assert found[0].mean == pytest.approx(found[1].mean, abs=1e-3)  # rounding to int16, seen at the lowest levels
    assert found[0].std == pytest.approx(found[1].std, abs=1e-3)


def test_the_command_writes_what_the_trainer_reads(corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "stats.json"
    stats = run_stats(StatsConfig(audio_dir=str(corpus), out=str(out), segments=50, unit_sec=0.3, workers=0))
    assert read_stats(out) == read_stats(out, LogMel()) == stats
    assert stats == run_stats(StatsConfig(audio_dir=str(corpus), segments=50, unit_sec=0.3, workers=0))
    content = json.loads(out.read_text())
    assert content["unit_sec"] == 0.3
    with pytest.raises(ValueError, match=r"stats\.json: computed with f_max 7800\.0, expected 7000\.0"):
        read_stats(out, LogMel(f_max=7000.0))


def test_the_front_end_may_be_another(corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "stats.json"
    run_stats(
        StatsConfig(
            audio_dir=str(corpus), out=str(out), segments=9, unit_sec=0.3, n_mels=40, mel_scale="htk", workers=0
        )
    )
    read_stats(out, LogMel(n_mels=40, mel_scale="htk"))
    with pytest.raises(ValueError, match="expected 64; compute it again with byola-fast stats --n_mels"):
        read_stats(out, LogMel())
    with pytest.raises(ValueError, match=r"center True, expected False; compute it again with byola-fast stats$"):
        read_stats(out, LogMel(n_mels=40, mel_scale="htk", center=False))


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"mean": 1}', '{"mean": NaN, "std": 1, "segments": 3, "front_end": {}}', "\xff",
     '{"mean": 0, "std": 0, "segments": 3, "front_end": {}}', '{"mean": "x", "std": 1, "segments": 3, "front_end": 4}'],
)  # fmt: skip
def test_files_that_are_no_statistics_are_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "stats.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=r"stats\.json: "):
        read_stats(tmp_path / "stats.json")
    with pytest.raises(FileNotFoundError):
        read_stats(tmp_path / "nowhere.json")


def test_bad_input_is_refused(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = SegmentFolder(list_audio_files(corpus))
    with pytest.raises(ValueError, match="segments: expected at least 1"):
        take_stats(source, LogMel(), segments=0)
    with pytest.raises(ValueError, match="512 samples"):
        take_stats(SegmentFolder(source.files, unit_sec=0.01), LogMel())
    with pytest.raises(ValueError, match="cannot be written"):
        write_stats(tmp_path, Stats(0.0, 1.0, 5), LogMel(), 0.95)
    with pytest.raises(AudioError, match="empty file"):
        run_stats(StatsConfig(audio_dir=str(corpus / "broken.wav"), workers=0))
    for settings in ({"segments": 0}, {"unit_sec": 0.01}, {"n_mels": 0}, {"workers": -1}):
        with pytest.raises(ValueError, match="expected"):
            run_stats(StatsConfig(audio_dir=str(corpus), out=str(tmp_path / "new" / "stats.json"), **settings))
    monkeypatch.setattr("byola_fast.spectrograms.corpus_statistics.take_stats", None)  # long work, in vain
    with pytest.raises(IsADirectoryError):
        run_stats(StatsConfig(audio_dir=str(corpus), out=str(tmp_path), workers=0))
    assert not list(tmp_path.iterdir())
