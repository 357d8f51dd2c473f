"""The CUDA C++ kernel of ``ema_update_``: arithmetic on any machine, compilation by nvcc, results on a GPU.

The kernel has no shared memory and no barriers, so the CPU can run the threads of all blocks one after the other, with
the GPU's table of addresses, bisection, chunks and roundings.
"""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from byola_fast import ops
from byola_fast.ops import BackendError, _dispatch, reference
from byola_fast.ops._native import build, cuda

NVCC = cuda.find_nvcc()
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="nvcc is not on this machine (PATH, CUDA_HOME)")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU to run on")

EMULATION = """
#include "ema_update.cuh"
using namespace byola::ema;
extern "C" int64_t update(const Pair* pairs, size_t count, double value, const void* on_device, int dtype, bool few) {
  const Decay decay{value, on_device, Float(dtype)};
  const auto launch = [](const auto& table) {
    for (uint32_t block = 0; block < table.chunks; ++block)
      for (int thread = 0; thread < kThreads; ++thread) run(table, block, thread);
  };
  return few ? launch_tables<kFew>(pairs, count, decay, launch) : launch_tables<kMany>(pairs, count, decay, launch);
}
"""
PAIRS = [
    (torch.float32, torch.float32),
    (torch.float32, torch.float16),
    (torch.float32, torch.bfloat16),
    (torch.float64, torch.float64),
]
DECAY_DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
FEW, MANY = 136, 1120  # tensors of a launch


class Pair(ctypes.Structure):
    _fields_ = (
        ("target", ctypes.c_void_p),
        ("online", ctypes.c_void_p),
        ("elements", ctypes.c_int64),
        ("kind", ctypes.c_uint8),
    )


@pytest.fixture(scope="module")
def emulated(tmp_path_factory):
    """The kernel on the CPU: ``update(target, online, decay, few)`` returns the number of launches."""
    folder = tmp_path_factory.mktemp("emulation")
    (folder / "update.cpp").write_text(EMULATION)
    compiler, library = os.environ.get("CXX", "c++"), folder / "update.so"
    flags = ["-O2", "-std=c++17", "-ffp-contract=off", "-shared", "-fPIC", "-I", str(build.source_folder())]
    subprocess.run([compiler, *flags, str(folder / "update.cpp"), "-o", str(library)], check=True)
    function = ctypes.CDLL(str(library)).update
    function.restype = ctypes.c_int64
    function.argtypes = (
        ctypes.POINTER(Pair),
        ctypes.c_size_t,
        ctypes.c_double,
        ctypes.c_void_p,
        ctypes.c_int,
        ctypes.c_bool,
    )

    def update(target, online, decay, few=False):
        pairs = (Pair * max(len(target), 1))()
        for pair, t, o in zip(pairs, target, online, strict=False):
            pair.target, pair.online, pair.elements = t.data_ptr(), o.data_ptr(), t.numel()
            pair.kind = PAIRS.index((t.dtype, o.dtype))
        if isinstance(decay, float):
            return function(pairs, len(target), decay, None, 1, few)
        return function(pairs, len(target), -1.0, decay.data_ptr(), DECAY_DTYPES.index(decay.dtype), few)

    return update


def assert_matches_the_reference(update, target, online, decay):
    wanted = [t.clone() for t in target]
    number = decay if isinstance(decay, torch.Tensor) else torch.tensor(decay, dtype=torch.float64)
    reference.ema_update__reference(wanted, online, number)
    launches = update(target, online, decay)
    for t, w in zip(target, wanted, strict=True):
        assert torch.equal(t.isnan(), w.isnan())
        assert torch.equal(t.nan_to_num(), w.nan_to_num())
    return launches


@pytest.mark.parametrize("decay", [0.0, 0.3, 0.5, 0.996, 1.0])
@pytest.mark.parametrize(("target_dtype", "online_dtype"), PAIRS)
def test_every_rounding(emulated, target_dtype, online_dtype, decay):
    sizes = [1, 3, 4, 7, 1023, 4095, 4096, 4097, 20_001]
    for number in (decay, *(torch.tensor(decay, dtype=dtype) for dtype in DECAY_DTYPES)):
        target = [torch.randn(size, dtype=target_dtype) for size in sizes]
        online = [torch.randn(size).to(online_dtype) for size in sizes]
        assert assert_matches_the_reference(emulated, target, online, number) == 1


