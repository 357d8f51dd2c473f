"""The target network: arithmetic over many steps, half precision, tied weights, buffers, wrappers, state."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from helpers.tolerances import assert_close
from torch import nn

from byola_fast import EMA
from byola_fast.networks.ema import CosineDecay


def make_net() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.ReLU(), nn.Linear(7, 3))


def jump(net: nn.Module) -> None:
    """Change the parameters as an optimiser would."""
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


def test_the_target_is_a_separate_copy_without_gradients():
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
    assert moved.min() > 3e-4 * 0.9 * 0.9  # each step moves by 0.125 / 1000, which rounds to zero in half precision
    assert ema(torch.randn(4, 5, dtype=dtype)).dtype == torch.float32


def test_half_leaves_the_target_in_float32():
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


@pytest.mark.parametrize(("mode", "weight"), [("none", 0.0), ("copy", 1.0), ("ema", 0.25)])
def test_buffers(mode, weight):
    net = make_net()
    ema = EMA(net, decay=0.75, buffers=mode)
    net[1].running_mean.fill_(4.0)
    net[1].num_batches_tracked.fill_(9)
    ema.update()
    assert_close(ema.target[1].running_mean, torch.full((7,), 4 * weight, dtype=torch.float64))
    assert int(ema.target[1].num_batches_tracked) == (0 if mode == "none" else 9)


def test_wrapped_before_or_after():
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


def test_a_network_with_other_parameters_is_refused():
    net = make_net()
    ema = EMA(net)
    net.append(nn.Linear(3, 3))
    with pytest.raises(ValueError, match=r"4\.bias, 4\.weight"):
        ema.update()


def test_state_loads_into_a_new_module():
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
def test_replaced_tensors_are_followed(buffers):
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


def test_a_new_dtype_is_followed_or_refused():
    net = make_net()
    ema = EMA(net, decay=0.5)
    ema.update()
    before = ema.target[0].weight.clone()
    net.bfloat16()
    jump(net)
    ema.update()
    assert not torch.equal(ema.target[0].weight, before)
    ema.double()
    with pytest.raises(TypeError, match=r"online\.0\.weight: expected torch.float64, got torch.bfloat16"):
        ema.update()


def test_a_deep_copy_is_independent():
    net = make_net()
    ema = EMA(net, decay=0.5)
    ema.update()
    jump(net)
    other = copy.deepcopy(ema)
    before = ema.target[0].weight.clone()
    other.update()
    assert torch.equal(ema.target[0].weight, before)
    assert not torch.equal(other.target[0].weight, before)


def test_the_decay_may_change_within_its_range():
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


@pytest.mark.parametrize(
    ("settings", "words"),
    [({"decay": 1.5}, "decay"), ({"decay": float("nan")}, "decay"), ({"buffers": "all"}, "buffers")],
)
def test_refused_settings(settings, words):
    with pytest.raises(ValueError, match=words):
        EMA(make_net(), **settings)


# changes between updates


def test_new_storages_shapes_and_dtypes_in_the_same_tensors():
    net = nn.ParameterList(torch.zeros(3) for _ in range(100))
    ema = EMA(net, decay=0.5)
    ema.update()
    for number, parameter in enumerate(net):
        parameter.data = torch.full((3,), float(number))
    ema.target[7].data = torch.full((3,), 1.0, dtype=torch.float64)
    net[7].data = net[7].data.double()
    ema.update()
    assert ema.target[5].tolist() == [2.5] * 3
    assert ema.target[7].tolist() == [4.0] * 3
    net.load_state_dict({str(k): torch.full((3,), -float(k)) for k in range(100)}, assign=True)
    ema.load_state_dict({f"target.{k}": torch.zeros(3) for k in range(100)}, assign=True)
    ema.update()
    assert ema.target[5].tolist() == [-2.5] * 3
    net[3].data = torch.zeros(4)
    before = [p.clone() for p in ema.target]
    with pytest.raises(ValueError, match=r"online\.3: expected shape \(3,\), got \(4,\)"):
        ema.update()
    net[3].data = torch.zeros(3)
    net[60].data.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match=r"online\.60: expected values, but its storage was freed"):
        ema.update()
    assert all(torch.equal(p, b) for p, b in zip(ema.target, before, strict=True))


def test_parameters_that_share_memory_move_once():
    net = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    net[1].weight = nn.Parameter(net[0].weight.data)
    ema = EMA(net, decay=0.5)
    for parameter in ema.parameters():
        parameter.zero_()
    nn.init.ones_(net[0].weight)
    ema.update()
    for parameter in ema.parameters():
        assert torch.equal(parameter, torch.full((4, 4), 0.5))


def test_a_target_in_the_memory_of_the_online_network_is_refused():
    net = make_net()
    ema = EMA(net)
    net[0].weight.data = ema.target[0].weight.data
    with pytest.raises(
        ValueError, match=r"target\.0\.weight: expected memory of its own, got that of online\.0\.weight"
    ):
        ema.update()


def test_frozen_parameters_are_averaged_too():
    net = make_net()
    net[0].requires_grad_(False)
    ema = EMA(net, decay=0.5)
    jump(net)
    before = ema.target[0].weight.clone()
    ema.update()
    assert_close(ema.target[0].weight, (before.double() + net[0].weight.double()) / 2)


def test_channels_last_networks():
    net = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5)).to(memory_format=torch.channels_last)
    ema = EMA(net, decay=0.5)
    assert ema.target[0].weight.is_contiguous(memory_format=torch.channels_last)
    before = ema.target[0].weight.clone()
    jump(net)
    ema.update()
    assert_close(ema.target[0].weight, (before.double() + net[0].weight.detach().double()) / 2)
    ema.to(memory_format=torch.contiguous_format)
    ema.target[0].weight.data = ema.target[0].weight.data.contiguous()
    before = ema.target[0].weight.clone()
    ema.update()
    assert_close(ema.target[0].weight, (before.double() + net[0].weight.detach().double()) / 2)


def test_inside_distributed_data_parallel():
    distributed = torch.distributed
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        net = nn.parallel.DistributedDataParallel(make_net())
        early = EMA(net.module, decay=0.5, buffers="copy")
        early._online = (net,)  # wrapped after the target was made
        ema = EMA(net, decay=0.5, buffers="copy")
        assert next(name for name, _ in ema.target.named_parameters()) == "0.weight"
        optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
        net(torch.randn(4, 5)).sum().backward()
        optimizer.step()
        before = ema.target[0].weight.clone()
        for average in (early, ema):
            average.update()
            assert_close(average.target[0].weight, (before.double() + net.module[0].weight.detach().double()) / 2)
            assert torch.equal(average.target[1].running_var, net.module[1].running_var)
        with ema.swapped() as averaged:
            assert averaged is net
            assert torch.equal(net.module[0].weight, ema.target[0].weight)
    finally:
        distributed.destroy_process_group()


def test_integer_parameters_are_copied_and_complex_ones_refused():
    net = make_net()
    net.codes = nn.Parameter(torch.zeros(3, dtype=torch.int8), requires_grad=False)
    ema = EMA(net)
    net.codes += 1
    ema.update()
    assert ema.target.codes.tolist() == [1, 1, 1]
    net.phase = nn.Parameter(torch.zeros(3, dtype=torch.complex64))
    ema = EMA(net)
    with pytest.raises(TypeError, match=r"target\.phase: expected float32 or float64, got torch.complex64"):
        ema.update()


# the schedule


def wanted_decay(step, base, total_steps):
    return 1 - (1 - base) * (math.cos(math.pi * min(step, total_steps) / total_steps) + 1) / 2


def test_a_cosine_decay_over_its_whole_length():
    net = nn.Linear(3, 3, bias=False)
    ema = EMA(net, decay=CosineDecay(0.9, total_steps=12))
    wanted = net.weight.detach().double()
    for step in range(15):
        jump(net)
        decay = wanted_decay(step, 0.9, 12)
        assert float(ema.current_decay()) == pytest.approx(decay, abs=1e-15)
        wanted = decay * wanted + (1 - decay) * net.weight.detach().double()
        ema.update()
        assert int(ema.step) == step + 1
        assert_close(ema.target.weight, wanted)
    assert float(ema.current_decay()) == 1.0


def test_the_schedule_resumes_from_its_state():
    net = make_net()
    ema = EMA(net, decay=CosineDecay(0.5, total_steps=10))
    for _ in range(4):
        jump(net)
        ema.update()
    assert "step" in ema.state_dict()
    other = EMA(net, decay=CosineDecay(0.5, total_steps=10))
    other.load_state_dict(copy.deepcopy(ema.state_dict()))
    for average in (ema, other):
        average.update()
    assert torch.equal(other.target[0].weight, ema.target[0].weight)
    with pytest.raises(RuntimeError, match="step"):
        EMA(net).load_state_dict(ema.state_dict())


def test_a_refused_update_does_not_count_as_a_step():
    net = nn.Linear(2, 2)
    ema = EMA(net, decay=CosineDecay(0.5, total_steps=10))
    net.weight.data = torch.zeros(3, 3)
    with pytest.raises(ValueError, match=r"online\.weight: expected shape"):
        ema.update()
    assert int(ema.step) == 0


def test_a_schedule_assigned_later_is_refused_with_advice():
    ema = EMA(make_net())
    ema.decay = CosineDecay(0.5, total_steps=10)
    with pytest.raises(RuntimeError, match=r"must be given to EMA\(...\) itself"):
        ema.update()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [((1.5, 10), "base"), ((float("nan"), 10), "base"), ((0.9, 0), "total_steps"), ((0.9, 2.5), "total_steps")],
)
def test_refused_schedules(arguments, words):
    with pytest.raises(ValueError, match=words):
        CosineDecay(*arguments)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
def test_the_schedule_in_a_cuda_graph():
    net = make_net().cuda()
    ema, eager = (EMA(net, decay=CosineDecay(0.5, total_steps=10), buffers="ema") for _ in range(2))
    jump(net)
    for average in (ema, eager):
        average.update()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ema.update()
    for _ in range(5):
        jump(net)
        graph.replay()
        eager.update()
        assert all(torch.equal(p, q) for p, q in zip(ema.parameters(), eager.parameters(), strict=True))


# the averaged weights in the online network


def state_of(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


@pytest.mark.parametrize("buffers", ["none", "copy", "ema"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_swapped(dtype, buffers):
    net = make_net().to(dtype)
    ema = EMA(net, decay=0.5, buffers=buffers)
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    jump(net)
    net(torch.randn(6, 5, dtype=dtype))
    ema.update()
    jump(net)
    net(torch.randn(6, 5, dtype=dtype))
    before, average = state_of(net), state_of(ema.target)
    objects = list(net.parameters())
    places = [p.data_ptr() for p in objects]
    with ema.swapped() as averaged:
        assert averaged is net
        followed = [name for name in before if buffers != "none" or name in dict(net.named_parameters())]
        for name, value in net.state_dict().items():
            assert torch.equal(value, average[name].to(value.dtype) if name in followed else before[name])
        assert all(p is q and p.dtype == dtype for p, q in zip(net.parameters(), objects, strict=True))
        net.eval()(torch.randn(6, 5, dtype=dtype))
        net.train()
    assert [p.data_ptr() for p in net.parameters()] == places
    for name, value in net.state_dict().items():
        assert torch.equal(value, before[name])
    for name, value in ema.target.state_dict().items():
        assert torch.equal(value, average[name])
    net(torch.randn(6, 5, dtype=dtype)).float().sum().backward()
    optimizer.step()
    assert not torch.equal(net[0].weight, before["0.weight"])
    ema.update()


def test_swapped_is_undone_after_an_error():
    net = make_net()
    ema = EMA(net, decay=0.5)
    jump(net)
    before = state_of(net)
    with pytest.raises(ZeroDivisionError), ema.swapped():
        _ = 1 / 0
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    ema.update()


def test_swapped_is_undone_if_it_fails_half_way(monkeypatch):
    net = make_net()
    ema = EMA(net, decay=0.5)
    jump(net)
    before = state_of(net)
    pairs = ema._current_plan().pairs
    pairs[2] = (pairs[2][0], None)
    with pytest.raises(AttributeError), ema.swapped():
        pass
    pairs[2] = (pairs[2][0].to("meta"), net[1].weight)
    with pytest.raises((RuntimeError, NotImplementedError)), ema.swapped():
        pass
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_no_update_and_no_second_swap_while_swapped():
    net = make_net()
    ema = EMA(net, decay=0.5)
    with ema.swapped():
        with pytest.raises(RuntimeError, match=r"update: the averaged weights are swapped in; leave"):
            ema.update()
        with pytest.raises(RuntimeError, match=r"swapped: the averaged weights are swapped in already"), ema.swapped():
            pass
    with ema.swapped():
        pass
    ema.update()


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("step", torch.tensor(-1), "negative"),
        ("step", torch.tensor(1.0), "of another dtype"),
        ("target.weight", torch.full((2, 2), torch.nan), "not finite"),
        ("target.weight", torch.ones(2, 2, dtype=torch.complex64), "of another dtype"),
    ],
)
def test_a_damaged_state_is_refused_and_changes_nothing(name, value, words):
    ema = EMA(nn.Linear(2, 2), CosineDecay())
    before = {key: x.clone() for key, x in ema.state_dict().items()}
    changed = {key: x + 1 for key, x in before.items()} | {name: value}
    with pytest.raises(RuntimeError, match=f"{name}: {words}"):
        ema.load_state_dict(changed)
    assert all(torch.equal(before[key], x) for key, x in ema.state_dict().items())
