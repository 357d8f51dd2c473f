"""Files that were damaged, and processes that were killed: what fuzzing and fault injection once found."""

from __future__ import annotations

import copy
import json
import math
import os
import signal
import time

import numpy as np
import pytest
import soundfile
import torch

from byola_fast import AudioNTT2020, Augment, LogMel, load_encoder
from byola_fast.audio.pack import pack
from byola_fast.audio.store import SegmentStore
from byola_fast.audio.store_format import StoreError
from byola_fast.embedding.embed_files import EmbedConfig, run_embed
from byola_fast.embedding.unfinished import Unfinished
from byola_fast.evaluation.report import check_results
from byola_fast.networks.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from byola_fast.networks.encoder_file import describe_encoder, save_encoder
from byola_fast.runtime.workers import read_in_processes
from byola_fast.spectrograms.corpus_statistics import Stats, read_stats, write_stats
from byola_fast.training.config import PretrainConfig
from byola_fast.training.run_folder import RunFolder, RunState

RATE = 16000


def write_encoder(path, **changes):
    encoder = AudioNTT2020(n_mels=16, d=4)
    config = describe_encoder(encoder, LogMel(n_mels=16)) | changes.pop("config", {})
    save_encoder(path, encoder, config=config, **{"stats": (-7.1, 4.2)} | changes)
    return path


def test_a_flipped_bit_of_a_weight_is_found(tmp_path):
    """``torch.load`` gives wrong weights without a word."""
    path = tmp_path / "a.pt"
    weight = torch.arange(1000.0)
    save_checkpoint(path, {"weight": weight})
    content = bytearray(path.read_bytes())
    content[content.find(weight.numpy().tobytes()) + 2001] ^= 4
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"a\.pt: truncated or damaged"):
        load_checkpoint(path)


