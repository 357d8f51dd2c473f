"""Kept kernels: which launches share one, and what a kept one is launched with; the driver is a stub.

Where Triton's own ``run`` would choose another compiled kernel, a launch must not use a kept one.
"""

from __future__ import annotations

import types

import pytest
import torch

from byola_fast.ops import _triton

tl = pytest.importorskip("triton.language")
pytestmark = pytest.mark.skipif(_triton.interpreted(), reason="the interpreter launches in its own way")


class FakeDriver:
    """The methods of a driver that a launch calls."""

    device = 0

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return self.device

    def get_current_stream(self, device):
        return 1000 + device


class Compiled:
    """A compiled kernel that notes its launches."""

    def __init__(self, name):
        self.name = name
        self.launches = []
        self.function, self.packed_metadata = object(), object()

    def launch_metadata(self, grid, stream, *args):
        return "metadata"

    def run(self, *args):
        self.launches.append(args)


@pytest.fixture
def stub(monkeypatch):
    """Replace driver and compiler; ``made`` holds a Compiled for each one that Triton would compile."""
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction

    from byola_fast.ops._triton import shared

    made = {}

    def compile_stub(self, key, signature, device, constexprs, options, attrs, warmup):
        cache = self.device_caches[device][0]
        made[self.__name__, device, key] = cache[key] = Compiled(self.__name__)
        return cache[key]

    monkeypatch.setattr(driver, "_active", FakeDriver())
    monkeypatch.setattr(JITFunction, "_do_compile", compile_stub)
    monkeypatch.setattr(shared, "_kept", {})
    return types.SimpleNamespace(made=made, launch=shared.launch)


def last_launch(stub):
    """Return what Triton launched last: each launch must be of its own compiled kernel."""
    launched = [compiled for compiled in stub.made.values() if compiled.launches]
    args = [launch for compiled in launched for launch in compiled.launches]
    for compiled in launched:
        compiled.launches.clear()
    assert len(args) == 1
    return launched[0], args[0]


def own(value):
    return value.data_ptr() if isinstance(value, torch.Tensor) else value


@pytest.fixture
def kernel():
    """A kernel with each kind of parameter."""
    import triton
    import triton.language as tl

    @triton.jit(do_not_specialize=["runtime"])
    def some_kernel(x, y, runtime, size, factor, FLAG: tl.constexpr, TYPE: tl.constexpr):
        tl.store(y, tl.load(x))

    return some_kernel


def arguments(x=torch.float32, offset=0, y=torch.int64, y_offset=0, runtime=5, size=5, factor=0.5):
    tensors = torch.zeros(64, dtype=x)[offset:], torch.zeros(64, dtype=y)[y_offset:]
    return *tensors, runtime, size, factor


SIZES = [0, 1, 5, 16, 2**31 - 1, 2**31, 2**31 + 1, -(2**31), -(2**31) - 1, 2**63 - 1, 2**63, 2**63 + 16]
VARIANTS = [
    {},
    {"x": torch.bfloat16},
    {"x": torch.float64},
    {"offset": 1},
    {"offset": 4},
    {"x": torch.bfloat16, "offset": 4},
    {"y_offset": 1},
    {"y": torch.int32},
    {"factor": 1.5},
    {"factor": 1},
    {"factor": None},
    {"factor": True},
    *({"size": size} for size in SIZES),
    *({"runtime": size} for size in SIZES),
]


def test_a_kept_kernel_is_launched_as_triton_would_launch_it(stub, kernel):
    """The arguments of the second launch, from the kept kernel, against those of ``run``."""
    from triton import knobs

    args, constants = arguments(), {"FLAG": True, "TYPE": tl.float32}
    stub.launch(kernel, 1, *args, **constants)
    first, by_triton = last_launch(stub)
    stub.launch(kernel, 1, *args, **constants)
    second, by_us = last_launch(stub)
    assert second is first
    assert by_us[:6] == by_triton[:6] == (1, 1, 1, 1000, first.function, first.packed_metadata)
    assert by_triton[7:9] == (knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook)
    assert by_us[6:9] == (None, None, None)  # the chains are empty
    assert [own(value) for value in by_us[9:]] == [own(value) for value in by_triton[9:]]
    assert len(by_us) == 9 + len(kernel.arg_names)


def test_hooks_are_called(stub, kernel, monkeypatch):
    from triton import knobs

    args, constants = arguments(), {"FLAG": True, "TYPE": tl.float32}
    stub.launch(kernel, 1, *args, **constants)
    last_launch(stub)
    chain = type(knobs.runtime.launch_enter_hook)
    for enter, leave in ((chain(), chain()), (print, None), (chain(), print)):
        if enter is not print and leave is not print:
            enter.add(print)
        monkeypatch.setattr(knobs.runtime, "launch_enter_hook", enter)
        monkeypatch.setattr(knobs.runtime, "launch_exit_hook", leave)
        stub.launch(kernel, 1, *args, **constants)
        assert last_launch(stub)[1][6:9] == ("metadata", enter, leave)
    before = []
    monkeypatch.setattr(kernel, "pre_run_hooks", [lambda *args, **kwargs: before.append(args)])
    stub.launch(kernel, 1, *args, **constants)
    assert len(before) == 1


