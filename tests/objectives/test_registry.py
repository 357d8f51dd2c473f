"""One interface for all objectives: by name, compiled, under autocast, and over two ranks as in one process."""

from __future__ import annotations

import pytest
import torch
from helpers import ranks
from torch import Tensor, nn

from byola_fast import BYOL, AudioNTT2020, AudioNTT2022, make_learner
from byola_fast.objectives.contrastive import COLA, MoCo, SimCLR
from byola_fast.objectives.learner import Learner, Output
from byola_fast.runtime.distributed import join

OBJECTIVES = {"byol": BYOL, "simclr": SimCLR, "moco": MoCo, "cola": COLA}
SMALL = {"proj_size": 8, "proj_dim": 16}


def make(objective: str, **settings) -> Learner:
    if objective == "moco":
        settings = {"queue_size": 10} | settings
    return make_learner(objective, AudioNTT2020(n_mels=16, d=24), **SMALL | settings)


def make_views(batch: int = 6) -> tuple[Tensor, Tensor]:
    return torch.randn(batch, 1, 16, 24), torch.randn(batch, 1, 16, 24)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_by_name(objective):
    learner = make(objective, ema_decay=0.5)
    assert type(learner) is OBJECTIVES[objective]
    out = learner(*make_views())
    assert isinstance(out, Output)
    assert out.loss.shape == ()
    assert (out.projection.shape, out.projection.requires_grad) == ((6, 8), False)
    learner.update_target()
    assert isinstance(learner.encoder, AudioNTT2020)
    assert set(learner.online.state_dict(prefix="online.")) <= set(learner.state_dict())
    if objective in ("byol", "moco"):
        assert learner.target.decay == 0.5


def test_published_settings_where_none_are_given():
    encoder = AudioNTT2022(n_mels=4, d=66, hidden_d=4)
    byol, simclr, moco, cola = (make_learner(name, encoder) for name in OBJECTIVES)
    assert [len(x.online.projector[0].bias) for x in (byol, simclr, moco)] == [4096] * 3
    assert [len(x.online.projector[3].bias) for x in (byol, simclr, moco)] == [256] * 3
    assert len(cola.online.projector[0].bias) == 512
    assert (byol.target.decay, moco.target.decay) == (0.99, 0.999)
    assert (simclr.temperature, moco.temperature, len(moco.queue)) == (0.1, 0.07, 65536)


@pytest.mark.parametrize(
    ("objective", "settings", "words"),
    [
        (
            "barlow",
            {},
            "objective: expected one of 'byol', 'simclr', 'moco', 'cola', or 'package.module:Class', got 'barlow'",
        ),
        ("byol", {"temperature": 0.1}, "temperature: objective 'byol' has no use for it, got 0.1"),
        ("simclr", {"queue_size": 9}, "queue_size: objective 'simclr' has no use"),
        ("moco", {"joint_batch": True}, "joint_batch: objective 'moco' has no use"),
        ("byol", {"proj_size": 0}, "proj_size: expected at least 1, got 0"),
        ("byol", {"ema_decay": 1.5}, "decay: expected"),
    ],
)
def test_refused(objective, settings, words):
    with pytest.raises(ValueError, match=words):
        make(objective, **settings)


@pytest.mark.slow
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_one_graph_without_breaks_gives_the_same_steps(objective):
    eager = make(objective)
    for module in eager.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    traced = make(objective)
    traced.encoder.fc[2].p = 0.0
    if hasattr(traced, "target"):
        traced.target.target.encoder.fc[2].p = 0.0
    traced.load_state_dict(eager.state_dict())
    compiled = torch.compile(traced, backend="aot_eager", fullgraph=True)
    for _ in range(2):
        views = make_views()
        outs = eager(*views), compiled(*views)
        for learner, out in zip((eager, traced), outs, strict=True):
            learner.zero_grad()
            out.loss.backward()
            learner.update_target()
        torch.testing.assert_close(outs[1].loss, outs[0].loss)
        torch.testing.assert_close(outs[1].projection, outs[0].projection)
    gradients = [[p.grad for p in learner.parameters() if p.requires_grad] for learner in (eager, traced)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(traced.state_dict(), eager.state_dict(), rtol=1e-4, atol=1e-5)
    torch.compiler.reset()


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("channels_last", [False, True])
def test_under_autocast_loss_projection_and_state_stay_float32(objective, channels_last):
    learner, views = make(objective).eval(), make_views()
    wanted = learner(*views)
    if channels_last:
        learner = learner.to(memory_format=torch.channels_last)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = learner(*views)
        trained = learner.train()(*views)
    assert out.loss.dtype == out.projection.dtype == torch.float32
    assert abs(out.loss - wanted.loss) < 0.1 * wanted.loss.abs() + 0.05
    trained.loss.backward()
    floating = [x for x in learner.state_dict().values() if x.is_floating_point()]
    assert all(x.dtype == torch.float32 for x in floating)
    assert all(p.grad is not None for p in learner.parameters() if p.requires_grad)


def prepare(objective: str) -> Learner:
    """A learner whose samples do not depend on each other but through the loss, in float64."""
    torch.manual_seed(3)
    learner = make(objective, ema_decay=0.9).double()
    for module in learner.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d, nn.Dropout)):
            module.eval()
    return learner


def two_steps(learner: nn.Module, views: Tensor) -> tuple[list[float], Tensor, dict[str, Tensor]]:
    """Losses, all gradients of the last step, and the state after them."""
    inner = learner.module if isinstance(learner, nn.parallel.DistributedDataParallel) else learner
    trained = [p for p in inner.parameters() if p.requires_grad]
    optimizer, losses = torch.optim.SGD(trained, lr=0.1), []
    for view1, view2 in views:
        optimizer.zero_grad()
        out = learner(view1, view2)
        out.loss.backward()
        optimizer.step()
        inner.update_target()
        losses.append(out.loss.item())
    return losses, torch.cat([p.grad.flatten() for p in trained]), inner.state_dict()


def steps_of_a_rank(views: Tensor) -> dict[str, tuple[list[float], Tensor, dict[str, Tensor]]]:
    with join(torch.device("cpu")) as world:
        own = views.chunk(world.size, dim=2)[world.rank]
        return {name: two_steps(nn.parallel.DistributedDataParallel(prepare(name)), own) for name in OBJECTIVES}


@pytest.mark.slow
def test_two_ranks_learn_as_one_process(tmp_path):
    """Loss, gradient and state, MoCo's queue included: negatives come from the whole batch."""
    views = torch.randn(2, 2, 6, 1, 16, 24, dtype=torch.float64)
    answers = ranks.run(2, tmp_path, steps_of_a_rank, views)
    for objective in OBJECTIVES:
        losses, gradient, state = two_steps(prepare(objective), views)
        first, second = (answer[objective] for answer in answers)
        mean = (torch.tensor(first[0]) + torch.tensor(second[0])) / 2
        torch.testing.assert_close(mean, torch.tensor(losses), rtol=1e-6, atol=1e-6)
        assert abs(first[0][1] - second[0][1]) > 1e-3  # each has samples of its own
        for _, rank_gradient, rank_state in (first, second):
            torch.testing.assert_close(rank_gradient, gradient, rtol=1e-9, atol=1e-11)
            torch.testing.assert_close(rank_state, state, rtol=1e-9, atol=1e-11)