def test_files_without_checksums_are_read(tmp_path):
    try:
        torch.serialization.set_crc32_options(False)
        torch.save({"weight": torch.ones(3)}, tmp_path / "a.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    assert load_checkpoint(tmp_path / "a.pt")["weight"].sum() == 3


@pytest.mark.parametrize("stats", [(math.nan, 1.0), (0.0, math.inf), (0.0, -1.0), (0.0, 0.0)])
def test_statistics_out_of_range_name_their_file(tmp_path, stats):
    with pytest.raises(CheckpointError, match=r"a\.pth: stats: expected \(mean, std\), finite"):
        load_encoder(write_encoder(tmp_path / "a.pth", stats=stats))


@pytest.mark.parametrize(
    "changed", [{"center": False}, {"n_fft": 2**60}, {"n_fft": 2**24}, {"hop_length": "x"}, {"f_min": "x"}]
)
def test_a_front_end_that_cannot_be_names_its_file(tmp_path, changed):
    with pytest.raises(CheckpointError, match=r"a\.pth: config: "):
        load_encoder(write_encoder(tmp_path / "a.pth", config=changed))


@pytest.mark.parametrize("value", ["Infinity", "NaN", "[" * 100_000])
def test_statistics_that_are_no_numbers(tmp_path, value):
    (tmp_path / "s.json").write_text(f'{{"mean": 1, "std": 2, "front_end": {{}}, "segments": {value}}}')
    with pytest.raises(ValueError, match=r"s\.json: not a file of statistics"):
        read_stats(tmp_path / "s.json")


def test_statistics_that_cannot_be_written_leave_the_old_ones(tmp_path, monkeypatch):
    path = tmp_path / "s.json"
    write_stats(path, Stats(1.0, 2.0, 3), LogMel(), 0.95)

    def full(_descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ValueError, match=r"s\.json: cannot be written: No space left"):
        write_stats(path, Stats(4.0, 5.0, 6), LogMel(), 0.95)
    assert read_stats(path) == Stats(1.0, 2.0, 3)
    assert os.listdir(tmp_path) == ["s.json"]


@pytest.mark.parametrize("content", [b"\xff\xfe", b'"' + b"x" * 200_000])
def test_results_that_are_no_text_are_named(tmp_path, content):
    (tmp_path / "results.csv").write_bytes(content)
    with pytest.raises(ValueError, match=r"results\.csv: not a CSV file in UTF-8"):
        check_results(tmp_path / "results.csv")


def test_a_damaged_line_of_a_log_is_left_out(tmp_path):
    good = [json.dumps({"step": step}).encode() for step in (1, 2)]
    (tmp_path / "log.jsonl").write_bytes(b"\n".join([good[0], b'{"step\xff": 1}', b"[" * 100_000, b"7", good[1], b""]))
    run = RunFolder(tmp_path)
    run.begin(5, PretrainConfig(tensorboard=False))
    run.close()
    assert [line["step"] for line in run.lines] == [1, 2]


@pytest.mark.parametrize("changed", [{"config": 3}, {"step": "x"}, {"optimizer": 3}])
def test_a_checkpoint_of_other_types_is_refused(tmp_path, changed):
    content = {"model": {}, "optimizer": {}, "augment": {}, "rng": [], "config": {}, "step": 1}
    save_checkpoint(tmp_path / "checkpoint.pt", content | changed)
    run = RunFolder(tmp_path)
    if "optimizer" in changed:
        one = torch.nn.Linear(1, 1)
        state = RunState(None, one, torch.optim.Adam(one.parameters()), one)  # type: ignore[arg-type]
        with pytest.raises(CheckpointError, match="does not fit this run"):
            state.restore(load_checkpoint(tmp_path / "checkpoint.pt"))
        return
    with pytest.raises(CheckpointError, match="damaged; give another out"):
        run.open(PretrainConfig())
    run.close()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model": {"weight": torch.full((1, 1), math.nan)}}, r"weight: not finite in torch.float32 \(1 of 1 values\)"),
        ({"model": {"weight": torch.ones(1, 1, dtype=torch.int64)}}, "weight: of another dtype torch.int64"),
        ({"augment": {"rng": torch.zeros(4)}}, "rng: of another "),
        ({"augment": {"fixed_stats": torch.tensor([0.0, math.inf])}}, "fixed_stats: not finite"),
        ({"augment": {"bank.cursor": torch.zeros(3)}}, "bank.cursor: of another dtype torch.float32"),
    ],
)
def test_a_run_with_other_tensors_is_refused_and_nothing_changes(change, words):
    learner, augment = torch.nn.Linear(1, 1), Augment(stats=(0.0, 1.0), n_memory=2)
    state = RunState(None, learner, torch.optim.Adam(learner.parameters()), augment)  # type: ignore[arg-type]
    parts = {"model": learner, "optimizer": state.optimizer, "augment": augment}
    saved = {name: part.state_dict() for name, part in parts.items()} | {"rng": [], "step": 1, "epoch": 0}
    before = copy.deepcopy([learner.state_dict(), augment.state_dict()])
    name, changed = next(iter(change.items()))
    with pytest.raises(CheckpointError, match=f"does not fit this run: {words}"):
        state.restore(saved | {name: saved[name] | changed})
    for old, part in zip(before, (learner, augment), strict=True):
        assert all(torch.equal(old[key], x) for key, x in part.state_dict().items())


@pytest.mark.parametrize("suffix", ["", "child."])
@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("bank.rows", torch.full((2, 3, 4), math.nan), r"not finite in torch.float32 \(24 of 24 values\)"),
        ("bank.rows", torch.ones(2, 3, 4, dtype=torch.int64), "of another dtype torch.int64"),
        ("bank.rows", torch.ones(2, 3, 5), r"of another shape \(2, 3, 5\) instead of \(2, 3, 4\)"),
        ("bank.rows", torch.ones(1).expand(2, 3, 4), "of fewer values than their shape"),
        ("bank.cursor", torch.tensor([0, -1, 0]), r"negative \(1 of 3 values\)"),
        ("rng", torch.zeros(4), "of another"),
        ("running_stats.variance", torch.tensor(-1.0), "negative"),
        ("running_stats.mean", torch.tensor(math.inf), "not finite"),
        ("running_stats.count", torch.tensor(1.0), "of another dtype"),
    ],
)
def test_a_damaged_state_of_augment_changes_nothing(suffix, name, value, words):
    augment = Augment(n_memory=2)
    augment(torch.randn(3, 3, 4))
    module = augment if not suffix else torch.nn.ModuleDict({"child": augment})
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(RuntimeError, match=rf"{name}: {words}"):
        module.load_state_dict(before | {suffix + name: value})
    assert all(torch.equal(before[key], x) for key, x in module.state_dict().items())


