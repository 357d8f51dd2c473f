"""Waveforms to log-mel spectrograms: torchaudio's MelSpectrogram and a log, against ``byola_fast.LogMel``."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import byola_fast
from benchmarks.contenders import backend_of
from benchmarks.measure import PLACES, Contender, Group, Place, input_sets, places_on

BATCH, SAMPLES = 256, 15200  # 0.95 s at 16 kHz
CONTENDERS = ("torchaudio", "byola_fast", "byola_fast, int16")
EPS = torch.finfo(torch.float32).eps


def frontend(device: str) -> Group:
    """256 waveforms to log-mel spectrograms: noise over a range of 40 dB, as float32, for ours also as int16."""
    torchaudio = pytest.importorskip("torchaudio")
    sets = input_sets(4 * BATCH * SAMPLES, device)
    level = 10 ** (-2 * torch.rand(sets, BATCH, 1, device=device))
    noise = torch.randn(sets, BATCH, SAMPLES, device=device).mul_(level / 8)
    whole = noise.mul_(32768).round_().clamp_(-32768, 32767).short().unbind(0)  # the same waveforms, half the bytes
    wav = noise.div_(32768).unbind(0)
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
        "byola_fast, int16": lambda k: [to_lms(whole[k % sets])[:, 0]],
    }
    shapes = {"wav": (BATCH, SAMPLES), "lms": (BATCH, 64, 96)}
    moved = 4 * BATCH * (SAMPLES + 64 * 96)
    backend = backend_of(device, ["log_mel"])
    contenders = [
        Contender(name, run, exact, place, shapes, BATCH, moved, backend if name != "torchaudio" else "torch")
        for place in places_on(device)
        for name, run in runs.items()
    ]
    return Group("frontend", f"B = {BATCH}", contenders, ("torchaudio",))


@pytest.mark.parametrize("contender", CONTENDERS)
@pytest.mark.parametrize("place", PLACES, ids=str)
def test_frontend(replay: Any, place: Place, contender: str) -> None:
    replay(frontend, contender, place)
