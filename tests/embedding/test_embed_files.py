"""Folders to one file: formats, what is left after a kill, ranks, broken and changed files."""

from __future__ import annotations

import csv
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import soundfile
import torch
from helpers.tolerances import assert_close

from byola_fast import AudioNTT2020, LogMel, load_encoder
from byola_fast.audio.pack import pack
from byola_fast.audio.reading import read_audio
from byola_fast.embedding import embed_files as module
from byola_fast.embedding import unfinished
from byola_fast.embedding.embed_files import EmbedConfig, run_embed
from byola_fast.networks.encoder_file import describe_encoder, save_encoder
from byola_fast.runtime import files
from byola_fast.runtime.distributed import RankError, World
from byola_fast.spectrograms.corpus_statistics import Stats, write_stats

LENGTHS = {"a/one.wav": 15200, "a/two.flac": 9000, "b/three.wav": 15200, "four.wav": 48000, "z.wav": 700}


@pytest.fixture
def weights(tmp_path):
    path, encoder = tmp_path / "encoder.pth", AudioNTT2020(16, 24)
    save_encoder(path, encoder, config=describe_encoder(encoder, LogMel(n_mels=16)), stats=(-7.1, 4.2))
    return str(path)


@pytest.fixture
def corpus(tmp_path):
    root = tmp_path / "corpus"
    for name, samples in LENGTHS.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(root / name, 0.2 * torch.randn(samples).numpy(), 16000)
    (root / "text.wav").write_text("no audio")
    return root


def config(weights, corpus, out, **settings) -> EmbedConfig:
    return EmbedConfig(weights, [str(corpus)], out=str(out), workers=0, **settings)


def wanted(weights, corpus, frames=False) -> dict[str, torch.Tensor]:
    embedder = load_encoder(weights)
    answers = {name: embedder(read_audio(corpus / name), frames=frames) for name in sorted(LENGTHS, key=lambda n: n)}
    return {name: answer.frames if frames else answer[None] for name, answer in answers.items()}


def read_npz(path) -> dict[str, torch.Tensor]:
    with np.load(path) as table:
        names = table["file_names"].tolist()
        ends = table["offsets"] if "offsets" in table else np.arange(len(names) + 1)
        rows = torch.from_numpy(table["embeddings"])
        return {name: rows[ends[n] : ends[n + 1]] for n, name in enumerate(names)}


def check(found, expected):
    assert list(found) == list(expected)
    for name, rows in expected.items():
        assert_close(found[name], rows.double(), factor=30)


