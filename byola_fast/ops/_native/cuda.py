"""The CUDA C++ kernels: a separate build, like that of the CPU kernels, for machines with nvcc and a GPU.

``BYOLA_FAST_CUDA_EXTENSION=1`` compiles and loads them without a GPU too (for tests); ``0`` leaves them out, so that
Triton's kernels are used. They are compiled for this machine's GPUs, or for ``TORCH_CUDA_ARCH_LIST``.
"""

from __future__ import annotations

import ctypes
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from byola_fast.ops import _dispatch, _schemas
from byola_fast.ops._dispatch import Backend, BackendError
from byola_fast.ops._native import build

NAME = "byola_fast_cuda"
FLAGS = ["-O3"]  # never --use_fast_math: the roundings are part of the contract
ARCHITECTURES = "8.0;9.0;10.0+PTX"  # without a GPU
VARIABLE = "BYOLA_FAST_CUDA_EXTENSION"

ema_call: Callable[[object, object, object], object] | None = None  # csrc/ema_call_cuda.cpp, once loaded


def find_nvcc() -> Path | None:
    """Return nvcc from ``CUDA_HOME``, ``CUDA_PATH``, PATH or /usr/local/cuda, in this order."""
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if os.environ.get(variable) and (found := Path(os.environ[variable]) / "bin" / "nvcc").exists():
            return found
    on_path = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    return Path(on_path) if on_path else None


def cuda_home(nvcc: Path) -> Path:
    """Return the folder of an nvcc's toolkit, even if nvcc is a wrapper script or a link."""
    message = subprocess.run([nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True).stderr
    top = re.search(r"^#\$ TOP=(.+)$", message, re.MULTILINE)
    return Path(top[1].strip()).resolve() if top else nvcc.resolve().parents[1]


def architectures() -> str:
    """Return the GPU architectures to compile for, in the form of ``TORCH_CUDA_ARCH_LIST``."""
    chosen = os.environ.get("TORCH_CUDA_ARCH_LIST")
    if chosen:
        return chosen
    found = {torch.cuda.get_device_capability(number) for number in range(torch.cuda.device_count())}
    return ";".join(f"{major}.{minor}" for major, minor in sorted(found)) or ARCHITECTURES


def flags() -> list[str]:
    """Return the compiler flags, plus ``BYOLA_FAST_CXXFLAGS``."""
    return FLAGS + os.environ.get("BYOLA_FAST_CXXFLAGS", "").split()


def sources() -> list[Path]:
    """Return the source files for CUDA."""
    folder = build.source_folder()
    return sorted([*folder.glob("*.cu"), *folder.glob("*_cuda.cpp")])


def build_name() -> str:
    """Return the name of the build for this torch, Python, GPUs and these sources."""
    python = f"py{sys.version_info.major}{sys.version_info.minor}"  # its headers are used
    target = "-".join([python, platform.machine(), re.sub(r"[^\w.]+", "_", architectures())])
    return build.versioned_name("cuda", target, flags(), sources())


def prepare() -> Path:
    """Return the shared library; build it if there is none yet.

    Raises:
        BackendError: it cannot be built; the message gives the reason.
    """
    if torch.version.cuda is None:
        raise BackendError("this torch was built without CUDA")
    if not torch.cuda.is_available() and os.environ.get(VARIABLE, "") != "1":
        raise BackendError(f"no GPU is available to torch ({VARIABLE}=1 compiles the kernels without one)")
    arguments = {
        "name": NAME,
        "sources": [str(path) for path in sources()],
        "extra_cflags": flags(),
        "extra_cuda_cflags": flags(),
        "is_python_module": False,
    }
    return build.build_once(
        build_name(), "CUDA", f"{NAME}.so", lambda folder: build.torchs_command(folder, arguments, build_environment())
    )


def register(library: Path) -> None:
    """Load the shared library; its static initialisers register the kernels with the dispatcher.

    Raises:
        BackendError: it cannot be loaded.
    """
    global ema_call
    with build.loading():
        torch.ops.load_library(str(library))
    make = getattr(ctypes.PyDLL(str(library)), "byola_ema_function", None)
    if make is not None:
        make.restype = ctypes.py_object
        ema_call = make()


def install() -> None:
    """Register the stubs of this backend, before those of Triton; compile and load nothing yet."""
    if os.environ.get(VARIABLE, "") != "0":
        _dispatch.add_backend(Backend("cuda", "CUDA", _schemas.CUDA_OPS, prepare, register))


def build_environment() -> dict[str, str]:
    """Return the environment to build in.

    Raises:
        BackendError: no nvcc, ninja or host compiler; the message gives the remedy.
    """
    nvcc = find_nvcc()
    if nvcc is None:
        raise BackendError("nvcc was not found: install the CUDA toolkit, put nvcc on PATH or set CUDA_HOME")
    named = {"CUDA_HOME": str(cuda_home(nvcc)), "TORCH_CUDA_ARCH_LIST": architectures()}
    return build.build_environment() | named
