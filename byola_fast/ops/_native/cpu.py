"""The C++ kernels of csrc: one library with the code of each instruction set, which is chosen when it is loaded."""

from __future__ import annotations

import ctypes
import os
import platform
from pathlib import Path

import torch

from byola_fast.ops import _dispatch, _schemas
from byola_fast.ops._dispatch import Backend
from byola_fast.ops._native import build

NAME = "byola_fast_cpu"
FLAGS = ["-O2", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off"]  # never -ffast-math: it breaks NaN
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
SIMD_FLAGS = {
    "avx2": AVX2,
    "avx512": [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"],
    "portable": [],
}

_library: ctypes.CDLL | None = None


def flags() -> list[str]:
    """Return the compiler flags, plus ``BYOLA_FAST_CXXFLAGS`` (for sanitizers)."""
    x86 = ["-DBYOLA_X86"] if "portable" not in instruction_sets() else []
    return FLAGS + x86 + os.environ.get("BYOLA_FAST_CXXFLAGS", "").split()


def instruction_sets() -> list[str]:
    """Return the instruction sets to compile for: those of all x86 CPUs with AVX2, or any CPU's."""
    x86 = platform.machine() in ("x86_64", "AMD64") and torch.backends.cpu.get_cpu_capability().startswith("AVX")
    return ["avx2", "avx512"] if x86 else ["portable"]


def sources() -> list[Path]:
    """Return the source files: NAME_cpu.cpp are compiled for each instruction set, the others once."""
    return sorted(path for path in build.source_folder().glob("*.cpp") if not path.stem.endswith("_cuda"))


def build_name(in_wheel: bool = False) -> str:
    """Return the name of the build for this torch, kind of CPU and these sources."""
    any_cpu = ["portable"] if instruction_sets() == ["portable"] else []
    target = "-".join([platform.machine(), *any_cpu])
    return build.versioned_name("cpu", target, flags(), sources(), in_wheel)


def place() -> Path:
    """Return the file of the library: in the wheel, or where it is or will be in the cache."""
    name = f"{NAME}.so"
    return build.in_wheel(build_name(in_wheel=True), name) or build.cache_folder() / build_name() / name


def prepare() -> Path:
    """Return the shared library; build it if there is none yet.

    Raises:
        BackendError: it cannot be built; the message gives the reason.
    """
    name = f"{NAME}.so"
    return build.in_wheel(build_name(in_wheel=True), name) or build.build_once(build_name(), "C++", name, _command)


def compile_into_wheel(package: Path) -> None:
    """Compile the library for this torch and put it into a package that is built; called by setup.py."""
    build.copy_into_wheel(prepare(), package, build_name(in_wheel=True))


def _command(folder: Path) -> build.Command:
    """Write a file for each instruction set that includes all kernels, so that headers are read once for each."""
    environment = build.build_environment()
    kernels = [path for path in sources() if path.stem.endswith("_cpu")]
    compiled = {path: flags() for path in sources() if path not in kernels}  # first: see library.cpp
    for simd in instruction_sets() if kernels else []:
        lines = [f"#define BYOLA_SIMD {simd}", *(f'#include "{path.name}"' for path in kernels)]
        lines.append("void byola::BYOLA_SIMD::add_ops(torch::stable::detail::StableLibrary& library) {")
        for path in kernels:
            name = path.stem.removesuffix("_cpu")
            if f"BYOLA_OPS({name}, " in path.read_text():
                lines.append(f"  add_{name}(library);")
        unit = folder / f"kernels_{simd}.cpp"
        unit.write_text("\n".join([*lines, "}", ""]))
        compiled[unit] = flags() + SIMD_FLAGS[simd]
    return build.ninjas_command(folder, f"{NAME}.so", compiled, environment)


def register(path: Path) -> None:
    """Load the shared library; its static initialisers register the kernels with the dispatcher.

    Raises:
        BackendError: it cannot be loaded.
    """
    global _library
    with build.loading():
        torch.ops.load_library(str(path))
        _library = ctypes.CDLL(str(path))


def library() -> ctypes.CDLL | None:
    """Return the library, or None if it is not loaded."""
    return _library


def in_use() -> str | None:
    """Return the instruction set of the kernels and their compiler, or None if they are not loaded."""
    if _library is None:
        return None
    functions = _library.byola_simd, _library.byola_compiler
    for function in functions:
        function.restype = ctypes.c_char_p
    simd, compiler = (function().decode() for function in functions)
    return f"{simd}, built by compiler {compiler}"


def install() -> None:
    """Register the stubs of this backend; compile and load nothing yet."""
    _dispatch.add_backend(Backend("cpp", "CPU", _schemas.CPU_OPS, prepare, register))
