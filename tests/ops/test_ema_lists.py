"""What ``ema_update_`` refuses, by the C++ checks and by those in Python alike: a clear error and nothing written."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from byola_fast import ops
from byola_fast.ops import _dispatch, _schemas


def by_the_backend(target, online, decay):
    torch.ops.byola_fast.ema_update_(target, online, torch.as_tensor(decay))


def by_the_reference(target, online, decay):
    _schemas.ema_update__checked(target, online, torch.as_tensor(decay))


WAYS = [ops.ema_update_, by_the_backend, by_the_reference]


def z(*size, dtype=torch.float32, device="cpu"):
    return torch.zeros(size, dtype=dtype, device=device)


LINE = z(24)
GONE = z(4)
GONE.untyped_storage().resize_(0)

REFUSED = {
    "fewer online": ([z(2)], [], 0.5, ValueError, "online: expected as many tensors as in target (1), got 0"),
    "more online": ([], [z(2)], 0.5, ValueError, "online: expected as many tensors as in target (0), got 1"),
    "shape": ([z(2)], [z(3)], 0.5, ValueError, "online[0]: expected shape (2,), got (3,)"),
    "rank": ([z(2), z(2, 3)], [z(2), z(6)], 0.5, ValueError, "online[1]: expected shape (2, 3), got (6,)"),
    "wider online": (
        [z(2)],
        [z(2, dtype=torch.float64)],
        0.5,
        TypeError,
        "online[0]: expected torch.float32 or half precision, got torch.float64",
    ),
    "half for float64": (
        [z(2, dtype=torch.float64)],
        [z(2, dtype=torch.float16)],
        0.5,
        TypeError,
        "online[0]: expected torch.float64, got torch.float16",
    ),
    "half target": (
        [z(2, dtype=torch.bfloat16)],
        [z(2, dtype=torch.bfloat16)],
        0.5,
        TypeError,
        "target[0]: expected float32 or float64, got torch.bfloat16; half would never move",
    ),
    "integers": (
        [z(2, dtype=torch.int64)],
        [z(2, dtype=torch.int64)],
        0.5,
        TypeError,
        "target[0]: expected float32 or float64, got torch.int64",
    ),
    "complex": (
        [z(2), z(2, dtype=torch.complex64)],
        [z(2), z(2, dtype=torch.complex64)],
        0.5,
        TypeError,
        "target[1]: expected float32 or float64, got torch.complex64",
    ),
    "sparse target": (
        [z(2).to_sparse()],
        [z(2)],
        0.5,
        TypeError,
        "target[0]: expected a dense tensor (torch.strided), got torch.sparse_coo",
    ),
    "sparse online": ([z(2)], [z(2).to_sparse()], 0.5, TypeError, "online[0]: expected a dense tensor"),
    "two devices": (
        [z(2), z(2, device="meta")],
        [z(2), z(2, device="meta")],
        0.5,
        ValueError,
        "target[1]: expected on the device of target[0] (cpu), got meta",
    ),
    "online elsewhere": (
        [z(2)],
        [z(2, device="meta")],
        0.5,
        ValueError,
        "online[0]: expected on the device of target[0] (cpu), got meta",
    ),
    "the same target twice": (
        [LINE, LINE],
        [z(24), z(24)],
        0.5,
        ValueError,
        "target[0]: expected memory of its own, got that of target[1]",
    ),
    "overlapping targets": (
        [LINE[:6], z(1), LINE[5:9]],
        [z(6), z(1), z(4)],
        0.5,
        ValueError,
        "target[0]: expected memory of its own, got that of target[2]",
    ),
    "target and online the same": (
        [z(2), LINE],
        [z(2), LINE],
        0.5,
        ValueError,
        "target[1]: expected memory of its own, got that of online[1]",
    ),
    "target and another's online": (
        [LINE[4:8], z(9)],
        [z(4), LINE[:9]],
        0.5,
        ValueError,
        "target[0]: expected memory of its own, got that of online[1]",
    ),
    "half precision in the target's memory": (
        [LINE[:4]],
        [LINE.view(torch.float16)[6:10]],
        0.5,
        ValueError,
        "target[0]: expected memory of its own, got that of online[0]",
    ),
    "interleaved and touching": (
        [LINE[::2], LINE[1:10:4]],
        [z(12), LINE[5:8]],
        0.5,
        ValueError,
        "target[1]: expected memory of its own, got that of online[1]",
    ),
    "expanded target": (
        [z(1).expand(3)],
        [z(3)],
        0.5,
        ValueError,
        "target[0]: expected elements with memory of their own, got strides (0,)",
    ),
    "windows as a target": (
        [LINE.unfold(0, 4, 2)],
        [z(11, 4)],
        0.5,
        ValueError,
        "target[0]: expected elements with memory of their own, got strides (2, 1)",
    ),
    "freed target": ([GONE], [z(4)], 0.5, ValueError, "target[0]: expected values, but its storage was freed"),
    "freed online": ([z(4)], [GONE], 0.5, ValueError, "online[0]: expected values, but its storage was freed"),
    "decay above 1": ([z(2)], [z(2)], 1.5, ValueError, "decay: expected a number in [0, 1], got 1.5"),
    "decay below 0": ([z(2)], [z(2)], torch.tensor(-0.5), ValueError, "decay: expected a number in [0, 1], got -0.5"),
    "decay NaN": ([z(2)], [z(2)], float("nan"), ValueError, "decay: expected a number in [0, 1], got nan"),
    "decay inf": ([z(2)], [z(2)], float("inf"), ValueError, "decay: expected a number in [0, 1], got inf"),
    "two decays": ([z(2)], [z(2)], torch.zeros(2), ValueError, "decay: expected "),
    "integer decay": ([z(2)], [z(2)], torch.tensor(1), TypeError, "decay: expected a floating-point tensor"),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("case", REFUSED)
def test_refused(case, way):
    target, online, decay, error, words = REFUSED[case]
    first, other = torch.full((3,), 7.0), torch.zeros(3)
    in_front = "online elsewhere" not in case and len(target) == len(online)
    with pytest.raises(error, match=re.escape(words)):
        way(target, online, decay)
    numbered = re.sub(r"\[(\d+)\]", lambda m: f"[{int(m[1]) + 1}]", words)
    if in_front and "device of" not in words and "decay" not in words:
        with pytest.raises(error, match=re.escape(numbered)):
            way([first, *target], [other, *online], decay)
    assert (first == 7).all()


@pytest.mark.parametrize(
    ("target", "online", "words"),
    [
        ([[0.0]], [z(1)], "target[0]: expected a torch.Tensor, got list"),
        ([z(1)], [None], "online[0]: expected a torch.Tensor, got NoneType"),
    ],
)
def test_what_is_no_tensor_is_named(target, online, words):
    with pytest.raises(TypeError, match=re.escape(words)):
        ops.ema_update_(target, online, 0.5)


def test_a_decay_that_is_no_number():
    with pytest.raises(TypeError, match="decay: expected a number or a 0-d tensor, got str"):
        ops.ema_update_([z(1)], [z(1)], "0.5")


def test_the_backend_checks_by_itself():
    """Else the cases above would test Python's checks twice."""
    backend, _why = _dispatch.backend_in_use("CPU", "ema_update_")
    assert backend == "cpp" or not _dispatch.strict()


