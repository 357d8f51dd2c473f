"""The table of ops against the kernels, launchers, references and fakes that exist."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest
import torch

from byola_fast import ops
from byola_fast.ops import _dispatch, _schemas, _triton, blocks, frontend, functional, reference
from byola_fast.ops._native import build, cpu


def registered_ops():
    return {
        name.removeprefix("byola_fast::") for name in torch._C._dispatch_get_all_op_names() if "byola_fast::" in name
    }


def test_every_op_has_a_reference_and_a_fake():
    for name, op in _schemas.OPS.items():
        qualified = f"byola_fast::{name}"
        assert hasattr(reference, f"{name}_reference") or op.made_of
        assert torch._C._dispatch_has_kernel_for_dispatch_key(qualified, "CompositeExplicitAutograd")
        assert torch._library.simple_registry.singleton.find(qualified).fake_impl.kernel is not None


@pytest.mark.skipif(_triton.interpreted(), reason="under the interpreter, Triton serves the CPU key")
def test_cpp_kernels_match_the_table():
    for name, op in _schemas.OPS.items():
        assert _dispatch.backend_in_use("CPU", name)[0] == ("cpp" if op.cpu else "reference")
    assert cpu.library() is not None  # once loaded, no stubs remain under the key
    with_kernel = {
        name
        for name in registered_ops()
        if torch._C._dispatch_has_kernel_for_dispatch_key(f"byola_fast::{name}", "CPU")
    }
    assert {name for name in with_kernel if not name.startswith("_")} == set(_schemas.CPU_OPS)


def test_cuda_kernels_match_the_table():
    sources = "".join(path.read_text() for path in build.source_folder().glob("*_cuda.cpp"))
    assert set(re.findall(r'm\.impl\("(\w+)"', sources)) == set(_schemas.CUDA_OPS)


def test_launchers_match_the_table():
    pytest.importorskip("triton")
    folder = Path(_triton.__file__).parent
    found = {}
    for path in folder.glob("[!_]*.py"):
        module = importlib.import_module(f"byola_fast.ops._triton.{path.stem}")
        here = {
            name: path.stem
            for name in _schemas.OPS
            if getattr(vars(module).get(name), "__module__", "") == module.__name__
        }
        assert not set(here) & set(found)
        found |= here
    assert found == _schemas.LAUNCHERS


def test_ops_exports_the_public_names_of_its_modules():
    assert sorted(ops.__all__) == sorted(["BackendError", *blocks.__all__, *frontend.__all__, *functional.__all__])
    assert all(callable(getattr(ops, name)) for name in ops.__all__)
