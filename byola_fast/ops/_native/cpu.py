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
# Kernels are written out in vectors: with two more passes, -O1 makes code as fast as -O2 does, in a fifth less time.
# Never -ffast-math: it breaks NaN. -Wno-psabi: of no interest, since no vector passes from one library to another.
FLAGS = ["-O1", "-fschedule-insns2", "-fcaller-saves", "-fstrict-aliasing", "-Wno-psabi"]
FLAGS += ["-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off"]
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
SIMD_FLAGS = {
    "avx2": AVX2,
    "avx512": [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"],
    "portable": [],
}
# Bound by memory, or with little to do: the first instruction set serves all CPUs.
COMMON = ("bank_push", "checks", "draw_params", "normalize", "statistics", "two_views")

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
    """Return the source files: NAME_cpu.cpp are compiled for each instruction set but for ``COMMON``, others once."""
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
    """Write a file for each instruction set that includes its kernels, so that headers are read once for each."""
    environment = build.build_environment()
    kernels = [path for path in sources() if path.stem.endswith("_cpu")]
    names = [path.stem.removesuffix("_cpu") for path in kernels]
    with_ops = [name for name, path in zip(names, kernels, strict=True) if f"BYOLA_OPS({name}, " in path.read_text()]
    compiled = {path: flags() for path in sources() if path not in kernels}  # first: see library.cpp
    for number, simd in enumerate(instruction_sets() if kernels else []):
        here = [name for name in names if number == 0 or name not in COMMON]
        lines = [f"#define BYOLA_SIMD {simd}", *(f'#include "{name}_cpu.cpp"' for name in here)]
        own = [name for name in with_ops if name not in COMMON]
        common = [name for name in with_ops if name in COMMON]
        functions = {f"byola::{simd}::add_ops": own} | ({"byola::add_common_ops": common} if number == 0 else {})
        for function, added in functions.items():
            calls = "".join(f" {simd}::add_{name}(library);" for name in added)
            lines.append(f"void {function}(torch::stable::detail::StableLibrary& library) {{{calls} }}")
        unit = folder / f"kernels_{simd}.cpp"
        unit.write_text("\n".join([*lines, ""]))
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
