"""Files stay short and imports stay cheap; lint-imports checks the layers (pyproject.toml)."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "byola_fast"

LIGHT = {"torch", "triton", "ninja"}  # packages that the ops may import


def imports(path: Path) -> set[str]:
    """Return the absolute names that a file imports."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def test_ops_import_torch_and_triton_alone():
    for path in (PACKAGE / "ops").rglob("*.py"):
        for name in imports(path):
            top = name.split(".")[0]
            assert top in LIGHT or top in sys.stdlib_module_names or name.startswith("byola_fast.ops"), (path, name)


def test_the_command_line_alone_changes_malloc():
    """It changes it for the whole process, which belongs to a library's user."""
    changing = [path for path in PACKAGE.rglob("*.py") if any("keep_freed_memory" in name for name in imports(path))]
    assert changing == [PACKAGE / "cli.py"]


def test_files_can_be_read_in_one_sitting():
    for path in [
        *PACKAGE.rglob("*.py"),
        *PACKAGE.parent.glob("tests/**/*.py"),
        *PACKAGE.parent.glob("benchmarks/**/*.py"),
    ]:
        assert len(path.read_text().splitlines()) <= 600, path


@pytest.mark.slow
def test_importing_needs_torch_alone_and_compiles_nothing():
    heavy = ["torchaudio", "soundfile", "soxr", "rich", "jsonargparse", "matplotlib", "sklearn", "triton", "numpy.f2py"]
    code = (
        "import torch, sys; before = set(sys.modules)\n"
        "import byola_fast\n"
        f"loaded = [m for m in {heavy!r} if m in set(sys.modules) - before]\n"
        "assert not loaded, loaded\n"
        "from torch.utils import cpp_extension\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
