"""What tests of training share: a corpus, and the settings of a small run without pictures.

The helpers need soundfile, so they are imported by the fixtures: tests that need no audio load without it.
"""

from __future__ import annotations

import pytest


@pytest.fixture(scope="module")
def recordings(tmp_path_factory):
    from helpers.runs import write_recordings

    return write_recordings(tmp_path_factory.mktemp("audio") / "corpus")


@pytest.fixture
def settings(recordings, tmp_path, monkeypatch):
    from helpers.runs import TINY

    from byola_fast.training import pretrain as trainer

    monkeypatch.setattr(trainer, "draw_training", lambda *_, **__: None)
    monkeypatch.setattr(trainer, "draw_views", lambda *_, **__: None)
    return TINY | {"audio_dir": str(recordings), "out": str(tmp_path / "run")}
