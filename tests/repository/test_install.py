"""What is installed: only a path for an editable checkout, and all kernel sources in a wheel."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of the checkout, in a folder with the name that git clone gives it."""
    folder = tmp_path_factory.mktemp("code") / "byola_fast"
    folder.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", "setup.py"):
        shutil.copy(ROOT / name, folder)
    for name in ("byola_fast", "csrc"):
        shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def build(checkout, kind, out, **environment):
    code = f"from setuptools import build_meta; build_meta.build_{kind}({str(out)!r})"
    path = os.environ | {"PYTHONPATH": ""} | environment
    subprocess.run([sys.executable, "-c", code], cwd=checkout, env=path, check=True, capture_output=True)
    (wheel,) = out.glob("*.whl")
    return zipfile.ZipFile(wheel)


def test_a_checkout_is_found_from_its_parent_folder(checkout, tmp_path):
    """An editable install must add a path, not a module finder.

    In the parent folder Python takes the clone for a namespace package. That beats a finder ("module 'byola_fast' has
    no attribute 'augment'" from ``python train.py`` beside the clone), but not a regular package on the path.
    """
    with build(checkout, "editable", tmp_path) as wheel:
        names = [name for name in wheel.namelist() if "dist-info" not in name]
        assert [Path(name).suffix for name in names] == [".pth"]
        (line,) = wheel.read(names[0]).decode().splitlines()
    assert line == str(checkout)
    code, path = "import byola_fast; print(byola_fast.__file__)", os.environ | {"PYTHONPATH": line}
    found = subprocess.check_output([sys.executable, "-c", code], cwd=checkout.parent, env=path, text=True)
    assert Path(found.strip()) == checkout / "byola_fast" / "__init__.py"


def test_a_wheel_holds_the_sources_of_all_kernels(checkout, tmp_path):
    with build(checkout, "wheel", tmp_path) as wheel:
        packed = {Path(name).name for name in wheel.namelist() if name.startswith("byola_fast/csrc/")}
        assert packed == {path.name for path in (ROOT / "csrc").iterdir()}
        assert {"byola_fast/py.typed", "byola_fast/ops/reference.py"} <= set(wheel.namelist())
        weights = {"encoder.safetensors", "README.md", "heard.tsv"}
        assert {f"byola_fast/weights/{name}" for name in weights} <= set(wheel.namelist())


def test_a_wheel_with_compiled_kernels_needs_no_compiler(checkout, tmp_path):
    with build(checkout, "wheel", tmp_path, BYOLA_FAST_COMPILE="1") as wheel:
        wheel.extractall(tmp_path / "installed")
        assert Path(wheel.filename).name.endswith(f"-py3-none-linux_{platform.machine()}.whl")
    code = (
        "import torch, byola_fast; byola_fast.augment(torch.randn(2, 8, 12)); report = byola_fast.doctor();"
        "print(report.backends['CPU', 'resize_crop'], *(note for note in report.notes if 'kernels' in note))"
    )
    environment = {
        "PYTHONPATH": str(tmp_path / "installed"),
        "CXX": "/none",
        "BYOLA_FAST_CACHE": str(tmp_path / "none"),
    }
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | environment, cwd=tmp_path, capture_output=True, text=True
    )
    assert done.stderr == ""
    assert done.stdout.startswith(
        f"cpp compiled kernels: {tmp_path / 'installed' / 'byola_fast' / 'kernels'}/cpu-torch"
    )
    assert not (tmp_path / "none").exists()
