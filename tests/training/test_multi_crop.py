"""Training with local views: refused early, resumed bit for bit, the same over two processes, and it learns."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
import yaml
from helpers import ranks
from helpers.runs import TINY, read_log, same_run
from torch import nn

from byola_fast import Augment, PretrainConfig, cli, pretrain
from byola_fast.audio.demo_corpus import write_demo_corpus
from byola_fast.networks.checkpoint import load_checkpoint
from byola_fast.objectives.byol import BYOL
from byola_fast.training import pretrain as trainer

LOCAL = {"local_views": 2, "local_size": (64, 16), "local_scale": (0.3, 0.8)}


class Anywhere(nn.Module):
    """An encoder of one's own that takes any size."""

    def __init__(self, feature_d: int = 12) -> None:
        super().__init__()
        self.feature_d = feature_d
        self.linear = nn.Linear(2, feature_d)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(torch.stack([x.mean((1, 2, 3)), x.std((1, 2, 3))], 1))


@pytest.fixture
def settings(settings):
    return settings | LOCAL


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"objective": "moco"}, r"local_views: expected 0 with objective 'moco', .*\(byol and simclr have\), got 2"),
        ({"objective": "cola"}, "local_views: expected 0 with objective 'cola'"),
        ({"objective": "helpers.own:Distance"}, "local_views: expected 0 with objective 'helpers.own:Distance'"),
        ({"local_views": -1}, "local_views: expected at least 0, got -1"),
        ({"local_views": 0}, "local_size: expected none without local_views"),
        ({"local_size": None}, "local_size: expected mel bins and frames of local views, as 64,48, got none"),
        ({"local_size": (0, 16)}, "local_size: expected"),
        ({"local_scale": (0.8, 0.3)}, r"local_scale: expected \(min, max\)"),
        ({"local_scale": (0.5, 1.5)}, "local_scale: expected"),
    ],
)
def test_refused_before_anything_is_loaded(settings, tmp_path, changes, words):
    with pytest.raises(ValueError, match=words):
        pretrain(PretrainConfig(**settings | changes | {"audio_dir": str(tmp_path / "nowhere")}))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("size", "words"), [((32, 16), r"\('B', 1, 64, 'T'\)|\(B, 1, 64, T\)"), ((64, 7), "at least 8")]
)
def test_a_size_that_the_encoder_does_not_take_is_refused_before_statistics(
    settings, tmp_path, monkeypatch, size, words
):
    monkeypatch.setattr(trainer, "take_stats", lambda *_: pytest.fail("statistics were taken first"))
    with pytest.raises(ValueError, match=f"local_size: expected a size that the encoder takes: .*{words}"):
        pretrain(PretrainConfig(**settings | {"local_size": size}))
    assert not (tmp_path / "run").exists()


def test_an_encoder_of_your_own_may_take_any_size(settings):
    settings = {name: value for name, value in settings.items() if name != "feature_d"}
    assert pretrain(PretrainConfig(**settings | {"local_size": (20, 11)}), encoder=Anywhere()).steps == 4


@pytest.mark.parametrize(
    "changes", [{"stats_segments": 0}, {"objective": "simclr", "reconstruction": 5.0, "preset": "byola-v2"}]
)
def test_a_stopped_run_resumes_bit_for_bit(settings, tmp_path, changes):
    pretrain(PretrainConfig(**settings | changes | {"steps": 6, "out": str(tmp_path / "whole")}))
    for steps in (3, 6):
        pretrain(PretrainConfig(**settings | changes | {"steps": steps}))
    same_run(tmp_path / "whole", tmp_path / "run")


def test_a_resumed_run_keeps_its_local_views(settings, tmp_path):
    without = {"local_views": 0, "local_size": None}
    pretrain(PretrainConfig(**settings | without | {"steps": 1}))
    path = tmp_path / "run" / "checkpoint.pt"
    content = torch.load(path, weights_only=True)
    for name in LOCAL:  # as a run of a version without them
        del content["config"][name]
    torch.save(content, path)
    with pytest.raises(ValueError, match="local_views: 0 there, 2 now"):
        pretrain(PretrainConfig(**settings))
    assert pretrain(PretrainConfig(**settings | without | {"steps": 2})).steps == 2


