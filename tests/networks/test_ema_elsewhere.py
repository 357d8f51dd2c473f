"""The moving average inside other people's programs: evaluation, copies, processes, wrappers, devices, contexts."""

from __future__ import annotations

import copy
import math
import multiprocessing
import pickle
import warnings

import pytest
import torch
from helpers.tolerances import assert_close
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.nn.utils import parametrizations
from torch.nn.utils import spectral_norm as old_spectral_norm
from torch.nn.utils import weight_norm as old_weight_norm
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from byola_fast import BYOL, EMA, AudioNTT2020
from byola_fast.networks.ema import CosineDecay
from byola_fast.objectives.contrastive import MoCo


def make_net() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.ReLU(), nn.Linear(7, 3))


def jump(net: nn.Module) -> None:
    """Change the parameters as an optimiser would."""
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(torch.randn_like(parameter))


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


# evaluation


def test_the_defaults_are_right_for_evaluation():
    """BatchNorm's statistics were those of the first day: an error 1000 times that of the network."""
    net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 1))
    ema = EMA(net, decay=0.9)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)

    def data(count):
        x = 30 + 10 * torch.randn(count, 4)
        return x, x.mean(1, keepdim=True) - 30

    for _ in range(300):
        x, y = data(64)
        loss = (net(x) - y).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        ema.update()
    x, y = data(1000)
    own, averaged = ((each.eval()(x) - y).square().mean().item() for each in (net, ema))
    assert averaged < 2 * own + 0.1


def test_spectral_norm_is_right_for_evaluation():
    net = parametrizations.spectral_norm(nn.Linear(8, 8))
    ema = EMA(net, decay=0.5)
    for _ in range(20):
        jump(net)
        for _ in range(20):
            net(torch.randn(2, 8))
        ema.update()
    assert torch.linalg.matrix_norm(ema.eval().target.weight, 2).item() == pytest.approx(1, abs=0.1)


def train_without_target(ema, net):
    for _ in range(2):
        net(torch.randn(6, 5))
        jump(net)
        ema.update()


