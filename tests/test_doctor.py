"""The report on backends."""

from __future__ import annotations

import platform
import re

import byola_fast
from byola_fast.doctor import first_call
from byola_fast.ops import _schemas


def test_every_op_on_every_device_is_named_and_readable(monkeypatch):
    report = byola_fast.doctor()
    assert {op for key, op in report.backends if key == "CPU"} == set(_schemas.OPS)
    text = str(report)
    for op in _schemas.OPS:
        assert op in text
    assert f"byola_fast {byola_fast.__version__}" in text
    assert ("CUDA" in report.devices) or "no GPU" in text
    monkeypatch.setenv("BYOLA_FAST_CACHE", "/some where/else")
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    message = str(byola_fast.doctor())
    assert platform.platform() in message
    assert "compiled kernels: /some where/else/cpu-torch" in message
    assert "BYOLA_FAST_CACHE=/some where/else, " in message
    assert "OMP_NUM_THREADS=3" in message


def test_ops_made_of_others_say_of_which():
    report = byola_fast.doctor()
    assert report.reasons["CPU", "augment_views"] == "made of augment_views_out"
    assert report.reasons["CPU", "log_mel_backward"] == "plain PyTorch, no kernel for this device"
    assert set(_schemas.MADE_OF) <= set(_schemas.OPS)


def test_strict_is_reported(monkeypatch):
    monkeypatch.setenv("BYOLA_FAST_STRICT", "1")
    assert byola_fast.doctor().strict
    monkeypatch.setenv("BYOLA_FAST_STRICT", "0")
    assert not byola_fast.doctor().strict


def test_the_first_call_is_timed(device):
    first, second = (float(number) for number in re.findall(r"([0-9.]+) (?:s|ms)", first_call(device)))
    assert first >= 0
    assert second > 0
    assert ("the first call of augment took" in str(byola_fast.doctor())) == (device.type == "cuda")
