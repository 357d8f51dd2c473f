"""SimCLR, MoCo and COLA: what their losses are made of, what gets a gradient, and what MoCo's queue keeps."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from helpers.tolerances import assert_close
from torch import Tensor, nn

from byola_fast import AudioNTT2020
from byola_fast.objectives.collapse import spread
from byola_fast.objectives.contrastive import COLA, MoCo, SimCLR
from byola_fast.objectives.losses import bilinear_loss, info_nce_loss, nt_xent_loss


def make(learner: type, **settings):
    widths = {"proj_size": 8} if learner is COLA else {"proj_size": 8, "proj_dim": 32}
    return learner(AudioNTT2020(n_mels=16, d=24), **widths, **settings)


def make_views(batch: int = 6) -> tuple[Tensor, Tensor]:
    return torch.randn(batch, 1, 16, 24), torch.randn(batch, 1, 16, 24)


@pytest.mark.parametrize("joint_batch", [False, True])
def test_simclr_from_the_parts(joint_batch):
    simclr, (view1, view2) = make(SimCLR, temperature=0.3, joint_batch=joint_batch).eval(), make_views()
    z1, z2 = simclr.online(view1), simclr.online(view2)
    out = simclr(view1, view2)
    assert_close(out.loss.detach(), nt_xent_loss(z1, z2, 0.3).detach().double(), factor=3)
    assert_close(out.projection, z1.detach().double())
    assert_close(simclr(view2, view1).loss.detach(), out.loss.detach().double(), factor=3)


@pytest.mark.parametrize("joint_batch", [False, True])
@pytest.mark.parametrize("mels", [16, 19])
def test_reconstruction_from_the_parts(joint_batch, mels):
    settings = dict(temperature=0.3, proj_size=8, proj_dim=32, joint_batch=joint_batch, reconstruction=5.0)
    simclr = SimCLR(AudioNTT2020(n_mels=mels, d=24), **settings).eval()
    views = torch.randn(2, 6, 1, mels, 27)  # three frame-level features, and three frames beyond them
    z1, z2 = (simclr.online(view) for view in views)
    expected = nt_xent_loss(z1, z2, 0.3)
    for view in views:
        frames = simclr.encoder.forward_frames(view)
        for place in range(3):
            patch = view[:, 0, :, 8 * place : 8 * place + 8].flatten(1)
            expected = expected + 5.0 / 2 / 3 * F.mse_loss(simclr.decoder(frames[:, place]), patch)
    out = simclr(*views)
    assert_close(out.loss.detach(), expected.detach().double(), factor=5)
    assert_close(out.projection, z1.detach().double(), factor=3)
    out.loss.backward()
    assert all(weight.grad is not None for weight in simclr.parameters())


def test_reconstruction_needs_frames_and_a_weight():
    with pytest.raises(
        ValueError, match="reconstruction: expected AudioNTT2020 or AudioNTT2022 as the encoder, got Flat"
    ):
        SimCLR(Flat(), reconstruction=1.0)
    for weight in (-1.0, math.nan):
        with pytest.raises(ValueError, match="reconstruction: expected a number of at least 0"):
            make(SimCLR, reconstruction=weight)


class Flat(nn.Flatten):
    feature_d = 384


@pytest.mark.parametrize("joint_batch", [False, True])
def test_cola_from_the_parts(joint_batch):
    cola, (view1, view2) = make(COLA, joint_batch=joint_batch).eval(), make_views()
    linear = cola.online.projector[0]
    nn.init.normal_(linear.weight)
    rows = []
    for view in (view1, view2):
        y = F.linear(cola.encoder(view), linear.weight, linear.bias)
        y = (y - y.mean(1, keepdim=True)) / (y.var(1, unbiased=False, keepdim=True) + 1e-5).sqrt()
        rows.append(y.tanh())
    out = cola(view1, view2)
    assert_close(out.loss.detach(), bilinear_loss(*rows, cola.similarity.weight).detach().double(), factor=3)
    assert_close(out.projection, rows[0].detach().double(), factor=5)
    assert cola.similarity.bias is None


def test_moco_from_the_parts():
    moco, (view1, view2) = make(MoCo, temperature=0.2, queue_size=7).eval(), make_views()
    nn.init.normal_(moco.target.target.encoder.fc[0].weight)  # so that the target is not the online network
    moco.queue.copy_(F.normalize(torch.randn(7, 8), dim=1))
    moco.cursor.copy_(torch.tensor([4, 4]))
    query, key = moco.online(view1), moco.target.target(view2)
    out = moco(view1, view2)
    wanted = info_nce_loss(query, key, moco.queue[:4], 0.2).detach()
    assert_close(out.loss.detach(), wanted.double())
    assert torch.equal(out.projection, query)
    assert moco.cursor.tolist() == [4, 4]  # in eval mode nothing joins


@pytest.mark.parametrize("batch", [2, 3, 5, 12])
def test_the_queue_holds_the_last_keys_in_order(batch):
    moco, size, keys = make(MoCo, queue_size=5), 5, []
    for _ in range(4):
        view1, view2 = make_views(batch)
        torch.manual_seed(1)
        moco(view1, view2)
        torch.manual_seed(1)  # dropout again
        moco.online(view1)
        keys.append(F.normalize(moco.target.target(view2), dim=1))
        past = torch.cat(keys)
        cursor, filled = moco.cursor.tolist()
        assert (cursor, filled) == (len(past) % size, min(len(past), size))
        for age in range(filled):
            assert_close(moco.queue[(cursor - 1 - age) % size], past[-1 - age].detach().double())


def test_the_queue_is_read_before_the_batch_joins_it_and_is_in_the_state():
    moco, views = make(MoCo, queue_size=16), make_views()
    assert moco(*views).loss == 0  # no negatives yet
    first = moco(*views).loss
    first.backward()  # reads the queue as it was
    assert first > 0
    other = make(MoCo, queue_size=16)
    other.load_state_dict(moco.state_dict())
    torch.manual_seed(5)
    resumed = [other(*views).loss.item() for _ in range(3)]
    torch.manual_seed(5)
    assert resumed == [moco(*views).loss.item() for _ in range(3)]
    assert torch.equal(other.queue, moco.queue)


@pytest.mark.parametrize("learner", [SimCLR, MoCo, COLA])
def test_gradient_reaches_what_is_trained_and_nothing_else(learner):
    model, views = make(learner), make_views()
    model(*views)
    model(*views).loss.backward()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {name for name, _ in model.named_parameters() if not name.startswith("target.")}
    for name in trained:
        assert model.get_parameter(name).grad.isfinite().all(), name
    assert model.encoder.features[0].weight.grad.abs().sum() > 0
    assert all(p.grad is None for name, p in model.named_parameters() if name not in trained)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("learner", "settings", "candidates"),
    [(SimCLR, {}, 31), (MoCo, {"queue_size": 64, "ema_decay": 0.9}, 65), (COLA, {}, 16)],
)
def test_forty_steps_learn_without_collapse(learner, settings, candidates):
    """Sixteen steady spectra in noise; guessing among n candidates would leave the loss at log(n)."""
    model, spectra = make(learner, **settings), 2 * torch.randn(16, 1, 16, 1).expand(-1, -1, -1, 24)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    losses = []
    for _ in range(40):
        out = model(*(spectra + 0.5 * torch.randn_like(spectra) for _ in range(2)))
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        model.update_target()
        losses.append(out.loss.item())
    assert sum(losses[-5:]) / 5 < 0.75 * math.log(candidates)
    assert spread(out.projection) > 0.6


def test_refused():
    view1, view2 = make_views()
    for learner in (SimCLR, MoCo, COLA):
        with pytest.raises(ValueError, match="view2: expected as many samples"):
            make(learner)(view1, view2[:3])
        with pytest.raises(ValueError, match="at least 2 samples"):
            make(learner)(view1[:1], view2[:1])
        with pytest.raises(TypeError, match="feature_d"):
            learner(nn.Flatten())
    for learner in (SimCLR, MoCo):
        for temperature in (0.0, -1.0, float("nan")):
            with pytest.raises(ValueError, match="temperature: expected a number above 0"):
                make(learner, temperature=temperature)
    with pytest.raises(ValueError, match="queue_size: expected at least 1, got 0"):
        make(MoCo, queue_size=0)
