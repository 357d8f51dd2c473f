"""``ema_update_`` in Triton, interpreted on the CPU, compiled on a GPU: the reference's results, bit for bit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from byola_fast.ops import _triton, reference
from byola_fast.ops._triton import ema_update as kernels

if not (torch.cuda.is_available() or _triton.interpreted()):
    reason = "kernels need a GPU or TRITON_INTERPRET=1; test_triton_interpreted.py runs this file under the interpreter"
    pytest.skip(reason, allow_module_level=True)

PAIRS = [
    (torch.float32, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.float32, torch.float16),
    (torch.float64, torch.float64),
]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def forgotten():
    """Let no table of another test be found."""
    kernels._known.clear()


def wanted_of(target, online, decay):
    wanted = [t.cpu().clone() for t in target]
    reference.ema_update__reference(wanted, [o.cpu() for o in online], torch.as_tensor(decay).cpu().double())
    return wanted


def assert_same(target, wanted):
    for t, w in zip(target, wanted, strict=True):
        assert torch.equal(t.cpu(), w)


@pytest.mark.parametrize("decay", [0.0, 0.3, 0.5, 0.996, 1.0])
@pytest.mark.parametrize(("target_dtype", "online_dtype"), PAIRS)
def test_every_rounding(target_dtype, online_dtype, decay):
    shapes = [(), (1,), (7,), (64, 33), (3, 5, 7), (0,), (4096,), (9001,)]
    for wrap in (torch.tensor, lambda d: torch.tensor(d, dtype=torch.float64, device=DEVICE)):
        target = [torch.randn(s, dtype=target_dtype, device=DEVICE) for s in shapes]
        online = [torch.randn(s, device=DEVICE).to(online_dtype) for s in shapes]
        wanted = wanted_of(target, online, wrap(decay))
        kernels.ema_update_(target, online, wrap(decay))
        assert_same(target, wanted)


def test_a_mix_of_everything_in_as_few_launches_as_dtypes_and_alignments():
    target, online = [], []
    for number in range(300):
        target_dtype, online_dtype = PAIRS[number % 4]
        size = 1 + (number * 37) % 90
        offset = number % 3 == 0
        target.append(torch.randn(size + offset, dtype=target_dtype, device=DEVICE)[offset:])
        online.append(torch.randn(size, device=DEVICE).to(online_dtype))
    wanted = wanted_of(target, online, 0.99)
    kernels.ema_update_(target, online, torch.tensor(0.99))
    assert_same(target, wanted)
    (work,) = kernels._known.values()
    assert len(work.launches) == 8


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_strides(data):
    target, online = [], []
    decay = torch.tensor(data.draw(st.floats(0, 1)), dtype=torch.float64)
    for _ in range(data.draw(st.integers(0, 4))):
        shape = data.draw(st.lists(st.integers(0, 5), max_size=3))
        for tensors in (target, online):
            order = data.draw(st.permutations(range(len(shape))))
            step = data.draw(st.integers(1, 2))
            wide = torch.randn([shape[d] * step for d in order], device=DEVICE)
            in_order = wide.permute([order.index(d) for d in range(len(shape))])
            tensors.append(in_order[(slice(None, None, step),) * len(shape)])
    wanted = wanted_of(target, online, decay)
    kernels.ema_update_(target, online, decay)
    assert_same(target, wanted)


def test_tables_are_kept_and_never_out_of_date():
    target, online = [torch.zeros(5, device=DEVICE)], [torch.ones(5, device=DEVICE)]
    decay = torch.tensor(0.5)
    kernels.ema_update_(target, online, decay)
    (first,) = kernels._known.values()
    kernels.ema_update_(target, online, decay)
    assert list(kernels._known.values()) == [first]
    assert target[0].tolist() == [0.75] * 5
    target[0].data = torch.zeros(9000, device=DEVICE)
    online[0].data = torch.ones(9000, device=DEVICE)
    kernels.ema_update_(target, online, decay)
    assert torch.equal(target[0], torch.full_like(target[0], 0.5))
    target[0].data = target[0].data[:3]  # the same address
    online[0].data = online[0].data[:3]
    kernels.ema_update_(target, online, decay)
    assert target[0].tolist() == [0.75] * 3
    for size in range(2 * kernels.KEPT):
        kernels.ema_update_([torch.zeros(size, device=DEVICE)], [torch.ones(size, device=DEVICE)], decay)
    assert len(kernels._known) == kernels.KEPT


def test_refused_before_anything_is_written():
    first, line = torch.full((3,), 7.0, device=DEVICE), torch.zeros(9, device=DEVICE)
    other, decay = torch.zeros(3, device=DEVICE), torch.tensor(0.5)
    for target, online, words in (
        ([first, line], [other, line[:4]], r"online\[1\]: expected shape"),
        ([first, line], [other, line], r"target\[1\]: expected memory of its own, got that of online\[1\]"),
        ([first], [], "as many tensors"),
    ):
        for _ in range(2):  # a table of a refused list must not be kept
            with pytest.raises(ValueError, match=words):
                kernels.ema_update_(target, online, decay)
    with pytest.raises(ValueError, match="decay: expected a number"):
        kernels.ema_update_([first], [other], torch.tensor(1.5))
    assert (first == 7).all()


def test_autograd_hears_of_it():
    target, x = torch.ones(3, device=DEVICE), torch.ones(3, device=DEVICE, requires_grad=True)
    y = (target * x).sum()
    kernels.ema_update_([target], [torch.zeros(3, device=DEVICE)], torch.tensor(0.5))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
def test_in_a_cuda_graph():
    target, online = [torch.zeros(5000, device="cuda")], [torch.ones(5000, device="cuda")]
    decay = torch.tensor(0.5, dtype=torch.float64, device="cuda")
    kernels.ema_update_(target, online, decay)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kernels.ema_update_(target, online, decay)
    kernels._known.clear()
    target[0].zero_()
    graph.replay()
    decay.fill_(0.0)
    assert (target[0] == 0.5).all()
    graph.replay()
    assert (target[0] == 1).all()
