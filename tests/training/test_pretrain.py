"""The trainer on tiny recordings: its files, its recovery from faults, its repeatability."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import soundfile
import torch
from helpers.runs import TINY, read_log

from byola_fast import BYOL, AudioNTT2020, Augment, load_encoder
from byola_fast.audio.pack import pack
from byola_fast.audio.reading import AudioError
from byola_fast.networks.checkpoint import load_checkpoint
from byola_fast.networks.encoder_file import load_encoder_weights
from byola_fast.objectives.collapse import effective_rank, spread
from byola_fast.runtime import device as device_module
from byola_fast.spectrograms.corpus_statistics import StatsConfig, run_stats
from byola_fast.training import pretrain as trainer
from byola_fast.training import watch
from byola_fast.training.config import PretrainConfig
from byola_fast.training.pretrain import pretrain
from byola_fast.training.watch import CollapseWatch

MOUNTS = bool(shutil.which("unshare")) and subprocess.run(["unshare", "-Urm", "true"]).returncode == 0
BROKEN = ("empty.flac", "text.wav", "headless.mp3")


@pytest.fixture
def run(recordings, tmp_path, monkeypatch):
    def run(name: str = "run", pictures: bool = False, **changes):
        if not pictures:  # which take longer than the training here
            monkeypatch.setattr(trainer, "draw_training", lambda *_, **__: None)
            monkeypatch.setattr(trainer, "draw_views", lambda *_, **__: None)
        return pretrain(
            PretrainConfig(**({"audio_dir": str(recordings), "out": str(tmp_path / name)} | TINY | changes))
        )

    return run


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["byola-v1", "byola-v2"])
def test_a_run_writes_everything_and_names_broken_files_once(run, caplog, preset):
    result = run(pictures=True, preset=preset, steps=5)
    assert (result.steps, result.stopped_by) == (5, 0)
    assert {path.name for path in result.out.iterdir()} == {
        *(
            "log.jsonl",
            "checkpoint.pt",
            "encoder.pth",
            "training.png",
            "views.png",
            "config.yaml",
            "README.md",
            ".lock",
        ),
    }
    log = read_log(result.out)
    assert [line["step"] for line in log] == [1, 2, 3, 4, 5]
    assert [line["epoch"] for line in log] == [0, 0, 0, 1, 1]  # twelve files, others in place of the broken three
    names = {"step", "epoch", "loss", "spread", "effective_rank", "samples_per_s", "refused", "lr"}
    assert all(set(line) == names and 1 < line["effective_rank"] <= 4 for line in log)
    assert all(0 < line["loss"] < 8 and 0.2 < line["spread"] < 1.2 and line["refused"] == 0 for line in log)
    assert log[-1]["lr"] == {"byola-v1": 3e-4, "byola-v2": 1e-4}[preset]
    assert (result.loss, result.spread) == (log[-1]["loss"], log[-1]["spread"])
    skipped = [record.getMessage() for record in caplog.records if record.getMessage().startswith("skipping ")]
    assert sorted(next(name for name in BROKEN if name in line) for line in skipped) == sorted(BROKEN)


def test_small_data_fills_in_what_is_not_given():
    now = PretrainConfig(audio_dir="x", preset="small-data").resolved("cpu")
    assert (now.objective, now.reconstruction, now.unit_sec) == ("simclr", 5.0, 0.31)
    assert (now.encoder, now.feature_d, now.lr, now.mixup_ratio) == ("AudioNTT2020", 512, 3e-4, 0.4)
    now = PretrainConfig(audio_dir="x", preset="small-data", objective="byol", feature_d=3072).resolved("cpu")
    assert (now.objective, now.reconstruction, now.encoder) == ("byol", None, "AudioNTT2020")
    now = PretrainConfig(audio_dir="x").resolved("cpu")
    assert (now.objective, now.reconstruction, now.unit_sec) == ("byol", None, 0.95)


def test_small_data_trains(run):
    result = run(preset="small-data", objective=None, unit_sec=None, steps=3)
    assert result.steps == 3
    assert 0 < result.loss < 30


def test_what_is_written_can_be_loaded(run):
    out = run().out
    content = load_checkpoint(out / "encoder.pth")
    assert content["config"]["feature_d"] == 16
    assert content["config"]["f_max"] == 7800
    assert -16 < content["stats"][0] < 5
    assert 0.1 < content["stats"][1] < 10
    encoder = AudioNTT2020(d=16)
    load_encoder_weights(encoder, out / "encoder.pth")
    whole = load_checkpoint(out / "checkpoint.pt")
    assert torch.equal(encoder.fc[0].weight, whole["model"]["online.encoder.fc.0.weight"])
    assert whole["step"] == 4
    assert whole["config"]["preset"] == "byola-v1"
    assert whole["optimizer"]["state"][0]["step"] == 4
    aug = Augment(n_memory=16, stats=(0.0, 1.0))
    aug.load_state_dict(whole["augment"])
    assert len(aug.bank) == 16
    assert aug.rng.tolist() == [0, 4]


def test_a_run_says_where_it_comes_from(run, recordings):
    for steps in (2, 3):
        out = run(steps=steps).out
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert ["run" in line for line in lines] == [True, False, True]
    told = load_encoder(out / "encoder.pth").about["provenance"]
    assert told.items() >= lines[2]["run"].items()
    assert (told["clips"], told["step"], told["total_steps"]) == (12, 3, 3)
    assert (told["torch"], told["data"]) == (str(torch.__version__), str(recordings))
    assert len(told["listing"]) == 64
    assert told["saved"] >= told["begun"]
    assert f"# torch: {torch.__version__}\n" in (out / "config.yaml").read_text()
    card = (out / "README.md").read_text()
    assert f"| listing | {told['listing']} |" in card
    assert "| step | 3 |" in card
    assert "| spread | " in card


def test_the_same_seed_gives_the_same_losses_for_any_workers(run):
    losses = [
        [line["loss"] for line in read_log(run(name, steps=3, seed=seed, workers=workers).out)]
        for name, seed, workers in (("a", 1, 0), ("b", 1, 2), ("c", 2, 0))
    ]
    assert losses[0] == losses[1]
    assert losses[0] != losses[2]


@pytest.mark.slow
def test_training_learns_and_moves_the_target(run, device):
    for steps in (5, 25):  # the second goes on: on a GPU, with a CUDA graph captured anew
        result = run(steps=steps, lr=3e-3, device=str(device), log_every=1, compile=False)
    log = read_log(result.out)
    assert [line["step"] for line in log] == list(range(1, 26))
    assert sum(line["loss"] for line in log[-5:]) < 0.7 * sum(line["loss"] for line in log[:5])
    state = load_checkpoint(result.out / "checkpoint.pt")["model"]
    weights = state["online.encoder.fc.0.weight"], state["target.target.encoder.fc.0.weight"]
    assert not torch.equal(*weights)


def test_running_statistics_and_few_clips(run, caplog):
    caplog.set_level("INFO", logger="byola_fast")
    result = run(stats_segments=0, batch_size=16, steps=3)
    assert result.steps == 3
    text = caplog.text
    assert "12 clips are fewer than batch_size 16: each gives up to 2 segments an epoch" in text
    assert "training AudioNTT2020, 16-d, on cpu: 3 steps of 16 segments, from 12 clips" in text
    assert all(text.count(name) == 1 for name in BROKEN)
    mean, std = load_checkpoint(result.out / "encoder.pth")["stats"]
    assert -16 < mean < 5
    assert 0.1 < std < 10


def test_epochs_end_a_run_and_lines_are_as_rare_as_asked_for(run):
    result = run(steps=None, epochs=2, log_every=4)
    assert [line["step"] for line in read_log(result.out)] == [4, 6]


def test_one_file_alone_trains(run, recordings):
    assert run(audio_dir=str(recordings / "deeper" / "d.opus"), steps=2).steps == 2


def test_without_matplotlib_one_line_says_so(run, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    out = run(pictures=True).out
    assert not list(out.glob("*.png"))
    assert caplog.text.count("pip install matplotlib") == 1
    assert (out / "encoder.pth").exists()


@pytest.mark.parametrize("stats_segments", [0, 8])
def test_all_broken_is_an_error(run, tmp_path, stats_segments):
    folder = tmp_path / "broken"
    folder.mkdir()
    for name in "abcde":
        (folder / f"{name}.wav").write_text("no audio")
    with pytest.raises(AudioError, match=r"none of the 5 files can be read"):
        run(audio_dir=str(folder), stats_segments=stats_segments)


def test_a_loss_that_is_not_finite_stops_the_run(run):
    with pytest.raises(ValueError, match="lr: the loss became nan at step"):
        run(lr=1e30, steps=20)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"audio_dir": None}, "audio_dir"),
        ({"preset": "byola-v3"}, "preset: expected one of 'byola-v1', 'byola-v2'"),
        ({"objective": "dino"}, "objective: expected one of 'byol', 'simclr', 'moco', 'cola'"),
        ({"encoder": "ViT"}, "encoder: expected one of"),
        ({"dtype": "fp8"}, "dtype: expected one of"),
        ({"resume": True, "restart": True}, "restart: expected no more than one of"),
        ({"queue_size": 9}, "queue_size: objective 'byol' has no use for it"),
        ({"save_minutes": 0.0}, "save_minutes: expected minutes above 0"),
        ({"cuda_graph": True}, "cuda_graph: .* it needs a GPU, and this run is on the CPU"),
        ({"store_on_gpu": True}, "store_on_gpu: expected a packed store and a GPU"),
        ({"batch_size": 1}, "batch_size: expected at least 2, got 1"),
        ({"steps": 0}, "steps: expected at least 1"),
        ({"lr": -1.0}, "lr"),
        ({"ema_decay": 2.0}, "ema_decay"),
        ({"unit_sec": 0.04}, r"unit_sec: expected at least 1120 samples, 0\.07 s, for AudioNTT2020, got 0\.04"),
        ({"unit_sec": 0.01}, "unit_sec: expected at least 1120 samples"),
        ({"mixup_ratio": 2.0}, "mixup_ratio: expected a weight"),
        ({"freq_scale": (1.5, 0.6)}, r"freq_scale: expected \(min, max\)"),
        ({"virtual_crop_scale": (0.5, 1.5)}, "virtual_crop_scale"),
        ({"encoder": "AudioNTT2022", "feature_d": 512}, r"d \(feature_d\): expected more than the 1024"),
        ({"interpolation": "nearest"}, "interpolation"),
        ({"seed": 1 << 64}, "seed: expected below 9223372036854775808"),
        ({"seed": -1}, "seed: expected at least 0, got -1"),
        ({"threads": 1 << 31}, "threads: expected below 2147483648"),
        ({"batch_size": (1 << 63) - 1}, "batch_size: expected below 2147483648"),  # in floats, no step makes an epoch
        ({"unit_sec": 1e308}, "unit_sec: expected seconds of 1 to"),
        ({"unit_sec": float("nan")}, "unit_sec: expected seconds of 1 to"),
        ({"lr": float("nan")}, "lr: expected a learning rate above 0, got nan"),
        ({"epochs": 0}, "epochs: expected at least 1, got 0"),
    ],
)
def test_settings_out_of_range_are_named(run, changes, words, monkeypatch, tmp_path):
    monkeypatch.setattr(trainer, "take_stats", lambda *_: pytest.fail("statistics were taken first"))
    with pytest.raises(ValueError, match=words):
        run(**changes)
    assert not (tmp_path / "run").exists()


def test_a_folder_without_audio_is_an_error(run, tmp_path):
    (tmp_path / "notes.txt").write_text("no audio")
    with pytest.raises(AudioError, match="no audio file in this folder"):
        run(audio_dir=str(tmp_path))


@pytest.mark.parametrize("stats_segments", [0, 8])
def test_silence_alone_is_an_error(run, tmp_path, stats_segments):
    """It used to train on rounding errors, with a loss that falls."""
    (tmp_path / "silence").mkdir()
    for number in range(4):
        soundfile.write(tmp_path / "silence" / f"{number}.wav", np.zeros(8000), 16000)
    with pytest.raises(ValueError, match="audio_dir: expected sounds, got log-mels with a std of"):
        run(audio_dir=str(tmp_path / "silence"), stats_segments=stats_segments)
    assert not list((tmp_path / "run").glob("*.p*t*"))


def test_files_that_vanish_or_hold_nan_are_named_and_replaced(run, tmp_path, monkeypatch, caplog):
    folder = tmp_path / "few"
    folder.mkdir()
    for number in range(6):
        wav = np.random.default_rng(number).normal(0, 0.1, 8000).astype(np.float32)
        wav[:] = np.nan if number == 0 else wav
        soundfile.write(folder / f"{number}.wav", wav, 16000, subtype="FLOAT")
    update, calls = BYOL.update_target, []

    def vanish(self):
        calls.append(1)
        update(self)
        if len(calls) == 2:
            (folder / "3.wav").unlink()

    monkeypatch.setattr(BYOL, "update_target", vanish)
    result = run(audio_dir=str(folder), steps=8, epochs=9)
    log = read_log(result.out)
    assert [line["refused"] for line in log] == [0] * 8
    assert all(np.isfinite(line["loss"]) for line in log)
    named = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert sorted(next(n for n in ("0.wav", "3.wav") if n in line) for line in named) == ["0.wav", "3.wav"]


def test_a_packed_store_trains_as_its_folder_does(run, recordings, tmp_path):
    pack(recordings, tmp_path / "store")
    losses = [
        [line["loss"] for line in read_log(run(name, audio_dir=str(path), steps=2).out)]
        for name, path in (("a", recordings), ("b", tmp_path / "store"))
    ]
    assert losses[0] == pytest.approx(losses[1], abs=0.02)  # 16 bits


def test_statistics_from_a_file(run, recordings, tmp_path, caplog):
    stats = run_stats(
        StatsConfig(audio_dir=str(recordings), out=str(tmp_path / "stats.json"), segments=8, unit_sec=0.25, workers=0)
    )
    out = run(stats=str(tmp_path / "stats.json"), steps=1).out
    assert load_checkpoint(out / "encoder.pth")["stats"] == pytest.approx(stats[:2])
    assert load_checkpoint(run("other", steps=1).out / "encoder.pth")["stats"] == pytest.approx(stats[:2])
    with pytest.raises(ValueError, match="computed with f_min 60"):
        run("third", stats=str(tmp_path / "stats.json"), f_min=50.0)


@pytest.mark.skipif(not MOUNTS, reason="this system allows no mount")
@pytest.mark.parametrize("method", ["fork", pytest.param("forkserver", marks=pytest.mark.slow)])
def test_a_folder_trains_with_little_shared_memory(recordings, tmp_path, method):
    """Where workers sent batches through /dev/shm, of 64 MB in a container, a run waited for ever."""
    config = TINY | {"audio_dir": str(recordings), "out": str(tmp_path / "run"), "batch_size": 32, "workers": 2}
    code = (
        "import multiprocessing, sys\n"
        "from byola_fast.training.pretrain import PretrainConfig, pretrain\n"
        "if __name__ == '__main__':\n"
        f"    multiprocessing.set_start_method({method!r})\n"
        f"    pretrain(PretrainConfig(**{config}))\n"
    )
    (tmp_path / "script.py").write_text(code)
    mount = "mount -t tmpfs -o size=64k tmpfs /dev/shm"  # a batch has 512 kB
    command = ["unshare", "-Urm", "sh", "-c", f'{mount} && exec "$0" "$1"', sys.executable, str(tmp_path / "script.py")]
    subprocess.run(command, check=True, timeout=120)
    assert read_log(tmp_path / "run")[-1]["step"] == 4


def test_bfloat16_learns_and_keeps_weights_in_float32(run):
    result = run(steps=25, lr=3e-3, dtype="bfloat16")
    log = read_log(result.out)
    assert sum(line["loss"] for line in log[-5:]) < 0.7 * sum(line["loss"] for line in log[:5])
    state = load_checkpoint(result.out / "checkpoint.pt")
    assert {x.dtype for x in state["model"].values() if x.is_floating_point()} == {torch.float32}
    assert log[0]["loss"] != read_log(run("wide", steps=1, lr=3e-3).out)[0]["loss"]


@pytest.mark.parametrize(("flags", "warned"), [("fpu avx2", True), ("fpu avx512_bf16", False), ("asimd bf16", False)])
def test_bfloat16_on_a_cpu_without_it_warns(run, tmp_path, monkeypatch, caplog, flags, warned):
    (tmp_path / "cpuinfo").write_text(f"flags : {flags}\n")
    monkeypatch.setattr(device_module, "CPU_INFO", tmp_path / "cpuinfo")
    run(steps=1, dtype="bfloat16")
    assert ("float32 is 5 to 15 times as fast" in caplog.text) == warned


def test_a_profile_times_every_stage(run, capsys):
    out = run(profile=True, steps=5).out
    printed = capsys.readouterr().err
    stages = ["data", "log-mel", "augmentation", "forward", "backward", "optimiser", "EMA"]
    content = json.loads((out / "profile.json").read_text())
    assert list(content["ms"]) == stages
    assert all(stage in printed for stage in stages)
    assert all(ms > 0 for ms in content["ms"].values())
    assert (content["steps"], content["samples"]) == (2, 4)
    assert content["samples_per_s"] == pytest.approx(4e3 / sum(content["ms"].values()))


def test_collapsed_representations_warn(run, monkeypatch, caplog):
    monkeypatch.setattr(watch, "spread", lambda _: torch.tensor(0.01))
    run(steps=8)
    message = [record.getMessage() for record in caplog.records if "collapse" in record.getMessage()]
    assert len(message) == 1
    assert message[0].startswith("step 5: representations collapse: spread 0.010 (1 is healthy")


def test_each_collapse_warns_once():
    collapsed = CollapseWatch()
    spreads = [0.05] * 4 + [0.5] + [0.05] * 7 + [0.5] + [0.0] * 5
    for ranks in ([9.0] * len(spreads), [1.0 if each < 0.1 else 9.0 for each in spreads]):
        both = zip(spreads if ranks[0] == 9 else [0.8] * len(spreads), ranks, strict=True)
        lines = [{"step": step, "spread": each, "effective_rank": rank} for step, (each, rank) in enumerate(both)]
        message = [collapsed(line, largest_rank=64) is not None for line in lines]
        assert [step for step, said in enumerate(message) if said] == [9, 17]
    narrow = {"step": 1, "spread": 0.8, "effective_rank": 1.9}
    assert not any(CollapseWatch()(narrow, largest_rank=4) for _ in range(9))


def test_projections_on_a_line_are_not_healthy():
    line = torch.randn(64, 1) * torch.randn(1, 256)
    assert spread(line) > 0.7
    assert effective_rank(line) == pytest.approx(1.0)


def test_tensorboard_gets_the_log(run):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for steps in (2, 3):  # the second goes on
        out = run(tensorboard=True, steps=steps, pictures=True).out
    events = reader.EventAccumulator(str(out / "tensorboard"))
    events.Reload()
    assert events.Images("training")[0].width == 880
    settings = list((out / "tensorboard" / "settings").iterdir())
    assert len(settings) == 1  # of the whole run
    compared = reader.EventAccumulator(str(settings[0]))
    compared.Reload()
    assert compared.Scalars("final/loss")[-1].value == pytest.approx(read_log(out)[-1]["loss"])
    assert {"_hparams_/session_start_info"} <= set(compared.summary_metadata)
    assert [(event.step, pytest.approx(event.value)) for event in events.Scalars("loss")] == [
        (line["step"], line["loss"]) for line in read_log(out)
    ]


@pytest.mark.slow
def test_copies_of_the_encoder_are_kept(recordings, tmp_path):
    pretrain(PretrainConfig(**TINY | {"audio_dir": str(recordings), "out": str(tmp_path), "keep_every": 2, "steps": 5}))
    kept = [load_checkpoint(tmp_path / f"encoder-{step}.pth")["state_dict"] for step in (2, 4)]
    assert sorted(path.name for path in tmp_path.glob("encoder*")) == ["encoder-2.pth", "encoder-4.pth", "encoder.pth"]
    last = load_checkpoint(tmp_path / "encoder.pth")["state_dict"]
    name = "features.0.weight"
    assert not torch.equal(kept[0][name], kept[1][name])
    assert not torch.equal(kept[1][name], last[name])