# embeddings


@pytest.mark.parametrize("damage", ["rows gone", "rows cut short", "no JSON", "a list", "numbers", "deep"])
def test_a_damaged_list_is_done_again(tmp_path, damage):
    """As after a kill while the folder of a finished run was being removed: it stopped every run after it."""
    (tmp_path / "audio").mkdir()
    for number in range(3):
        soundfile.write(
            tmp_path / "audio" / f"{number}.wav", 0.1 * np.random.default_rng(number).standard_normal(4000), RATE
        )
    config = EmbedConfig(
        str(write_encoder(tmp_path / "a.pth")), [str(tmp_path / "audio")], str(tmp_path / "e.npy"), workers=0
    )
    run_embed(config)
    wanted = np.load(tmp_path / "e.npy")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Unfinished, "clear", lambda _store: None)
        run_embed(config)
    path = next((tmp_path / "e.npy.parts").glob("0-*.json"))
    rows, content = path.with_suffix(".f32"), json.loads(path.read_text())
    if damage == "rows gone":
        rows.unlink()
    elif damage == "rows cut short":
        os.truncate(rows, 20)
    else:
        content["clips"]["1.wav"][1] = 1 << 70
        texts = {"no JSON": "\0", "a list": "[1]", "numbers": json.dumps(content), "deep": "[" * 100_000}
        path.write_text(texts[damage])
    (tmp_path / "e.npy").unlink()
    assert run_embed(config).resumed == 0
    np.testing.assert_array_equal(np.load(tmp_path / "e.npy"), wanted)
    assert not path.parent.exists()


# a store


@pytest.mark.parametrize("change", ["cut short", "written to"])
def test_a_store_that_changes_under_a_run_is_an_error(tmp_path, change):
    (tmp_path / "audio").mkdir()
    soundfile.write(tmp_path / "audio" / "a.wav", np.full(RATE, 0.1), RATE)
    pack(tmp_path / "audio", tmp_path / "store", workers=0)
    store = SegmentStore(tmp_path / "store", unit_sec=0.1)
    store.gather([0], 0)
    data = next((tmp_path / "store").glob("*.int16"))
    if change == "cut short":
        os.truncate(data, 1000)
    else:
        with open(data, "r+b") as file:
            file.write(b"x")
        os.utime(data)
    for read in (lambda: store.gather([0], 0), lambda: store.to_device("cpu")):
        with pytest.raises(StoreError, match=rf"{change} since the store was opened"):
            read()


# processes


def read_slowly(number):
    time.sleep(0.1 * number)
    return os.getpid()


@pytest.mark.parametrize("number", [3, 100])
def test_a_killed_process_raises_where_its_data_are_waited_for(number):
    """Not in the middle of another call, as torch's handler of SIGCHLD does."""
    reading = read_in_processes(read_slowly, range(number), 1)
    os.kill(next(reading), signal.SIGKILL)
    deadline, saved = time.monotonic() + 0.5, 0
    while time.monotonic() < deadline:
        saved += 1  # a save that must not be torn
    with pytest.raises(ChildProcessError, match="a process that reads audio was killed"):
        list(reading)
    assert saved


def read_large(_number):
    """More than a pipe holds: the sender waits for the receiver."""
    return np.zeros(1 << 20)


def test_processes_end_with_a_parent_that_was_killed():
    """They used to wait for ever with the locks of their queue."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        next(read_in_processes(read_large, range(100), 2))  # the workers read ahead
        os.kill(os.getpid(), signal.SIGKILL)
    os.close(writer)
    os.waitpid(child, 0)
    os.set_blocking(reader, False)
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        try:
            assert os.read(reader, 1) == b""  # the last process that held the other end is gone
            break
        except BlockingIOError:
            time.sleep(0.05)
    else:
        pytest.fail("processes outlived their parent by 30 s")
    os.close(reader)