@pytest.mark.parametrize("moved", [False, True])
def test_a_target_that_saw_no_data_warns_once(moved):
    net = make_net()
    ema = EMA(net, buffers="none")
    train_without_target(ema, net)
    if moved:
        ema.to(torch.float64)
        ema = copy.deepcopy(ema)
    x = torch.randn(2, 5, dtype=torch.float64 if moved else torch.float32)
    with pytest.warns(UserWarning, match=r"target\.1\.\w+: the target runs in eval mode .*copy") as record:
        ema.eval()(x)
    assert record[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ema(x)


@pytest.mark.parametrize("buffers", ["none", "copy", "ema"])
def test_a_target_that_saw_data_does_not_warn(buffers):
    net = make_net()
    ema = EMA(net, buffers=buffers)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ema.eval()(torch.randn(2, 5))
        ema.train()
        for _ in range(2):
            train_without_target(ema, net)
            if buffers == "none":
                ema(torch.randn(6, 5))
        ema.eval()(torch.randn(2, 5))
        frozen = EMA(net.eval(), buffers="none")  # neither network changes its statistics
        train_without_target(frozen, net)
        frozen(torch.randn(2, 5))
        loaded = EMA(make_net(), buffers="none")
        loaded.load_state_dict(ema.state_dict(), assign=True)
        loaded.eval()(torch.randn(2, 5))


@pytest.mark.parametrize("learner", [BYOL, MoCo])
def test_learners_keep_the_published_buffers_and_do_not_warn(learner):
    made = learner(AudioNTT2020(d=32), proj_size=8, proj_dim=16)
    assert made.target.buffers_mode == "none"
    optimizer = torch.optim.SGD(made.parameters(), lr=0.1)
    views = torch.randn(2, 4, 1, 64, 96)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            made(*views).loss.backward()
            optimizer.step()
            made.update_target()
        made.eval()(*views)


def test_weights_cast_under_autocast_are_swapped_too():
    """Autocast keeps casts by tensor object, so that evaluation ran the network's own weights."""
    net = nn.Linear(5, 5)
    ema = EMA(net)
    jump(net)
    x = torch.randn(4, 5)
    with torch.autocast("cpu", torch.bfloat16):
        own = net(x)
        with ema.swapped():
            assert torch.equal(net(x), ema(x))
        assert torch.equal(net(x), own)
    assert not torch.equal(own, ema(x).to(own.dtype))


# schedules


def test_a_function_of_the_step_is_a_schedule():
    net = nn.Linear(3, 3, bias=False)
    ema = EMA(net, decay=lambda step: min(0.9, (1 + step) / (10 + step)))
    wanted = net.weight.detach().double()
    for step in range(5):
        jump(net)
        decay = min(0.9, (1 + step) / (10 + step))
        assert float(ema.current_decay()) == pytest.approx(decay, abs=1e-7)
        wanted = decay * wanted + (1 - decay) * net.weight.detach().double()
        ema.update()
    assert int(ema.state_dict()["step"]) == 5
    assert_close(ema.target.weight, wanted)
    EMA(net, decay=lambda step: 1 - 0.1 * math.cos(step)).update()
    with pytest.raises(ValueError, match=r"decay: expected a number in \[0, 1\], got 2"):
        EMA(net, decay=lambda step: 2.0).update()
    with pytest.raises(TypeError, match="decay: expected a number or a 0-d tensor, got str"):
        EMA(net, decay=lambda step: "0.9").update()


@pytest.mark.parametrize("decay", ["0.9", None, [0.9]])
def test_a_decay_of_another_type_is_named(decay):
    with pytest.raises(TypeError, match=r"decay: expected a number in \[0, 1\] or a schedule decay\(step\), got"):
        EMA(make_net(), decay=decay)


# copies and processes


def test_a_deep_copy_follows_the_same_network():
    """It followed a copy that nobody trains."""
    net = make_net()
    ema = EMA(net, decay=0.5)
    other = copy.deepcopy(ema)
    with ema.swapped():
        third = copy.deepcopy(ema)
    jump(net)
    for each in (ema, other, third):
        each.update()
    assert same(ema, other)
    assert same(ema, third)
    assert other.target is not ema.target


class Program(nn.Module):
    def __init__(self, first: str) -> None:
        super().__init__()
        net = make_net()
        ema = EMA(net, decay=0.5)
        for name in (first, *{"net", "ema"} - {first}):
            setattr(self, name, {"net": net, "ema": ema}[name])


@pytest.mark.parametrize("first", ["net", "ema"])
@pytest.mark.parametrize(
    "how", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x)), lambda x: copy.deepcopy([x])[0]]
)
def test_a_copy_of_a_whole_program_follows_its_own_network(first, how):
    program = Program(first)
    program.ema.update()
    other = how(program)
    jump(other.net)
    before = copy.deepcopy(program.ema.state_dict())
    moved = other.ema.target[0].weight.clone()
    other.ema.update()
    assert_close(other.ema.target[0].weight, (moved.double() + other.net[0].weight.detach().double()) / 2)
    program.ema.update()
    assert all(torch.equal(value, before[name]) for name, value in program.ema.state_dict().items())


def step_in_another_process(ema, answers):
    with torch.no_grad():
        for parameter in ema._online[0].parameters():
            parameter.zero_()
    ema.update()
    answers.put([p.tolist() for p in ema.target.parameters()])


@pytest.mark.slow
def test_spawned_workers_get_a_working_average():
    ema = EMA(nn.Linear(2, 2), decay=CosineDecay(0.5, 10))
    context = multiprocessing.get_context("spawn")
    answers = context.SimpleQueue()
    wanted = [(p / 2).tolist() for p in ema.target.parameters()]
    worker = context.Process(target=step_in_another_process, args=(ema, answers))
    worker.start()
    found = answers.get()
    worker.join()
    assert found == wanted


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize(
    "norm",
    [old_weight_norm, old_spectral_norm, parametrizations.weight_norm, parametrizations.spectral_norm],
)
def test_networks_that_compute_their_weights(norm):
    """deepcopy refuses those of the old functions, as in DINO's head."""
    net = nn.Sequential(nn.Linear(5, 4), norm(nn.Linear(4, 3)))
    net(torch.randn(6, 5))
    ema = EMA(net, decay=0.0)
    x = torch.randn(6, 5)
    for _ in range(2):
        jump(net)
        net(x)
        ema.update()
        net.eval(), ema.eval()
        assert torch.equal(ema(x), net(x))
        with ema.swapped():
            assert torch.equal(ema(x), net(x))
        net.train(), ema.train()
    copy.deepcopy(ema).update()


