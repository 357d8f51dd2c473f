"""Loading of backends: on the first call, with one warning, in strict mode, and from graphs compiled earlier."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
import time
from contextlib import nullcontext

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from byola_fast.ops import BackendError, _dispatch

X = torch.randn(2, 3)

# an op without a real backend; its reference adds 1
probe = torch.library.Library("byola_fast", "FRAGMENT")
probe.define("probe(Tensor x) -> Tensor", tags=torch.Tag.pt2_compliant_tag)
probe.impl("probe", lambda x: x + 1, "CompositeExplicitAutograd")
torch.library.register_fake("byola_fast::probe", torch.empty_like, lib=probe)


def call():
    return torch.ops.byola_fast.probe(X)


@pytest.fixture
def registry(monkeypatch):
    """An empty registry of backends."""
    fresh = _dispatch._Registry()
    monkeypatch.setattr(_dispatch, "_registry", fresh)
    monkeypatch.delenv("BYOLA_FAST_STRICT", raising=False)
    yield fresh
    for stub in fresh.stubs.values():
        stub._destroy()


def backend(name, value, *, fails=None, delay=0.0, calls=None):
    """A backend with a probe that returns a constant."""
    kept = []

    def prepare():
        time.sleep(delay)
        if calls is not None:
            calls.append(name)
        if fails:
            raise BackendError(fails)
        return value

    def register(prepared):
        kept.append(torch.library.Library("byola_fast", "IMPL", "CPU"))
        kept[0].impl("probe", lambda x: torch.full_like(x, prepared))

    made = _dispatch.Backend(name, "CPU", ("probe",), prepare, register)
    made.undo = lambda: [library._destroy() for library in kept]
    return made


def test_the_first_call_loads_and_later_ones_do_not(registry):
    calls = []
    made = backend("seven", 7.0, calls=calls)
    _dispatch.add_backend(made)
    assert calls == []
    try:
        assert (call() == 7).all()
        assert (call() == 7).all()
        assert calls == ["seven"]
        assert _dispatch.backend_in_use("CPU", "probe") == ("seven", "")
    finally:
        made.undo()
    assert torch.equal(call(), X + 1)


def test_kernels_that_cannot_be_loaded_warn_and_the_next_best_answers(registry, caplog, monkeypatch):
    """The first call raised ImportError, and the later ones ran the reference without a word."""

    def unloadable(_prepared):
        raise ImportError("failed to map segment from shared object")

    broken, good = backend("broken", 0.0), backend("seven", 7.0)
    broken.register = unloadable
    _dispatch.add_backend(broken)
    _dispatch.add_backend(good)
    try:
        with caplog.at_level(logging.WARNING, logger="byola_fast"):
            assert (call() == 7).all()
    finally:
        good.undo()
    reason = "the kernels cannot be loaded: failed to map segment from shared object"
    assert [record.getMessage() for record in caplog.records] == [f"byola_fast: broken backend not used: {reason}"]
    registry.backends.clear()
    _dispatch.add_backend(backend("strict", 0.0))
    registry.backends[0].register = unloadable
    monkeypatch.setenv("BYOLA_FAST_STRICT", "1")
    for _ in range(2):
        with pytest.raises(BackendError, match="probe on CPU: strict backend: the kernels cannot be loaded"):
            call()


@pytest.mark.parametrize("error", [ImportError("no libtriton"), RuntimeError("broken"), OSError(5, "I/O")])
def test_a_broken_installation_is_a_fallback_with_a_warning(registry, caplog, error):
    """As where Triton is there, but cannot be imported."""

    def prepare():
        raise error

    broken = backend("broken", 0.0)
    broken.prepare = prepare
    _dispatch.add_backend(broken)
    assert torch.equal(call(), X + 1)
    assert [r.getMessage() for r in caplog.records] == [
        f"byola_fast: broken backend not used: the kernels cannot be loaded: {error}"
    ]


def test_loading_that_is_interrupted_is_done_again(registry):
    """The reference answered all later calls in silence."""

    def interrupted(_prepared):
        raise KeyboardInterrupt

    made = backend("seven", 7.0)
    register, made.register = made.register, interrupted
    _dispatch.add_backend(made)
    with pytest.raises(KeyboardInterrupt):
        call()
    made.register = register
    try:
        assert (call() == 7).all()
    finally:
        made.undo()


def test_a_failure_warns_once_and_the_next_best_answers(registry, caplog):
    good = backend("seven", 7.0)
    _dispatch.add_backend(backend("broken", 0.0, fails="no compiler: install g++"))
    _dispatch.add_backend(good)
    try:
        with caplog.at_level(logging.WARNING, logger="byola_fast"):
            assert (call() == 7).all()
            assert (call() == 7).all()
        assert [r.getMessage() for r in caplog.records] == [
            "byola_fast: broken backend not used: no compiler: install g++"
        ]
        assert _dispatch.backend_in_use("CPU", "probe") == ("seven", "broken: no compiler: install g++")
    finally:
        good.undo()


def test_without_any_backend_the_reference_answers(registry, caplog):
    _dispatch.add_backend(backend("broken", 0.0, fails="no compiler"))
    call()
    assert torch.equal(call(), X + 1)
    assert len(caplog.records) == 1
    assert _dispatch.backend_in_use("CPU", "probe") == ("reference", "broken: no compiler")


def test_strict_turns_a_fallback_into_an_error_at_every_call(registry, monkeypatch):
    monkeypatch.setenv("BYOLA_FAST_STRICT", "1")
    _dispatch.add_backend(backend("broken", 0.0, fails="no compiler"))
    _dispatch.add_backend(backend("seven", 7.0))
    for _ in range(2):
        with pytest.raises(BackendError, match="probe on CPU: broken backend: no compiler"):
            call()


def test_threads_that_start_together_load_once(registry):
    calls, answers = [], []
    made = backend("seven", 7.0, delay=0.3, calls=calls)
    _dispatch.add_backend(made)
    threads = [threading.Thread(target=lambda: answers.append(call())) for _ in range(6)]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert calls == ["seven"]
        assert len(answers) == 6
        assert all((answer == 7).all() for answer in answers)
    finally:
        made.undo()


def test_a_backend_is_asked_about_the_gpu_of_the_call(registry, monkeypatch):
    """It asked about the current GPU, which may be another one than that of the tensors."""
    asked = []
    monkeypatch.setattr(torch.cuda, "device_of", lambda x: asked.append(x.device.index) or nullcontext())
    monkeypatch.setattr(_dispatch, "resolve", lambda key, op: asked.append(key))
    with FakeTensorMode():
        _dispatch._make_stub("CUDA", "probe")(torch.empty(2, device="cuda:1"))
    assert asked == [1, "CUDA"]


def test_a_graph_compiled_before_anything_was_loaded_gets_the_backend(registry):
    made = backend("seven", 7.0)

    def doubled(x):
        return 2 * torch.ops.byola_fast.probe(x)

    compiled = torch.compile(doubled, fullgraph=True, backend="aot_eager")
    _dispatch.add_backend(made)
    try:
        assert not made.loaded
        assert (compiled(X) == 14).all()
        assert made.loaded
        assert (compiled(X) == 14).all()
    finally:
        made.undo()


@pytest.mark.parametrize("chosen", ["reference", "cpp"])
def test_the_reference_can_be_chosen_and_nothing_else(chosen):
    code = "import byola_fast, torch; print(set(byola_fast.doctor().backends.values()))"
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"BYOLA_FAST_BACKEND": chosen}, capture_output=True, text=True
    )
    if chosen == "reference":
        assert done.stdout == "{'reference'}\n", done.stderr
    else:
        assert "BYOLA_FAST_BACKEND: expected reference, or nothing for the best backend, got 'cpp'" in done.stderr
