"""Two processes against one: the same views, the same gradient, one checkpoint; and what happens when one dies."""

from __future__ import annotations

import json
import os
import signal
from typing import Any

import pytest
import torch
from helpers import ranks
from helpers.runs import TINY
from helpers.tolerances import assert_close
from torch import Tensor, nn

from byola_fast import BYOL, AudioNTT2020, Augment
from byola_fast.networks.checkpoint import load_checkpoint
from byola_fast.runtime.device import pick_device
from byola_fast.runtime.distributed import RankError, World, join, name_lost_rank
from byola_fast.training import pretrain as trainer
from byola_fast.training.config import PretrainConfig
from byola_fast.training.pretrain import pretrain

pytestmark = pytest.mark.slow


def views_of_steps(lms: Tensor, preset: str) -> list[tuple[Tensor, ...]]:
    """Augment this process's part of each batch ``(steps, B, 1, F, T)``, and return views and drawn parameters."""
    with join(torch.device("cpu")) as world:
        own = lms.shape[1] // world.size
        aug = Augment(preset, n_memory=24, seed=5)
        results = []
        for batch in lms:
            part = batch[world.rank * own :][:own]
            *views, params = aug(part, sample_offset=world.rank * own, return_params=True)
            results.append((*views, params.lam.T, params.bank_index.T, params.crop.transpose(0, 1)))
        bank = (aug.bank.rows.clone(), aug.bank.cursor, aug.running_stats.stats())
        assert world.all_max(world.rank) == [world.size - 1]
        assert world.mean(float(world.rank)) == [(world.size - 1) / 2]
        return [*results, bank]


@pytest.mark.parametrize("preset", ["byola-v1", "byola-v2"])
def test_views_do_not_depend_on_the_number_of_processes(preset, tmp_path):
    lms = torch.randn(4, 8, 1, 16, 24) * 3 - 7  # the bank is empty, filling and full
    whole = views_of_steps(lms, preset)
    parts = ranks.run(2, tmp_path, views_of_steps, lms, preset)
    for step in range(4):
        for one, halves in zip(whole[step], zip(*(part[step] for part in parts), strict=True), strict=True):
            assert torch.equal(one, torch.cat(halves))
    for part in parts:
        for one, other in zip(whole[-1], part[-1], strict=True):
            assert torch.equal(one, other)


def gradient(views: Tensor) -> dict[str, Tensor]:
    """Return the averaged gradient of a batch ``(2, B, 1, F, T)``, with BatchNorm in eval mode and no dropout."""
    torch.manual_seed(3)
    byol = BYOL(AudioNTT2020(16, 16), proj_size=8, proj_dim=16)
    for module in byol.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_var.uniform_(0.5, 2)
        if isinstance(module, nn.modules.batchnorm._BatchNorm | nn.Dropout):
            module.eval()
    with join(torch.device("cpu")) as world:
        own = views.shape[1] // world.size
        network = world.wrap(byol)
        loss, _ = network(*views[:, world.rank * own :][:, :own])
        loss.backward()
        return {name: x.grad.clone() for name, x in byol.named_parameters() if x.requires_grad}


def test_the_averaged_gradient_is_that_of_one_process(tmp_path):
    views = torch.randn(2, 8, 1, 16, 24)
    alone = gradient(views)
    parts = ranks.run(2, tmp_path, gradient, views)
    assert alone.keys() == parts[0].keys()
    assert max(float(x.abs().max()) for x in alone.values()) > 1e-3
    for name, expected in alone.items():
        assert torch.equal(parts[0][name], parts[1][name]), name
        scale = float(expected.abs().max()) + 1e-6
        assert_close(parts[0][name] / scale, expected.double() / scale, factor=20)


def train(config: dict[str, Any], kill_at: int | None = None) -> tuple[int, dict[str, Any]]:
    """Train as one of several; with ``kill_at``, rank 1 is killed in that step."""
    trainer.draw_training = trainer.draw_views = lambda *_, **__: None  # type: ignore[assignment]
    update, done, lms = BYOL.update_target, [], []

    def killed(self: BYOL) -> None:
        done.append(1)
        if len(done) == kill_at and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGKILL)
        update(self)

    if kill_at:
        BYOL.update_target = killed  # type: ignore[method-assign]
    forward = Augment.forward

    def noted(self: Augment, x: Tensor, **given: Any) -> Any:
        views = forward(self, x, **given)
        lms.append((x.clone(), views[0].clone(), views[1].clone()))
        return views

    Augment.forward = noted  # type: ignore[method-assign]
    result = pretrain(PretrainConfig(**config))
    return result.steps, {"views": lms, "rng": torch.get_rng_state()}


