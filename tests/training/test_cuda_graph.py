"""Compiled and eager steps agree; an impossible CUDA graph is refused."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from helpers.tolerances import assert_close
from torch import nn

from byola_fast import AudioNTT2020, Augment, make_learner
from byola_fast.training.cuda_graph import graph_step, use_graph
from byola_fast.training.stage_times import StageTimes

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def make_step(device: torch.device, objective: str = "byol", capturable: bool = False, local_views: int = 0):
    """Return a whole training step on log-mels, its networks, and its optimiser."""
    torch.manual_seed(7)
    encoder = AudioNTT2020(16, 16)
    for module in encoder.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    learner = make_learner(objective, encoder, proj_size=8, proj_dim=32).to(device)
    local = {"local_views": local_views, "local_size": (16, 9)} if local_views else {}
    aug = Augment(n_memory=16, shape=(16, 24), seed=3, stats=(0.0, 1.0), **local).to(device)
    trained = [parameter for parameter in learner.parameters() if parameter.requires_grad]
    lr = torch.tensor(1e-3, device=device) if capturable else 1e-3
    optimizer = torch.optim.Adam(trained, lr=lr, fused=True, capturable=capturable)

    def step(lms):
        view1, view2, *local = aug(lms)
        loss, projection = learner(view1, view2, local) if local else learner(view1, view2)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        learner.update_target()
        return loss.detach(), projection

    return step, learner, aug, optimizer


@pytest.mark.slow
@pytest.mark.parametrize(("objective", "local"), [("byol", 0), ("moco", 0), ("simclr", 2)])
def test_a_compiled_step_equals_an_eager_one(objective, local):
    batches = torch.randn(3, 8, 1, 16, 24)
    eager, *_ = make_step(CPU, objective, local_views=local)
    compiled, learner, *_ = make_step(CPU, objective, local_views=local)
    learner.compile(backend="aot_eager", fullgraph=True, dynamic=False)
    for lms in batches:
        one, other = eager(lms), compiled(lms)
        assert_close(other[0], one[0].double(), factor=100)
        assert_close(other[1], one[1].double(), factor=100)


@pytest.mark.parametrize(
    ("device", "settings", "words"),
    [
        (CPU, {}, "it needs a GPU, and this run is on the CPU"),
        (GPU, {"processes": 2}, "several processes exchange gradients"),
        (GPU, {"profile": True}, "the stages of a graph cannot be timed"),
    ],
)
def test_an_impossible_graph_gives_its_reason(device, settings, words):
    settings = {"processes": 1, "profile": False} | settings
    assert use_graph(None, device, **settings) is False
    assert use_graph(False, device, **settings) is False
    with pytest.raises(ValueError, match=f"cuda_graph: .*{words}"):
        use_graph(True, device, **settings)


def test_a_gpu_alone_takes_a_graph():
    assert use_graph(None, GPU, processes=1, profile=False)
    assert not use_graph(False, GPU, processes=1, profile=False)


class FakeGraph:
    """Runs again what was captured, on the input that it was captured with."""

    def __init__(self, again):
        self.replay = again


def test_the_warm_up_of_a_graph_leaves_no_trace(monkeypatch):
    batches = torch.randn(4, 8, 1, 16, 24)
    eager, learner, aug, _ = make_step(CPU, "moco")
    step, learner2, aug2, optimizer = make_step(CPU, "moco")
    inputs = []

    def noted(lms):
        inputs.append(lms)
        torch.rand(1)  # as dropout does
        return step(lms)

    side = FakeStream()
    fakes = {"Stream": lambda _: side, "current_stream": lambda _: FakeStream(), "stream": nullcontext}
    captures = []

    def capture(_graph, stream=None, capture_error_mode="global"):
        captures.append((stream, capture_error_mode))
        return nullcontext()

    fakes |= {"CUDAGraph": lambda: FakeGraph(lambda: step(inputs[-1])), "graph": capture}
    fakes |= {"get_rng_state": lambda _: torch.get_rng_state(), "set_rng_state": lambda x, _: torch.set_rng_state(x)}
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    generator = torch.get_rng_state()
    replay = graph_step(noted, batches[3], [learner2, aug2], optimizer)
    assert len(inputs) == 4  # three to warm up, one captured
    # Gradients are added up on the warm-up's stream; threads that pin memory for coming batches go on.
    assert captures == [(side, "thread_local")]
    assert torch.equal(torch.get_rng_state(), generator)
    for lms in batches:
        eager(lms)
        replay(lms)
    for one, other in ((learner, learner2), (aug, aug2)):
        for x, y in zip(one.state_dict().values(), other.state_dict().values(), strict=True):
            assert torch.equal(x, y)


class FakeStream:
    def wait_stream(self, _other):
        pass


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
@pytest.mark.parametrize(
    ("objective", "local"), [("byol", 0), ("simclr", 0), ("moco", 0), ("cola", 0), ("byol", 2), ("simclr", 2)]
)
def test_a_replayed_cuda_graph_equals_eager_steps(objective, local):
    batches = torch.randn(6, 8, 1, 16, 24, device="cuda")
    eager, learner, aug, _ = make_step(GPU, objective, capturable=True, local_views=local)
    step, learner2, aug2, optimizer = make_step(GPU, objective, capturable=True, local_views=local)
    replay = graph_step(step, batches[0], [learner2, aug2], optimizer)
    for lms in batches:
        one, other = eager(lms)[0], replay(lms)[0]
        assert_close(other, one.double(), factor=1000)
    assert aug2.rng.tolist() == aug.rng.tolist() == [3, 6]
    assert torch.equal(aug2.bank.rows, aug.bank.rows)
    for (name, x), y in zip(learner.state_dict().items(), learner2.state_dict().values(), strict=True):
        assert_close(y.float() / (x.abs().max() + 1e-3), (x / (x.abs().max() + 1e-3)).double(), factor=1e4), name


def test_times_cost_nothing_where_nobody_asked():
    times = StageTimes(CPU, on=False)
    with times("forward"):
        pass
    assert list(times.each("data", [1, 2])) == [1, 2]
    assert times.medians() == {}
