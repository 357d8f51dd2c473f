"""Pictures are drawn, hold the right panels, and retrace the augmentation exactly."""

from __future__ import annotations

import os
import sys
from types import SimpleNamespace

import matplotlib.image
import numpy as np
import pytest
import soundfile
import torch
from helpers.tolerances import assert_close

from byola_fast import LogMel, ops
from byola_fast.audio.reading import AudioError
from byola_fast.training import pretrain
from byola_fast.training.config import PretrainConfig
from byola_fast.training.curves import draw_training
from byola_fast.views.explain import explain_views
from byola_fast.views.pictures import draw_views
from byola_fast.views.show import show


def looks_drawn(path, width: int, height: int) -> np.ndarray:
    """Check a picture's size, and that neither white nor any other single colour fills it; return it."""
    picture = matplotlib.image.imread(path)[:, :, :3]
    assert picture.shape[1] == pytest.approx(width, rel=0.02)
    assert picture.shape[0] == pytest.approx(height, rel=0.02)
    assert picture.std() > 0.1
    assert 0.05 < (picture.min(2) > 0.99).mean() < 0.95  # white margins, and something else
    return picture


def panels(batch: int, **settings):
    lms = torch.randn(batch, 1, 16, 24) * 3 - 7
    settings = {"samples": 2, "preset": "byola-v2", "seed": 3} | settings
    return lms, explain_views(lms, [f"clip {n}" for n in range(batch)], **settings)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_the_steps_shown_lead_to_the_views_shown(interpolation):
    lms, drawn = panels(5, interpolation=interpolation, samples=5)
    x = ((lms - lms.mean()) / lms.std())[:, 0]
    results, views = [], []
    for number, panel in enumerate(drawn):
        assert_close(panel.original, x[number].double(), factor=10)
        for view in panel.views:
            partner = int(view.partner_name.removeprefix("clip "))
            assert partner != number
            assert_close(view.partner, x[partner].double(), factor=10)
            cut = ops.resize_crop(view.mix[None], torch.tensor([view.crop]), interpolation=interpolation)[0]
            results.append(cut + torch.linspace(*view.fader, 24))
            views.append(view.view)
    normalised = torch.stack(results).double()
    normalised = (normalised - normalised.mean()) / normalised.std()
    assert_close(torch.stack(views), normalised, factor=20)


@pytest.mark.slow
def test_views_are_drawn_with_both_boxes(tmp_path):
    _, drawn = panels(4)
    draw_views(tmp_path / "views.png", drawn, title="two clips")
    picture = looks_drawn(tmp_path / "views.png", 1430, 1012)
    for colour in ((1.0, 0.302, 0.369), (0.208, 0.769, 1.0)):  # of view 1 and view 2: the box and the frame
        assert (np.abs(picture - colour).max(2) < 0.02).sum() > 500


def test_axes_in_hertz_and_seconds_and_a_hatched_canvas(tmp_path):
    _, drawn = panels(4, samples=1)
    draw_views(tmp_path / "views.svg", drawn, to_lms=LogMel(n_mels=16, hop_length=640))  # 24 frames of 40 ms
    text = tmp_path.joinpath("views.svg").read_text()
    for words in ("Hz", "s", "500", "2k", "0.4", "0.8", "log-mel, in std from the mean"):
        assert f">{words}<" in text or f"<!-- {words} -->" in text
    assert text.count('<pattern id="h') == 1  # the hatch of both canvases


@pytest.mark.slow
def test_a_lone_sample_has_no_partner(tmp_path):
    _, (panel,) = panels(1, samples=3)
    assert panel.views[0].partner is None
    assert torch.equal(panel.views[0].mix, panel.original)
    draw_views(tmp_path / "views.svg", [panel])
    assert tmp_path.joinpath("views.svg").read_text().count("no partner") == 2


def test_titles_tell_the_parameters(tmp_path):
    _, drawn = panels(4, samples=1)
    draw_views(tmp_path / "views.svg", drawn)
    text = tmp_path.joinpath("views.svg").read_text()
    for number, view in enumerate(drawn[0].views, start=1):
        i, j, h, w = view.crop
        for words in (
            f"mix, lam {view.lam:.2f}   crop: mels {i}+{h}, frames {j}+{w}",
            f"view {number}, fader {view.fader[0]:+.2f} to {view.fader[1]:+.2f}",
            f"partner: {view.partner_name}",
        ):
            assert words in text


def test_training_is_drawn(tmp_path):
    log = [{"step": n, "loss": 4 / n, "spread": 0.9, "refused": 3} for n in range(1, 50)]
    draw_training(tmp_path / "training.png", log)
    looks_drawn(tmp_path / "training.png", 880, 506)
    full = [line | {"effective_rank": 9.0, "lr": 3e-4} for line in log]
    full[9] |= {"probe": 0.8}
    draw_training(tmp_path / "training.png", full, name="run")
    looks_drawn(tmp_path / "training.png", 880, 1199)
    draw_training(tmp_path / "training.svg", full[:10], "my $loss_{$", "my_$run")
    text = tmp_path.joinpath("training.svg").read_text()
    for words in ("3 samples with NaN or inf", "my $loss_{$", "my_$run", "learning rate", "score of the probe", "rank"):
        assert words in text


