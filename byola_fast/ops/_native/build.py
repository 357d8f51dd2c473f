"""Build the kernels of csrc once, in a cache folder; safe against parallel starts, kills and unwritable folders.

The name of a build's folder contains everything that it depends on: the version of torch, the kind of machine, and a
hash of the C library's version, the sources and flags. A file lock guards the build: two processes that start together
build once, and the system releases the lock once a killed process and its ninja have ended. A marker, written last,
makes a build valid: the checksum of the library.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import logging
import os
import platform
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import torch

from byola_fast.ops._dispatch import BackendError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger("byola_fast")

Command = tuple[list[str], dict[str, str]]  # words and environment
REMEDY = "set BYOLA_FAST_CACHE to a folder"
MARKER = "library.sha256"
STANDARD = "-std=c++17" if torch.__version__.startswith("2.11") else "-std=c++20"  # as torch compiles extensions


def source_folder() -> Path:
    """Return the folder of the C++ sources: ``byola_fast/csrc``, in a checkout a link to ``csrc``."""
    folder = Path(__file__).parents[2] / "csrc"
    if not folder.is_dir():
        raise BackendError(f"the C++ sources are missing ({folder}); install from a checkout with 'pip install -e .'")
    return folder


def cache_folder() -> Path:
    """Return the folder of all builds: ``BYOLA_FAST_CACHE``, or ``byola_fast`` in the user's cache folder."""
    user = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    folder = os.path.expanduser(os.environ.get("BYOLA_FAST_CACHE") or f"{user}/byola_fast")
    if folder.startswith("~"):  # of a user without a home
        folder = f"/nonexistent{folder[1:]}"
    return Path(folder).absolute()  # the compiler runs elsewhere


def versioned_name(
    device: str, target: str, build_flags: list[str], compiled: list[Path], in_wheel: bool = False
) -> str:
    """Return the name of a build: everything that it depends on, with headers and sources as a hash.

    Args:
        in_wheel: leave out the C library, which the wheel's platform names, and whether torch is built for CUDA.
    """
    system = () if in_wheel else platform.libc_ver()
    digest = hashlib.sha256(" ".join([MARKER, *system, *build_flags]).encode())
    headers = [path for path in source_folder().iterdir() if path.suffix in (".h", ".cuh")]
    for path in sorted([*headers, *compiled]):
        digest.update(path.name.encode() + path.read_bytes())
    version = torch.__version__.partition("+")[0] if in_wheel else torch.__version__
    return f"{device}-torch{version}-{target}-{digest.hexdigest()[:12]}"


def in_wheel(build: str, name: str) -> Path | None:
    """Return a library that was compiled into the installed wheel, or None."""
    folder = Path(__file__).parents[2] / "kernels" / build
    return folder / name if _finished(folder, name) else None


def copy_into_wheel(library: Path, package: Path, build: str) -> None:
    """Copy a library to where ``in_wheel`` finds it; ``package`` is the folder of the package that is built."""
    folder = package / "kernels" / build
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(library, folder)
    (folder / MARKER).write_bytes(_checksum(library))


def build_once(build: str, language: str, name: str, prepare: Callable[[Path], Command]) -> Path:
    """Return the shared library ``name`` of a build; build it if the cache has none.

    Args:
        build: name of its folder in the cache.
        language: of the kernels, for the message that announces a compilation.
        name: of the library's file.
        prepare: returns the command that builds the library in a folder, or raises ``BackendError``.
    """
    if fcntl is None:
        raise BackendError("the kernels are compiled on Linux and macOS alone")
    folder = cache_folder() / build
    if _finished(folder, name):
        return folder / name
    folder = writable(folder, name)
    try:
        with _locked(folder / "byola_fast.lock") as lock:
            if not _finished(folder, name):
                for old in (MARKER, name):
                    (folder / old).unlink(missing_ok=True)
                _build(folder, language, prepare(folder), lock)
                (folder / MARKER).write_bytes(_checksum(folder / name))
    except OSError as error:
        raise BackendError(f"cannot build in {folder}: {error.strerror or error}; {REMEDY}") from error
    return folder / name


