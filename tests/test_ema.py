"""The target network: its arithmetic over many steps, half precision, tied weights, buffers, wrappers, state."""

from __future__ import annotations

import copy

import pytest
import torch
from tolerances import assert_close
from torch import nn

from byola_fast import EMA


def make_net() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.ReLU(), nn.Linear(7, 3))


def jump(net: nn.Module) -> None:
    """Stand in for a step of an optimiser."""
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(torch.randn_like(parameter, dtype=torch.float32).to(parameter.dtype))


def test_twenty_steps_against_a_loop_in_float64():
    net = make_net()
    ema = EMA(net, decay=0.9)
    wanted = {name: p.detach().double() for name, p in net.named_parameters()}
    for _ in range(20):
        jump(net)
        ema.update()
        wanted = {name: 0.9 * wanted[name] + 0.1 * p.detach().double() for name, p in net.named_parameters()}
    for name, parameter in ema.target.named_parameters():
        assert_close(parameter.detach(), wanted[name])
        assert not torch.equal(parameter, net.get_parameter(name))


def test_target_is_a_copy_of_its_own_without_gradients():
    net = make_net()
    ema = EMA(net)
    assert all(p.requires_grad for p in net.parameters())
    assert not any(p.requires_grad for p in ema.parameters())
    assert not {p.data_ptr() for p in ema.parameters()} & {p.data_ptr() for p in net.parameters()}
    assert {name.split(".")[0] for name in ema.state_dict()} == {"target"}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_networks_have_float32_targets_that_move(dtype):
    net = make_net().to(dtype)
    ema = EMA(net, decay=0.999)
    assert {p.dtype for p in ema.parameters()} == {torch.float32}
    before = ema.target[0].weight.clone()
    with torch.no_grad():
        net[0].weight.add_(0.125)
    for _ in range(3):
        ema.update()
    moved = (ema.target[0].weight - before).double()
    assert moved.min() > 3e-4 * 0.9 * 0.9  # each step a thousandth of 0.125, which half precision would lose
    assert ema(torch.randn(4, 5, dtype=dtype)).dtype == torch.float32


def test_half_asked_for_later_does_not_reach_the_target():
    ema = EMA(make_net())
    assert {p.dtype for p in ema.half().parameters()} == {torch.float32}
    assert {p.dtype for p in ema.double().parameters()} == {torch.float64}


def test_tied_weights_move_once():
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    net[1].weight = net[0].weight
    ema = EMA(net, decay=0.5)
    assert ema.target[0].weight is ema.target[1].weight
    nn.init.zeros_(ema.target[0].weight)
    nn.init.ones_(net[0].weight)
    ema.update()
    assert torch.equal(ema.target[1].weight, torch.full((4, 4), 0.5))


@pytest.mark.parametrize(("mode", "share"), [("none", 0.0), ("copy", 1.0), ("ema", 0.25)])
def test_buffers(mode, share):
    net = make_net()
    ema = EMA(net, decay=0.75, buffers=mode)
    net[1].running_mean.fill_(4.0)
    net[1].num_batches_tracked.fill_(9)
    ema.update()
    assert_close(ema.target[1].running_mean, torch.full((7,), 4 * share, dtype=torch.float64))
    assert int(ema.target[1].num_batches_tracked) == (0 if mode == "none" else 9)


def test_wrapped_later_or_from_the_start():
    net = make_net()
    plain, wrapped = EMA(net, decay=0.5), EMA(torch.compile(net, backend="eager"), decay=0.5)
    net[0] = torch.compile(net[0], backend="eager")
    assert "0._orig_mod.weight" in dict(net.named_parameters())
    jump(net)
    for ema in (plain, wrapped):
        ema.update()
        assert "0.weight" in dict(ema.target.named_parameters())
        assert not torch.equal(ema.target[0].weight, net[3].weight)
    assert torch.equal(plain.target[0].weight, wrapped.target[0].weight)


def test_a_network_of_another_make_is_refused():
    net = make_net()
    ema = EMA(net)
    net.append(nn.Linear(3, 3))
    with pytest.raises(ValueError, match=r"4\.bias, 4\.weight"):
        ema.update()


def test_state_goes_into_a_new_module():
    net = make_net()
    ema = EMA(net, decay=0.5)
    jump(net)
    ema.update()
    other = EMA(make_net())
    other.load_state_dict(copy.deepcopy(ema.state_dict()))
    ema.eval()
    other.eval()
    x = torch.randn(2, 5)
    assert torch.equal(other(x), ema(x))
    assert torch.equal(ema(x), ema.target(x))


@pytest.mark.parametrize("buffers", ["none", "ema"])
def test_follows_tensors_that_were_replaced(buffers):
    net = make_net()
    ema = EMA(net, decay=0.5, buffers=buffers)
    ema.update()
    net[0].weight = nn.Parameter(torch.ones(7, 5))
    net[3] = nn.Linear(7, 3)
    net[1].running_mean = torch.ones(7)
    ema.target[0].weight = nn.Parameter(torch.zeros(7, 5), requires_grad=False)
    last = ema.target[3].weight.clone()
    ema.update()
    assert torch.equal(ema.target[0].weight, torch.full((7, 5), 0.5))
    assert_close(ema.target[3].weight, (last.double() + net[3].weight.detach().double()) / 2)
    assert torch.equal(ema.target[1].running_mean, torch.full((7,), 0.5 if buffers == "ema" else 0.0))


def test_another_dtype_later_is_followed_or_refused():
    net = make_net()
    ema = EMA(net, decay=0.5)
    ema.update()
    before = ema.target[0].weight.clone()
    net.bfloat16()
    jump(net)
    ema.update()
    assert not torch.equal(ema.target[0].weight, before)
    ema.double()
    with pytest.raises(TypeError, match=r"online\[0\]: expected torch.float64"):
        ema.update()


def test_a_copy_moves_alone():
    net = make_net()
    ema = EMA(net, decay=0.5)
    ema.update()
    jump(net)
    other = copy.deepcopy(ema)
    before = ema.target[0].weight.clone()
    other.update()
    assert torch.equal(ema.target[0].weight, before)
    assert not torch.equal(other.target[0].weight, before)


def test_the_decay_may_change_but_not_leave_its_range():
    net = make_net()
    ema = EMA(net, decay=1.0)
    jump(net)
    ema.decay = 0.0
    ema.update()
    assert torch.equal(ema.target[0].weight, net[0].weight)
    ema.decay = 1.5
    with pytest.raises(ValueError, match="decay: expected a number in"):
        ema.update()


def test_an_update_before_backward_is_noticed():
    ema = EMA(nn.Linear(2, 2))
    y = ema.target(torch.ones(1, 2, requires_grad=True)).sum()
    ema.update()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


@pytest.mark.parametrize(("settings", "words"), [({"decay": 1.5}, "decay"), ({"buffers": "all"}, "buffers")])
def test_refused_settings(settings, words):
    with pytest.raises(ValueError, match=words):
        EMA(make_net(), **settings)
