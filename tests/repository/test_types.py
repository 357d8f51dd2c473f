"""The types that users see: a small file under mypy --strict."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "byola_fast"

GOOD = """
import torch
from torch import Tensor

import byola_fast

lms = torch.randn(4, 64, 96)
view1, view2 = byola_fast.augment(lms, mixup_ratio=0.2, interpolation="bicubic")
views: tuple[Tensor, Tensor] = byola_fast.augment(lms, seed=0)
v1, v2, params = byola_fast.augment(lms, return_params=True)
drawn: byola_fast.AugmentParams = params
aug = byola_fast.Augment("byola-v2", n_memory=8, time_scale=(0.6, 1.5))
first, second = aug(lms)
first, second, drawn = aug(lms, return_params=True)
large1, large2, *small = byola_fast.Augment(local_views=4, local_size=(32, 48))(lms)
small_views: list[Tensor] = small
encoder = byola_fast.make_encoder("AudioNTT2020")
embedder = byola_fast.Embedder(encoder, stats=(0.0, 1.0))
embedding: Tensor = embedder(torch.zeros(1, 16000))
frames = embedder(torch.zeros(1, 16000), frames=True)
times: Tensor = frames.timestamps
mixed: Tensor = byola_fast.ops.log_mixup_exp(lms, lms, torch.rand(4))
wav: Tensor = byola_fast.read_audio("a.wav")
"""
BAD = {
    "byola_fast.augment(lms, mixup_ration=0.2)": "mixup_ration",
    "byola_fast.augment(lms, mixup_ratio='a')": 'argument types "Tensor", "str"',
    "byola_fast.Augment(mixup_ration=0.2)": "mixup_ration",
    "byola_fast.augment(lms, interpolation=3)": 'argument types "Tensor", "int"',
    "number: int = byola_fast.augment(lms)": "Incompatible types in assignment",
    "a, b, c = byola_fast.augment(lms)": "Need more than 2 values to unpack",
    "aug(lms, sample_ofset=3)": "sample_ofset",
    "embedder(torch.zeros(1, 16000)).timestamps": "has no attribute",
    "byola_fast.LogMel(n_mel=3)": "n_mel",
}


@pytest.mark.slow
def test_a_small_file_of_a_user(tmp_path):
    path = tmp_path / "train.py"
    path.write_text(GOOD + "\n".join(BAD) + "\n")
    command = [sys.executable, "-m", "mypy", "--strict", "--python-version=3.10", "--no-incremental", str(path)]
    config = tmp_path / "mypy.ini"  # a user has none of this project's settings
    config.write_text("[mypy]\nfollow_imports = silent\n")
    done = subprocess.run([*command, f"--config-file={config}"], cwd=PACKAGE.parent, capture_output=True, text=True)
    errors = [line for line in done.stdout.splitlines() if ": error:" in line]
    good_lines = GOOD.count("\n")
    for number, (code, words) in enumerate(BAD.items(), good_lines + 1):
        assert any(f":{number}: error:" in line and words in line for line in errors), (code, done.stdout)
    assert not [line for line in errors if int(line.split(":")[1]) <= good_lines], done.stdout


def test_no_public_function_returns_any():
    found = []
    for path in PACKAGE.rglob("*.py"):
        if any(part.startswith("_") and part != "__init__.py" for part in path.relative_to(PACKAGE).parts):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("_") and node.returns is not None:
                names = {part.id for part in ast.walk(node.returns) if isinstance(part, ast.Name)}
                if names == {"Any"}:
                    found.append(f"{path.relative_to(PACKAGE)}: {node.name}")
    assert not found, found
