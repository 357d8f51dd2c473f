"""The two networks: what the loss is made of, what gets a gradient, what moves."""

from __future__ import annotations

import pytest
import torch
from helpers.tolerances import assert_close
from torch import nn

from byola_fast import BYOL, AudioNTT2020
from byola_fast.objectives.collapse import spread
from byola_fast.objectives.learner import MLP
from byola_fast.objectives.losses import byol_loss


def make_byol(**settings) -> BYOL:
    return BYOL(AudioNTT2020(n_mels=16, d=24), **({"proj_size": 8, "proj_dim": 32} | settings))


def make_views(batch: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(batch, 1, 16, 24), torch.randn(batch, 1, 16, 24)


def test_loss_and_projection_from_the_parts():
    byol, (view1, view2) = make_byol().eval(), make_views()
    nn.init.normal_(byol.target.target.encoder.fc[0].weight)  # so that the target is not the online network
    out = byol(view1, view2)
    q1, q2 = (byol.predictor(byol.online.projector(byol.encoder(view))) for view in (view1, view2))
    z1, z2 = (byol.target.target(view) for view in (view1, view2))
    assert_close(out.loss.detach(), (byol_loss(q1, z2) + byol_loss(q2, z1)).detach().double())
    assert torch.equal(out.projection, byol.online(view1))
    assert not out.projection.requires_grad


def test_gradient_reaches_online_and_predictor_but_not_the_target():
    byol, views = make_byol(), make_views()
    byol(*views).loss.backward()
    assert all(p.grad is not None for p in [*byol.online.parameters(), *byol.predictor.parameters()])
    assert byol.encoder.features[0].weight.grad.abs().sum() > 0
    assert all(p.grad is None and not p.requires_grad for p in byol.target.parameters())


def test_each_view_passes_batch_norm_by_itself():
    byol, (view1, view2) = make_byol(), make_views()
    byol.target.eval()
    norm = byol.encoder.features[1]
    byol(view1, view2)
    means = [byol.encoder.features[0](view).mean((0, 2, 3)) for view in (view1, view2)]
    wanted = 0.9 * (0.1 * means[0]) + 0.1 * means[1]
    assert int(norm.num_batches_tracked) == 2
    assert_close(norm.running_mean, wanted.detach().double())


def test_a_joint_batch_changes_batch_norm_and_nothing_else():
    byol, (view1, view2) = make_byol(), make_views()
    joint = make_byol(joint_batch=True)
    joint.load_state_dict(byol.state_dict())
    norm = joint.encoder.features[1]
    joint(view1, view2)
    assert int(norm.num_batches_tracked) == int(joint.predictor[1].num_batches_tracked) == 1
    mean = joint.encoder.features[0](torch.cat([view1, view2])).mean((0, 2, 3))
    assert_close(norm.running_mean, (0.1 * mean).detach().double())
    joint.load_state_dict(byol.state_dict())
    apart, together = byol.eval()(view1, view2), joint.eval()(view1, view2)
    assert_close(together.loss.detach(), apart.loss.detach().double())
    assert_close(together.projection, apart.projection.double())
    with pytest.raises(ValueError, match="view2: expected the shape of view1"):
        joint(view1, view2[..., :16])
    assert byol(view1, view2[..., :16]).loss.isfinite()


def test_the_target_follows_and_sees_batches_in_training_only():
    byol, views = make_byol(ema_decay=0.5), make_views()
    counter = byol.target.target.encoder.features[1].num_batches_tracked
    byol(*views)
    assert int(counter) == 2
    byol.eval()(*views)
    assert int(counter) == 2
    nn.init.ones_(byol.encoder.fc[3].bias)
    before = byol.target.target.encoder.fc[3].bias.clone()
    byol.update_target()
    assert_close(byol.target.target.encoder.fc[3].bias, (0.5 * before + 0.5).double())


def test_twenty_steps_learn_without_collapse():
    byol, (view, _) = make_byol(ema_decay=0.9), make_views(16)
    trained = [p for p in byol.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=1e-3)
    losses = []
    for _ in range(20):
        loss, projection = byol(view + 0.1 * torch.randn_like(view), view + 0.1 * torch.randn_like(view))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        byol.update_target()
        losses.append(loss.item())
    assert sum(losses[-3:]) < 0.6 * sum(losses[:3])
    assert spread(projection) > 0.5


def test_state_has_the_names_that_loaders_expect():
    names = set(make_byol().state_dict())
    for name in ("encoder.features.0.weight", "encoder.fc.3.bias", "projector.3.weight"):
        assert {f"online.{name}", f"target.target.{name}"} <= names
    assert "predictor.0.weight" in names


def test_the_mlp_is_as_published():
    layers = [type(layer) for layer in MLP(2048)]
    assert layers == [nn.Linear, nn.BatchNorm1d, nn.ReLU, nn.Linear]
    assert (MLP(2048)[0].out_features, MLP(2048)[3].out_features) == (4096, 256)


def test_refused():
    byol, (view1, view2) = make_byol(), make_views()
    with pytest.raises(ValueError, match="view2: expected as many samples"):
        byol(view1, view2[:3])
    with pytest.raises(ValueError, match="at least 2 samples in training"):
        byol(view1[:1], view2[:1])
    with pytest.raises(TypeError, match="feature_d"):
        BYOL(nn.Flatten())
