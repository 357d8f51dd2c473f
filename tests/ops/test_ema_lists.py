"""The lists that ``ema_update_`` refuses, with a clear error and before it writes, and when it checks them again."""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from byola_fast import ops
from byola_fast.ops import _dispatch, _ema_checks, _schemas


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
        "target[0]: expected float32 or float64, got torch.bfloat16; small updates round to zero in half precision",
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
def test_a_value_that_is_not_a_tensor_is_named(target, online, words):
    with pytest.raises(TypeError, match=re.escape(words)):
        ops.ema_update_(target, online, 0.5)


def test_a_decay_that_is_not_a_number():
    with pytest.raises(TypeError, match="decay: expected a number or a 0-d tensor, got str"):
        ops.ema_update_([z(1)], [z(1)], "0.5")


def test_the_backend_is_compiled():
    """Otherwise the cases above would test the reference twice."""
    backend, _why = _dispatch.backend_in_use("CPU", "ema_update_")
    assert backend == "cpp" or not _dispatch.strict()


@pytest.fixture
def searches(monkeypatch):
    """Return the numbers of ranges in the searches for shared memory; a search of disjoint tensors takes one."""
    numbers, search = [], _ema_checks._first_clash
    monkeypatch.setattr(_ema_checks, "_first_clash", lambda ranges, n: (numbers.append(n), search(ranges, n))[1])
    return numbers


@pytest.mark.parametrize("way", WAYS)
def test_the_same_lists_are_searched_once(searches, way):
    wide = torch.arange(18.0).view(3, 6)
    lists = [
        ([z(number), wide.clone()[:, ::2], wide.clone().t()], [z(number), wide[:, 1::2], wide.t().contiguous()])
        for number in range(8)
    ]
    for _ in range(3):
        for target, online in lists:
            way(target, [*online], 0.5)
    assert len(searches) == 8
    for target, online in lists:
        assert torch.equal(target[1], online[1] - 0.125)
        assert torch.equal(target[2], online[2])


def test_a_loop_over_a_thousand_pairs_is_searched_once(searches):
    if _dispatch.backend_in_use("CPU", "ema_update_")[0] == "reference":
        pytest.skip("the reference remembers 16 lists")
    target, online = z(1000).split(1), torch.ones(1000).split(1)
    for _ in range(2):
        for t, o in zip(target, online, strict=True):
            ops.ema_update_([t], [o], 0.5)
    assert all(t.item() == 0.75 for t in target)
    assert len(searches) == 1000


def test_more_tensors_than_are_remembered(searches):
    line, other = z(70_000), torch.ones(70_000)
    for _ in range(2):
        for pieces in (line.split(1), line.split(2)):
            ops.ema_update_(pieces, other.split(pieces[0].numel()), 0.5)
    assert (line == 1 - 0.5**4).all()
    assert 2 <= len(searches) <= 4


def shared(target, online):
    target.set_(online.detach())


def longer(target, online):
    target.data = target.as_strided((5,), (1,))
    online.data = z(5)


CHANGES = {
    "another storage": (shared, "expected memory of its own, got that of online[0]"),
    "the next tensor's memory": (longer, "expected memory of its own, got that of target[1]"),
    "strides": (lambda t, o: t.as_strided_((4,), (0,)), "expected elements with memory of their own, got strides (0,)"),
    "shape of the online tensor": (lambda t, o: o.resize_(3), "expected shape (4,), got (3,)"),
    "shape of the target": (lambda t, o: t.resize_(3), "expected shape (3,), got (4,)"),
    "dtype": (lambda t, o: setattr(o, "data", o.view(torch.int32)), "expected torch.float32 or half precision"),
    "target freed": (lambda t, o: t.untyped_storage().resize_(0), "expected values, but its storage was freed"),
    "online freed": (lambda t, o: o.untyped_storage().resize_(0), "expected values, but its storage was freed"),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("change", CHANGES)
def test_lists_that_changed_are_checked_again(change, way):
    line = z(8)
    target, online = [line[:4], line[4:]], [torch.ones(4), torch.ones(4)]
    for _ in range(2):
        way(target, online, 0.5)
    change_lists, words = CHANGES[change]
    change_lists(target[0], online[0])
    for _ in range(2):
        with pytest.raises((TypeError, ValueError), match=re.escape(words)):
            way(target, online, 0.5)
    if "freed" not in change or "online" in change:
        assert line.tolist() == [0.75] * 8


@pytest.mark.parametrize("way", WAYS)
def test_lists_that_changed_are_followed(way):
    target, online = [torch.zeros(2, 2)], [torch.tensor([[0.0, 1.0], [2.0, 3.0]])]
    way(target, online, 0.0)
    online[0].t_()  # at the same address
    way(target, online, 0.0)
    assert target[0].tolist() == [[0, 2], [1, 3]]
    online[0].data = torch.full((2, 2), 4.0, dtype=torch.bfloat16)
    way(target, online, 0.0)
    assert target[0].tolist() == [[4, 4], [4, 4]]
    way([online[0].float()], target, 0.0)
    target[0].data = torch.zeros(2, 2, dtype=torch.float64)
    online[0].data = torch.ones(2, 2, dtype=torch.float64)
    way(target, online, 0.5)
    assert target[0].tolist() == [[0.5, 0.5], [0.5, 0.5]]


@pytest.mark.parametrize("way", WAYS)
def test_one_line_of_memory_in_other_pieces(way):
    """The address of the first tensor stays the same."""
    line, other = z(12), torch.ones(12)
    for pieces in ([12], [4, 8], [8, 4], [4, 4, 4], [12]):
        way(line.split(pieces), other.split(pieces), 0.5)
    assert line.tolist() == [1 - 0.5**5] * 12
    way(other.split([4, 8]), line.split([4, 8]), 0.0)
    assert torch.equal(line, other)


def test_threads_keep_plans_of_their_own():
    lists = [([z(3)], [torch.ones(3)]) for _ in range(20)]

    def update(number):
        for _ in range(50):
            ops.ema_update_(*lists[number], 0.5)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(update, range(20)))
    assert all(target[0].tolist() == [1.0] * 3 for target, _online in lists)


@pytest.mark.parametrize("way", WAYS)
def test_tensors_may_touch_and_fill_the_gaps_of_others(way):
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
