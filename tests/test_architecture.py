"""Imports point one way, files stay short, and importing stays cheap."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "byola_fast"

# from the top floor down; a module imports from floors below its own
FLOORS = [
    ["__main__"],
    ["cli"],
    ["usage"],
    ["pretrain", "evaluate", "hear", "export"],
    ["watch", "embed_files", "probe"],
    ["run_folder", "schedules", "clips"],
    ["pretrain_config", "distributed", "step", "show", "stats", "recipes"],
    ["learners", "embed", "batches"],
    ["byol", "contrastive", "weights", "demo"],
    ["heads", "checkpoint"],
    ["doctor"],
    ["augment", "ema", "pictures", "store", "pack"],
    ["memory_bank", "frontend", "params", "normalize", "encoders", "objectives", "audio"],
    ["gather", "parts", "workers", "progress", "tables", "tasks", "results"],
    ["files", "host"],
    ["ops"],
]
OPS_FLOORS = [
    ["__init__"],
    ["_autograd", "frontend", "functional"],
    ["_extension_cuda"],
    ["_extension", "_triton"],
    ["_backends"],
    ["_triton_augment_views"],
    [
        "_triton_bank_push",
        "_triton_draw_params",
        "_triton_log_mel",
        "_triton_log_mixup_exp",
        "_triton_normalize",
        "_triton_resize_crop",
    ],
    ["_triton_device"],
    ["_library", "_triton_ema_update"],
    ["_ema_checks"],
    ["reference", "_checks"],
    ["philox"],
]
LIGHT = {"torch", "triton", "ninja"}  # what the ops may import


def imports(path: Path) -> set[str]:
    """Return the absolute names of everything a file imports."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def floor_of(name: str, floors: list[list[str]], prefix: str) -> int | None:
    part = name.removeprefix(prefix).split(".")[0]
    return next((n for n, floor in enumerate(floors) if part in floor), None)


def check_floors(folder: Path, floors: list[list[str]], prefix: str) -> None:
    modules = {path.stem for path in folder.glob("*.py")} | {p.parent.name for p in folder.glob("*/__init__.py")}
    listed = {name for floor in floors for name in floor}
    assert modules - {"__init__"} <= listed, f"not on any floor: {sorted(modules - listed)}"
    for path in folder.glob("*.py"):
        own = floor_of(path.stem, floors, "")
        if own is None:
            continue  # the package's public names
        for name in imports(path):
            if name.startswith(prefix):
                other = floor_of(name, floors, prefix)
                assert other is not None, f"{path.name} imports {name}, which is on no floor"
                assert other > own, f"{path.name} imports {name}, which is not below it"


def test_the_arrows():
    check_floors(PACKAGE, FLOORS, "byola_fast.")
    check_floors(PACKAGE / "ops", OPS_FLOORS, "byola_fast.ops.")


def test_ops_import_torch_and_triton_alone():
    for path in (PACKAGE / "ops").glob("*.py"):
        for name in imports(path):
            top = name.split(".")[0]
            assert top in LIGHT or top in sys.stdlib_module_names or name.startswith("byola_fast.ops"), (path, name)


def test_files_can_be_read_in_one_sitting():
    for path in [*PACKAGE.rglob("*.py"), *PACKAGE.parent.glob("tests/*.py"), *PACKAGE.parent.glob("benchmarks/*.py")]:
        assert len(path.read_text().splitlines()) <= 600, path


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