@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_any_sizes_alignments_and_dtypes(emulated, data):
    target, online = [], []
    for _ in range(data.draw(st.integers(0, 12))):
        size = data.draw(st.one_of(st.integers(0, 40), st.integers(4080, 4110), st.integers(8000, 13_000)))
        target_dtype, online_dtype = data.draw(st.sampled_from(PAIRS))
        shifts = data.draw(st.tuples(st.integers(0, 3), st.integers(0, 3)))
        target.append(torch.randn(size + shifts[0], dtype=target_dtype)[shifts[0] :])
        online.append(torch.randn(size + shifts[1]).to(online_dtype)[shifts[1] :])
    assert_matches_the_reference(emulated, target, online, data.draw(st.floats(0, 1)))


def test_half_precision_of_every_bit_pattern(emulated):
    bits = torch.from_numpy(np.arange(2**16, dtype=np.uint16).view(np.int16))
    for dtype in (torch.float16, torch.bfloat16):
        assert_matches_the_reference(emulated, [torch.zeros(2**16)], [bits.view(dtype)], 0.0)


@pytest.mark.parametrize(
    ("count", "few", "launches"),
    [(0, True, 0), (FEW, True, 1), (FEW + 1, True, 2), (MANY, False, 1), (MANY + 1, False, 2), (3 * MANY, False, 3)],
)
def test_a_new_launch_only_if_the_table_is_full(emulated, count, few, launches):
    sizes = [1 + (37 * number) % 61 for number in range(count)]
    target, online = ([torch.randn(size) for size in sizes] for _ in range(2))
    found = []
    assert_matches_the_reference(lambda *a: found.append(emulated(*a, few=few)), target, online, 0.9)
    assert found == [launches]


def test_empty_tensors_take_no_room_in_the_table(emulated):
    target, online = ([torch.randn(size) for size in (0, 5, 0, 4097, 0)] for _ in range(2))
    assert assert_matches_the_reference(emulated, target, online, 0.9) == 1
    assert emulated([torch.zeros(0)], [torch.zeros(0)], 0.9) == 0


# registers of a thread at most: 64 allow four blocks of 256 threads, enough loads to hide the latency of memory
REGISTERS = {"sm_80": 64, "sm_90": 64, "sm_100": 64}


