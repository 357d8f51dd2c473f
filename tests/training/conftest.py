"""What tests of training share: a corpus, and the settings of a small run without pictures."""

from __future__ import annotations

import pytest
from helpers.runs import TINY, write_recordings

from byola_fast.training import pretrain as trainer


@pytest.fixture(scope="module")
def recordings(tmp_path_factory):
    return write_recordings(tmp_path_factory.mktemp("audio") / "corpus")


@pytest.fixture
def settings(recordings, tmp_path, monkeypatch):
    monkeypatch.setattr(trainer, "draw_training", lambda *_, **__: None)
    monkeypatch.setattr(trainer, "draw_views", lambda *_, **__: None)
    return TINY | {"audio_dir": str(recordings), "out": str(tmp_path / "run")}
