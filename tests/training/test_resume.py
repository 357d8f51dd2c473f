"""A run stopped in any way resumes bit for bit, and nothing saved is lost."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import time
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import ranks
from helpers.runs import read_log, same_run
from torch import Tensor

from byola_fast import BYOL, LogMel, cli
from byola_fast.networks import checkpoint
from byola_fast.networks.checkpoint import CheckpointError, load_checkpoint
from byola_fast.runtime import files
from byola_fast.spectrograms.corpus_statistics import Stats, write_stats
from byola_fast.training import pretrain as trainer
from byola_fast.training import run_folder
from byola_fast.training.config import PretrainConfig, differing_settings
from byola_fast.training.pretrain import pretrain
from byola_fast.training.run_folder import RunFolder


def run_killed(config: dict[str, Any], kill_at: int) -> None:
    """Train until the middle of a step, and die there."""
    update, done = BYOL.update_target, []

    def killed(self: BYOL) -> None:
        done.append(1)
        if len(done) == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        update(self)

    BYOL.update_target = killed  # type: ignore[method-assign]
    pretrain(PretrainConfig(**config))


SCHEDULES = {"lr_schedule": "cosine", "warmup_steps": 9, "ema_schedule": "cosine"}


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{"stats_segments": 0}, {"preset": "byola-v2"} | SCHEDULES])
def test_twenty_steps_are_seven_a_kill_and_the_rest(settings, tmp_path, changes):
    config = settings | {"steps": 20, "save_every": 5} | changes
    pretrain(PretrainConfig(**config | {"out": str(tmp_path / "whole")}))
    killed = ranks.start(1, tmp_path, run_killed, config, 8)  # in the 8th step, after 7 whole ones
    assert ranks.finish(killed) == [-signal.SIGKILL]
    assert load_checkpoint(tmp_path / "run" / "checkpoint.pt")["step"] == 5
    assert [line["step"] for line in read_log(tmp_path / "run")] == [1, 2, 3, 4, 5, 6, 7]
    assert pretrain(PretrainConfig(**config)).steps == 20
    same_run(tmp_path / "whole", tmp_path / "run")


@pytest.mark.parametrize(
    "changes", [{"objective": "moco", "queue_size": 10}, {"objective": "cola"}, {"objective": "simclr"}]
)
def test_other_objectives_resume_too(settings, tmp_path, changes):
    pretrain(PretrainConfig(**settings | changes | {"steps": 5, "out": str(tmp_path / "whole")}))
    for steps in (2, 5):
        pretrain(PretrainConfig(**settings | changes | {"steps": steps}))
    same_run(tmp_path / "whole", tmp_path / "run")


def test_a_longer_run_resumes_and_a_finished_one_has_nothing_to_do(settings, tmp_path, caplog):
    caplog.set_level("INFO", logger="byola_fast")
    pretrain(PretrainConfig(**settings | {"steps": 3}))
    pretrain(PretrainConfig(**settings | {"steps": 5, "log_every": 2, "resume": True}))
    assert "resuming at step 3 of 5" in caplog.text
    assert [line["step"] for line in read_log(tmp_path / "run")] == [1, 2, 3, 4, 5]
    before = (tmp_path / "run" / "checkpoint.pt").read_bytes()
    for steps in (5, 4):
        result = pretrain(PretrainConfig(**settings | {"steps": steps}))
        assert (result.steps, result.stopped_by) == (5, 0)
        assert f"nothing to do: 5 of {steps} steps are done; raise --epochs or --steps to train longer" in caplog.text
        assert 0 < result.loss < 8
    assert (tmp_path / "run" / "checkpoint.pt").read_bytes() == before


def test_resuming_with_other_files_warns(settings, tmp_path, recordings, caplog):
    moved = tmp_path / "moved"
    shutil.copytree(recordings, moved)
    pretrain(PretrainConfig(**settings | {"steps": 1}))
    pretrain(PretrainConfig(**settings | {"steps": 2, "audio_dir": str(moved)}))
    assert "other files" not in caplog.text
    first = min(path for path in moved.rglob("*") if path.is_file())
    first.rename(first.with_stem("renamed"))
    pretrain(PretrainConfig(**settings | {"steps": 3, "audio_dir": str(moved)}))
    assert f"{moved} holds other files than at the start of the run; resuming with them" in caplog.text


def test_resuming_with_another_schedule_or_torch_warns(settings, monkeypatch, caplog):
    cosine = settings | {"lr_schedule": "cosine"}
    pretrain(PretrainConfig(**cosine | {"steps": 1}))
    monkeypatch.setattr(torch, "__version__", "99.0")
    pretrain(PretrainConfig(**cosine | {"steps": 2}))
    words = "the cosine schedule now ends at step 2 instead of 1: the learning rate jumps from 0 to 0.00015"
    assert words in caplog.text
    assert "torch 99.0 resumes a run of torch 2" in caplog.text
    caplog.clear()
    pretrain(PretrainConfig(**cosine | {"steps": 2}))
    assert "schedule" not in caplog.text
    assert "resumes a run" not in caplog.text


def test_resume_without_a_folder_reads_the_runs_own_settings(settings, tmp_path, capsys):
    pretrain(PretrainConfig(**settings | {"steps": 2}))
    (tmp_path / "run").rename(tmp_path / "moved")
    assert cli.main(["pretrain", "--out", str(tmp_path / "moved"), "--resume", "--steps=3"]) == 0
    assert len(read_log(tmp_path / "moved")) == 3
    assert cli.main(["pretrain", "--out", str(tmp_path / "none"), "--resume"]) == 2
    assert "audio_dir: expected a folder of audio files" in capsys.readouterr().err


def test_a_run_with_nothing_to_do_leaves_no_event_file(settings, tmp_path):
    for _ in range(2):
        pretrain(PretrainConfig(**settings | {"steps": 1, "tensorboard": True}))
    assert len(list((tmp_path / "run" / "tensorboard").glob("events*"))) == 1


def test_a_statistics_file_that_changed_is_named(settings, tmp_path):
    """The run used to go on with the numbers of its start."""
    path = tmp_path / "stats.json"
    to_lms = LogMel(**PretrainConfig(**settings).resolved("cpu").front_end())
    write_stats(path, Stats(-7.0, 4.0, 9), to_lms, 0.25)
    pretrain(PretrainConfig(**settings | {"steps": 1, "stats": str(path)}))
    write_stats(path, Stats(-7.0, 5.0, 9), to_lms, 0.25)
    with pytest.raises(ValueError, match=r"stats: .*stats\.json changed since the run began: \(-7\.0, 4\.0\) then"):
        pretrain(PretrainConfig(**settings | {"steps": 2, "stats": str(path)}))
    path.unlink()  # not needed any more
    assert pretrain(PretrainConfig(**settings | {"steps": 2, "stats": str(path)})).steps == 2


def test_another_configuration_is_named_and_nothing_is_touched(settings, tmp_path, recordings):
    pretrain(PretrainConfig(**settings | {"steps": 2}))
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    with pytest.raises(
        ValueError, match=r"other settings \(feature_d: 16 there, 24 now; lr: 0\.0003 there, 0\.001 now\)"
    ):
        pretrain(PretrainConfig(**settings | {"feature_d": 24, "lr": 1e-3}))
    with pytest.raises(ValueError, match=r"expected the 12 clips that the run began with, got 1"):
        pretrain(PretrainConfig(**settings | {"audio_dir": str(recordings / "a.wav")}))
    with pytest.raises(CheckpointError, match="no such file to resume"):
        pretrain(PretrainConfig(**settings | {"out": str(tmp_path / "elsewhere"), "resume": True}))
    assert not (tmp_path / "elsewhere").exists()
    assert {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()} == before
    assert pretrain(PretrainConfig(**settings | {"feature_d": 24, "steps": 1, "restart": True})).steps == 1
    assert [line["step"] for line in read_log(tmp_path / "run")] == [1]


def test_settings_that_may_change_do(recordings):
    before = dict(vars(PretrainConfig(freq_scale=(0.5, 1.0))))
    now = PretrainConfig(epochs=7, steps=9, audio_dir="moved", workers=3, device="cuda", freq_scale=[0.5, 1.0])
    assert differing_settings(before, now) == []
    assert differing_settings(before, PretrainConfig(seed=1, freq_scale=(0.5, 1.0))) == ["seed: 0 there, 1 now"]


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut short", b"no checkpoint"])
def test_a_damaged_checkpoint_is_not_replaced(settings, tmp_path, content):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "checkpoint.pt").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"checkpoint\.pt: .*; give another out, or restart to replace it"):
        pretrain(PretrainConfig(**settings))
    assert (folder / "checkpoint.pt").read_bytes() == content


def test_a_checkpoint_of_something_else_is_not_replaced(settings, tmp_path):
    (tmp_path / "run").mkdir()
    torch.save({"model": {}}, tmp_path / "run" / "checkpoint.pt")
    with pytest.raises(CheckpointError, match="no state to resume from"):
        pretrain(PretrainConfig(**settings))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_step_and_saves(settings, tmp_path, monkeypatch, number):
    update, done = BYOL.update_target, []

    def signalled(self):
        done.append(1)
        if len(done) == 3:
            os.kill(os.getpid(), number)  # in the middle of the third step
        update(self)

    before = signal.getsignal(number)
    monkeypatch.setattr(BYOL, "update_target", signalled)
    result = pretrain(PretrainConfig(**settings | {"steps": 6}))
    assert (result.steps, result.stopped_by) == (3, number)
    assert signal.getsignal(number) == before
    assert load_checkpoint(tmp_path / "run" / "checkpoint.pt")["step"] == 3
    assert pretrain(PretrainConfig(**settings | {"steps": 6})).stopped_by == 0
    pretrain(PretrainConfig(**settings | {"steps": 6, "out": str(tmp_path / "whole")}))
    same_run(tmp_path / "whole", tmp_path / "run")


def main_in_process(argv: list[str]) -> None:
    trainer.draw_training = trainer.draw_views = lambda *_, **__: None  # type: ignore[assignment]
    raise SystemExit(cli.main(argv))


def test_sigterm_leaves_with_143(settings, tmp_path):
    given = settings | {"steps": 10000, "epochs": 10000, "out": tmp_path / "run"}
    audio = given.pop("audio_dir")
    flags = [f"--{name}={value}" for name, value in given.items() if value is not False] + ["--no_tensorboard"]
    (process,) = ranks.start(1, tmp_path, main_in_process, ["pretrain", audio, *flags])
    deadline = time.monotonic() + 50
    log = tmp_path / "run" / "log.jsonl"
    while not log.exists() or not log.read_bytes():
        assert time.monotonic() < deadline
        assert process.is_alive(), (tmp_path / "rank0.err").read_text()
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGTERM)
    assert ranks.finish([process]) == [143]
    assert "stopped by a signal after step" in (tmp_path / "rank0.err").read_text()
    saved = load_checkpoint(tmp_path / "run" / "checkpoint.pt")["step"]
    assert saved == read_log(tmp_path / "run")[-1]["step"]


def test_a_loss_that_is_not_finite_leaves_the_last_good_checkpoint(settings, tmp_path, monkeypatch):
    forward, calls = BYOL.forward, []

    def poisoned(self, view1, view2):
        calls.append(1)
        return forward(self, view1 * (float("nan") if len(calls) == 3 else 1), view2)

    monkeypatch.setattr(BYOL, "forward", poisoned)
    with pytest.raises(ValueError, match=r"the loss became nan at step 3; .* step 2 is safe in"):
        pretrain(PretrainConfig(**settings | {"save_every": 1}))
    saved = load_checkpoint(tmp_path / "run" / "checkpoint.pt")
    assert saved["step"] == 2
    assert all(x.isfinite().all() for x in saved["model"].values())


def spoil_weight(learner: BYOL, _optimizer: Any) -> None:
    learner.encoder.fc[0].bias[0] = float("inf")


def spoil_statistics(learner: BYOL, _optimizer: Any) -> None:
    learner.encoder.features[1].running_var[0] = float("nan")


def spoil_moment(_learner: BYOL, optimizer: Any) -> None:
    next(iter(optimizer.state.values()))["exp_avg_sq"].view(-1)[0] = float("inf")  # this weight never moves again


@pytest.mark.parametrize("spoil", [spoil_weight, spoil_statistics, spoil_moment])
def test_a_state_that_is_not_finite_is_neither_saved_nor_kept(settings, tmp_path, monkeypatch, spoil):
    update, done, make, optimizers = BYOL.update_target, [], trainer._make_optimizer, []
    monkeypatch.setattr(trainer, "_make_optimizer", lambda *given: optimizers.append(make(*given)) or optimizers[0])

    def spoiled(self):
        done.append(1)
        update(self)
        if len(done) == 2:
            with torch.no_grad():
                spoil(self, optimizers[0])  # after the loss of this step was computed

    monkeypatch.setattr(BYOL, "update_target", spoiled)
    with pytest.raises(ValueError, match=r"lr: the networks are not finite at step 2; .*step 1 is safe"):
        pretrain(PretrainConfig(**settings | {"keep_every": 1}))
    assert load_checkpoint(tmp_path / "run" / "checkpoint.pt")["step"] == 1
    assert sorted(path.name for path in (tmp_path / "run").glob("encoder*")) == ["encoder-1.pth", "encoder.pth"]


def test_a_full_disk_warns_and_training_continues(settings, tmp_path, monkeypatch, caplog):
    save, calls = checkpoint.write_checked, []

    def full(path, write):
        calls.append(path.name)
        if len(calls) in (3, 5):  # the encoder of step 2, the checkpoint of step 3
            raise CheckpointError(f"{path}: cannot be written: No space left on device; the file is unchanged")
        save(path, write)

    monkeypatch.setattr(checkpoint, "write_checked", full)
    pretrain(PretrainConfig(**settings | {"steps": 4, "save_every": 1}))
    warnings = [record.getMessage() for record in caplog.records if "No space left" in record.getMessage()]
    assert ["encoder.pth" in line for line in warnings] == [True, False]
    assert all("cannot be written" in line and "training continues" in line for line in warnings)
    assert load_checkpoint(tmp_path / "run" / "checkpoint.pt")["step"] == 4

    monkeypatch.setattr(
        checkpoint, "write_checked", lambda path, write: full(calls.clear() or calls.extend("abcd") or path, write)
    )
    with pytest.raises(CheckpointError, match="No space left on device"):  # the last one must not fail silently
        pretrain(PretrainConfig(**settings | {"steps": 5}))
    assert load_checkpoint(tmp_path / "run" / "checkpoint.pt")["step"] == 4


def encoder_of_checkpoint(out: Path) -> dict[str, Tensor]:
    prefix = "online.encoder."
    model = load_checkpoint(out / "checkpoint.pt")["model"]
    return {name.removeprefix(prefix): x for name, x in model.items() if name.startswith(prefix)}


def assert_encoder_is_the_checkpoints(out: Path) -> None:
    wanted = encoder_of_checkpoint(out)
    for path in (out / "encoder.pth", out / f"encoder-{load_checkpoint(out / 'checkpoint.pt')['step']}.pth"):
        found = load_checkpoint(path)["state_dict"]
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[name], wanted[name]) for name in wanted), path


def run_killed_in_save(config: dict[str, Any], write: int) -> None:
    """Train, and die before a file of the second save is given its name."""
    whole, done = files.os.replace, []

    def killed(source: str, target: str) -> None:
        done.append(Path(target).name)
        if len(done) == 6 + write:  # each save names five files, the model card last
            os.kill(os.getpid(), signal.SIGKILL)
        whole(source, target)

    begin = RunFolder.begin
    RunFolder.begin = lambda run, *given: (begin(run, *given), done.clear())[0]  # type: ignore[method-assign]
    files.os.replace = killed
    pretrain(PretrainConfig(**config))


@pytest.mark.parametrize("write", [2, *(pytest.param(number, marks=pytest.mark.slow) for number in (0, 1, 3))])
def test_killed_in_any_write_of_a_save_the_encoder_becomes_the_checkpoints(settings, tmp_path, write):
    """Killed between two files, the run used to end with an older encoder, and no error."""
    config = settings | {"steps": 4, "save_every": 2, "keep_every": 2}
    assert ranks.finish(ranks.start(1, tmp_path, run_killed_in_save, config, write)) == [-signal.SIGKILL]
    assert pretrain(PretrainConfig(**config)).steps == 4
    assert_encoder_is_the_checkpoints(tmp_path / "run")
    assert {path.name for path in (tmp_path / "run").iterdir()} == {
        *("log.jsonl", "checkpoint.pt", "encoder.pth", "encoder-2.pth", "encoder-4.pth", "config.yaml", ".lock"),
        "README.md",
    }


@pytest.mark.parametrize("write", [1, 2, 3, 4])
def test_a_write_that_fails_leaves_checkpoint_and_encoder_of_one_step(settings, monkeypatch, write):
    save, calls = checkpoint.write_checked, []

    def full(path, content):
        calls.append(path.name)
        if len(calls) > write:
            raise CheckpointError(f"{path}: cannot be written: No space left on device")
        save(path, content)

    monkeypatch.setattr(checkpoint, "write_checked", full)
    with pytest.raises(CheckpointError, match="No space left"):
        pretrain(PretrainConfig(**settings | {"save_every": 1}))
    out = Path(settings["out"])
    assert (out / "encoder.pth").exists() == (out / "checkpoint.pt").exists() == (write > 1)
    if write > 1:
        found, wanted = load_checkpoint(out / "encoder.pth")["state_dict"], encoder_of_checkpoint(out)
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert not (out / ".encoder.pth").exists()


def test_lines_of_a_full_disk_come_later_and_whole(tmp_path, monkeypatch, caplog):
    run, write, full = RunFolder(tmp_path), os.write, []

    def small(descriptor: int, data: bytes) -> int:
        if full == ["half"]:
            return write(descriptor, data[: len(data) // 2])
        if full:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(descriptor, data)

    run.begin(0, PretrainConfig(tensorboard=False))
    monkeypatch.setattr(run_folder.os, "write", small)
    for step, state in enumerate(([], ["half"], ["no"], ["no"], []), 1):
        full[:] = state
        run.log({"step": step, "loss": 1.0})
        lines = (tmp_path / "log.jsonl").read_text().splitlines()
        assert [json.loads(line)["step"] for line in lines] == list(range(1, 6 if step == 5 else 2))
    assert caplog.text.count("No space left on device") == 1
    run.close()


def test_a_folder_that_cannot_be_written_is_named(settings, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CheckpointError, match=r"file/run: cannot be written: Not a directory"):
        pretrain(PretrainConfig(**settings | {"out": str(tmp_path / "file" / "run")}))


def test_two_runs_do_not_share_a_folder(settings, tmp_path):
    first = RunFolder(tmp_path / "run")
    assert first.open(PretrainConfig(**settings)) is None
    with pytest.raises(CheckpointError, match="another run is writing there"):
        pretrain(PretrainConfig(**settings))
    first.close()
    assert pretrain(PretrainConfig(**settings | {"steps": 1})).steps == 1


@pytest.mark.parametrize("then", ["nothing", "another run"])
def test_a_folder_renamed_during_a_run_is_noticed(settings, tmp_path, monkeypatch, then):
    """The run used to make the folder again, and to write over another run that began there."""
    run, update, done = tmp_path / "run", BYOL.update_target, []

    def moved(self):
        done.append(1)
        update(self)
        if len(done) == 3:
            run.rename(tmp_path / "moved")
            if then == "another run":
                other = RunFolder(run)
                other.open(PretrainConfig(**settings))
                other.close()

    monkeypatch.setattr(BYOL, "update_target", moved)
    with pytest.raises(CheckpointError, match=r"run: this run's folder was renamed or removed; it has step 2"):
        pretrain(PretrainConfig(**settings | {"save_every": 2}))
    assert not run.exists()
    assert load_checkpoint(tmp_path / "moved" / "checkpoint.pt")["step"] == 2


def test_a_run_that_replaces_another_leaves_nothing_of_it(settings, tmp_path, monkeypatch):
    """Encoders of other steps stayed, and killed at its start it went on from the other's checkpoint."""
    run = tmp_path / "run"
    pretrain(PretrainConfig(**settings | {"keep_every": 1}))
    (run / "encoder-own.pth").touch()
    monkeypatch.setattr(trainer, "set_learning_rate", lambda *_: os.kill(os.getpid(), signal.SIGINT) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        pretrain(PretrainConfig(**settings | {"restart": True}))
    assert {path.name for path in run.iterdir()} == {"log.jsonl", "config.yaml", ".lock", "encoder-own.pth"}
    monkeypatch.undo()
    assert pretrain(PretrainConfig(**settings | {"steps": 1})).steps == 1


def test_encoders_without_their_checkpoint_are_not_replaced(settings, tmp_path):
    pretrain(PretrainConfig(**settings))
    (tmp_path / "run" / "checkpoint.pt").unlink()
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    with pytest.raises(CheckpointError, match=r"holds encoder\.pth of a run without its checkpoint\.pt; give"):
        pretrain(PretrainConfig(**settings))
    assert {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()} == before


def test_a_run_that_does_not_begin_leaves_no_folder(settings, tmp_path, monkeypatch):
    monkeypatch.setattr(trainer, "take_stats", lambda *_, **__: os.kill(os.getpid(), signal.SIGINT))
    for folders in ("run", "run/deeper/still"):
        for changes in ({"feature_d": 3, "encoder": "AudioNTT2022"}, {"batch_size": 2, "unit_sec": 0.01}):
            with pytest.raises(ValueError, match=r"feature_d|unit_sec"):
                pretrain(PretrainConfig(**settings | {"out": str(tmp_path / folders)} | changes))
            assert not (tmp_path / "run").exists()
    with pytest.raises(KeyboardInterrupt):
        pretrain(PretrainConfig(**settings | {"demo": True, "audio_dir": None}))
    assert not (tmp_path / "run").exists()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes").touch()
    with pytest.raises(KeyboardInterrupt):
        pretrain(PretrainConfig(**settings | {"demo": True, "audio_dir": None}))
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["notes"]


def test_lines_of_the_log_take_no_memory(tmp_path):
    run = RunFolder(tmp_path)
    run.begin(0, PretrainConfig(tensorboard=False))
    run.log({"step": 1, "loss": 1.0})
    tracemalloc.start()
    for step in range(2, 2000):
        run.log({"step": step, "loss": 1.0})
    grown, _peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    run.close()
    assert grown < 50_000  # a line takes 400
    assert [line["step"] for line in run.lines] == list(range(1, 2000))


def test_tensorboard_on_a_full_disk_warns_and_training_continues(settings, monkeypatch, caplog):
    class Full:
        def add_scalar(self, *_: Any) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(RunFolder, "_open_board", lambda self, _step: setattr(self, "_board", Full()))
    assert pretrain(PretrainConfig(**settings | {"tensorboard": True})).steps == 4
    assert caplog.text.count("tensorboard: No space left on device; training continues without it") == 1


def test_a_log_cut_short_is_mended(tmp_path):
    lines = [{"step": step, "loss": 1.0} for step in (1, 2, 3)]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 4, "lo')
    run = RunFolder(tmp_path)
    run.begin(2, PretrainConfig(tensorboard=False))
    run.log({"step": 3, "loss": 2.0})
    run.close()
    assert read_log(tmp_path) == run.lines == [*lines[:2], {"step": 3, "loss": 2.0}]


def test_a_run_killed_at_its_last_picture_draws_it_later(settings, tmp_path, monkeypatch):
    drawn = []
    pretrain(PretrainConfig(**settings))
    (tmp_path / "run" / "views.png.0123abcd.tmp").touch()
    monkeypatch.setattr(trainer, "draw_training", lambda path, log, loss, name: drawn.append(len(log)))
    pretrain(PretrainConfig(**settings))
    assert drawn == [4]
    assert not list((tmp_path / "run").glob("*.tmp"))


def test_curves_are_drawn_on_the_way(settings, monkeypatch):
    drawn = []
    monkeypatch.setattr(trainer, "draw_training", lambda path, log, loss, name: drawn.append(len(log)))
    monkeypatch.setattr(run_folder, "CURVES_SEC", 0.0)
    pretrain(PretrainConfig(**settings | {"steps": 5, "save_every": 2}))
    assert drawn == [2, 4, 5]
