"""Waveforms to log-mel spectrograms: torchaudio's MelSpectrogram and a logarithm, against ``byola_fast.LogMel``."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import byola_fast
from benchmarks.contenders import backend_of
from benchmarks.measure import PLACES, Contender, Group, Place, input_sets

BATCH, SAMPLES = 256, 15200  # 0.95 s at 16 kHz
CONTENDERS = ("torchaudio", "byola_fast")
EPS = torch.finfo(torch.float32).eps


def frontend(device: str) -> Group:
    """256 waveforms to log-mel spectrograms, on one CPU thread: noise at levels 40 dB apart."""
    torchaudio = pytest.importorskip("torchaudio")
    sets = input_sets(4 * BATCH * SAMPLES, device)
    level = 10 ** (-2 * torch.rand(sets, BATCH, 1, device=device))
    wav = torch.randn(sets, BATCH, SAMPLES, device=device).mul_(level).unbind(0)
    settings = {"n_fft": 1024, "hop_length": 160, "n_mels": 64, "f_min": 60.0, "f_max": 7800.0}
    mel = torchaudio.transforms.MelSpectrogram(16000, norm="slaney", mel_scale="slaney", **settings).to(device)
    exact_mel = torchaudio.transforms.MelSpectrogram(16000, norm="slaney", mel_scale="slaney", **settings)
    exact_mel = exact_mel.double().to(device)
    to_lms = byola_fast.LogMel().to(device)

    @functools.lru_cache(maxsize=1)
    def exact(k: int) -> Sequence[Tensor]:
        return [(exact_mel(wav[k % sets].double()) + EPS).log()]

    runs = {
        "torchaudio": lambda k: [(mel(wav[k % sets]) + EPS).log()],
        "byola_fast": lambda k: [to_lms(wav[k % sets])[:, 0]],
    }
    shapes = {"wav": (BATCH, SAMPLES), "lms": (BATCH, 64, 96)}
    moved = 4 * BATCH * (SAMPLES + 64 * 96)
    backend = {"torchaudio": "torch", "byola_fast": backend_of(device, ["log_mel"])}
    place = Place(device, 1)
    contenders = [Contender(n, run, exact, place, shapes, BATCH, moved, backend[n]) for n, run in runs.items()]
    return Group("frontend", f"B = {BATCH}", contenders, ("torchaudio",))


@pytest.mark.parametrize("contender", CONTENDERS)
@pytest.mark.parametrize("place", [place for place in PLACES if place.threads == 1], ids=str)
def test_frontend(replay: Any, place: Place, contender: str) -> None:
    replay(frontend, contender, place)