def test_a_picture_that_fails_ends_no_training(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(pretrain, "draw_training", lambda *_: 1 / 0)
    run = SimpleNamespace(lines=[{"step": 1, "loss": 4.0, "spread": 0.9}], path=tmp_path)
    pretrain._draw(PretrainConfig().resolved("cpu"), run, None, None)
    assert "no training.png and views.png: division by zero" in caplog.text


def test_nothing_to_draw_is_refused(tmp_path):
    with pytest.raises(ValueError, match="panels"):
        draw_views(tmp_path / "a.png", [])
    with pytest.raises(ValueError, match="log"):
        draw_training(tmp_path / "a.png", [])


def test_a_missing_matplotlib_names_the_install_command(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        draw_training(tmp_path / "a.png", [{"step": 1, "loss": 1.0, "spread": 1.0}])


def write(path, seconds: float, rate: int = 16000) -> None:
    soundfile.write(path, np.random.default_rng(0).normal(0, 0.1, round(seconds * rate)), rate)


@pytest.mark.slow
def test_show_a_file_whose_segments_are_partners(tmp_path):
    write(tmp_path / "long.flac", 4.0)
    show(tmp_path / "long.flac", tmp_path / "views.svg")
    text = tmp_path.joinpath("views.svg").read_text()
    assert "partner: long.flac at" in text
    assert show(tmp_path / "long.flac", tmp_path / "1.png", seed=5) == tmp_path / "1.png"
    assert show(tmp_path / "long.flac", tmp_path / "2", seed=5).rename(tmp_path / "2.png")  # PNG, by the name given
    show(tmp_path / "long.flac", tmp_path / "3.png", seed=6)
    one, two, three = (looks_drawn(tmp_path / f"{n}.png", 1430, 539) for n in (1, 2, 3))
    assert np.array_equal(one, two)
    assert not np.array_equal(one, three)


def test_show_a_short_file_says_no_partner(tmp_path):
    write(tmp_path / "short.wav", 0.3)
    show(tmp_path / "short.wav", tmp_path / "views.svg")
    assert "no partner" in tmp_path.joinpath("views.svg").read_text()


@pytest.mark.slow
def test_show_a_folder_skips_what_is_broken(tmp_path, caplog):
    for name in ("a", "b", "c"):
        write(tmp_path / f"{name}.wav", 1.5, rate=22050)
    (tmp_path / "broken.wav").write_text("not audio")
    show(tmp_path, tmp_path / "views.png", samples=2)
    looks_drawn(tmp_path / "views.png", 1430, 1012)
    assert [record.getMessage().count("broken.wav") for record in caplog.records] == [1]


@pytest.mark.filterwarnings("error")
def test_names_are_drawn_as_they_are(tmp_path, caplog):
    """Not as formulas, and also if they are not UTF-8 or beyond the font."""
    folder = tmp_path / "$x_{$ and $y"
    folder.mkdir()
    names = ("$x_{$.wav", "\udcff$.wav", "\u97f3\u697d.wav", "a\nb.wav")
    for name in names:
        write(os.fsencode(folder / name), 0.5)
    show(folder, tmp_path / "views.svg", samples=len(names))
    text = tmp_path.joinpath("views.svg").read_text()
    for words in ("<!-- $x_{$.wav -->", r"<!-- \udcff$.wav -->", r"<!-- a\nb.wav -->", "$x_{$ and $y   (byola-v1"):
        assert words in text
    show(folder / names[0], tmp_path / "views.png")
    assert sum("drawn as boxes" in record.getMessage() for record in caplog.records) <= 1


def test_show_refuses(tmp_path):
    (tmp_path / "broken.wav").write_text("not audio")
    with pytest.raises(AudioError, match="none of 1 audio files"):
        show(tmp_path, tmp_path / "a.png")
    with pytest.raises(AudioError, match=r"broken\.wav"):
        show(tmp_path / "broken.wav", tmp_path / "a.png")
    with pytest.raises(ValueError, match="samples"):
        show(tmp_path, tmp_path / "a.png", samples=0)
    write(tmp_path / "a.wav", 0.5)
    for words, settings in {  # by the names of its own settings
        "sample_rate: expected more than 120 Hz": {"sample_rate": 100},
        r"unit_sec: expected at least 513 samples .*, got 0\.001": {"unit_sec": 0.001},
        "unit_sec: expected at least 513 samples .*, got inf": {"unit_sec": float("inf")},
    }.items():
        with pytest.raises(ValueError, match=words):
            show(tmp_path / "a.wav", tmp_path / "a.png", **settings)
    with pytest.raises(ValueError, match=r"a\.bmp: expected a name ending in \..*\.png"):
        show(tmp_path / "a.wav", tmp_path / "a.bmp")
