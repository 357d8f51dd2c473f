"""Batches: full, equal for every reader, rank and resumed run, with broken files replaced."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from byola_fast.audio.batches import AHEAD, Batch, Batches, as_float
from byola_fast.audio.pack import pack
from byola_fast.audio.reading import AudioError, list_audio_files
from byola_fast.audio.segments import SegmentFolder
from byola_fast.audio.sources import open_source
from byola_fast.audio.store import DeviceStore, SegmentStore
from byola_fast.audio.store_format import StoreError

RATE = 16000
UNIT = 0.05
CLIPS = 11
BROKEN = (3, 7)
Source = SegmentFolder | SegmentStore | DeviceStore
KINDS = ["folder", "store", "device"]


def write_clips(folder: Path, broken: tuple[int, ...] = ()) -> Path:
    """Write 16-bit clips whose samples hold the clip number (thousands) and the position (rest); clip 5 is short."""
    folder.mkdir(parents=True)
    for number in range(CLIPS):
        samples = 300 if number == 5 else 990
        wav = (1000 * number + 1 + np.arange(samples)).astype(np.int16)
        soundfile.write(folder / f"{number:02}.wav", wav, RATE)
        if number in broken:
            (folder / f"{number:02}.wav").write_text("no audio")
    return folder


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("clips")
    for name, broken in (("folder", ()), ("broken folder", BROKEN)):
        write_clips(root / name, broken)
        for part in range(2):
            pack(root / name, root / name.replace("folder", "store"), part=(part, 2), workers=0)
    return {path.name: path for path in root.iterdir()}


@pytest.fixture
def source(sources: dict[str, Path]) -> Callable[..., Source]:
    def make(kind: str, broken: bool = False, unit_sec: float = UNIT, seed: int = 3) -> Source:
        name = "broken " * broken + ("store" if kind == "device" else kind)
        found = open_source(sources[name], unit_sec=unit_sec, seed=seed)
        return found.to_device("cpu") if kind == "device" and isinstance(found, SegmentStore) else found

    return make


def as_int16(wav: torch.Tensor) -> torch.Tensor:
    return wav if wav.dtype == torch.int16 else (wav * 32768).round().to(torch.int16)


def clip_numbers(wav: torch.Tensor) -> list[int]:
    """Return the clip of every segment."""
    return ((as_int16(wav).amax(-1).long() - 1) // 1000).flatten().tolist()


def equal(a: Batch, b: Batch) -> bool:
    return a[:3] == b[:3] and torch.equal(as_int16(a.wav), as_int16(b.wav))


def test_every_epoch_takes_each_clip_once_in_its_own_order(source: Callable[..., Source]) -> None:
    batches = Batches(source("store"), 4, seed=1)
    assert batches.steps_per_epoch == 2
    found = list(batches.run(6))
    assert [batch[:3] for batch in found] == [(0, 0, 0), (1, 0, 0), (2, 1, 0), (3, 1, 0), (4, 2, 0), (5, 2, 0)]
    assert all(batch.wav.shape == (4, 800) for batch in found)
    epochs = [clip_numbers(torch.cat([a.wav, b.wav])) for a, b in zip(found[::2], found[1::2], strict=True)]
    assert all(len(set(epoch)) == 8 for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert clip_numbers(next(Batches(source("store"), 11, seed=1).run(1)).wav) != clip_numbers(
        next(Batches(source("store"), 11, seed=2).run(1)).wav
    )


@pytest.mark.parametrize("broken", [False, True])
@pytest.mark.parametrize("segments", [1, 2])
@pytest.mark.parametrize(("kind", "workers"), [("folder", 0), ("folder", 2), ("store", 0), ("store", 1), ("device", 1)])
def test_every_reader_gives_the_same(
    source: Callable[..., Source], kind: str, workers: int, segments: int, broken: bool
) -> None:
    settings: dict[str, Any] = {"seed": 5, "segments": segments}
    wanted = list(Batches(source("folder", broken), 4, workers=0, **settings).run(7))
    batches = Batches(source(kind, broken), 4, workers=workers, **settings)
    found = list(batches.run(7))
    assert all(map(equal, found, wanted))
    assert all(batch.wav.shape == ((4, 800) if segments == 1 else (4, 2, 800)) for batch in found)
    assert found[0].wav.dtype == (torch.float32 if kind == "folder" else torch.int16)
    resumed = list(batches.run(7, start=3))
    assert len(resumed) == 4
    assert all(map(equal, resumed, wanted[3:]))
    assert {path.name for path in batches.broken} == ({"03.wav", "07.wav"} if broken else set())
    assert set(clip_numbers(torch.cat([batch.wav for batch in found]))) <= set(range(CLIPS)) - set(
        BROKEN if broken else ()
    )


@pytest.mark.parametrize("kind", KINDS)
def test_another_default_device_changes_nothing(source: Callable[..., Source], kind: str) -> None:
    wanted = list(Batches(source(kind, True), 4, seed=5, segments=2, workers=0).run(7))
    with torch.device("meta"):
        found = list(Batches(source(kind, True), 4, seed=5, segments=2, workers=0).run(7))
    assert all(map(equal, found, wanted))


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    local_size=st.integers(1, 9), world=st.integers(1, 4), seed=st.integers(0, 2**64 - 1), step=st.integers(0, 10**6),
    segments=st.integers(1, 3), kind=st.sampled_from(KINDS), broken=st.booleans(),
)  # fmt: skip
def test_the_global_batch_does_not_depend_on_ranks(
    source: Callable[..., Source],
    local_size: int,
    world: int,
    seed: int,
    step: int,
    segments: int,
    kind: str,
    broken: bool,
) -> None:
    settings: dict[str, Any] = {"seed": seed, "workers": 0, "segments": segments}
    whole = next(Batches(source("store", broken), local_size * world, **settings).run(step + 1, step))
    parts = [
        next(
            Batches(source(kind, broken), local_size * world, rank=rank, world_size=world, **settings).run(
                step + 1, step
            )
        )
        for rank in range(world)
    ]
    assert [part.sample_offset for part in parts] == [rank * local_size for rank in range(world)]
    assert torch.equal(as_int16(torch.cat([part.wav for part in parts])), whole.wav)


@pytest.mark.parametrize("kind", KINDS)
def test_few_clips_give_several_segments(source: Callable[..., Source], kind: str) -> None:
    batches = Batches(source(kind, broken=True), 64, seed=0, workers=0)
    assert (batches.repeats, batches.steps_per_epoch) == (6, 1)
    wav = as_int16(next(batches.run(1)).wav)
    assert wav.shape == (64, 800)
    long = wav[[clip != 5 for clip in clip_numbers(wav)]]
    assert (
        len({tuple(row.tolist()) for row in long}) > len(long) - 20
    )  # 191 places for a segment; each drawn independently


@pytest.mark.parametrize("kind", KINDS)
def test_segments_of_one_clip_are_drawn_apart(source: Callable[..., Source], kind: str) -> None:
    wav = torch.cat([batch.wav for batch in Batches(source(kind), 10, seed=0, segments=2, workers=0).run(20)])
    first, second = (as_int16(wav[:, part])[:, 0].long() for part in range(2))
    long = torch.tensor(clip_numbers(wav[:, 0])) != 5
    assert torch.equal(((first - 1) // 1000)[long], ((second - 1) // 1000)[long])
    distance = (first - second)[long]
    assert (distance == 0).float().mean() < 0.05
    assert -40 < distance.float().mean() < 40


def test_a_broken_file_is_reported_once_and_replaced_by_others(
    source: Callable[..., Source], caplog: pytest.LogCaptureFixture
) -> None:
    for workers in (0, 2):
        caplog.clear()
        batches = Batches(source("folder", broken=True), CLIPS, seed=2, workers=workers)
        found = list(batches.run(30))
        assert all(batch.wav.shape == (CLIPS, 800) for batch in found)
        lines = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
        assert sorted(line.split(": ")[0].split("/")[-1] for line in lines) == ["03.wav", "07.wav"]
        assert all("not audio that can be decoded" in line for line in lines)
        assert set(batches.broken.values()) == {"not audio that can be decoded"}
        counts = np.bincount(clip_numbers(torch.cat([batch.wav for batch in found])), minlength=CLIPS)
        assert counts.tolist()[3] == counts.tolist()[7] == 0
        others = np.delete(counts, BROKEN) - 30  # 60 replacements by 9 clips
        assert others.sum() == 60
        assert others.max() < 20
        assert (others > 0).sum() > 5


def test_a_file_that_vanishes_or_turns_bad_is_replaced(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = write_clips(tmp_path / "clips")
    files = list_audio_files(folder)
    batches = Batches(SegmentFolder(files, unit_sec=UNIT), CLIPS, seed=0, workers=0)
    running = batches.run(100)
    assert 4 in clip_numbers(next(running).wav)
    (folder / "04.wav").unlink()
    soundfile.write(folder / "06.wav", np.full(990, np.nan), RATE, "FLOAT")
    (folder / "08.wav").write_bytes(b"")
    rest = [next(running) for _ in range(5)]
    assert all(batch.wav.shape == (CLIPS, 800) for batch in rest)
    assert not {4, 6, 8} & set(clip_numbers(torch.cat([batch.wav for batch in rest])))
    lines = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    reasons = {"04.wav: No such file or directory", "06.wav: NaN or infinite samples", "08.wav: empty file (0 bytes)"}
    assert {line.split("/")[-1] for line in lines} == reasons
    again = Batches(SegmentFolder(files, unit_sec=UNIT), CLIPS, seed=0, workers=0)
    assert all(map(equal, again.run(6, start=1), rest))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_folder_of_broken_files_is_an_error(tmp_path: Path, workers: int) -> None:
    folder = write_clips(tmp_path / "clips", broken=tuple(range(CLIPS)))
    with pytest.raises(AudioError, match=r"\.wav: not audio .*; none of the 11 files can be read"):
        next(Batches(open_source(folder), 2, seed=0, workers=workers).run(1))
    with pytest.raises(AudioError, match=r"00\.wav: not audio that can be decoded$"):
        next(Batches(open_source(folder / "00.wav"), 2, seed=0, workers=workers).run(1))
    assert not multiprocessing.active_children()


def test_one_readable_file_is_enough(tmp_path: Path) -> None:
    folder = write_clips(tmp_path / "clips", broken=tuple(range(CLIPS - 1)))
    pack(folder, tmp_path / "store", workers=0)
    for source in (open_source(folder, unit_sec=UNIT), open_source(tmp_path / "store", unit_sec=UNIT)):
        found = list(Batches(source, 4, seed=0, workers=0).run(4))
        assert {clip for batch in found for clip in clip_numbers(batch.wav)} == {CLIPS - 1}


def test_a_killed_worker_is_an_error(source: Callable[..., Source], monkeypatch: pytest.MonkeyPatch) -> None:
    main = os.getpid()

    def die(*_arguments: object) -> None:
        assert os.getpid() != main
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(SegmentFolder, "read", die)
    with pytest.raises(ChildProcessError, match=r"a process that reads audio was killed \(out of memory\?\)"):
        next(Batches(source("folder"), 4, seed=0, workers=1).run(3))


def test_other_errors_of_workers_come_through(source: Callable[..., Source], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_arguments: object) -> None:
        raise RuntimeError("unforeseen")

    monkeypatch.setattr(SegmentFolder, "read", fail)
    for workers in (0, 1):
        with pytest.raises(RuntimeError, match="unforeseen") as raised:
            next(Batches(source("folder"), 4, seed=0, workers=workers).run(3))
        assert not multiprocessing.active_children(), raised


@pytest.mark.slow
def test_a_program_that_fails_ends_its_workers(sources: dict[str, Path]) -> None:
    code = (
        "import sys; from byola_fast.audio.batches import Batches; from byola_fast.audio.sources import open_source\n"
        "running = Batches(open_source(sys.argv[1]), 4, seed=0, workers=2).run(10**9); next(running)\n"
        "raise SystemExit('failed')"
    )
    done = subprocess.run([sys.executable, "-c", code, sources["folder"]], capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stderr) == (1, "failed\n")


def readers() -> list[str]:
    return [thread.name for thread in threading.enumerate() if "byola_fast" in thread.name]


def test_the_thread_reads_ahead_and_ends_with_its_iterator(
    source: Callable[..., Source], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("byola_fast.audio.batches.num_workers", lambda asked: 0)  # a single core
    batches = Batches(source("store"), 4, seed=0)
    read: list[int] = []
    one = batches.read
    monkeypatch.setattr(batches, "read", lambda step, pin: read.append(step) or one(step, pin))
    for _ in range(3):
        running = batches.run(10**9)
        for step in range(5):
            assert next(running).step == step
            assert len(readers()) == 1
        running.close()
        assert not readers()
        assert read == list(range(len(read)))
        assert 5 <= len(read) <= 5 + AHEAD
        read.clear()
    assert [batch.step for batch in batches.run(7)] == list(range(7))
    assert not readers()
    with pytest.raises(KeyboardInterrupt):
        interrupt(batches.run(100))
    assert not readers()


def interrupt(running: Any) -> None:
    for batch in running:
        if batch.step == 3:
            raise KeyboardInterrupt


def test_workers_end_with_their_iterator(source: Callable[..., Source]) -> None:
    running = Batches(source("folder"), 4, seed=0, workers=2).run(10**9)
    next(running)
    assert len(multiprocessing.active_children()) == 2
    running.close()
    assert not multiprocessing.active_children()


def test_workers_leave_signals_to_the_main_process(source: Callable[..., Source]) -> None:
    running = Batches(source("folder"), 4, seed=0, workers=2).run(60)
    next(running)
    for worker in multiprocessing.active_children():
        assert worker.pid is not None
        for number in (signal.SIGINT, signal.SIGTERM):
            os.kill(worker.pid, number)
    assert len(list(running)) == 59
    assert not multiprocessing.active_children()


def test_workers_that_have_just_started_leave_signals_to_the_main_process(
    source: Callable[..., Source], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = multiprocessing.Process.run

    def slow(process: multiprocessing.Process) -> None:
        time.sleep(0.5)
        run(process)

    def stop() -> None:
        while not (started := multiprocessing.active_children()):
            time.sleep(0.001)
        for number in (signal.SIGINT, signal.SIGTERM):
            os.kill(int(started[0].pid or 0), number)

    monkeypatch.setattr(multiprocessing.Process, "run", slow)
    thread = threading.Thread(target=stop)
    thread.start()
    assert len(list(Batches(source("folder"), 4, seed=0, workers=1).run(3))) == 3
    thread.join()


def test_errors_in_the_thread_come_through(sources: dict[str, Path], tmp_path: Path) -> None:
    for path in sources["store"].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    running = Batches(SegmentStore(tmp_path, unit_sec=UNIT), 4, seed=0, workers=1).run(1000)
    next(running)
    for data in tmp_path.glob("*.int16"):
        os.truncate(data, 0)
    with pytest.raises(StoreError, match="cut short since the store was opened"):
        list(running)
    assert not readers()


@pytest.mark.parametrize("kind", KINDS)
def test_batches_are_put_on_the_device(source: Callable[..., Source], kind: str, device: torch.device) -> None:
    wanted = next(Batches(source(kind), 4, seed=0, workers=0).run(1))
    for workers in (0, 1):
        batch = next(Batches(source(kind), 4, seed=0, workers=workers, device=device).run(1))
        assert batch.wav.device.type == device.type
        assert torch.equal(batch.wav.cpu(), wanted.wav)


@pytest.mark.parametrize(
    ("size", "arguments", "message"),
    [
        (0, {}, "batch_size: expected a multiple of world_size 1, got 0"),
        (10, {"world_size": 4}, "batch_size: expected a multiple of world_size 4, got 10"),
        (4, {"rank": 2, "world_size": 2}, "rank: expected 0 to 1"),
        (4, {"rank": -1}, "rank"),
        (4, {"world_size": 0}, "world_size: expected at least 1"),
        (4, {"segments": 0}, "segments: expected at least 1, got 0"),
        (4, {"workers": -1}, "workers: expected at least 0"),
    ],
)
def test_arguments_out_of_range_are_named(
    source: Callable[..., Source], size: int, arguments: dict[str, int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Batches(source("store"), size, seed=0, **arguments)


def test_open_source_recognises_the_kind(sources: dict[str, Path], tmp_path: Path) -> None:
    assert isinstance(open_source(sources["folder"]), SegmentFolder)
    assert isinstance(open_source(sources["folder"] / "01.wav"), SegmentFolder)
    assert isinstance(open_source(str(sources["store"])), SegmentStore)
    with pytest.raises(ValueError, match=r"sample_rate: expected 16000 Hz, the rate of .*store, got 8000"):
        open_source(sources["store"], sample_rate=8000)
    with pytest.raises(FileNotFoundError):
        open_source(tmp_path / "nowhere")
    (tmp_path / "part-00000-of-00001.int16.tmp").touch()
    with pytest.raises(StoreError, match="packing has not finished"):
        open_source(tmp_path)


def test_the_listing_detects_changed_data(sources: dict[str, Path], tmp_path: Path) -> None:
    def listing(path: Path) -> str:
        return Batches(open_source(path), 4, seed=0).listing

    assert listing(sources["folder"]) == listing(sources["broken folder"]) == listing(sources["store"])
    moved = write_clips(tmp_path / "deeper" / "elsewhere")
    pack(tmp_path / "deeper", tmp_path / "store", workers=0)
    assert listing(moved) == listing(tmp_path / "deeper") == listing(tmp_path / "store") == listing(sources["folder"])
    (moved / "05.wav").unlink()
    assert listing(moved) != listing(sources["folder"])
    assert Batches(SegmentStore(sources["store"]).to_device("cpu"), 4, seed=0).listing == listing(sources["store"])


def test_files_are_found_in_the_order_of_their_numbers(sources: dict[str, Path], source: Callable[..., Source]) -> None:
    assert [path.stem for path in list_audio_files(sources["folder"])] == [f"{number:02}" for number in range(CLIPS)]
    for kind in KINDS:
        loaded = source(kind, unit_sec=990 / RATE)
        wav = [loaded.read(5, 0)] if isinstance(loaded, SegmentFolder) else loaded.gather([5], 0)
        assert as_float(wav[0])[345:645].mul(32768).tolist() == list(range(5001, 5301))
        assert not wav[0][:345].any()
