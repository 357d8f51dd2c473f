"""A batch of random segments from a folder of audio files and from a packed store, against a copy of its bytes."""

from __future__ import annotations

import atexit
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.measure import PLACES, Contender, Group, Place
from byola_fast.audio.batches import Batches
from byola_fast.audio.pack import pack
from byola_fast.audio.reading import list_audio_files
from byola_fast.audio.segments import SegmentFolder
from byola_fast.audio.store import DeviceStore, SegmentStore

BATCH, SAMPLES = 256, 15200  # 0.95 s at 16 kHz
CLIPS, CLIP_SAMPLES = 1000, 64000  # 128 MB, more than most caches hold
HOST = ("folder (wav)", "folder (flac)", "SegmentStore.gather", "Batches of a store", "copy")
DEVICE = ("SegmentStore.gather", "DeviceStore.gather", "Batches of a DeviceStore", "copy")


def write_corpus(root: Path) -> None:
    """Write clips of noise as 16-bit wav and flac, and pack them."""
    import soundfile

    for form in ("wav", "flac"):
        (root / form).mkdir()
    for number in range(CLIPS):
        wav = torch.randn(CLIP_SAMPLES).mul_(3000).clamp_(-32768, 32767).short().numpy()
        for form in ("wav", "flac"):
            soundfile.write(root / form / f"{number:04}.{form}", wav, 16000)
    pack(root / "wav", root / "store", workers=0)


def store(device: str) -> Group:
    """256 random segments of 1000 clips of 4 s, on one core; int16, compared in units of the last bit."""
    pytest.importorskip("soundfile")
    temporary = tempfile.TemporaryDirectory()
    atexit.register(temporary.cleanup)
    root = Path(temporary.name)
    write_corpus(root)
    folders = {form: SegmentFolder(list_audio_files(root / form)) for form in ("wav", "flac")}
    packed = SegmentStore(root / "store")
    there: DeviceStore = packed.to_device(device)
    batches = {"store": Batches(packed, BATCH, seed=0), "device": Batches(there, BATCH, seed=0)}
    clips = torch.randint(CLIPS, (64, BATCH)).unbind()
    clips_there = [some.to(device) for some in clips]
    out = torch.empty(BATCH, SAMPLES, dtype=torch.int16)
    sources = there.samples[: 16 * out.numel()].view(16, BATCH, SAMPLES)
    copied = torch.empty_like(out, device=device)

    def decoded(form: str, k: int, some: Sequence[int]) -> Tensor:
        return torch.stack([folders[form].read(clip, k) for clip in some])

    def exact(k: int) -> list[Tensor]:
        return [(decoded("flac", k, clips[k % 64].tolist()) * 32768).double().to(device)]

    def exact_batch(k: int) -> list[Tensor]:
        wav = Batches(folders["flac"], BATCH, seed=0).read(k)[0].wav
        return [(wav * 32768).double().to(device)]

    runs: dict[str, Any] = {
        "folder (wav)": lambda k: [decoded("wav", k, clips[k % 64].tolist())],
        "folder (flac)": lambda k: [decoded("flac", k, clips[k % 64].tolist())],
        "SegmentStore.gather": lambda k: [packed.gather(clips[k % 64], k, out=out)],
        "Batches of a store": lambda k: [batches["store"].read(k)[0].wav],
        "DeviceStore.gather": lambda k: [there.gather(clips_there[k % 64], k)],
        "Batches of a DeviceStore": lambda k: [batches["device"].read(k)[0].wav],
        "copy": lambda k: [copied.copy_(sources[k % 16])],
    }
    expected: dict[str, Any] = dict.fromkeys(runs, exact)
    expected |= dict.fromkeys(("Batches of a store", "Batches of a DeviceStore"), exact_batch)
    expected["folder (wav)"] = expected["folder (flac)"] = lambda k: [exact(k)[0] / 32768]
    expected["copy"] = lambda k: [sources[k % 16].double()]
    if device != "cpu":
        host = expected["SegmentStore.gather"]
        expected["SegmentStore.gather"] = lambda k: [host(k)[0].cpu()]
    names = HOST if device == "cpu" else DEVICE
    shapes: dict[str, tuple[int, ...]] = {"wav": (BATCH, SAMPLES)}
    moved, place = 4 * BATCH * SAMPLES, Place(device, 1)
    contenders = [Contender(name, runs[name], expected[name], place, shapes, BATCH, moved) for name in names]
    baselines = ("folder (wav)", "folder (flac)") if device == "cpu" else ("SegmentStore.gather",)
    return Group("store", f"B = {BATCH}", contenders, baselines, floor="copy", dtype="int16")


CASES = [
    (place, name) for place in PLACES if place.threads == 1 for name in (HOST if place.device == "cpu" else DEVICE)
]


@pytest.mark.parametrize(("place", "contender"), CASES, ids=str)
def test_store(replay: Any, place: Place, contender: str) -> None:
    replay(store, contender, place)