def test_two_processes_train_on_the_views_of_one_and_write_one_checkpoint(recordings, tmp_path):
    config = TINY | {"audio_dir": str(recordings), "batch_size": 8, "steps": 3, "save_every": 2}
    alone = ranks.run(1, tmp_path / "1", train, config | {"out": str(tmp_path / "alone")})[0]
    both = ranks.run(2, tmp_path / "2", train, config | {"out": str(tmp_path / "both")})
    assert [steps for steps, _ in both] == [3, 3]
    for number, whole in enumerate(alone[1]["views"]):
        for one, halves in zip(whole, zip(*(seen["views"][number] for _, seen in both), strict=True), strict=True):
            assert torch.equal(one, torch.cat(halves))
    saved = load_checkpoint(tmp_path / "both" / "checkpoint.pt")
    assert len(saved["rng"]) == 2
    for own, (_, seen) in zip(saved["rng"], both, strict=True):
        assert torch.equal(own["cpu"], seen["rng"])  # each has its own dropout
    assert not torch.equal(saved["rng"][0]["cpu"], saved["rng"][1]["cpu"])
    assert not any(name.startswith("module.") for name in saved["model"])
    log = [json.loads(line) for line in (tmp_path / "both" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log] == [1, 2, 3]

    # Resumed by two, it equals five steps at once.
    ranks.run(2, tmp_path / "3", train, config | {"out": str(tmp_path / "both"), "steps": 5})
    ranks.run(2, tmp_path / "4", train, config | {"out": str(tmp_path / "once"), "steps": 5})
    resumed, once = (load_checkpoint(tmp_path / name / "checkpoint.pt") for name in ("both", "once"))
    for name, weight in once["model"].items():
        assert torch.equal(weight, resumed["model"][name]), name


def test_a_killed_process_ends_the_other_with_a_clear_error(recordings, tmp_path):
    config = TINY | {"audio_dir": str(recordings), "steps": 10000, "epochs": 10000, "save_every": 2}
    tmp_path.joinpath("ranks").mkdir()
    processes = ranks.start(2, tmp_path / "ranks", train, config | {"out": str(tmp_path / "run")}, 5)
    assert ranks.finish(processes, seconds=60) == [1, -signal.SIGKILL]
    message = (tmp_path / "ranks" / "rank0.err").read_text()
    assert "RankError: rank 0 lost another rank, which died or hangs" in message
    assert "step 4 is safe in" in message
    assert "--resume" in message
    assert load_checkpoint(tmp_path / "run" / "checkpoint.pt")["step"] == 4


def test_processes_with_other_files_are_named(recordings, tmp_path):
    """Each used to shuffle its own files, so that a global batch held some clips twice."""
    (tmp_path / "both").mkdir()
    code = TINY | {"out": str(tmp_path / "run"), "audio_dir": str(recordings)}
    ranks.finish(ranks.start(2, tmp_path / "both", train_on_own_files, code))
    for rank in range(2):
        assert (
            "audio_dir: expected the same files for all 2 processes" in (tmp_path / f"both/rank{rank}.err").read_text()
        )
    assert not (tmp_path / "run").exists()


def train_on_own_files(config: dict[str, Any]) -> None:
    own = config["audio_dir"] + ("/deeper" if os.environ["RANK"] == "1" else "")
    pretrain(PretrainConfig(**config | {"audio_dir": own}))


def fail_first() -> str:
    def fail() -> None:
        raise ValueError("no such thing")

    with join(torch.device("cpu")) as world:
        assert world.broadcast(lambda: world.rank) == 0
        assert world.gather(world.rank) == [0, 1]
        with pytest.raises(ValueError if world.first else RankError, match="no such thing"):
            world.broadcast(fail)
    return "fine"


def test_an_error_of_rank_0_ends_all(tmp_path):
    assert ranks.run(2, tmp_path, fail_first) == ["fine", "fine"]


def test_other_errors_pass_as_they_are():
    two = World(torch.device("cpu"), 1, 2)
    with pytest.raises(RuntimeError, match="of another kind"), name_lost_rank(two, str):
        raise RuntimeError("of another kind")
    with pytest.raises(RuntimeError, match=r"^connection") as alone, name_lost_rank(World(torch.device("cpu")), str):
        raise RuntimeError("connection")
    assert type(alone.value) is RuntimeError
    message = "rank 1 lost another rank, which died or hangs: Connection closed by peer; all is safe"
    with pytest.raises(RankError, match=message), name_lost_rank(two, lambda: "all is safe"):
        raise RuntimeError("[/gloo/pair.cc:534] Connection closed by peer. This may have many reasons")


def test_devices_that_are_not_there_are_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device("auto") == torch.device("cpu")
    with pytest.raises(ValueError, match="device: expected one that is available, got 'cuda'"):
        pick_device("cuda")
    with pytest.raises(ValueError, match="device: expected auto, cpu, cuda, cuda:N or mps, got 'gpu'"):
        pick_device("gpu")
    with pytest.raises(ValueError, match="device: expected one that is available, got 'mps': "):
        pick_device("mps")


def test_sync_batchnorm_says_that_it_needs_gpus(recordings, tmp_path):
    settings = TINY | {"audio_dir": str(recordings), "out": str(tmp_path / "run"), "sync_batchnorm": True}
    with pytest.raises(ValueError, match="sync_batchnorm: expected GPUs"):
        pretrain(PretrainConfig(**settings))
