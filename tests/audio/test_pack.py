"""Packing: reports, unchanged parts, and an existing store that survives every failure."""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from byola_fast.audio import decoding
from byola_fast.audio import pack as packing
from byola_fast.audio.pack import PackConfig, pack, run_pack
from byola_fast.audio.reading import AudioError, list_audio_files
from byola_fast.audio.segments import SegmentFolder
from byola_fast.audio.store import SegmentStore
from byola_fast.audio.store_format import PartWriter, StoreError
from byola_fast.runtime import files

RATE = 16000


def write_clips(folder: Path, seed: int = 0, count: int = 6) -> Path:
    rng = np.random.default_rng(seed)
    folder.mkdir(exist_ok=True)
    for number in range(count):
        wav = 0.2 * rng.standard_normal(rng.integers(1000, 20000))
        soundfile.write(folder / f"{number:04}.wav", wav, RATE)
    return folder


def content(out: Path) -> list[tuple[str, bytes]]:
    """Return every clip of a store that has passed all checks."""
    store = SegmentStore(out, unit_sec=1.5)
    store.verify()
    return [(name, store.gather([clip], 0).numpy().tobytes()) for clip, name in enumerate(store.names)]


def names(out: Path) -> list[str]:
    return sorted(path.suffix for path in out.iterdir())


