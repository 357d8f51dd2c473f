"""Which backend runs each op here, and why."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import time
from dataclasses import dataclass, field

import torch

from byola_fast.audio.decoding import MORE_FORMATS, decoders, has_ffmpeg
from byola_fast.ops import _schemas
from byola_fast.ops._dispatch import backend_in_use, strict
from byola_fast.ops._native import cpu
from byola_fast.views.augment import augment

PACKAGES = ("torch", "torchaudio", "triton", "numpy", "soundfile", "soxr", "av", "ninja", "pybind11")
VARIABLES = ("BYOLA_FAST_", "CXX", "CUDA_HOME", "CUDA_VISIBLE_DEVICES", "TRITON_", "OMP_NUM_THREADS", "TORCH_")


@dataclass(frozen=True)
class Report:
    """The findings of ``doctor``; ``print`` shows them.

    Attributes:
        versions: of Python and the packages in use; None if missing.
        devices: name of each kind of device, by dispatch key: "CPU", "CUDA".
        backends: backend in use, by (key, op).
        reasons: why no better backend is in use, by (key, op).
        strict: whether ``BYOLA_FAST_STRICT`` turns fallbacks into errors.
        notes: the system, the folder of compiled kernels, relevant environment variables.
    """

    versions: dict[str, str | None]
    devices: dict[str, str]
    backends: dict[tuple[str, str], str]
    reasons: dict[tuple[str, str], str]
    strict: bool
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = ["byola_fast " + (self.versions.get("byola_fast") or "(not installed)")]
        lines += [
            f"  {name:<11} {version or 'missing'}" for name, version in self.versions.items() if name != "byola_fast"
        ]
        for key, name in self.devices.items():
            lines.append(f"{key}: {name}")
            for op in (op for k, op in self.backends if k == key):
                reason = self.reasons[key, op]
                lines.append(f"  {op:<24} {self.backends[key, op]}" + (f"  ({reason})" if reason else ""))
        lines += self.notes
        lines.append(
            "fallbacks are " + ("errors (BYOLA_FAST_STRICT is set)" if self.strict else "allowed, with a warning")
        )
        return "\n".join(lines)


def doctor() -> Report:
    """Load the backends of every device and report which one runs each op.

    Raises:
        BackendError: a backend is missing and ``BYOLA_FAST_STRICT`` is set.

    >>> report = doctor()
    >>> sorted({key for key, op in report.backends})[0]
    'CPU'
    """
    versions: dict[str, str | None] = {"byola_fast": _version("byola_fast"), "python": platform.python_version()}
    versions |= {name: _version(name) for name in PACKAGES}
    devices = {
        "CPU": f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"
    }
    notes = [f"system: {platform.platform()}"]
    more = "" if has_ffmpeg() else f"; without FFmpeg, joined files are read in part ({MORE_FORMATS})"
    notes.append(f"audio: {decoders()}{more}")
    notes.append(f"compiled kernels: {cpu.place().parent}")
    variables = [f"{name}={value}" for name, value in sorted(os.environ.items()) if name.startswith(VARIABLES)]
    notes.append(f"environment: {', '.join(variables) or 'no relevant variable is set'}")
    if torch.cuda.is_available():
        devices["CUDA"] = torch.cuda.get_device_name()
        notes.append(f"CUDA: {first_call(torch.device('cuda'))}")
    else:
        notes.append("CUDA: no GPU is available to torch")
    backends, reasons = {}, {}
    for key in devices:
        for op in _schemas.OPS:
            backends[key, op], reasons[key, op] = backend_in_use(key, op)
    if (kernels := cpu.in_use()) is not None:
        devices["CPU"] += f"; C++ kernels for {kernels}"
    return Report(versions, devices, backends, reasons, strict(), notes)


def first_call(device: torch.device) -> str:
    """Return a sentence on the time of the first and the second call of ``augment``; the difference is compilation.

    Triton caches compiled kernels (in ``TRITON_CACHE_DIR``, by default ``~/.triton``). Another dtype or interpolation,
    or sizes of another kind, compile once more.
    """
    seconds = []
    for _ in range(2):
        started = time.perf_counter()
        views = augment(torch.zeros(2, 64, 96, device=device), seed=0)
        views[0].sum().item()  # synchronises
        seconds.append(time.perf_counter() - started)
    return (
        f"the first call of augment took {seconds[0]:.2f} s, including any compilation; the second took "
        f"{1e3 * seconds[1]:.1f} ms"
    )


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
