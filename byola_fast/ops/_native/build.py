"""Build the kernels of csrc once, in a cache folder; safe against parallel starts, kills and unwritable folders.

The name of a build's folder contains everything that it depends on: the versions of torch and Python, the CPU's
instruction set, and a hash of the sources and flags. A file lock guards the build: two processes that start together
build once, and the system releases the lock of a killed process. A marker, written last, makes a build valid.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib.util
import json
import logging
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from byola_fast.ops._dispatch import BackendError

logger = logging.getLogger("byola_fast")

MARKER = "complete"


def source_folder() -> Path:
    """Return the folder of the C++ sources: ``byola_fast/csrc``, in a checkout a link to ``csrc``."""
    folder = Path(__file__).parents[2] / "csrc"
    if not folder.is_dir():
        raise BackendError(f"the C++ sources are missing ({folder}); install from a checkout with 'pip install -e .'")
    return folder


def cache_folder() -> Path:
    """Return the folder of all builds: ``BYOLA_FAST_CACHE``, or ``byola_fast`` in the user's cache folder."""
    chosen = os.environ.get("BYOLA_FAST_CACHE")
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "byola_fast"


def versioned_name(device: str, architecture: str, build_flags: list[str], compiled: list[Path]) -> str:
    """Return the name of a build: everything that it depends on, with headers and sources as a hash."""
    digest = hashlib.sha256(" ".join(build_flags).encode())
    headers = [path for path in source_folder().iterdir() if path.suffix in (".h", ".cuh")]
    for path in sorted([*headers, *compiled]):
        digest.update(path.name.encode() + path.read_bytes())
    python = f"py{sys.version_info.major}{sys.version_info.minor}"
    machine = platform.machine()
    return f"{device}-torch{torch.__version__}-{python}-{machine}-{architecture}-{digest.hexdigest()[:12]}"


def build_once(build: str, language: str, arguments: dict[str, Any], environment: Callable[[], dict[str, str]]) -> Path:
    """Return the shared library ``arguments["name"]`` of a build; build it if the cache has none.

    Args:
        build: name of its folder in the cache.
        language: of the kernels, for the message that announces a compilation.
        arguments: of ``torch.utils.cpp_extension.load``.
        environment: returns the environment to build in, or raises ``BackendError``; called only to build.
    """
    folder = cache_folder() / build
    name = f"{arguments['name']}.so"
    if (folder / MARKER).exists() and (folder / name).exists():
        return folder / name
    folder = _writable(folder)
    with _locked(folder / "byola_fast.lock"):
        if not ((folder / MARKER).exists() and (folder / name).exists()):
            _build(folder, language, arguments, environment())
            (folder / MARKER).touch()
    return folder / name


def _writable(folder: Path) -> Path:
    """Create and return ``folder``, or one in the temporary folder if it cannot be written to or locked."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # some file systems refuse locks
            return folder
    except OSError as error:
        other = Path(tempfile.gettempdir()) / f"byola_fast-{os.getuid()}" / folder.name
        logger.warning("byola_fast: cache folder %s: %s; using %s instead", folder, error.strerror, other)
    try:
        other.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise BackendError(f"no folder to build in: {other}: {error.strerror}; set BYOLA_FAST_CACHE to one") from error
    if other.parent.stat().st_uid != os.getuid():
        raise BackendError(f"no folder to build in: {other.parent} is another user's; set BYOLA_FAST_CACHE to one")
    return other


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock between processes; the system releases it if this process dies."""
    with open(path, "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _build(folder: Path, language: str, arguments: dict[str, Any], environment: dict[str, str]) -> None:
    """Build in a subprocess, because ``load`` also loads the library, and here the stubs must be removed first."""
    (folder / "lock").unlink(missing_ok=True)  # torch's; some versions wait for it even if its owner is dead
    arguments = arguments | {"build_directory": str(folder)}
    code = (  # torch quotes all paths but this one, and the environment's folder may contain a space
        "import json, shlex, sys; from torch.utils import cpp_extension as torchs; "
        "torchs.TORCH_LIB_PATH = shlex.quote(torchs.TORCH_LIB_PATH); torchs.load(**json.loads(sys.argv[1]))"
    )
    started = time.perf_counter()
    message = (
        f"byola_fast: compiling the {language} kernels for this machine, once, into {folder} (about half a minute)"
    )
    print(message, file=sys.stderr, flush=True)
    command = [sys.executable, "-c", code, json.dumps(arguments)]
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True)
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
    if shutil.which(compiler, path=path) is None:
        raise BackendError(f"the C++ compiler {compiler!r} was not found: install g++, or name one in CXX")
    return os.environ | {"PATH": path}
