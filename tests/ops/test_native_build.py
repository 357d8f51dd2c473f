"""Compilation on first use, and faults of the cache: each case ends with a working package and one message."""

from __future__ import annotations

import fcntl
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from byola_fast.ops import BackendError, _triton
from byola_fast.ops._native import build, cpu, cuda

pytestmark = pytest.mark.slow

TINY = 'extern "C" const char* byola_simd() { return "tiny"; }\n'
PREPARE = """
import sys, logging
from pathlib import Path
from byola_fast.ops._native import build, cpu
build.source_folder = lambda: Path(sys.argv[1])
print(cpu.prepare())
"""
AUGMENT = """
import torch, byola_fast
view1, _ = byola_fast.augment(torch.randn(2, 8, 12), seed=0)
assert view1.isfinite().all()
print(byola_fast.doctor().backends["CPU", "resize_crop"])
"""

TWO_CALLS = """
import byola_fast
for call in (lambda: byola_fast.augment(torch.randn(2, 8, 12), seed=0),) * 2 + (byola_fast.doctor,):
    try:
        answer = call()
        print("done" if isinstance(answer, tuple) else answer.backends["CPU", "resize_crop"])
    except byola_fast.ops.BackendError as error:
        print(error)
"""


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """Sources that compile quickly, and an empty cache."""
    folder = tmp_path / "csrc"
    folder.mkdir()
    (folder / "kernels.cpp").write_text(TINY)
    monkeypatch.setattr(build, "source_folder", lambda: folder)
    monkeypatch.setenv("BYOLA_FAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("BYOLA_FAST_STRICT", raising=False)
    monkeypatch.setattr(cpu, "_library", cpu.library())  # restores the library after a test that loads another one
    return folder


def run(code, *arguments, **environment):
    """Run a new Python process; return it and the package's messages, without torch's."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)
    lines = [line for line in done.stderr.splitlines() if line.startswith("byola_fast")]
    return done, lines


def test_a_build_is_announced_timed_and_cached(tiny, capsys):
    library = cpu.prepare()
    assert library.exists()
    message = capsys.readouterr().err.splitlines()
    assert len(message) == 2
    assert message[0].startswith("byola_fast: compiling the C++ kernels for this machine, once, into ")
    assert message[0].endswith(" (15 to 30 seconds)")
    assert message[1].startswith("byola_fast: compiled in ")
    assert cpu.prepare() == library
    assert capsys.readouterr().err == ""


def test_folders_with_a_space_and_beyond_ascii(tiny, tmp_path, monkeypatch):
    environment = tmp_path / "an environment ü"
    environment.symlink_to(sys.prefix)
    monkeypatch.setenv("BYOLA_FAST_CACHE", str(tmp_path / "a cache é"))
    python = environment / Path(sys.executable).relative_to(sys.prefix)
    code = "import torch; assert 'ment ü' in torch.__file__, torch.__file__" + PREPARE
    done = subprocess.run([python, "-c", code, str(tiny)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).exists()


def test_two_processes_that_start_together_build_once(tiny):
    command = [sys.executable, "-c", PREPARE, str(tiny)]
    together = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    answers = [process.communicate(timeout=120) for process in together]
    assert [process.returncode for process in together] == [0, 0]
    assert answers[0][0] == answers[1][0]
    assert sum(stderr.count("byola_fast: compiling") for _, stderr in answers) == 1


def test_a_build_killed_half_way_is_done_again(tiny):
    (tiny / "slow.cpp").write_text("#include <regex>\n#include <map>\n#include <iostream>\n")
    command = [sys.executable, "-c", PREPARE, str(tiny)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    folder = build.cache_folder() / cpu.build_name()
    deadline = time.monotonic() + 60
    while not (folder / "build.ninja").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert not (folder / build.MARKER).exists()
    (folder / "lock").touch()  # some versions of torch leave it behind
    (folder / f"{cpu.NAME}.so").write_bytes(b"half a library")
    (tiny / "slow.cpp").unlink()
    half = build.cache_folder() / cpu.build_name()
    half.mkdir(parents=True)
    (half / "lock").touch()
    (half / f"{cpu.NAME}.so").write_bytes(b"half a library")
    cpu.register(cpu.prepare())


def test_ninja_that_outlives_a_killed_process_keeps_the_lock(tiny):
    """Two of them wrote to the same folder."""
    (tiny / "slow.cpp").write_text("int slow;\n")
    folder = build.cache_folder() / cpu.build_name()
    slow = tiny.parent / "slow"
    slow.write_text('#!/bin/sh\ncase "$*" in *slow.cpp*) sleep 6;; esac\nexec c++ "$@"\n')
    slow.chmod(0o755)
    command = [sys.executable, "-c", PREPARE, str(tiny)]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, env=os.environ | {"CXX": str(slow)})
    deadline = time.monotonic() + 60
    while not (folder / ".ninja_log").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    process.wait()
    with open(folder / "byola_fast.lock") as lock, pytest.raises(BlockingIOError):
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    started = time.monotonic()
    library = cpu.prepare()
    assert time.monotonic() - started > 2
    cpu.register(library)


@pytest.mark.parametrize("strict", ["0", "1"])
def test_a_complete_build_that_cannot_be_loaded_is_named(tmp_path, strict):
    """It raised ImportError out of the first op; then the reference answered in silence, also under STRICT."""
    library = tmp_path / cpu.build_name() / f"{cpu.NAME}.so"
    library.parent.mkdir()
    library.write_bytes(b"of another machine")
    library.with_name(build.MARKER).write_bytes(build._checksum(library))
    code = "import sys; import torch\n" + TWO_CALLS
    done, lines = run(code, BYOLA_FAST_CACHE=str(tmp_path), BYOLA_FAST_STRICT=strict)
    reason = f"the kernels cannot be loaded: {library}: "
    assert done.returncode == 0, done.stderr
    if strict == "0":
        assert done.stdout.splitlines() == ["done", "done", "reference"]
        (line,) = lines
        assert line.startswith(f"byola_fast: cpp backend not used: {reason}")
        assert line.endswith("; set BYOLA_FAST_CACHE to another folder")
    else:
        assert [reason in line for line in done.stdout.splitlines()] == [True] * 3


def test_cuda_kernels_that_cannot_be_loaded_are_named(tmp_path):
    (tmp_path / "cuda.so").write_bytes(b"of another machine")
    with pytest.raises(BackendError, match=r"the kernels cannot be loaded: .*cuda\.so: .*; set BYOLA_FAST_CACHE"):
        cuda.register(tmp_path / "cuda.so")


@pytest.mark.parametrize("chosen", ["a cache", "~/a cache"])
def test_a_relative_cache_and_one_in_the_home(tiny, tmp_path, monkeypatch, chosen):
    """Each start built once more, in a folder within the build's own."""
    monkeypatch.setenv("BYOLA_FAST_CACHE", chosen)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    library = cpu.prepare()
    assert library == tmp_path / "a cache" / cpu.build_name() / f"{cpu.NAME}.so"
    assert library.exists()
    assert not list(library.parent.glob("*/*"))


@pytest.mark.parametrize("compiler", ["{wrapper} c++", "c++ -DFLAG", "/no/such/ccache c++"])
def test_a_compiler_behind_a_wrapper_or_with_flags(tiny, tmp_path, monkeypatch, compiler):
    """It was said not to be found."""
    wrapper = tmp_path / "ccache"
    wrapper.write_text('#!/bin/sh\nexec "$@"\n')
    wrapper.chmod(0o755)
    monkeypatch.setenv("CXX", compiler.format(wrapper=wrapper))
    if "no/such" in compiler:
        with pytest.raises(BackendError, match="the C\\+\\+ compiler '/no/such/ccache c\\+\\+' was not found"):
            cpu.prepare()
    else:
        cpu.register(cpu.prepare())


def test_a_cache_that_cannot_be_written_is_replaced(tiny, tmp_path, monkeypatch, caplog):
    (tmp_path / "file").touch()
    monkeypatch.setenv("BYOLA_FAST_CACHE", str(tmp_path / "file" / "cache"))
    monkeypatch.setattr(build.tempfile, "gettempdir", lambda: str(tmp_path))
    library = cpu.prepare()
    assert library.is_relative_to(tmp_path / f"byola_fast-{os.getuid()}")
    assert [record.getMessage().startswith("byola_fast: cache folder") for record in caplog.records] == [True]


def test_a_cache_without_locks_is_replaced(tiny, tmp_path, monkeypatch):
    """On Lustre mounted without flock, every op once raised OSError."""
    lock = build.fcntl.flock

    def no_locks(file, kind):
        inside = os.readlink(f"/proc/self/fd/{file.fileno()}").startswith(str(build.cache_folder()))
        if inside:
            raise OSError(38, "Function not implemented")
        lock(file, kind)

    monkeypatch.setattr(build.fcntl, "flock", no_locks)
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(build.tempfile, "gettempdir", lambda: str(tmp_path / "tmp"))
    assert cpu.prepare().is_relative_to(tmp_path / "tmp")


def test_a_finished_build_in_a_read_only_cache_is_used(tiny, monkeypatch):
    library = cpu.prepare()
    monkeypatch.setattr(build, "writable", lambda *_: pytest.fail("wrote to a finished build"))
    assert cpu.prepare() == library


@pytest.fixture
def quick(tiny, monkeypatch):
    """A stand-in for the compiler."""
    library = f"{cpu.NAME}.so"
    monkeypatch.setattr(build, "_build", lambda folder, *_: (folder / library).write_bytes(b"kernels"))


@pytest.fixture
def fallback(quick, tmp_path, monkeypatch):
    """A finished build in a shared temporary folder, as the cache cannot be written to."""
    (tmp_path / "file").touch()
    (tmp_path / "tmp").mkdir()
    (tmp_path / "tmp").chmod(0o1777)
    monkeypatch.setenv("BYOLA_FAST_CACHE", str(tmp_path / "file" / "cache"))
    monkeypatch.setattr(build.tempfile, "gettempdir", lambda: str(tmp_path / "tmp"))
    umask = os.umask(0)
    yield cpu.prepare()
    os.umask(umask)


def test_the_folder_in_a_shared_one_is_private(fallback, tmp_path):
    """Under umask 0 its parent was open to everyone."""
    assert [folder.stat().st_mode & 0o777 for folder in fallback.parents[:2]] == [0o700, 0o700]
    assert fallback.is_relative_to(tmp_path / "tmp")
    assert cpu.prepare() == fallback


@pytest.mark.parametrize("level", [-1, 0, 1])
def test_a_link_in_a_shared_folder_is_refused(fallback, tmp_path, level):
    """Another user could plant one to a library of theirs."""
    path = [fallback, *fallback.parents][level + 1]
    path.rename(tmp_path / "planted")
    path.symlink_to(tmp_path / "planted")
    with pytest.raises(BackendError, match=re.escape(f"another user can change {path}; set BYOLA_FAST_CACHE")):
        cpu.prepare()


@pytest.mark.parametrize("level", [0, 1, 2])
@pytest.mark.parametrize("mode", [0o720, 0o702])
def test_a_folder_that_others_can_write_to_is_refused(fallback, level, mode):
    path = fallback.parents[level]
    path.chmod(mode)
    with pytest.raises(BackendError, match=re.escape(f"another user can change {path}; set BYOLA_FAST_CACHE")):
        cpu.prepare()


@pytest.mark.parametrize("level", [-1, 0, 1, 2, 3])
def test_what_another_user_owns_in_a_shared_folder_is_refused(fallback, monkeypatch, level):
    path, lstat = [fallback, *fallback.parents][level + 1], Path.lstat

    def owned_by_another(one):
        status = lstat(one)
        return os.stat_result([*status[:4], 12345, *status[5:10]]) if one == path else status

    monkeypatch.setattr(Path, "lstat", owned_by_another)
    with pytest.raises(BackendError, match=re.escape(f"another user can change {path}; set BYOLA_FAST_CACHE")):
        cpu.prepare()


def test_a_user_without_a_home_has_a_cache(quick, tmp_path, monkeypatch):
    """As in a container that runs under any number; every op raised RuntimeError."""
    for name in ("BYOLA_FAST_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "getuid", lambda: 54321)
    assert build.cache_folder() == Path("/nonexistent/.cache/byola_fast")
    monkeypatch.setenv("BYOLA_FAST_CACHE", "~/kernels")
    assert build.cache_folder() == Path("/nonexistent/kernels")
    monkeypatch.setenv("BYOLA_FAST_CACHE", str(tmp_path))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
    _triton.prepare()
    assert os.environ["TRITON_CACHE_DIR"] == str(tmp_path / "triton")
    monkeypatch.delenv("TRITON_CACHE_DIR")  # prepare() set it for the whole process


def test_another_c_library_has_its_own_build(tiny, monkeypatch):
    """As in a home that machines with different systems share."""
    here = cpu.build_name()
    monkeypatch.setattr(build.platform, "libc_ver", lambda: ("glibc", "2.17"))
    assert cpu.build_name() != here


def test_the_users_own_cache_may_belong_to_a_group(quick):
    library = cpu.prepare()
    for path in (library, *library.parents[:2]):
        path.chmod(0o775)
    assert cpu.prepare() == library


@pytest.mark.parametrize("content", [b"kern", b"kernelz", None])
def test_a_damaged_library_is_built_again(quick, content):
    """The loader maps one that is cut short, and then the process dies."""
    library = cpu.prepare()
    library.unlink()
    if content is not None:
        library.write_bytes(content)
    assert cpu.prepare() == library
    assert library.read_bytes() == b"kernels"


def test_a_full_disk_is_a_reason_to_use_the_reference(quick, monkeypatch):
    def full(*_args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(build, "_build", full)
    with pytest.raises(BackendError, match=r"cannot build in .*: No space left on device; set BYOLA_FAST_CACHE"):
        cpu.prepare()


def test_the_error_without_any_folder_names_the_remedy(tiny, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("BYOLA_FAST_CACHE", str(tmp_path / "file" / "cache"))
    monkeypatch.setattr(build.tempfile, "gettempdir", lambda: str(tmp_path / "file"))
    with pytest.raises(BackendError, match="set BYOLA_FAST_CACHE"):
        cpu.prepare()


def test_a_missing_compiler_leaves_a_working_package_and_one_line(tmp_path):
    broken = {"CXX": "/no/such/compiler", "BYOLA_FAST_CACHE": str(tmp_path), "BYOLA_FAST_STRICT": "0"}
    done, lines = run(AUGMENT, **broken)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "reference"
    assert lines == [
        "byola_fast: cpp backend not used: the C++ compiler '/no/such/compiler' was not found: install g++, or name "
        "one in CXX"
    ]
    done, _ = run(AUGMENT, **(broken | {"BYOLA_FAST_STRICT": "1"}))
    assert done.returncode != 0
    assert "BackendError" in done.stderr
    assert "/no/such/compiler" in done.stderr


def test_a_compiler_error_is_named_and_kept(tiny):
    (tiny / "kernels.cpp").write_text("this is not C++\n")
    with pytest.raises(BackendError, match=r"compiling failed: .*kernels.cpp.* error: .*build.log"):
        cpu.prepare()
    folder = build.cache_folder() / cpu.build_name()
    assert "this is not C++" in (folder / "build.log").read_text()


def test_ninja_is_found_if_the_environment_is_not_activated(tiny):
    done, lines = run(PREPARE, tiny, PATH="/usr/bin:/bin")
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).exists()
    assert len(lines) == 2


def test_another_torch_machine_or_source_has_its_own_build(tiny, monkeypatch):
    names = {cpu.build_name()}
    with monkeypatch.context() as patch:
        patch.setattr(torch, "__version__", "2.11.0")
        names.add(cpu.build_name())
    with monkeypatch.context() as patch:
        patch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
        names.add(cpu.build_name())
    with monkeypatch.context() as patch:
        patch.setattr(platform, "machine", lambda: "aarch64")
        names.add(cpu.build_name())
    (tiny / "kernels.cpp").write_text(TINY + "\n")
    names.add(cpu.build_name())
    (tiny / "more.h").touch()
    names.add(cpu.build_name())
    assert len(names) == 6


@pytest.mark.skipif(shutil.which("objdump") is None, reason="needs objdump")
def test_nothing_that_every_cpu_runs_needs_an_instruction_set():
    """The library's static initialisers run before the choice, and its own functions on any CPU."""
    folder = cpu.prepare().parent
    assert cpu.instruction_sets() == ["portable"] or len([*folder.glob("kernels_avx*.o")]) == 2
    for path in folder.glob("*.o"):
        section = [] if path.stem == "library" else ["-j", ".text.startup"]
        if section and section[1] not in subprocess.check_output(["objdump", "-h", path], text=True):
            continue  # no static initialisers
        code = subprocess.check_output(["objdump", "-d", "--no-show-raw-insn", *section, path], text=True)
        assert "ret" in code or "jmp" in code
        assert not re.search(r"%[yz]mm|\sv[a-z]+ .*%xmm", code), path


def test_one_build_serves_python_of_any_version_and_x86_of_either_instruction_set(tiny, monkeypatch):
    names = set()
    for minor, capability in ((10, "AVX2"), (13, "AVX512")):
        monkeypatch.setattr(sys, "version_info", type("V", (), {"major": 3, "minor": minor})())
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda found=capability: found)
        monkeypatch.setattr(platform, "machine", lambda: "x86_64")
        names.add(cpu.build_name())
    assert len(names) == 1


def test_missing_sources_say_how_to_install(monkeypatch, tmp_path):
    monkeypatch.setattr(build, "__file__", str(tmp_path / "a" / "b" / "c.py"))
    with pytest.raises(BackendError, match="install from a checkout"):
        build.source_folder()


def test_the_sources_use_no_threads_that_need_a_flag():
    """Without -fopenmp, at::parallel_for is silently serial; torch::stable::parallel_for is not."""
    for path in build.source_folder().glob("*_cpu.cpp"):
        assert "at::parallel_for" not in path.read_text()
