"""Folders to one file: formats, what is left after a kill, ranks, broken and changed files."""

from __future__ import annotations

import csv
import json
import logging
import os

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
from byola_fast.runtime.distributed import RankError, World

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


@pytest.mark.parametrize("ranks", [2, 7])
def test_ranks_share_the_files(weights, corpus, tmp_path, monkeypatch, ranks):
    class OneAtATime(World):
        def all_max(self, *values):
            return list(values)

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

    lost = Lost(torch.device("cpu"), 0, 2)
    monkeypatch.setattr(module, "join", lambda *_: module.nullcontext(lost))
    settings = config(weights, corpus, tmp_path / "e.npz")
    with pytest.raises(RankError, match=r"rank 0 lost another rank.*kept in .*e\.npz\.parts"):
        run_embed(settings)
    monkeypatch.undo()
    assert run_embed(settings).resumed == 2  # of three, one of them broken


def test_files_by_name_and_bfloat16(weights, corpus, tmp_path):
    paths = [str(corpus / "z.wav"), str(corpus / "a")]
    result = run_embed(EmbedConfig(weights, paths, out=str(tmp_path / "e.npz"), workers=0, dtype="bfloat16"))
    found, expected = read_npz(result.out), wanted(weights, corpus)
    assert list(found) == [str(corpus / name) for name in ("z.wav", "a/one.wav", "a/two.flac")]
    for name in ("z.wav", "a/one.wav"):
        assert torch.cosine_similarity(found[str(corpus / name)], expected[name]).item() > 0.999


def test_refused(weights, corpus, tmp_path):
    (tmp_path / "bad").mkdir()
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
        "none of 1 files can be read: a.wav: not audio": {"paths": [str(tmp_path / "bad")]},
        "batch_sec: expected": {"batch_sec": -1.0},
    }.items():
        given = {"paths": [str(corpus)], "out": str(tmp_path / "e.npz"), "workers": 0} | settings
        with pytest.raises((ValueError, OSError), match=words):
            run_embed(EmbedConfig(weights, **given))
    assert not (tmp_path / "e.npz").exists()