def test_launches_that_need_two_kernels_do_not_share_one(stub, kernel):
    """A kept kernel is the one that Triton would choose, whatever was launched before."""
    chosen = []
    for variant in VARIANTS:
        kernel[(1,)](*arguments(**variant), FLAG=True, TYPE=tl.float32)  # Triton's choice
        chosen.append(last_launch(stub)[0])
    assert len(set(chosen)) >= 15
    for _again in range(2):
        for variant, expected in zip(VARIANTS, chosen, strict=True):
            stub.launch(kernel, 1, *arguments(**variant), FLAG=True, TYPE=tl.float32)
            assert last_launch(stub)[0] is expected, variant


def test_constants_options_devices_and_debugging_make_other_kernels(stub, kernel, monkeypatch):
    from triton import knobs
    from triton.runtime.driver import driver

    args = arguments()
    seen = set()
    for constants in ({"FLAG": True, "TYPE": tl.float32}, {"FLAG": True, "TYPE": tl.float64}):
        for options in ({}, {"num_warps": 8}, {"num_warps": 8, "maxnreg": 64}, {"enable_fp_fusion": False}):
            for device in (0, 1):
                for debug in (False, True):
                    monkeypatch.setattr(driver.active, "device", device)
                    monkeypatch.setattr(knobs.runtime, "debug", debug)
                    stub.launch(kernel, 1, *args, **constants, **options)
                    last_launch(stub)
                    stub.launch(kernel, 1, *args, **constants, **options)
                    seen.add(last_launch(stub)[0])
    assert len(seen) == len(stub.made) == 2 * 4 * 2 * 2


@pytest.fixture
def replayed_on_the_cpu(stub, monkeypatch):
    """Let calls on the CPU be recorded and replayed with stubs for kernels; all their launches, in order."""
    from byola_fast.ops import _replay
    from byola_fast.ops._triton import shared
    from byola_fast.views import augment

    launches = []
    monkeypatch.setattr(augment, "has_cpu_op", lambda x: False)
    monkeypatch.setattr(Compiled, "run", lambda self, *args: launches.append((self.name, *args)))
    monkeypatch.setattr(_replay, "ON_CPU", True)
    monkeypatch.setattr(_replay, "_plans", {})
    monkeypatch.setattr(_replay, "_served", {False})
    monkeypatch.setattr(_replay._dispatch, "backend_in_use", lambda *args: ("triton", ""))
    monkeypatch.setattr(shared, "current_stream", lambda device: 1000)
    return launches


@pytest.mark.parametrize("with_memory", [False, True])
def test_a_replayed_call_launches_what_was_recorded(with_memory, replayed_on_the_cpu, monkeypatch):
    """The same kernels, grids and numbers; for each address, the one that the call's own memory has."""
    from byola_fast import Augment, augment

    aug = Augment(n_memory=4, seed=1, stats=(0.5, 2.0))
    batches = [torch.randn(3, 1, 6, 9) for _ in range(4)]
    seen, allocations, empty = [], [0], torch.empty

    def counted(*args, **kwargs):
        allocations[0] += 1
        return empty(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", counted)
        for number, x in enumerate(batches):
            replayed_on_the_cpu.clear()
            allocations[0] = 0
            aug(x) if with_memory else augment(x, seed=2**40 + number, step=number, stats=(0.5, 2.0))
            seen.append(list(replayed_on_the_cpu))
    assert allocations[0] == 2  # the views, and all else
    number = 2 if with_memory else 1  # of the recorded call; with a memory, the first one allocates it
    recorded, replayed = seen[number], seen[3]
    assert len(recorded) == len(replayed) >= 2
    buffers = {x.data_ptr(): x.data_ptr() for x in aug.buffers()}
    moved = buffers | {batches[number].data_ptr(): batches[3].data_ptr()}
    for before, after in zip(recorded, replayed, strict=True):
        assert len(before) == len(after)
        for old, new in zip(before[:7] + before[10:], after[:7] + after[10:], strict=True):  # without the hooks
            if isinstance(old, torch.Tensor):
                assert isinstance(new, int)
                assert new % 16 == old.data_ptr() % 16
                assert moved.setdefault(old.data_ptr(), new) == new
            elif "write_inputs" not in before[0]:
                assert old == new or old is new
    if not with_memory:
        assert replayed[0][12:] == (3, 2**8, 3, 0.5, 2.0, True)  # seed, step and statistics of this call


def test_every_launch_is_by_launch():
    """A plan replays the launches that ``launch`` saw; one past it would be missing."""
    import re
    from pathlib import Path

    for file in Path(_triton.__file__).parent.glob("*.py"):
        if file.name != "shared.py":
            assert not re.search(r"_kernel\[", file.read_text()), file