def test_whole_views_are_those_of_a_run_without_local_ones(settings, monkeypatch):
    seen: list[list[torch.Tensor]] = []
    forward = Augment.forward

    def noted(self: Augment, x: torch.Tensor, **given: Any) -> Any:
        views = forward(self, x, **given)
        seen.append([view.clone() for view in views])
        return views

    monkeypatch.setattr(Augment, "forward", noted)
    pretrain(PretrainConfig(**settings | {"steps": 1}))
    pretrain(PretrainConfig(**settings | {"steps": 1, "local_views": 0, "local_size": None, "restart": True}))
    assert [tuple(view.shape[1:]) for view in seen[0]] == [(1, 64, 26)] * 2 + [(1, 64, 16)] * 2
    assert len(seen[1]) == 2
    assert all(torch.equal(one, other) for one, other in zip(*seen, strict=False))


def test_from_the_command_line(settings, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    flags = [f"--{name}={value}" for name, value in TINY.items() if name not in ("steps", "tensorboard")]
    local = ["--local-views", "2", "--local_size", "64,16", "--local-scale=0.3,0.8", "--profile"]
    assert cli.main(["pretrain", settings["audio_dir"], "--out", "run", "--steps=2", *local, *flags]) == 0
    content = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert [content[name] for name in LOCAL] == [2, [64, 16], [0.3, 0.8]]
    assert json.loads((tmp_path / "run" / "profile.json").read_text())["ms"]["augmentation"] > 0
    assert cli.main(["pretrain", "--out", "run", "--resume", "--steps=3"]) == 0  # by config.yaml
    assert [line["step"] for line in read_log(tmp_path / "run")] == [1, 2, 3]
    assert cli.main(["pretrain", "nowhere", "--objective=moco", "--local-views=2", "--local-size=64,16"]) == 2
    assert "error: local_views: expected 0 with objective 'moco'" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{"objective": "simclr"}, {"dtype": "bfloat16"}])
def test_the_loss_falls(tmp_path, settings, changes):
    write_demo_corpus(tmp_path / "demo")
    wide = {"unit_sec": 0.95, "local_size": (64, 32), "batch_size": 16, "lr": 2e-3, "feature_d": 32}
    result = pretrain(PretrainConfig(**settings | wide | changes | {"audio_dir": str(tmp_path / "demo"), "steps": 24}))
    losses = [line["loss"] for line in read_log(result.out)]
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])


def train(config: dict[str, Any]) -> list[list[torch.Tensor]]:
    """Train as one of several, and return the views of each step."""
    trainer.draw_training = trainer.draw_views = lambda *_, **__: None  # type: ignore[assignment]
    seen, forward = [], BYOL.forward

    def noted(self: BYOL, view1: torch.Tensor, view2: torch.Tensor, local_views: Any = ()) -> Any:
        seen.append([view.clone() for view in (view1, view2, *local_views)])
        return forward(self, view1, view2, local_views)

    BYOL.forward = noted  # type: ignore[method-assign]
    pretrain(PretrainConfig(**config))
    return seen


@pytest.mark.slow
def test_two_processes_train_on_the_views_of_one_and_resume(recordings, tmp_path):
    config = TINY | LOCAL | {"audio_dir": str(recordings), "batch_size": 8, "steps": 3}
    [alone] = ranks.run(1, tmp_path / "1", train, config | {"out": str(tmp_path / "alone")})
    both = ranks.run(2, tmp_path / "2", train, config | {"out": str(tmp_path / "both")})
    for whole, *halves in zip(alone, *both, strict=True):
        assert len(whole) == 4
        for one, parts in zip(whole, zip(*halves, strict=True), strict=True):
            assert torch.equal(one, torch.cat(parts))
    ranks.run(2, tmp_path / "3", train, config | {"out": str(tmp_path / "both"), "steps": 5})
    ranks.run(2, tmp_path / "4", train, config | {"out": str(tmp_path / "once"), "steps": 5})
    resumed, once = (load_checkpoint(tmp_path / name / "checkpoint.pt") for name in ("both", "once"))
    for name, weight in once["model"].items():
        assert torch.equal(weight, resumed["model"][name]), name