# networks of every kind


@pytest.mark.filterwarnings("ignore:.*quanti:DeprecationWarning", "ignore:.*quant:UserWarning")
def test_networks_that_an_average_cannot_follow_are_refused():
    with pytest.raises(
        TypeError, match=r"online\.0\.weight: expected values, got a lazy tensor; call the network once"
    ):
        EMA(nn.Sequential(nn.LazyLinear(3)))
    quantised = torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(4, 4)), {nn.Linear})
    with pytest.raises(TypeError, match=r"online\.0: expected floating-point weights, got quantised ones"):
        EMA(quantised)
    net = make_net()
    net.lock = multiprocessing.Lock()
    with pytest.raises(TypeError, match=r"online: expected a network that copy\.deepcopy can copy: Lock objects"):
        EMA(net)


def test_lazy_networks_work_after_their_first_call():
    net = nn.Sequential(nn.LazyLinear(3), nn.LazyBatchNorm1d())
    net(torch.randn(4, 2))
    ema = EMA(net, decay=0.0)
    jump(net)
    ema.update()
    assert same(ema.target, net)


def test_buffers_that_appear_vanish_and_change_shape_are_copied():
    net = make_net()
    net.register_buffer("cache", None)
    net.register_buffer("table", torch.zeros(3, dtype=torch.complex64), persistent=False)
    net.register_buffer("narrow", torch.zeros(2, dtype=torch.float16))
    ema = EMA(net)
    ema.update()
    net.cache = torch.ones(2, dtype=torch.float16)
    net.table = torch.ones(5, dtype=torch.complex64)
    net.narrow.resize_(1).fill_(3)  # the same object; copy_ would broadcast it
    with torch.inference_mode():
        ema.update()
    target = ema.target
    assert (target.cache.tolist(), target.cache.dtype) == ([1, 1], torch.float32)
    assert target.table.tolist() == [1] * 5
    assert target.narrow.tolist() == [3]
    assert "target.table" not in ema.state_dict()
    net.cache = None
    net.narrow.fill_(4)
    ema.update()
    assert target.cache is None
    assert target.narrow.tolist() == [4]
    average = EMA(net, buffers="ema")
    net.narrow.resize_(2)
    with pytest.raises(ValueError, match=r"online\.narrow: expected shape \(1,\), got \(2,\)"):
        average.update()


@pytest.mark.filterwarnings("ignore:.*quanti:DeprecationWarning", "ignore:.*quant:UserWarning")
def test_quantisation_aware_training():
    net = nn.Sequential(nn.Linear(4, 4)).train()
    net[0].qconfig = torch.ao.quantization.get_default_qat_qconfig("fbgemm")
    torch.ao.quantization.prepare_qat(net, inplace=True)
    ema = EMA(net, decay=0.0, buffers="copy")
    x = torch.randn(6, 4)
    net(x)
    ema.update()
    assert torch.equal(ema.eval()(x), net.eval()(x))


def test_activation_checkpointing_may_wrap_later():
    net = make_net()
    ema = EMA(net, decay=0.0)
    apply_activation_checkpointing(net, check_fn=lambda module: isinstance(module, nn.Linear))
    jump(net)
    net(torch.randn(4, 5))
    ema.update()
    assert torch.equal(ema.target[0].weight, net[0].weight)
    assert torch.equal(ema.target[1].running_mean, net[1].running_mean)


