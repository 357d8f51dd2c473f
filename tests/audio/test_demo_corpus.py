"""The synthetic corpus: number and length of clips, reproducibility, no silent clip."""

from __future__ import annotations

from pathlib import Path

import pytest
import soundfile
import torch

from byola_fast.audio.demo_corpus import CLIPS, write_demo_corpus
from byola_fast.audio.reading import audio_duration, list_audio_files, read_audio
from byola_fast.spectrograms.log_mel import LogMel


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Path]]:
    folder = tmp_path_factory.mktemp("demo") / "made" / "here"
    return folder, write_demo_corpus(folder)


def test_size_and_format(corpus: tuple[Path, list[Path]]) -> None:
    folder, files = corpus
    assert sorted(files) == list_audio_files(folder)
    assert 140 <= len(files) <= 160
    assert {path.parent.name for path in files} == set(CLIPS)
    assert 4 <= sum(map(audio_duration, files)) / 60 <= 6
    for path in files:
        info = soundfile.info(path)
        assert (info.samplerate, info.channels, info.subtype, info.format) == (16000, 1, "PCM_16", "WAV")


def test_no_clip_is_silent_or_clipped(corpus: tuple[Path, list[Path]]) -> None:
    for path in corpus[1]:
        wav = read_audio(path)
        assert 0.19 < wav.abs().max() < 0.91, path
        assert wav.std() > 0.005, path
        assert wav.mean().abs() < 0.05, path


def test_clips_differ_in_their_log_mels(corpus: tuple[Path, list[Path]]) -> None:
    to_lms = LogMel()
    means = torch.stack([to_lms(read_audio(path)).mean(dim=(0, 2)) for path in corpus[1]])
    distances = torch.cdist(means, means) + torch.eye(len(means)) * 1e9
    assert distances.min() > 0.5  # nats over 64 mels; 0 for copies


@pytest.mark.slow
def test_the_corpus_depends_on_the_seed_alone(corpus: tuple[Path, list[Path]], tmp_path: Path) -> None:
    again, other = write_demo_corpus(tmp_path / "again"), write_demo_corpus(str(tmp_path / "other"), seed=1)
    for first, second in zip(corpus[1], again, strict=True):
        assert first.name == second.name
        assert first.read_bytes() == second.read_bytes()
    assert all(first.read_bytes() != second.read_bytes() for first, second in zip(corpus[1], other, strict=True))
