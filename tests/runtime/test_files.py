"""Files written whole whoever else writes them, and locks."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from byola_fast.runtime import files
from byola_fast.runtime.files import open_locked, require_writable, write_whole


def test_two_writers_never_mix(tmp_path):
    path = tmp_path / "a.bin"

    def write(letter):
        def slowly(file):
            for _ in range(20):
                file.write(letter * 1000)
                file.flush()

        deadline = time.monotonic() + 1.0
        while time.monotonic() < deadline:
            write_whole(path, slowly)

    children = []
    for letter in (b"a", b"b", b"c"):
        if (child := os.fork()) == 0:
            try:
                write(letter)
            except BaseException:
                os._exit(1)
            os._exit(0)
        children.append(child)
    reads = set()
    while (ended := os.waitpid(children[0], os.WNOHANG))[0] == 0:
        if path.exists():
            content = path.read_bytes()
            reads.add((len(content), bytes(sorted(set(content)))))
    codes = [ended[1], *(os.waitpid(child, 0)[1] for child in children[1:])]
    assert codes == [0, 0, 0]
    assert reads == {(20_000, b"a"), (20_000, b"b"), (20_000, b"c")}
    assert list(tmp_path.iterdir()) == [path]


def test_temporary_files_of_killed_writers_are_removed_and_others_stay(tmp_path):
    path, own = tmp_path / "a [1].json", tmp_path / "a [1].json.mine.tmp"
    own.touch()
    if (child := os.fork()) == 0:
        write_whole(path, lambda _file: os.kill(os.getpid(), signal.SIGKILL))
    os.waitpid(child, 0)
    assert len(list(tmp_path.iterdir())) == 2
    write_whole(path, lambda file: (file.write(b"outer"), write_whole(path, lambda other: other.write(b"inner"))))
    assert path.read_bytes() == b"outer"
    assert sorted(tmp_path.iterdir()) == [path, own]


def test_permissions_are_those_of_open(tmp_path):
    before = os.umask(0o027)
    try:
        write_whole(tmp_path / "a", lambda file: file.write(b"1"))
    finally:
        os.umask(before)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o640


def test_links_are_followed_and_only_files_are_replaced(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real/a")
    for content in (b"new", b"newer"):
        write_whole(tmp_path / "link", lambda file, content=content: file.write(content))
        assert (tmp_path / "real" / "a").read_bytes() == content
    assert (tmp_path / "link").is_symlink()
    os.mkfifo(tmp_path / "pipe")
    for name, words in {"real": "Is a directory", "pipe": "Not a regular file"}.items():
        for refused in (require_writable, lambda path: write_whole(path, lambda file: file.write(b"1"))):
            with pytest.raises(OSError, match=words):
                refused(tmp_path / name)
    assert (tmp_path / "pipe").is_fifo()


def test_what_cannot_be_written_is_refused_and_nothing_made(tmp_path, monkeypatch):
    (tmp_path / "a.txt").touch()
    require_writable(tmp_path / "a.txt")
    require_writable(tmp_path / "new" / "folder" / "a.txt")
    with pytest.raises(NotADirectoryError, match=r"a\.txt"):
        require_writable(tmp_path / "a.txt" / "b" / "c.txt")
    for locked in (tmp_path, tmp_path / "a.txt"):  # root may write everywhere
        monkeypatch.setattr(files.os, "access", lambda path, _mode, locked=locked: path != locked)
        with pytest.raises(PermissionError):
            require_writable(tmp_path / "a.txt")
    assert list(tmp_path.iterdir()) == [tmp_path / "a.txt"]


def test_a_lock_is_waited_for_while_a_killed_run_ends(tmp_path, monkeypatch):
    path = tmp_path / "new" / "lock"
    held = open_locked(path)
    if (child := os.fork()) == 0:  # as a worker, which ends a moment after its parent
        time.sleep(0.5)
        os._exit(0)
    held.close()
    began = time.monotonic()
    again = open_locked(path)
    assert 0.2 < time.monotonic() - began < 3
    os.waitpid(child, 0)
    monkeypatch.setattr(files, "LOCK_SEC", 0.0)
    assert open_locked(path) is None
    with pytest.raises(FileNotFoundError):
        open_locked(Path("/proc/new/lock"))  # no folder can be made there
    again.close()


def test_a_lock_of_a_removed_file_does_not_count(tmp_path, monkeypatch):
    path, lock = tmp_path / "lock", files.lock

    def removed(file):
        monkeypatch.setattr(files, "lock", lock)
        path.unlink()
        return lock(file)

    monkeypatch.setattr(files, "lock", removed)
    with open_locked(path) as file:
        assert os.path.samestat(os.fstat(file.fileno()), os.stat(path))


def test_a_file_system_without_locks_is_enough(tmp_path, monkeypatch):
    def no_locks(*_arguments):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(files.fcntl, "flock", no_locks)
    (tmp_path / "a.01234567.tmp").touch()  # perhaps in use
    write_whole(tmp_path / "a", lambda file: file.write(b"1"))
    assert open_locked(tmp_path / "lock") is not None
    assert sorted(os.listdir(tmp_path)) == ["a", "a.01234567.tmp", "lock"]


def test_a_name_of_any_bytes(tmp_path):
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/a\xff\n*.json"))
    write_whole(path, lambda file: file.write(b"1"))
    assert os.listdir(tmp_path) == [path.name]