def test_names_that_become_one_without_their_prefixes_are_refused():
    """One of the two would not have been averaged."""
    net = nn.Sequential(nn.Linear(2, 2))
    net[0].module = nn.Linear(2, 2)
    ema = EMA(net)
    net[0] = torch.compile(net[0], backend="eager")
    with pytest.raises(
        ValueError, match=r"online: expected the parameter names of the target; only one of the two has"
    ):
        ema.update()


def test_sharded_networks_are_refused():
    distributed = torch.distributed
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        from torch.distributed.fsdp import fully_shard

        net = make_net()
        ema = EMA(net)
        fully_shard(net, mesh=distributed.device_mesh.init_device_mesh("cpu", (1,)))
        with pytest.raises(TypeError, match=r"online\.0\.weight: expected a plain tensor, got DTensor"):
            ema.update()
        with pytest.raises(TypeError, match=r"online: expected a network that copy\.deepcopy can copy: FSDP"):
            EMA(net)
    finally:
        distributed.destroy_process_group()


def test_the_same_average_as_averaged_model():
    net = make_net()
    averaged = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=False)
    ema = EMA(net, decay=0.9)
    averaged.update_parameters(net)  # its first update copies
    of_averaged = EMA(averaged, decay=0.0)
    for _ in range(5):
        jump(net)
        averaged.update_parameters(net)
        ema.update()
        of_averaged.update()
    for ours, theirs in zip(ema.target.parameters(), averaged.module.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    assert same(of_averaged.target, averaged)


# devices and contexts


@pytest.mark.parametrize("decay", [0.5, CosineDecay(0.5, 10)])
def test_built_on_meta(decay):
    net, other = make_net(), None
    ema = EMA(net, decay)
    with torch.device("meta"):
        other = make_net()
        average = EMA(other, decay)
        average.update()
    for module, source in ((other, net), (average, ema)):
        module.to_empty(device="cpu")
        module.load_state_dict(source.state_dict())
    jump(net)
    net(torch.randn(4, 5))
    other.load_state_dict(net.state_dict())
    ema.update()
    average.update()
    assert same(ema, average)


def test_another_default_device_changes_nothing():
    net = make_net()
    ema, plain = (EMA(net, CosineDecay(0.5, 10), buffers="ema") for _ in range(2))
    jump(net)
    net(torch.randn(4, 5))
    plain.update()
    with torch.device("meta"):
        ema.update()
        made = EMA(net, CosineDecay(0.5, 10))
        made.update()
    assert same(ema, plain)
    assert {x.device.type for x in made.state_dict().values()} == {"cpu"}


def test_updates_in_inference_mode_and_under_autocast():
    net = make_net()
    with torch.inference_mode():
        ema = EMA(net, CosineDecay(0.5, 10))
    plain = EMA(net, CosineDecay(0.5, 10))
    for context in (torch.inference_mode(), torch.autocast("cpu", torch.bfloat16), torch.enable_grad()):
        jump(net)
        with context:
            ema.update()
        plain.update()
        assert same(ema, plain)


def test_updates_in_a_compiled_step():
    net = make_net()
    ema, plain = (EMA(net, CosineDecay(0.5, 10)) for _ in range(2))
    step = torch.compile(lambda: ema.update(), backend="aot_eager", fullgraph=True)
    for _ in range(3):
        jump(net)
        net(torch.randn(4, 5))
        step()
        plain.update()
    assert same(ema, plain)
    stale = EMA(net, buffers="none").eval()
    torch.compile(stale, backend="aot_eager", fullgraph=True)(torch.randn(4, 5))


def test_modes_pass_to_the_target_and_not_to_the_network():
    net = make_net()
    ema = EMA(net)
    ema.eval()
    assert (ema.target[1].training, net[1].training) == (False, True)
    ema.train()
    net.eval()
    assert ema.target[1].training


@pytest.mark.parametrize("learner", [BYOL, MoCo])
def test_learners_on_meta(learner):
    """The meta device knows no autocast, which the losses turn off."""
    with torch.device("meta"):
        made = learner(AudioNTT2020(d=32), proj_size=8, proj_dim=16)
        loss, _ = made(torch.empty(4, 1, 64, 96), torch.empty(4, 1, 64, 96))
    loss.backward()
    made.update_target()
    assert loss.is_meta
