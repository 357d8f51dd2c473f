"""Other systems, as far as Linux can stand in for them: Windows' missing modules, MPS's missing float64."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torchaudio
from helpers.runs import write_recordings

from byola_fast import LogMel, cli
from byola_fast.spectrograms.mel_bank import own_filter_bank

ROOT = Path(__file__).parents[1]

# Windows: these are not there, processes are spawned, and an open file can be neither renamed nor removed.
WINDOWS = """
import multiprocessing, os, signal, sys
for name in ("fcntl", "pwd", "grp", "resource", "termios"):
    sys.modules[name] = None
for module, names in {os: ("getuid", "geteuid", "sched_getaffinity"), signal: ("pthread_sigmask",)}.items():
    for name in names:
        delattr(module, name)

def closed(function):
    def call(path, *others, **words):
        held = [os.path.realpath(f"/proc/self/fd/{number}") for number in os.listdir("/proc/self/fd")]
        if os.path.realpath(path) in held:
            raise PermissionError(13, "The process cannot access the file", str(path))
        return function(path, *others, **words)
    return call

os.replace, os.unlink, os.rename = closed(os.replace), closed(os.unlink), closed(os.rename)
"""
COMMANDS = """
if __name__ == "__main__":
    multiprocessing.set_start_method("spawn")
    import torch, byola_fast
    from byola_fast import cli
    view1, view2 = byola_fast.augment(torch.randn(4, 1, 64, 96))
    assert view1.isfinite().all() and "torch" in str(byola_fast.doctor())
    small = "--feature_d=16 --proj_size=8 --proj_dim=32 --n_memory=16 --unit_sec=0.25 --batch_size=4 --steps=3".split()
    small += "--stats_segments=8 --device=cpu --threads=1 --no_tensorboard --workers=1".split()
    for command in (
        ["pack", "audio", "store"],
        ["pretrain", "audio", "--out", "run", *small],
        ["pretrain", "audio", "--out", "run", *small, "--steps=4"],
        ["embed", "run", "audio", "--out", "e.npz", "--workers=1"],
        ["embed", "run", "audio", "--out", "e.npy", "--workers=0"],
        ["doctor"],
    ):
        assert cli.main(command) == 0, command
"""


def run(code: str, folder: Path, **environment: str) -> str:
    (folder / "program.py").write_text(code)
    path = {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "BYOLA_FAST_STRICT": "0"}
    command = [sys.executable, "program.py"]
    done = subprocess.run(command, cwd=folder, env=os.environ | path | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout + done.stderr


@pytest.mark.slow
def test_without_what_windows_lacks(tmp_path):
    write_recordings(tmp_path / "audio")
    said = run(WINDOWS + COMMANDS, tmp_path)
    assert "the kernels are compiled on Linux and macOS alone" in said
    assert "e.npy: 9 x 16 of 9 files, 3 broken" in said


NO_FLOAT64 = """
import torch, byola_fast
from pathlib import Path
from torch.utils._python_dispatch import TorchDispatchMode
from byola_fast.embedding.streaming import embed_clips
from byola_fast.evaluation.mel_baseline import MelStats
from helpers.runs import write_recordings

for module in [each for name, each in sys.modules.items() if name.startswith("byola_fast")]:
    if hasattr(module, "sums_dtype"):
        module.sums_dtype = lambda _device: torch.float32  # as on MPS

class NoFloat64(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        answer = function(*args, **(kwargs or {}))
        for x in answer if isinstance(answer, (tuple, list)) else [answer]:
            # scalars of a schedule stay on the CPU
            assert not isinstance(x, torch.Tensor) or x.dtype != torch.float64 or not x.ndim, function
        return answer

encoder = byola_fast.load_encoder()
aug = byola_fast.Augment("byola-v2", n_memory=8)
noisy = byola_fast.Augment(n_memory=8, stats=(-7, 4), interpolation="bicubic", mixup="gaussian")
learner = byola_fast.make_learner("byol", byola_fast.make_encoder("AudioNTT2020", feature_d=16))
files = sorted(write_recordings(Path("audio")).glob("[abc].*"))
stats = byola_fast.Embedder(MelStats(), stats=(-7, 4)).eval()
with NoFloat64():
    wav = torch.randn(4, 16000)
    lms = byola_fast.LogMel()(wav)
    encoder(wav), encoder(wav, frames=True), byola_fast.augment(lms), noisy(lms)
    byola_fast.standardize(encoder(wav))
    optimizer = torch.optim.Adam(learner.parameters(), 1e-3)
    for _ in range(2):
        learner(*aug(lms)).loss.backward()
        optimizer.step()
        learner.update_target()
    for embedder in (encoder, stats):
        assert all(piece.error is None for piece in embed_clips(embedder, files, batch_sec=0.3, workers=0))
print("no float64")
"""


@pytest.mark.slow
def test_no_float64_where_mps_has_none(tmp_path):
    assert "no float64" in run("import sys\n" + NO_FLOAT64, tmp_path, BYOLA_FAST_BACKEND="reference")


@pytest.mark.parametrize("mel_scale", ["slaney", "htk"])
@pytest.mark.parametrize("norm", ["slaney", None])
def test_our_filter_bank_is_torchaudios(mel_scale, norm, monkeypatch):
    sizes = [(513, 60.0, 7800.0, 64, 16000), (257, 0.0, 4000.0, 40, 8000), (1025, 20.0, 22050.0, 128, 44100)]
    for n_freqs, *band, rate in sizes:
        theirs = torchaudio.functional.melscale_fbanks(n_freqs, *band, rate, norm=norm, mel_scale=mel_scale)
        assert (own_filter_bank(n_freqs, *band, rate, norm, mel_scale) - theirs).abs().max() <= 1e-6
    before = LogMel(mel_scale=mel_scale, norm=norm).filter_bank
    for module in [name for name in sys.modules if name.split(".")[0] == "torchaudio"]:
        monkeypatch.setitem(sys.modules, module, None)
    assert (LogMel(mel_scale=mel_scale, norm=norm).filter_bank - before).abs().max() <= 1e-6


def test_a_torchaudio_that_cannot_be_loaded(tmp_path):
    """The wheel of the common index beside a CPU-only PyTorch: its library wants CUDA's."""
    (tmp_path / "torchaudio").mkdir()
    reason = "Could not load this library: libtorchaudio.so"
    for error in ("OSError", "RuntimeError", "ImportError"):
        (tmp_path / "torchaudio" / "__init__.py").write_text(f"raise {error}({reason!r})\n")
        code = "import torch, byola_fast\nprint(byola_fast.LogMel()(torch.zeros(1, 16000)).shape, byola_fast.doctor())"
        said = run(code, tmp_path, PYTHONPATH=f"{tmp_path}{os.pathsep}{ROOT}")
        assert "torch.Size([1, 1, 64, 101])" in said


def test_mps_that_is_not_there_is_one_short_line(capsys):
    assert cli.main(["embed", "audio", "--device", "mps"]) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert "device: expected one that is available, got 'mps'" in message
    assert len(message) < 200
