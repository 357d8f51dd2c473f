"""The Hub's layout, both ways, and model cards; no test asks another machine."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib import import_module
from pathlib import Path

import pytest
import torch
import yaml
from helpers.own import Flat

from byola_fast import AudioNTT2020, Embedder, LogMel, load_encoder
from byola_fast.networks import model_card
from byola_fast.networks.checkpoint import CheckpointError
from byola_fast.training import provenance as origin


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*_args, **_kwargs):
        raise AssertionError("a test asks the network")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture
def embedder():
    embedder = Embedder(AudioNTT2020(16, 24), stats=(-7.1, 4.2), to_lms=LogMel(n_mels=16, hop_length=200)).eval()
    embedder.about = {"unit_sec": 0.5, "provenance": {"commit": "abc", "command": "pretrain a|b"}}
    return embedder.requires_grad_(False)


def test_a_saved_folder_loads_with_everything(embedder, tmp_path):
    embedder.save_pretrained(tmp_path / "mine")
    assert {path.name for path in (tmp_path / "mine").iterdir()} == {"README.md", "config.json", "model.safetensors"}
    wav = torch.randn(2, 8000)
    for path in (tmp_path / "mine", str(tmp_path / "mine"), tmp_path / "mine" / "model.safetensors"):
        loaded = load_encoder(path)
        assert torch.equal(loaded(wav), embedder(wav))
        assert (loaded.stats, loaded.to_lms.hop_length) == ((-7.1, 4.2), 200)
        assert loaded.about["provenance"]["commit"] == "abc"
    loaded.save_pretrained(tmp_path / "again")
    contents = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("mine", "again")]
    assert contents[0] == contents[1]
    assert (contents[0]["encoder"], contents[0]["feature_d"], contents[0]["stats"]) == ("AudioNTT2020", 24, [-7.1, 4.2])


def test_the_card_says_what_it_is_and_yours_is_kept(embedder, tmp_path):
    embedder.save_pretrained(tmp_path)
    text = (tmp_path / "README.md").read_text()
    front = yaml.safe_load(text.split("---")[1])
    assert (front["library_name"], front["pipeline_tag"]) == ("byola_fast", "feature-extraction")
    for words in (
        "AudioNTT2020, 24-d",
        "| hop_length | 200 |",
        "| f_max | 7800 |",
        r"| command | pretrain a\|b |",
        "-7.1000, 4.2000",
    ):
        assert words in text
    (tmp_path / "README.md").write_text(text.replace("Say here", "It heard").replace(model_card.MARK, ""))
    embedder.save_pretrained(tmp_path)
    assert "It heard" in (tmp_path / "README.md").read_text()


def hub_cache(root: Path, saved: Path) -> None:
    """Put a saved folder where huggingface_hub keeps a downloaded model."""
    repo = root / "models--someone--sounds"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text("0" * 40)
    (repo / "snapshots").mkdir()
    saved.rename(repo / "snapshots" / ("0" * 40))


def test_a_name_on_the_hub_loads(embedder, tmp_path, monkeypatch):
    embedder.save_pretrained(tmp_path / "mine")
    hub_cache(tmp_path / "cache", tmp_path / "mine")
    constants = import_module("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    wav = torch.randn(2, 8000)
    for name in ("hf-hub:someone/sounds", "hf-hub:someone/sounds@main"):
        assert torch.equal(load_encoder(name)(wav), embedder(wav))
    for name in ("hf-hub:someone/none", "hf-hub:no name at all", "hf-hub:"):
        with pytest.raises(CheckpointError, match=f"{name}: no model"):
            load_encoder(name)


class OneModel(SimpleHTTPRequestHandler):
    """A hub of one model: the files of a saved folder, at the addresses and with the headers of the Hub."""

    def translate_path(self, path):
        start, _, name = path.partition("/resolve/main/")
        return str(Path(self.directory, name)) if start == "/someone/sounds" else "/none"

    def end_headers(self):
        self.send_header("X-Repo-Commit", "0" * 40)
        self.send_header("ETag", '"1"')
        super().end_headers()

    def log_message(self, *_words):
        pass


def test_a_name_is_downloaded_once_from_a_hub_on_this_machine(embedder, tmp_path):
    embedder.save_pretrained(tmp_path / "mine")
    code = "import byola_fast, torch; encoder = byola_fast.load_encoder('hf-hub:someone/sounds')"
    code += "; print(encoder(torch.ones(1, 8000)).tolist())"
    handler = partial(OneModel, directory=str(tmp_path / "mine"))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        environment = {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(tmp_path / "home")}
        for _again in range(2):  # the second time without a server
            done = subprocess.run(
                [sys.executable, "-c", code], env=os.environ | environment, capture_output=True, text=True
            )
            assert done.returncode == 0, done.stderr
            assert torch.allclose(torch.tensor(json.loads(done.stdout)), embedder(torch.ones(1, 8000)))
            server.shutdown()


def test_nothing_else_asks_the_network(tmp_path, monkeypatch):
    for path in ("someone/sounds", tmp_path / "none", "https://huggingface.co/someone/sounds"):
        with pytest.raises(CheckpointError, match="No such file"):
            load_encoder(path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match="hf-hub:a/b: needs huggingface_hub: pip install huggingface_hub"):
        load_encoder("hf-hub:a/b")


def test_your_own_class_is_saved_and_named_by_who_loads(tmp_path):
    own = Embedder(Flat(), stats=(0.0, 1.0)).eval()
    own.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"holds weights of the class helpers.own:Flat; give that class"):
        load_encoder(tmp_path)
    wav = torch.randn(1, 8000)
    assert torch.equal(load_encoder(tmp_path, encoder=Flat)(wav), own(wav))


def test_a_folder_that_cannot_be_written_is_named(embedder, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match=r"file.*cannot be written"):
        embedder.save_pretrained(tmp_path / "file")


def test_the_commit_is_that_of_the_packages_own_clone(tmp_path, monkeypatch):
    monkeypatch.setattr(origin, "PACKAGE", tmp_path)
    assert origin.provenance()["commit"] is None
    for command in (
        ["init", "-q"],
        ["-c", "user.name=a", "-c", "user.email=b", "commit", "-q", "--allow-empty", "-m", "x"],
    ):
        subprocess.run(["git", "-C", str(tmp_path), *command], check=True)
    assert origin.provenance()["commit"] is None  # a clone of something else
    (tmp_path / "__init__.py").touch()
    subprocess.run(["git", "-C", str(tmp_path), "add", "__init__.py"], check=True)
    commit = origin.provenance()["commit"]
    assert len(commit.removesuffix("-dirty")) == 40
    assert commit.endswith("-dirty")
    monkeypatch.setenv("PATH", "")
    assert origin.provenance()["commit"] is None