@pytest.mark.slow
@needs_nvcc
def test_compiles_for_every_architecture_without_spills(tmp_path):
    architectures = [f"-gencode=arch={name.replace('sm', 'compute')},code={name}" for name in REGISTERS]
    source = build.source_folder() / "ema_update_cuda.cu"
    command = [NVCC, "-std=c++17", *cuda.FLAGS, "-Xptxas", "-v", *architectures]
    command += ["-c", source, "-o", tmp_path / "ema_update.o"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    kernels = re.findall(
        r"Compiling entry function '\w+' for '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, "
        r"(\d+) bytes spill loads.*?Used (\d+) registers",
        done.stderr,
        re.DOTALL,
    )
    assert sorted(kernel[0] for kernel in kernels) == sorted([*REGISTERS] * 2)  # tables for few and for many tensors
    for architecture, stack, *spills, registers in kernels:
        assert (stack, spills) == ("0", ["0", "0"])
        assert int(registers) <= REGISTERS[architecture], architecture


BUILT = """
import torch, byola_fast
from byola_fast.ops import _dispatch
print(*_dispatch.backend_in_use("CUDA", "ema_update_"))
print(torch._C._dispatch_dump("byola_fast::ema_update_"))

# the library's own binding for lists calls the dispatcher, so it serves the CPU too
from byola_fast import ops
from byola_fast.ops._native import cuda

class Own(torch.Tensor):
    pass

call, answers = cuda.ema_call, []
cuda.ema_call = lambda *args: answers.append(call(*args)) or answers[-1]
for shapes in ([(3,)] * 5 + [(2, 0), (4, 2)], [(1,)]):
    target, online = ([torch.nn.Parameter(torch.randn(shape)) for shape in shapes] for _ in range(2))
    before = [t.detach().clone() for t in target]
    ops.ema_update_(target, online, 0.25)
    for t, o, b in zip(target, online, before):
        assert torch.equal(t, o + -0.25 * (o - b)) and t._version == 1
    assert answers.pop() is None and not answers
target, online = [torch.zeros(2).as_subclass(Own)], [torch.ones(2)]
ops.ema_update_(target, online, 0.5)
assert answers.pop() is NotImplemented and target[0].tolist() == [0.5, 0.5]
ops.ema_update_(tuple(online), [torch.zeros(2)], torch.tensor(0.5))
assert answers.pop() is NotImplemented and online[0].tolist() == [0.5, 0.5]
for wrong, error in (
    (([torch.ones(2)], [], 0.5), "ValueError('online: expected as many tensors as in target (1), got 0')"),
    (([torch.ones(2).half()], [torch.ones(2)], 0.5), "TypeError('target[0]: expected float32 or float64, got torch.f"),
    ((online, online, 0.5), "ValueError('target[0]: expected memory of its own, got that of online[0]')"),
    (([1], [torch.ones(2)], 0.5), "TypeError('target[0]: expected a torch.Tensor, got int')"),
):
    try:
        ops.ema_update_(*wrong)
    except Exception as raised:
        assert repr(raised).startswith(error), repr(raised)
    else:
        raise AssertionError(error)
with torch._subclasses.fake_tensor.FakeTensorMode():
    ops.ema_update_([torch.zeros(2)], [torch.ones(2)], 0.5)
"""


@pytest.mark.slow
@needs_nvcc
def test_compiles_loads_and_registers_with_or_without_a_gpu():
    environment = os.environ | {"BYOLA_FAST_CUDA_EXTENSION": "1", "BYOLA_FAST_STRICT": "1"}
    done = subprocess.run([sys.executable, "-c", BUILT], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0].strip() == "cuda"
    assert re.search(r"CUDA: registered at .*register_cuda\.cpp", done.stdout)


def test_nothing_is_built_without_a_gpu_or_nvcc(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("BYOLA_FAST_CUDA_EXTENSION", raising=False)
    with pytest.raises(BackendError, match="no GPU is available to torch"):
        cuda.prepare()
    monkeypatch.setenv("BYOLA_FAST_CUDA_EXTENSION", "1")
    monkeypatch.setenv("BYOLA_FAST_CACHE", str(tmp_path))
    monkeypatch.setattr(cuda, "find_nvcc", lambda: None)
    with pytest.raises(BackendError, match="nvcc was not found: install the CUDA toolkit, put nvcc on PATH"):
        cuda.prepare()
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(BackendError, match="this torch was built without CUDA"):
        cuda.prepare()


def test_it_is_preferred_and_can_be_disabled(monkeypatch):
    for chosen, expected in (("", ["cuda"]), ("1", ["cuda"]), ("0", [])):
        added = []
        monkeypatch.setattr(_dispatch, "add_backend", added.append)
        monkeypatch.setenv("BYOLA_FAST_CUDA_EXTENSION", chosen)
        cuda.install()
        assert [backend.name for backend in added] == expected
        assert all((backend.key, backend.ops) == ("CUDA", ("ema_update_",)) for backend in added)


def test_nvcc_is_found_in_cuda_home_or_on_path(monkeypatch, tmp_path):
    for folder in ("home", "path"):
        (tmp_path / folder / "bin").mkdir(parents=True)
        (tmp_path / folder / "bin" / "nvcc").write_text("#!/bin/sh\n")
        (tmp_path / folder / "bin" / "nvcc").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "path" / "bin"))
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv("CUDA_HOME", raising=False)
        monkeypatch.delenv("CUDA_PATH", raising=False)
        assert cuda.find_nvcc() == tmp_path / "path" / "bin" / "nvcc"
        monkeypatch.setenv(variable, str(tmp_path / "home"))
        assert cuda.find_nvcc() == tmp_path / "home" / "bin" / "nvcc"
    assert cuda.cuda_home(tmp_path / "home" / "bin" / "nvcc") == (tmp_path / "home").resolve()


def test_each_architecture_has_its_own_build(monkeypatch):
    names = set()
    for chosen in ("8.0", "9.0", "8.0;9.0+PTX"):
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", chosen)
        assert cuda.architectures() == chosen
        names.add(cuda.build_name())
    assert len(names) == 3
    assert all(re.fullmatch(r"[\w.+-]+", name) for name in names)


@needs_gpu
def test_in_a_cuda_graph_on_a_stream_of_its_own():
    target, online = ([torch.randn(size, device="cuda") for size in [5] * 1500 + [70_001]] for _ in range(2))
    decay = torch.tensor(0.5, device="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        ops.ema_update_(target, online, 1.0)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            ops.ema_update_(target, online, decay)
    for number in (0.25, 0.9):
        wanted = [t.clone() for t in target]
        decay.fill_(number)
        reference.ema_update__reference(wanted, online, decay)
        graph.replay()
        assert all(torch.equal(t, w) for t, w in zip(target, wanted, strict=True))