@contextlib.contextmanager
def loading() -> Iterator[None]:
    """Add the remedy to an error of the loader: no such file, or a folder mounted noexec.

    Raises:
        BackendError: the library cannot be loaded.
    """
    try:
        yield
    except (ImportError, OSError) as error:
        reason = error.__cause__ or error  # torch puts an error without a reason before the loader's
        raise BackendError(f"the kernels cannot be loaded: {reason}; set BYOLA_FAST_CACHE to another folder") from error


def _finished(folder: Path, name: str) -> bool:
    """Return whether a folder holds a whole library."""
    try:
        return (folder / MARKER).read_bytes() == _checksum(folder / name)
    except OSError:
        return False


def _checksum(library: Path) -> bytes:
    return hashlib.sha256(library.read_bytes()).hexdigest().encode()


def writable(folder: Path, name: str) -> Path:
    """Create and return ``folder``, or one in the temporary folder if it cannot be written to or locked."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # some file systems refuse locks
            return folder
    except OSError as error:
        why = error.strerror
    try:
        temporary = Path(tempfile.gettempdir()).resolve()
        other = temporary / f"byola_fast-{os.getuid()}" / folder.name
        _make_private(other, name)
    except OSError as error:
        raise BackendError(f"no folder to build in: {error.filename}: {error.strerror}; {REMEDY}") from error
    logger.warning("byola_fast: cache folder %s: %s; using %s instead", folder, why, other)
    return other


def _make_private(folder: Path, name: str) -> None:
    """Create a folder and its parent in a shared one; refuse what another user may have put there or may replace.

    Raises:
        BackendError: another user owns, can write to or can replace one of the folders, or owns the library.
    """
    me = os.getuid()
    for path in (folder.parent, folder):
        with contextlib.suppress(FileExistsError):
            path.mkdir(mode=0o700)
        _require(path, stat.S_ISDIR, {me}, 0o022)
    for path in (folder / MARKER, folder / name):
        if os.path.lexists(path):
            _require(path, stat.S_ISREG, {me}, 0)
    for path in folder.parent.parents:
        sticky = path.lstat().st_mode & stat.S_ISVTX  # others can add to it, but not replace what is in it
        _require(path, stat.S_ISDIR, {me, 0}, 0 if sticky else 0o022)


def _require(path: Path, kind: Callable[[int], bool], owners: set[int], forbidden: int) -> None:
    status = path.lstat()  # of a link itself
    if not kind(status.st_mode) or status.st_uid not in owners or status.st_mode & forbidden:
        raise BackendError(f"no folder to build in: another user can change {path}; {REMEDY}")


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[IO[str]]:
    """Hold a lock between processes; the system releases it once this one and those that inherit it have ended."""
    with open(path, "w+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield lock


def torchs_command(folder: Path, arguments: dict[str, Any], environment: dict[str, str]) -> Command:
    """Return a command that runs ``torch.utils.cpp_extension.load``; it also loads the library, hence the process."""
    (folder / "lock").unlink(missing_ok=True)  # torch's; some versions wait for it even if its owner is dead
    arguments = arguments | {"build_directory": str(folder)}
    if len(words := shlex.split(environment.get("CXX", ""))) > 1:  # torch takes it for one word
        compiler = folder / "c++"
        compiler.write_text(f'#!/bin/sh\nexec {shlex.join(words)} "$@"\n')
        compiler.chmod(0o755)
        environment = environment | {"CXX": str(compiler)}
    code = (  # torch quotes all paths but this one, and the environment's folder may contain a space
        "import json, shlex, sys; from torch.utils import cpp_extension as torchs; "
        "torchs.TORCH_LIB_PATH = shlex.quote(torchs.TORCH_LIB_PATH); torchs.load(**json.loads(sys.argv[1]))"
    )
    return [sys.executable, "-c", code, json.dumps(arguments)], environment


def ninjas_command(folder: Path, library: str, sources: dict[Path, list[str]], environment: dict[str, str]) -> Command:
    """Return a command that compiles and links C++ sources, each with flags of its own, in this order.

    ``torch.utils.cpp_extension`` has one set of flags for all sources, and takes two seconds to start.
    """
    torchs = Path(torch.__file__).parent
    includes = [torchs / "include", torchs / "include" / "torch" / "csrc" / "api" / "include", source_folder()]
    common = [f"-I{path}" for path in includes] + [STANDARD, "-fPIC"]
    libraries = [f"-L{torchs / 'lib'}", "-lc10", "-ltorch_cpu", "-ltorch"]
    compiler = environment.get("CXX", "c++")
    lines = [
        f"rule compile\n  command = {_escaped(compiler)} {_words(common)} $flags -c $in -o $out",
        f"rule link\n  command = {_escaped(compiler)} -shared $in {_words(libraries)} -o $out",
    ]
    objects = []
    for path, flags in sources.items():
        objects.append(f"{path.stem}.o")
        lines.append(f"build {objects[-1]}: compile {_path(path)}\n  flags = {_words(flags)}")
    lines.append(f"build {library}: link {' '.join(objects)}")
    (folder / "build.ninja").write_text("\n".join([*lines, ""]))
    jobs = ["-j", environment["MAX_JOBS"]] if environment.get("MAX_JOBS") else []  # as torch does
    return ["ninja", *jobs], environment


def _escaped(text: str) -> str:
    return text.replace("$", "$$")


def _words(words: list[str]) -> str:
    return _escaped(shlex.join(words))


def _path(path: Path) -> str:
    return _escaped(str(path)).replace(" ", "$ ").replace(":", "$:")


def _build(folder: Path, language: str, command: Command, lock: IO[str]) -> None:
    started = time.perf_counter()
    message = f"byola_fast: compiling the {language} kernels for this machine, once, into {folder} (15 to 30 seconds)"
    print(message, file=sys.stderr, flush=True)
    # ninja inherits stdin, and with it the lock: it goes on if this process is killed
    words, environment = command
    executable = shutil.which(words[0], path=environment["PATH"]) or words[0]
    done = subprocess.run(
        [executable, *words[1:]], env=environment, cwd=folder, stdin=lock, capture_output=True, text=True
    )
    (folder / "build.log").write_text(done.stdout + done.stderr)
    if done.returncode:
        lines = (done.stdout + done.stderr).splitlines()
        errors = [line for line in lines if " error: " in line] or [line for line in lines if line.strip()][-1:]
        reason = errors[0].strip() if errors else f"exit code {done.returncode}"
        raise BackendError(f"compiling failed: {reason} (full log: {folder / 'build.log'})")
    print(f"byola_fast: compiled in {time.perf_counter() - started:.1f} s", file=sys.stderr, flush=True)


def build_environment() -> dict[str, str]:
    """Return the environment to build in, with ninja on PATH even if the virtual environment is not activated.

    Raises:
        BackendError: no ninja or no compiler; the message gives the remedy.
    """
    folders = [str(Path(sys.executable).parent)]
    if importlib.util.find_spec("ninja") is not None:
        import ninja

        folders.insert(0, str(ninja.BIN_DIR))
    path = os.pathsep.join([os.environ.get("PATH", ""), *folders])
    if shutil.which("ninja", path=path) is None:
        raise BackendError("ninja was not found: pip install ninja")
    compiler = os.environ.get("CXX", "c++")  # the same choice as torch's
    words = shlex.split(compiler)  # "ccache g++", or a compiler with flags
    if not words or shutil.which(words[0], path=path) is None:
        raise BackendError(f"the C++ compiler {compiler!r} was not found: install g++, or name one in CXX")
    return os.environ | {"PATH": path}
