"""Shared by all tests: poisoned memory, the devices that are here, and one table of tolerances."""

from __future__ import annotations

import os
import signal
from collections.abc import Generator, Iterator

import pytest
import torch

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # else deterministic mode, below, warns of each product
torch.set_num_threads(1)  # tiny tensors: a second thread on a busy machine costs milliseconds an op
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # by a shell that runs this in the background; tests send it
    signal.signal(signal.SIGINT, signal.default_int_handler)

torch.backends.cudnn.allow_tf32 = False  # float32 convolutions are compared with float64
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Fill every ``torch.empty`` with NaN, so that an element nobody wrote fails a comparison."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Escape names that are not UTF-8 in captured output; pytest-xdist cannot send them."""
    report = yield
    report.sections = [(name, text.encode("utf-8", "backslashreplace").decode()) for name, text in report.sections]
    return report


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(20210311)


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)
