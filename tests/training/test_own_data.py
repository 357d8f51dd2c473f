"""A user's own data, encoder and optimiser: from Python, resumed bit for bit, in one process and several."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import webdataset
from helpers import ranks
from helpers.own import Flat, Memory
from helpers.runs import TINY, read_log, same_run

import byola_fast
from byola_fast import PretrainConfig, cli, pretrain
from byola_fast.audio.pack import pack
from byola_fast.audio.store import SegmentStore
from byola_fast.networks.checkpoint import CheckpointError
from byola_fast.training import pretrain as trainer
from examples import hugging_face_datasets, webdataset_shards

GOOD = ["a.wav", "b.flac", "c.ogg", "deeper/d.opus", "deeper/e.mp3", "f.wav", "text.wav"]  # one of them is no audio


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    monkeypatch.setattr(trainer, "draw_training", lambda *_, **__: None)
    monkeypatch.setattr(trainer, "draw_views", lambda *_, **__: None)


@pytest.fixture(scope="module")
def parquet(recordings, tmp_path_factory) -> str:
    clips = [{"audio": {"path": name, "bytes": (recordings / name).read_bytes()}, "label": 0} for name in GOOD]
    path = tmp_path_factory.mktemp("parquet") / "train.parquet"
    datasets.Dataset.from_list(clips).cast_column("audio", datasets.Audio()).to_parquet(path)  # as on the Hub
    return str(path)


@pytest.fixture(scope="module")
def shards(recordings, tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("shards")
    for number in range(2):
        with webdataset.TarWriter(str(folder / f"{number}.tar")) as tar:
            for name in GOOD[number::2]:
                path = recordings / name
                tar.write({"__key__": path.stem, path.suffix[1:]: path.read_bytes(), "json": {"label": 0}})
    return str(folder)


@pytest.fixture(params=["parquet", "shards"])
def example(request, parquet, shards, monkeypatch, tmp_path) -> tuple[Any, str]:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    return (hugging_face_datasets, parquet) if request.param == "parquet" else (webdataset_shards, shards)


def test_an_example_on_real_data_resumes_bit_for_bit(example, tmp_path, caplog):
    module, data = example
    module.main(data, out=str(tmp_path / "whole"), **TINY | {"steps": 5})
    assert caplog.text.count("skipping clip") == 1  # the text file
    for steps in (2, 5):
        module.main(data, out=str(tmp_path / "parts"), **TINY | {"steps": steps})
    same_run(tmp_path / "whole", tmp_path / "parts")
    by_duration = TINY | {"steps": 2, "sample_by": "duration", "workers": 1}
    module.main(data, out=str(tmp_path / "by_duration"), **by_duration)
    assert read_log(tmp_path / "by_duration") != read_log(tmp_path / "whole")[:2]


def test_examples_give_the_segments_of_their_files(recordings, parquet, shards, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows = datasets.load_dataset("parquet", data_files=parquet, split="train")
    files = [recordings / name for name in GOOD]
    ordered = sorted(files, key=lambda path: GOOD.index(path.relative_to(recordings).as_posix()) % 2)
    for source, paths in (
        (hugging_face_datasets.DatasetSource(rows), files),
        (webdataset_shards.ShardSource(shards), ordered),
    ):
        assert len(source) == len(paths)
        for index, path in enumerate(paths):
            if path.name != "text.wav":
                wav = byola_fast.audio.read_segment(path, 15200, seed=0, epoch=4, index=index, draw=1)
                assert torch.equal(source.read(index, 4, 1), wav)
                assert torch.equal(source.whole(index), byola_fast.read_audio(path))
        pack(source, tmp_path / f"{type(source).__name__}", workers=0)
        assert int(SegmentStore(tmp_path / f"{type(source).__name__}").readable.sum()) == 6


def train_example(name: str, data: str, out: str, steps: int) -> tuple[int, float]:
    module = {"parquet": hugging_face_datasets, "shards": webdataset_shards}[name]
    result = module.main(data, out=out, **TINY | {"steps": steps})
    return result.steps, result.loss


@pytest.mark.slow
@pytest.mark.parametrize("name", ["parquet", "shards"])
def test_an_example_trains_on_two_processes_and_resumes(name, parquet, shards, tmp_path):
    data = parquet if name == "parquet" else shards
    for out, parts in (("whole", (4,)), ("parts", (2, 4))):
        for steps in parts:
            folder = tmp_path / f"ranks{out}{steps}"
            results = ranks.run(2, folder, train_example, name, data, str(tmp_path / out), steps)
            assert results == [(steps, read_log(tmp_path / out)[-1]["loss"])] * 2
    same_run(tmp_path / "whole", tmp_path / "parts")


def config(out: Path, **changes: Any) -> PretrainConfig:
    settings = {name: value for name, value in TINY.items() if name != "feature_d"}
    return PretrainConfig(**{"out": str(out)} | settings | changes)


def own(parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(
        [{"params": parameters[:2], "lr": 0.01}, {"params": parameters[2:]}], lr=0.1, momentum=0.9, nesterov=True
    )


def test_everything_of_your_own_resumes_bit_for_bit(tmp_path):
    runs = [("whole", 5)] + [("parts", steps) for steps in (2, 5)]
    for name, steps in runs:
        torch.manual_seed(1)
        given = config(tmp_path / name, steps=steps, warmup_steps=2)
        result = pretrain(given, source=Memory(6, 4000), encoder=Flat(), optimizer=own)
        assert result.steps == steps
    log = read_log(tmp_path / "parts")
    assert len(log) == 5
    assert log[0]["lr"] == pytest.approx(0.005)
    encoder = byola_fast.load_encoder(tmp_path / "parts" / "encoder.pth", encoder=Flat)
    assert encoder(torch.zeros(1, 16000)).shape == (1, 12)
    content = torch.load(tmp_path / "parts" / "checkpoint.pt", weights_only=True)
    assert content["config"]["lr"] is None
    assert [group["momentum"] for group in content["optimizer"]["param_groups"]] == [0.9, 0.9]


def test_your_own_optimiser_resumes_bit_for_bit(tmp_path):
    for name, steps in (("whole", 5), ("parts", 2), ("parts", 5)):
        torch.manual_seed(1)  # of Flat's weights
        pretrain(config(tmp_path / name, steps=steps), source=Memory(6, 4000), encoder=Flat(), optimizer=own)
    same_run(tmp_path / "whole", tmp_path / "parts")
    with pytest.raises(ValueError, match=r"a run with other settings \(lr: None there, 0.0003 now\)"):
        pretrain(config(tmp_path / "parts", steps=6), source=Memory(6, 4000), encoder=Flat())
    with pytest.raises(CheckpointError, match="does not fit this run: "):
        pretrain(
            config(tmp_path / "parts", steps=6),
            source=Memory(6, 4000),
            encoder=Flat(),
            optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1),
        )


@pytest.mark.parametrize(
    ("changes", "given", "words"),
    [
        ({}, {}, "audio_dir: expected a folder of audio files"),
        ({"audio_dir": "x"}, {"source": Memory(6, 4000)}, "audio_dir: expected none beside source=, got 'x'"),
        ({"demo": True}, {"source": Memory(6, 4000)}, "demo: expected none beside source=, got True"),
        (
            {"encoder": "AudioNTT2020"},
            {"source": Memory(6), "encoder": Flat()},
            "encoder: expected none beside en",
        ),
        ({"lr": 0.1}, {"source": Memory(6), "optimizer": own}, "lr: expected none beside optimizer=, got 0.1"),
        ({}, {"source": Memory(6, 15200)}, "source: num_samples: expected 4000, 0.25 s at 16000 Hz, got 15200"),
        ({}, {"source": [1, 2]}, "source: expected __len__, num_samples, listing, read, got list without num_samples"),
        ({"sample_by": "duration"}, {"source": Memory(6, 4000)}, "got Memory without seconds"),
        ({"sample_by": "hour"}, {"source": Memory(6, 4000)}, "sample_by: expected one of .*, got 'hour'"),
        ({}, {"source": Memory(6, 4000), "encoder": torch.nn.Identity()}, "encoder: expected an attribute feature_d"),
        ({}, {"source": Memory(6, 4000), "optimizer": list}, "optimizer: expected a function that returns a torch opt"),
        (
            {},
            {"source": Memory(6, 4000), "optimizer": "adam"},
            "expected a function that returns a torch optimiser, got",
        ),
        (
            {},
            {"source": Memory(6, 4000), "encoder": Flat},
            "encoder: expected a module, got <class 'helpers.own.Flat'>",
        ),
        ({"probe_every": 5}, {"source": Memory(6, 4000)}, "probe_every: expected a probe to score, got none"),
        ({"cuda_graph": True}, {"source": Memory(6, 4000)}, "cuda_graph: expected false"),
    ],
)
def test_what_does_not_fit_is_named_before_any_work(tmp_path, changes, given, words):
    with pytest.raises((TypeError, ValueError), match=words):
        pretrain(config(tmp_path / "run", **changes), **given)
    assert not (tmp_path / "run").exists()


def test_a_store_is_a_source_as_any_other(recordings, tmp_path):
    pack(recordings, tmp_path / "store", workers=0)
    store = SegmentStore(tmp_path / "store", unit_sec=0.25)
    assert pretrain(config(tmp_path / "run", steps=2), source=store, encoder=Flat()).steps == 2
    with pytest.raises(ValueError, match="sample_rate: expected 16000 Hz, the rate of the source, got 8000"):
        pretrain(config(tmp_path / "other", sample_rate=8000), source=store)


def test_several_folders_and_a_manifest_train_from_the_command_line(recordings, tmp_path):
    (recordings / "some.csv").write_text("file_name,start,end\na.wav,0.1,0.5\nb.flac,,\n")
    flags = ["--no-tensorboard", *(f"--{name}={value}" for name, value in TINY.items() if name != "tensorboard")]
    paths = [str(recordings / "some.csv"), str(recordings / "deeper"), str(recordings / "f.wav")]
    assert cli.main(["pretrain", *paths, "--out", str(tmp_path / "run"), *flags]) == 0
    assert torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["clips"] == 5
    assert cli.main(["pack", *paths, str(tmp_path / "store"), "--workers=0"]) == 0
    assert SegmentStore(tmp_path / "store").names[:2] == ["a.wav#0.1-0.5", "b.flac#0-"]
    assert cli.main(["stats", *paths, "--workers=0", "--segments=8"]) == 0