@pytest.mark.parametrize("frames", [False, True])
def test_formats(weights, corpus, tmp_path, caplog, frames):
    expected = wanted(weights, corpus, frames)
    with caplog.at_level(logging.WARNING, "byola_fast"):
        result = run_embed(config(weights, corpus, tmp_path / "new" / "e.npz", frames=frames, batch_sec=1.5))
    check(read_npz(result.out), expected)
    assert sum("text.wav" in line for line in caplog.messages) == 1
    assert (result.files, result.feature_d, result.resumed) == (5, 24, 0)
    assert list(result.broken) == ["text.wav"]
    assert result.rows == sum(map(len, expected.values()))
    assert not list(tmp_path.glob("new/*.parts"))
    if frames:
        times = np.load(result.out)["timestamps_ms"]
        assert len(times) == result.rows
        assert times[:3].tolist() == [35, 115, 195]

    out = run_embed(config(weights, corpus, tmp_path / "e.npy", frames=frames)).out
    rows = torch.from_numpy(np.load(out))
    with open(tmp_path / "e.npy.names.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    spans = {line["file_name"]: (int(line["first_row"]), int(line["rows"])) for line in lines}
    check({name: rows[begin : begin + count] for name, (begin, count) in spans.items()}, expected)

    out = run_embed(config(weights, corpus, tmp_path / "e.csv", frames=frames)).out
    found: dict[str, list[torch.Tensor]] = {}
    with open(out, newline="") as file:
        for line in csv.DictReader(file):
            row = torch.tensor([float(line[f"e{k}"]) for k in range(24)])
            if frames:
                assert float(line["timestamp_ms"]) == 35 + 80 * len(found.get(line["file_name"], []))
            found.setdefault(line["file_name"], []).append(row)
    check({name: torch.stack(rows) for name, rows in found.items()}, expected)


class Killed(BaseException):
    pass


def kill_after(monkeypatch, pieces: int) -> None:
    """Stop a run as ``kill -9`` does: at once, with nothing tidied up."""
    embed_clips = module.embed_clips

    def killed(*args, **settings):
        for count, piece in enumerate(embed_clips(*args, **settings)):
            if count == pieces:
                raise Killed
            yield piece

    monkeypatch.setattr(module, "embed_clips", killed)
    monkeypatch.setattr(unfinished.Unfinished, "__exit__", lambda *_: None)
    monkeypatch.setattr(unfinished, "KEEP_SEC", -1.0)


@pytest.mark.parametrize("frames", [False, True])
@pytest.mark.parametrize("pieces", range(8))
def test_killed_and_run_again(weights, corpus, tmp_path, frames, pieces):
    settings = config(weights, corpus, tmp_path / "e.npz", frames=frames, batch_sec=1.5)
    with pytest.MonkeyPatch.context() as patch:
        kill_after(patch, pieces)
        with pytest.raises(Killed):
            run_embed(settings)
    assert not (tmp_path / "e.npz").exists()
    result = run_embed(settings)
    check(read_npz(result.out), wanted(weights, corpus, frames))
    assert result.resumed <= pieces
    assert result.resumed >= (0 if pieces < 5 else 1)
    assert list(result.broken) == ["text.wav"]


def test_interrupted_keeps_what_was_done_and_changed_files_are_done_again(weights, corpus, tmp_path, monkeypatch):
    settings = config(weights, corpus, tmp_path / "e.npz", batch_sec=0.5)
    with pytest.MonkeyPatch.context() as patch:
        embed_clips = module.embed_clips

        def interrupted(*args, **words):
            pieces = [piece for piece in embed_clips(*args, **words) if piece.last]
            yield from pieces[:3]
            raise KeyboardInterrupt

        patch.setattr(module, "embed_clips", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run_embed(settings)
    kept = json.loads(next((tmp_path / "e.npz.parts").glob("0-*.json")).read_text())
    changed = next(iter(kept["clips"]))
    soundfile.write(corpus / changed, 0.1 * torch.randn(20000).numpy(), 16000)
    result = run_embed(settings)
    assert result.resumed == len(kept["clips"]) - 1
    check(read_npz(result.out), wanted(weights, corpus))


def test_work_of_other_settings_is_refused_and_stays(weights, corpus, tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        kill_after(patch, 3)
        with pytest.raises(Killed):
            run_embed(config(weights, corpus, tmp_path / "e.npz"))
    before = sorted(os.listdir(tmp_path / "e.npz.parts"))
    with pytest.raises(ValueError, match=r"e.npz.parts: holds the work of a stopped run with other frames"):
        run_embed(config(weights, corpus, tmp_path / "e.npz", frames=True))
    assert sorted(os.listdir(tmp_path / "e.npz.parts")) == before
    with pytest.MonkeyPatch.context() as patch:  # others read other parts of damaged files
        patch.setattr(module, "decoders", lambda: "libsndfile 0.9")
        with pytest.raises(ValueError, match=r"e.npz.parts: holds the work of a stopped run with other decoders"):
            run_embed(config(weights, corpus, tmp_path / "e.npz"))


@pytest.mark.parametrize("ranks", [2, 7])
def test_ranks_share_the_files(weights, corpus, tmp_path, monkeypatch, ranks):
    class OneAtATime(World):
        def all_max(self, *values):
            return list(values)

        def broadcast(self, make):
            return make()

    settings = config(weights, corpus, tmp_path / "e.npz")
    done = []
    embed_clips = module.embed_clips
    monkeypatch.setattr(
        module,
        "embed_clips",
        lambda embedder, files, **words: done.append(files) or embed_clips(embedder, files, **words),
    )
    for rank in range(ranks - 1, -1, -1):  # one after the other; the first, which waits for all, is the last
        world = OneAtATime(torch.device("cpu"), rank, ranks)
        monkeypatch.setattr(module, "join", lambda *_, world=world: module.nullcontext(world))
        result = run_embed(settings)
        assert (result is None) == (rank > 0)
    check(read_npz(result.out), wanted(weights, corpus))
    assert list(result.broken) == ["text.wav"]
    assert sorted(file for files in done for file in files) == sorted(
        [*(corpus / n for n in LENGTHS), corpus / "text.wav"]
    )
    assert max(map(len, done)) - min(map(len, done)) <= 1


def test_a_lost_rank_is_named_and_finished_work_stays(weights, corpus, tmp_path, monkeypatch):
    class Lost(World):
        def all_max(self, *values):
            raise RuntimeError("Connection closed by peer")

        def broadcast(self, make):
            return make()

    lost = Lost(torch.device("cpu"), 0, 2)
    monkeypatch.setattr(module, "join", lambda *_: module.nullcontext(lost))
    settings = config(weights, corpus, tmp_path / "e.npz")
    with pytest.raises(RankError, match=r"rank 0 lost another rank.*kept in .*e\.npz\.parts"):
        run_embed(settings)
    monkeypatch.undo()
    assert run_embed(settings).resumed == 2  # of three, one of them broken


def test_a_second_run_of_one_out_changes_nothing(weights, corpus, tmp_path, monkeypatch):
    settings = config(weights, corpus, tmp_path / "e.npz")
    embed_clips, refused = module.embed_clips, []

    def meanwhile(*args, **words):
        for piece in embed_clips(*args, **words):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(files, "LOCK_SEC", 0.0)
                before = {path: path.read_bytes() for path in (tmp_path / "e.npz.parts").iterdir()}
                message = rf"e\.npz: another embed is writing there \(process {os.getpid()} on .*give another out"
                for frames in (False, True):
                    with pytest.raises(ValueError, match=message):
                        run_embed(config(weights, corpus, tmp_path / "e.npz", frames=frames))
                assert {path: path.read_bytes() for path in (tmp_path / "e.npz.parts").iterdir()} == before
            refused.append(piece)
            yield piece

    monkeypatch.setattr(module, "embed_clips", meanwhile)
    check(read_npz(run_embed(settings).out), wanted(weights, corpus))
    assert len(refused) == 6
    assert not (tmp_path / "e.npz.parts").exists()


@pytest.mark.slow
def test_two_processes_and_a_rerun_after_a_kill(weights, corpus, tmp_path):
    for number in range(300):
        shutil.copy(corpus / "a" / "one.wav", corpus / f"{number:03}.wav")
    out = tmp_path / "e.npz"
    command = [sys.executable, "-m", "byola_fast", "embed", weights, corpus, "--out", out, "--workers", "2"]

    def start():
        return subprocess.Popen([str(word) for word in command], stderr=subprocess.PIPE, text=True)

    first, second = start(), start()
    errors = [run.communicate(timeout=120)[1] for run in (first, second)]
    assert 0 in (first.returncode, second.returncode)
    for run, error in zip((first, second), errors, strict=True):
        assert run.returncode == 0 or "another embed is writing there" in error
    expected = wanted(weights, corpus)["a/one.wav"]
    found = read_npz(out)
    assert len(found) == 305
    for number in range(300):
        assert_close(found[f"{number:03}.wav"], expected.double(), factor=30)

    out.unlink()
    killed = start()
    while not list(tmp_path.glob("e.npz.parts/*.f32")):
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    again = start()  # its workers may still hold the lock
    assert "Traceback" not in again.communicate(timeout=120)[1]
    assert again.returncode == 0
    assert len(read_npz(out)) == 305


def test_broken_files_are_tried_again_and_changes_during_a_run_reported(weights, corpus, tmp_path, caplog):
    settings = config(weights, corpus, tmp_path / "e.npz")
    text, status = corpus / "text.wav", (corpus / "text.wav").stat()
    embed_clips = module.embed_clips
    with pytest.MonkeyPatch.context() as patch:

        def interrupted(*args, **words):
            yield from [piece for piece in embed_clips(*args, **words) if piece.error is not None]
            raise KeyboardInterrupt

        patch.setattr(module, "embed_clips", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run_embed(settings)
    soundfile.write(text, 0.2 * torch.randn(3000).numpy(), 16000)
    os.utime(text, ns=(status.st_atime_ns, status.st_mtime_ns))  # a change that nobody sees
    with pytest.MonkeyPatch.context() as patch:

        def changing(*args, **words):
            pieces = list(embed_clips(*args, **words))
            soundfile.write(corpus / "four.wav", 0.2 * torch.randn(4000).numpy(), 16000)
            yield from pieces

        patch.setattr(module, "embed_clips", changing)
        with caplog.at_level(logging.WARNING, "byola_fast"):
            result = run_embed(settings)
    assert list(read_npz(result.out)) == ["a/one.wav", "a/two.flac", "b/three.wav", "text.wav", "z.wav"]
    assert result.broken == {"four.wav": "the file changed during the run"}
    assert any("four.wav: the file changed" in line for line in caplog.messages)


def test_the_same_names_of_another_folder_are_other_files(weights, tmp_path, monkeypatch):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        soundfile.write(tmp_path / name / "x.wav", 0.2 * torch.randn(3000).numpy(), 16000)
        os.utime(tmp_path / name / "x.wav", (0, 0))  # as out of an archive
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "write_table", lambda *_args, **_words: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run_embed(config(weights, tmp_path / "a", tmp_path / "e.npz"))
    with pytest.raises(ValueError, match="stopped run with other folder"):
        run_embed(config(weights, tmp_path / "b", tmp_path / "e.npz"))
    assert run_embed(config(weights, tmp_path / "a", tmp_path / "e.npz")).resumed == 1

    both = EmbedConfig(
        weights, [f"{tmp_path}/{name}" for name in "abb"] + [f"{tmp_path}/a/x.wav"], str(tmp_path / "e.npz")
    )
    found = read_npz(run_embed(both).out)
    assert list(found) == [f"{tmp_path}/a/x.wav", f"{tmp_path}/b/x.wav"]
    embedder = load_encoder(weights)
    for name, rows in found.items():
        assert_close(rows[0], embedder(read_audio(name)).double(), factor=30)


def test_weights_that_change_while_they_are_read_are_refused(weights, corpus, tmp_path, monkeypatch):
    open_encoder = module.open_encoder

    def changing(*args, **words):
        embedder = open_encoder(*args, **words)
        save_encoder(weights, AudioNTT2020(16, 8), config={}, stats=None)
        return embedder

    monkeypatch.setattr(module, "open_encoder", changing)
    with pytest.raises(ValueError, match=r"encoder\.pth: changed while it was read"):
        run_embed(config(weights, corpus, tmp_path / "e.npz"))


def test_statistics_of_another_front_end_are_refused(weights, corpus, tmp_path):
    for n_mels in (16, 24):
        write_stats(tmp_path / "stats.json", Stats(-7.0, 4.0, 10), LogMel(n_mels=n_mels), 0.95)
        settings = config(weights, corpus, tmp_path / "e.npz", stats=str(tmp_path / "stats.json"))
        if n_mels == 16:
            run_embed(settings)
        else:
            with pytest.raises(ValueError, match=r"stats\.json: computed with n_mels 24, expected 16"):
                run_embed(settings)


@pytest.mark.parametrize("suffix", ["npz", "npy", "csv"])
def test_names_of_any_bytes_come_back(weights, tmp_path, suffix):
    names = ["a,b.wav", 'quote".wav', "line\nend.wav", "return\r.wav", " space .wav", "'.wav", "\udcff.wav", "ü.wav"]
    (tmp_path / "audio").mkdir()
    for name in names:
        soundfile.write(os.fsencode(tmp_path / "audio" / name), 0.2 * torch.randn(3000).numpy(), 16000, format="WAV")
    out = run_embed(config(weights, tmp_path / "audio", tmp_path / f"e.{suffix}")).out
    if suffix == "npz":
        found = list(read_npz(out))
    else:
        path = out if suffix == "csv" else out.with_name(f"{out.name}.names.csv")
        with open(path, newline="", encoding="utf-8", errors="surrogateescape") as file:
            found = [line["file_name"] for line in csv.DictReader(file)]
    assert found == sorted(names)


def test_files_by_name_and_bfloat16(weights, corpus, tmp_path):
    paths = [str(corpus / "z.wav"), str(corpus / "a")]
    result = run_embed(EmbedConfig(weights, paths, out=str(tmp_path / "e.npz"), workers=0, dtype="bfloat16"))
    found, expected = read_npz(result.out), wanted(weights, corpus)
    assert list(found) == [str(corpus / name) for name in ("z.wav", "a/one.wav", "a/two.flac")]
    for name in ("z.wav", "a/one.wav"):
        assert torch.cosine_similarity(found[str(corpus / name)], expected[name]).item() > 0.999


def test_refused(weights, corpus, tmp_path):
    (tmp_path / "bad").mkdir()
    (tmp_path / "folder.npz").mkdir()
    (tmp_path / "bad" / "a.wav").write_text("no audio")
    pack(corpus, tmp_path / "store", workers=0)
    for words, settings in {
        "out: expected a name ending in .npz, .npy, .csv": {"out": "e.txt"},
        "dtype: expected one of float32, bfloat16": {"dtype": "float8"},
        "device: expected auto, cpu": {"device": "toaster"},
        "device: expected one": {"device": "cuda:99"},
        "a packed store, which pretrain and stats read": {"paths": [str(tmp_path / "store")]},
        "paths: expected audio files": {"paths": []},
        "no such file or folder": {"paths": [str(tmp_path / "missing")]},
        "none of 1 files can be embedded: a.wav: not audio": {"paths": [str(tmp_path / "bad")]},
        "batch_sec: expected": {"batch_sec": -1.0},
        "workers: expected": {"workers": -1},
        "Is a directory": {"out": str(tmp_path / "folder.npz")},
        "Not a directory": {"out": str(tmp_path / "encoder.pth" / "e.npz")},
    }.items():
        given = {"paths": [str(corpus)], "out": str(tmp_path / "e.npz"), "workers": 0} | settings
        with pytest.raises((ValueError, OSError), match=words):
            run_embed(EmbedConfig(weights, **given))
    made = sorted(os.listdir(tmp_path))
    assert made == ["bad", "corpus", "encoder.pth", "folder.npz", "store"]
