"""The C++ kernels of csrc: sources, compiler flags for this CPU, and loading of the library."""

from __future__ import annotations

import importlib.util
import os
import platform
from pathlib import Path
from types import ModuleType

import torch

from byola_fast.ops import _dispatch, _schemas
from byola_fast.ops._dispatch import Backend
from byola_fast.ops._native import build

NAME = "byola_fast_cpu"
FLAGS = ["-O3", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off"]  # never -ffast-math: it breaks NaN
SIMD_FLAGS = {
    "AVX512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx2", "-mfma", "-mf16c"],
    "AVX2": ["-mavx2", "-mfma", "-mf16c"],
}

_module: ModuleType | None = None


def flags() -> list[str]:
    """Return the compiler flags for this CPU, plus ``BYOLA_FAST_CXXFLAGS`` (for sanitizers)."""
    simd = []  # portable code
    if platform.machine() in ("x86_64", "AMD64"):
        simd = SIMD_FLAGS.get(torch.backends.cpu.get_cpu_capability(), [])
    return FLAGS + simd + os.environ.get("BYOLA_FAST_CXXFLAGS", "").split()


def sources() -> list[Path]:
    """Return the source files for the CPU."""
    return sorted(path for path in build.source_folder().glob("*.cpp") if not path.stem.endswith("_cuda"))


def build_name() -> str:
    """Return the name of the build for this torch, Python, CPU and these sources."""
    simd = torch.backends.cpu.get_cpu_capability().replace(" ", "")
    return build.versioned_name("cpu", simd, flags(), sources())


def prepare() -> Path:
    """Return the shared library; build it if there is none yet.

    Raises:
        BackendError: it cannot be built; the message gives the reason.
    """
    arguments = {"name": NAME, "sources": [str(path) for path in sources()], "extra_cflags": flags()}
    return build.build_once(build_name(), "C++", arguments, build.build_environment)


def register(library: Path) -> None:
    """Load the shared library; its static initialisers register the kernels with the dispatcher.

    Raises:
        BackendError: it cannot be loaded.
    """
    global _module
    spec = importlib.util.spec_from_file_location(NAME, library)
    assert spec is not None
    assert spec.loader is not None
    with build.loading():
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    _module = module


def module() -> ModuleType | None:
    """Return the Python module of the kernels (``build_info()``, vector functions), or None if they are not loaded."""
    return _module


def install() -> None:
    """Register the stubs of this backend; compile and load nothing yet."""
    _dispatch.add_backend(Backend("cpp", "CPU", _schemas.CPU_OPS, prepare, register))
