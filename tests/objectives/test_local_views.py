"""Local views: each beside both whole ones, in a plain loop; without any, nothing changes; in one graph; over ranks."""

from __future__ import annotations

import pytest
import torch
from helpers import ranks
from helpers.tolerances import assert_close
from torch import Tensor, nn

from byola_fast import AudioNTT2020, Learner, make_learner
from byola_fast.objectives.losses import byol_loss, nt_xent_loss
from byola_fast.runtime.distributed import join

OBJECTIVES = ("byol", "simclr")


def make(objective: str, **settings) -> Learner:
    return make_learner(objective, AudioNTT2020(n_mels=16, d=24), **{"proj_size": 8, "proj_dim": 16} | settings)


def make_views(batch: int = 6, count: int = 3) -> tuple[Tensor, Tensor, list[Tensor]]:
    whole = torch.randn(2, batch, 1, 16, 24)
    return whole[0], whole[1], [torch.randn(batch, 1, 16, 9) for _ in range(count)]


@pytest.mark.parametrize("joint_batch", [False, True])
def test_byol_is_twice_the_mean_over_all_predictions(joint_batch):
    byol, (view1, view2, local) = make("byol", joint_batch=joint_batch).eval(), make_views()
    nn.init.normal_(byol.target.target.encoder.fc[0].weight)  # so that the target is not the online network
    out = byol(view1, view2, local)
    online, other = [view1, view2, *local], [view1, view2]
    terms = [
        byol_loss(byol.predictor(byol.online(x)), byol.target.target(y)) for x in online for y in other if x is not y
    ]
    assert len(terms) == 2 + 2 * 3
    assert_close(out.loss.detach(), 2 * torch.stack(terms).mean().detach().double(), factor=3)
    assert_close(out.projection, byol.online(view1).detach().double(), factor=3)


@pytest.mark.parametrize("joint_batch", [False, True])
@pytest.mark.parametrize("reconstruction", [0.0, 5.0])
def test_simclr_is_the_mean_over_all_pairs(joint_batch, reconstruction):
    settings = dict(temperature=0.3, joint_batch=joint_batch, reconstruction=reconstruction)
    simclr, (view1, view2, local) = make("simclr", **settings).eval(), make_views()
    pairs = [(view1, view2)] + [(x, y) for x in local for y in (view1, view2)]
    terms = [nt_xent_loss(simclr.online(x), simclr.online(y), 0.3) for x, y in pairs]
    expected = torch.stack(terms).mean() + simclr(view1, view2).loss - terms[0]  # with what whole views reconstruct
    assert_close(simclr(view1, view2, local).loss.detach(), expected.detach().double(), factor=5)


def test_the_target_sees_whole_views_alone_and_gets_no_gradient():
    byol, (view1, view2, local) = make("byol"), make_views()
    byol(view1, view2, local).loss.backward()
    assert int(byol.target.target.encoder.features[1].num_batches_tracked) == 2
    assert int(byol.encoder.features[1].num_batches_tracked) == 2 + 3
    assert all(x.grad is None for x in byol.target.parameters())


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_without_local_views_nothing_changes(objective):
    """Bit for bit: loss, gradients, BatchNorm, and the draws of dropout."""
    learner, (view1, view2, _local) = make(objective), make_views()
    again = make(objective)
    again.load_state_dict(learner.state_dict())
    torch.manual_seed(1)
    out = learner(view1, view2)
    torch.manual_seed(1)
    z1, z2 = again.online(view1), again.online(view2)
    if objective == "byol":
        with torch.no_grad():
            t1, t2 = again.target(view1), again.target(view2)
        loss = byol_loss(again.predictor(z1), t2) + byol_loss(again.predictor(z2), t1)
    else:
        loss = nt_xent_loss(z1, z2, 0.1)
    assert torch.equal(out.loss, loss)
    out.loss.backward()
    loss.backward()
    for (name, mine), (_name, theirs) in zip(learner.named_parameters(), again.named_parameters(), strict=True):
        assert not mine.requires_grad or torch.equal(mine.grad, theirs.grad), name
    for name, value in again.state_dict().items():
        assert torch.equal(value, learner.state_dict()[name]), name


def test_refused():
    view1, view2, local = make_views()
    with pytest.raises(ValueError, match=r"local_views\[1\]: expected as many samples as in view1 \(6\), got 4"):
        make("byol")(view1, view2, [local[0], local[1][:4]])
    with pytest.raises(ValueError, match=r"local_views\[2\]: expected the shape of the first .* with joint_batch"):
        make("simclr", joint_batch=True)(view1, view2, [*local[:2], local[2][..., :8]])
    assert [make(name, queue_size=8 if name == "moco" else None).takes_local_views for name in ("moco", "cola")] == [
        False,
        False,
    ]


@pytest.mark.slow
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_one_graph_without_breaks_gives_the_same_step(objective):
    eager, traced = prepare(objective), prepare(objective)
    compiled = torch.compile(traced, backend="aot_eager", fullgraph=True, dynamic=False)
    view1, view2, local = make_views()
    views = view1.double(), view2.double(), [x.double() for x in local]
    outs = eager(*views), compiled(*views)
    for out in outs:
        out.loss.backward()
    torch.testing.assert_close(outs[1].loss, outs[0].loss)
    gradients = [[p.grad for p in learner.parameters() if p.requires_grad] for learner in (eager, traced)]
    torch.testing.assert_close(*gradients)
    torch.compiler.reset()


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_under_autocast_the_loss_stays_float32(objective):
    learner, views = make(objective).eval(), make_views()
    wanted = learner(*views).loss
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = learner(*views).loss
    assert loss.dtype == torch.float32
    assert abs(loss - wanted) < 0.1 * wanted.abs() + 0.05


def prepare(objective: str) -> Learner:
    """A learner whose samples do not depend on each other but through the loss, in float64."""
    torch.manual_seed(3)
    learner = make(objective).double()
    for module in learner.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d, nn.Dropout)):
            module.eval()
    return learner


def gradient(learner: nn.Module, whole: Tensor, local: Tensor) -> tuple[Tensor, Tensor]:
    loss, _projection = learner(*whole, list(local))
    loss.backward()
    return loss.detach(), torch.cat([p.grad.flatten() for p in learner.parameters() if p.requires_grad])


def gradients_of_a_rank(whole: Tensor, local: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    with join(torch.device("cpu")) as world:
        own = [views.chunk(world.size, dim=1)[world.rank] for views in (whole, local)]
        return {name: gradient(nn.parallel.DistributedDataParallel(prepare(name)), *own) for name in OBJECTIVES}


@pytest.mark.slow
def test_two_ranks_learn_as_one_process(tmp_path):
    whole, local = (torch.randn(count, 6, 1, 16, frames).double() for count, frames in ((2, 24), (3, 9)))
    answers = ranks.run(2, tmp_path, gradients_of_a_rank, whole, local)
    for objective in OBJECTIVES:
        loss, wanted = gradient(prepare(objective), whole, local)
        torch.testing.assert_close((answers[0][objective][0] + answers[1][objective][0]) / 2, loss)
        for answer in answers:
            torch.testing.assert_close(answer[objective][1], wanted, rtol=1e-9, atol=1e-11)