@pytest.mark.parametrize("way", WAYS)
def test_neighbours_and_gaps_are_nobodys(way):
    line = torch.arange(24.0)
    target = [line[0:4], line[4:5], line[8:16:2], line[16:].view(2, 4)[:, :2]]
    online = [torch.zeros(4), torch.zeros(1), line[9:16:2], line[16:].view(2, 4)[:, 2:]]
    way(target, online, 0.0)
    expected = [0, 0, 0, 0, 0, 5, 6, 7, 9, 9, 11, 11, 13, 13, 15, 15, 18, 19, 18, 19, 22, 23, 22, 23]
    assert line.tolist() == expected


@pytest.mark.parametrize("way", WAYS)
def test_online_tensors_may_share_memory(way):
    line, target = torch.arange(6.0), [torch.zeros(4), torch.zeros(4), torch.zeros(3)]
    way(target, [line[:4], line[2:], line[:1].expand(3)], 0.0)
    assert [t.tolist() for t in target] == [[0, 1, 2, 3], [2, 3, 4, 5], [0, 0, 0]]


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_shared_memory_is_found_exactly(data):
    """Views of one line of memory are refused if and only if some element of a target belongs to another too."""
    line = torch.zeros(40)

    def view():
        shape = data.draw(st.lists(st.integers(0, 4), max_size=2))
        stride = [data.draw(st.integers(0, 6)) for _ in shape]
        return line.as_strided(shape, stride, data.draw(st.integers(0, 3)))

    count = data.draw(st.integers(1, 3))
    target = [view() for _ in range(count)]
    online = [line[30].expand(t.shape) if data.draw(st.booleans()) else torch.ones(t.shape) for t in target]
    owners = torch.zeros(40)
    for t in target:
        places = torch.arange(40).as_strided(t.shape, t.stride(), t.storage_offset()).flatten()
        owners.index_add_(0, places, torch.ones(len(places)))
    read = any(o.numel() and o.data_ptr() == line[30].data_ptr() for o in online)
    clash = bool((owners > 1).any()) or (read and bool(owners[30]))
    for way in WAYS:
        line.zero_()
        if clash:
            with pytest.raises(ValueError, match="memory of"):
                way(target, online, 0.5)
            assert not line.any()
        else:
            way(target, online, 0.0)
            assert all(torch.equal(t, o) for t, o in zip(target, online, strict=True))