def test_broken_files_are_reported_once_and_recorded(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = write_clips(tmp_path / "audio")
    (folder / "empty.wav").touch()
    (folder / "text.wav").write_text("no audio")
    soundfile.write(folder / "inf.wav", np.array([0.0, np.inf]), RATE, "FLOAT")
    done = []
    for workers in (0, 2):
        caplog.clear()
        result = pack(
            folder, tmp_path / "out", workers=workers, force=True, progress=lambda *report: done.append(report)
        )
        assert [record.getMessage() for record in caplog.records] == [
            f"skipping {folder / 'empty.wav'}: empty file (0 bytes)",
            f"skipping {folder / 'inf.wav'}: NaN or infinite samples",
            f"skipping {folder / 'text.wav'}: not audio that can be decoded",
        ]
        assert (result.files, list(result.broken), result.unchanged) == (9, ["empty.wav", "inf.wav", "text.wav"], False)
        assert [report[:2] for report in done] == [(number, 9) for number in range(1, 10)]
        assert done[-1][2] == result.seconds == sum(SegmentStore(tmp_path / "out").lengths.tolist()) / RATE
        done.clear()


def test_an_unchanged_part_is_not_packed_again(tmp_path: Path) -> None:
    folder, out = write_clips(tmp_path / "audio"), tmp_path / "out"
    assert not pack(folder, out, workers=0).unchanged
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    again = pack(folder, out, workers=0)
    assert (again.unchanged, again.files) == (True, 6)
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == before
    assert not pack(folder, out, workers=0, force=True).unchanged
    write_clips(folder, seed=1, count=1)
    assert not pack(folder, out, workers=0).unchanged
    (folder / "0001.wav").unlink()
    assert not pack(folder, out, workers=0).unchanged
    assert not pack(folder, out, workers=0, sample_rate=8000).unchanged
    header = out / "part-00000-of-00001.json"
    header.write_text("damaged")
    assert not pack(folder, out, workers=0).unchanged
    assert len(SegmentStore(out)) == 5
    assert names(out) == [".int16", ".json"]


def test_a_broken_file_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, out = write_clips(tmp_path / "audio"), tmp_path / "out"
    (folder / "0002.wav").rename(tmp_path / "away.wav")
    (folder / "0002.wav").symlink_to(tmp_path / "away.wav")
    read = soundfile.SoundFile.read

    def fail(file: soundfile.SoundFile, **arguments: object) -> object:
        if os.fsdecode(file.name).endswith("0002.wav"):
            raise soundfile.LibsndfileError(2)  # the disk failed
        return read(file, **arguments)

    with monkeypatch.context() as patched:
        patched.setattr(soundfile.SoundFile, "read", fail)
        assert pack(folder, out, workers=0).broken == {"0002.wav": "read error"}
        assert pack(folder, out, workers=0).unchanged  # still broken
    again = pack(folder, out, workers=0)
    assert not again.unchanged
    assert not again.broken


def test_a_store_of_other_decoders_is_packed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, out = write_clips(tmp_path / "audio"), tmp_path / "out"
    pack(folder, out, workers=0)
    monkeypatch.setattr(decoding, "has_ffmpeg", lambda: False)
    assert not pack(folder, out, workers=0).unchanged
    assert pack(folder, out, workers=0).unchanged


def test_clipped_files_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = write_clips(tmp_path / "audio")
    for name in ("loud.wav", "louder.wav"):
        soundfile.write(folder / name, np.full(100, 1.5), RATE, "FLOAT")
    pack(folder, tmp_path / "out", workers=0)
    assert caplog.messages == ["200 samples of 2 files were clipped to full scale: loud.wav, louder.wav"]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_folder_of_broken_files_is_an_error(tmp_path: Path, workers: int) -> None:
    good = write_clips(tmp_path / "good")
    pack(good, tmp_path / "out", workers=0)
    before = content(tmp_path / "out")
    bad = tmp_path / "bad"
    bad.mkdir()
    for name in "abc":
        (bad / f"{name}.wav").write_text("no audio")
    with pytest.raises(AudioError, match=r"a\.wav: not audio .*none of 3 files can be read"):
        pack(bad, tmp_path / "out", workers=workers)
    assert content(tmp_path / "out") == before
    assert names(tmp_path / "out") == [".int16", ".json"]
    for part in range(2):  # each part cannot know that the others are broken too
        pack(bad, tmp_path / "parts", part=(part, 2), workers=0)
    with pytest.raises(StoreError, match="none of 3 files could be read"):
        SegmentStore(tmp_path / "parts")


def test_parts_may_be_more_than_files(tmp_path: Path) -> None:
    folder = write_clips(tmp_path / "audio", count=2)
    for part in range(5):
        pack(folder, tmp_path / "out", part=(part, 5), workers=0)
    pack(folder, tmp_path / "one", workers=0)
    assert content(tmp_path / "out") == content(tmp_path / "one")
    store = SegmentStore(tmp_path / "out")
    assert torch.equal(store.to_device("cpu").gather([0, 1], 0), store.gather([0, 1], 0))


def test_names_of_every_kind(tmp_path: Path) -> None:
    folder = tmp_path / "Ünï çödé"
    (folder / "日本 語").mkdir(parents=True)
    made = ["a b.wav", "日本 語/é\n\t'\".wav", os.fsdecode(b"latin-\xe9.wav"), "-x.wav"]
    for name in made:
        soundfile.write((folder / "x.wav"), np.full(100, 0.25), RATE)
        (folder / "x.wav").rename(folder / name)
    pack(folder, tmp_path / "out ö", workers=1)
    store = SegmentStore(tmp_path / "out ö")
    assert store.names == [path.relative_to(folder).as_posix() for path in list_audio_files(folder)]
    assert sorted(store.names) == sorted(made)
    assert len(store.gather([0, 1, 2, 3], 0)) == 4


def test_a_single_file_is_a_corpus(tmp_path: Path) -> None:
    folder = write_clips(tmp_path / "audio")
    pack(folder / "0003.wav", tmp_path / "out", workers=0)
    assert SegmentStore(tmp_path / "out").names == ["0003.wav"]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"sample_rate": 0}, "sample_rate"),
        ({"sample_rate": 10_000_001}, "sample_rate"),
        ({"part": (2, 2)}, "part"),
        ({"part": (-1, 2)}, "part"),
        ({"part": (0, 0)}, "part"),
        ({"workers": -1}, "workers"),
    ],
)
def test_settings_out_of_range_are_named(tmp_path: Path, arguments: dict[str, object], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        pack(write_clips(tmp_path / "audio"), tmp_path / "out", **arguments)
    assert not (tmp_path / "out").exists()


def test_run_pack_shows_progress(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_clips(tmp_path / "audio")
    result = run_pack(PackConfig(str(folder), str(tmp_path / "out"), part=1, parts=2, workers=0))
    assert (result.files, result.out) == (3, tmp_path / "out")
    assert "files 3/3  0.00 h of audio" in capsys.readouterr().err


# an existing store survives


@pytest.fixture
def old_and_new(tmp_path: Path) -> tuple[Path, Path, list[tuple[str, bytes]]]:
    """Return a folder that has changed since it was packed, its store, and the contents of the store."""
    out = tmp_path / "out"
    folder = write_clips(tmp_path / "audio")
    pack(folder, out, workers=0)
    before = content(out)
    write_clips(folder, seed=1)
    return folder, out, before


def test_an_unwritable_folder_is_named(tmp_path: Path) -> None:
    folder = write_clips(tmp_path / "audio")
    (tmp_path / "file").touch()
    for out in (tmp_path / "file", tmp_path / "file" / "deeper"):
        with pytest.raises(StoreError, match=f"{out}: cannot be written: "):
            pack(folder, out, workers=0)


def test_a_full_disk_leaves_the_old_store(old_and_new: tuple[Path, Path, list[tuple[str, bytes]]]) -> None:
    folder, out, before = old_and_new
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50000, limits[1]))  # larger files fail; Python ignores SIGXFSZ
    try:
        with pytest.raises(StoreError, match=f"{out}: cannot be written: .*; what was packed before is unchanged"):
            pack(folder, out, workers=0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert content(out) == before
    assert names(out) == [".int16", ".json"]


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_failure_at_the_end_leaves_the_old_store(
    old_and_new: tuple[Path, Path, list[tuple[str, bytes]]], failing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, out, before = old_and_new

    def fail(*_arguments: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, failing, fail)
        with pytest.raises(StoreError, match="No space left on device; what was packed before is unchanged"):
            pack(folder, out, workers=0)
    assert content(out) == before
    assert names(out) == [".int16", ".json"]


def test_another_number_of_parts_is_refused(old_and_new: tuple[Path, Path, list[tuple[str, bytes]]]) -> None:
    folder, out, before = old_and_new
    with pytest.raises(StoreError, match="holds a store of 1 parts, not 2"):
        pack(folder, out, part=(0, 2), workers=0)
    assert content(out) == before


def test_two_processes_never_write_one_part(
    old_and_new: tuple[Path, Path, list[tuple[str, bytes]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, out, before = old_and_new
    monkeypatch.setattr(files, "LOCK_SEC", 0.0)
    with PartWriter(out, 0, 1), pytest.raises(StoreError, match="another process is packing this part"):
        pack(folder, out, workers=0)
    assert content(out) == before
    pack(folder, out, workers=0)
    assert content(out) != before


def test_a_file_system_without_locks_is_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_arguments: object) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(files.fcntl, "flock", refuse)
    assert pack(write_clips(tmp_path / "audio"), tmp_path / "out", workers=0).files == 6


def test_an_interrupt_leaves_the_old_store(old_and_new: tuple[Path, Path, list[tuple[str, bytes]]]) -> None:
    folder, out, before = old_and_new

    def interrupt(done: int, _total: int, _seconds: float) -> None:
        if done == 3:
            raise KeyboardInterrupt

    for workers in (0, 2):
        with pytest.raises(KeyboardInterrupt):
            pack(folder, out, workers=workers, progress=interrupt)
        assert content(out) == before
        assert names(out) == [".int16", ".json"]
        assert not multiprocessing.active_children()


def test_a_killed_decoder_is_an_error(
    old_and_new: tuple[Path, Path, list[tuple[str, bytes]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, out, before = old_and_new

    def die(file: Path, sample_rate: int) -> packing.Decoded:
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError

    monkeypatch.setattr(packing, "_decode", die)
    with pytest.raises(ChildProcessError, match=r"a process that reads audio was killed \(out of memory\?\)"):
        pack(folder, out, workers=1)
    assert content(out) == before
    assert names(out) == [".int16", ".json"]


def die_at(moment: int, run: Callable[[], object]) -> bool:
    """Run in a child that is killed before its n-th write, flush, rename or removal; return whether it was killed."""
    child = os.fork()
    if child == 0:
        count = iter(range(moment + 1))

        def counted(function: Callable[..., object]) -> Callable[..., object]:
            def call(*arguments: object, **named: object) -> object:
                if next(count, None) == moment:
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*arguments, **named)

            return call

        PartWriter.write = counted(PartWriter.write)  # type: ignore[method-assign]
        os.fsync, os.replace, Path.unlink = counted(os.fsync), counted(os.replace), counted(Path.unlink)
        try:
            run()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


@pytest.mark.slow
def test_kill_9_at_any_moment_leaves_the_old_or_the_new_store_whole(tmp_path: Path) -> None:
    folder, out = write_clips(tmp_path / "audio"), tmp_path / "out"
    pack(folder, out, workers=0)
    stages, moment, killed = [content(out)], 0, True
    while killed:
        write_clips(folder, seed=moment + 1)
        killed = die_at(moment, lambda: pack(folder, out, workers=0))
        found = content(out)
        renewed = found != stages[-1]
        assert renewed or killed
        pack(folder, out, workers=0)
        assert names(out) == [".int16", ".json"]
        stages.append(content(out))
        assert not renewed or found == stages[-1]
        moment += 1
    assert moment - 1 == 6 + 3 + 2 + 1  # writes, flushes, renames, and the removal of the old data


def test_a_killed_first_packing_is_recognised(tmp_path: Path) -> None:
    folder, out, moment = write_clips(tmp_path / "audio"), tmp_path / "out", 0
    pack(folder, tmp_path / "whole", workers=0)
    wanted, messages = content(tmp_path / "whole"), set()
    while die_at(moment, lambda: pack(folder, out, workers=0)):
        try:
            assert content(out) == wanted
        except StoreError as error:
            messages.add(str(error))
        moment += 1
        for path in out.iterdir():
            path.unlink()
    assert moment == 6 + 3 + 2
    assert all("no packed store in this folder; packing has not finished: part-00000-of-00001" in x for x in messages)
    assert len(messages) == 3  # only samples; also a header; samples renamed


@pytest.mark.slow
def test_kill_9_from_outside_ends_the_workers_and_the_lock(tmp_path: Path) -> None:
    folder, out = write_clips(tmp_path / "audio", count=40), tmp_path / "out"
    slow = (
        "import sys, time; from byola_fast.audio import pack as packing, segments; read = segments.read_blocks\n"
        "segments.read_blocks = lambda *given: (time.sleep(0.05), read(*given))[1]\n"
        "packing.pack(sys.argv[1], sys.argv[2], workers=2, progress=lambda *report: print(*report, flush=True))"
    )
    command = [sys.executable, "-c", slow, str(folder), str(out)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stdout is not None
    for _ in range(int(np.random.default_rng().integers(1, 20))):
        process.stdout.readline()
    process.kill()
    process.wait()
    process.stdout.close()
    with pytest.raises(StoreError, match=r"packing has not finished: part-00000-of-00001\.int16\.tmp"):
        SegmentStore(out)
    deadline = time.monotonic() + 60  # the workers poll their parent
    while group_is_alive(process.pid) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not group_is_alive(process.pid)
    pack(folder, out, workers=0)
    assert len(content(out)) == 40
    folder_source = SegmentFolder(list_audio_files(folder))
    wav = SegmentStore(out).gather([7], 0)[0]
    torch.testing.assert_close(wav / 32768, folder_source.read(7, 0), atol=1e-6, rtol=0)


def group_is_alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_long_file_is_not_held_as_floats(tmp_path: Path) -> None:
    import tracemalloc

    frames = 600 * 48000
    soundfile.write(tmp_path / "long.wav", np.zeros(frames, np.int16), 48000, "PCM_U8")
    tracemalloc.start()
    packed = pack(tmp_path / "long.wav", tmp_path / "out", workers=0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert packed.seconds == 600
    assert peak < 4 * frames
