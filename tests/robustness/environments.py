"""Install the wheel in fresh environments and use it when something is missing or odd. Run by hand.

    python tests/robustness/environments.py --pythons python3.10 python3.13 --torch 2.11 2.14

Each environment takes 5 GB and some minutes. The wheel is built once, from a copy of this checkout, and installed with
torch from the package index into a folder whose name has a space and non-ASCII letters. Then each situation below must
end as expected. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[2]
VIEWS = """
import sys, torch, byola_fast
view1, view2 = byola_fast.augment(torch.randn(8, 64, 96), seed=0)
assert view1.shape == (8, 64, 96) and bool(view1.isfinite().all())
report = byola_fast.doctor()
assert report.backends["CPU", "augment_views_out"] == WANTED, report
"""
WITHOUT_TRITON = 'import sys; sys.modules["triton"] = None\n'


@dataclass
class Situation:
    """Something missing or odd.

    Attributes:
        name: row of the table.
        code: for ``python -c``; must exit with 0.
        wanted: words that stderr must contain.
        unwanted: words that stderr must not contain.
        change: environment variables to set; None removes one.
        before: called first, with the temporary folder.
    """

    name: str
    code: str
    wanted: str = ""
    unwanted: str = "Traceback"
    change: dict[str, str | None] = field(default_factory=dict)
    before: Callable[[Path], None] | None = None


def views(backend: str) -> str:
    return VIEWS.replace("WANTED", repr(backend))


def situations(folder: Path, cache: Path) -> list[Situation]:
    """Return all situations; the first fills the cache that some others use."""
    missing = str(folder / "no such")
    shared: dict[str, str | None] = {"BYOLA_FAST_CACHE": str(cache)}
    no_nvcc: dict[str, str | None] = {"CUDA_HOME": missing, "CUDA_PATH": missing, "PATH": "/bin:/usr/bin"}
    no_compiler: dict[str, str | None] = {"CXX": missing, "BYOLA_FAST_CACHE": str(folder / "other cache")}
    no_home: dict[str, str | None] = {"HOME": None, "XDG_CACHE_HOME": None}
    nowhere: dict[str, str | None] = {"HOME": "/proc/none", "XDG_CACHE_HOME": "/proc/none", "TMPDIR": str(folder)}
    flags = ["pretrain", "--demo", "--steps=3", f"--out={folder}/demo"]
    demo = f"import sys; from byola_fast.cli import main; sys.exit(main({flags}))"

    def seal(_: Path) -> None:
        for path in [cache, *cache.rglob("*")]:
            path.chmod(path.stat().st_mode & ~0o222)  # root could still write, but nothing here does

    found = "compiling"
    return [
        Situation("first views, kernels compiled", views("cpp"), "compiling the C++ kernels", change=shared),
        Situation("second start", views("cpp"), unwanted=found, change=shared),
        Situation("kernels built ahead of time, read-only", views("cpp"), unwanted=found, change=shared, before=seal),
        Situation("no compiler", views("reference"), "C++ compiler", change=no_compiler),
        Situation("no nvcc", views("cpp"), change=shared | no_nvcc),
        Situation("no Triton", WITHOUT_TRITON + views("cpp"), change=shared),
        Situation("HOME unset", views("cpp"), change=shared | no_home),
        Situation("home and cache not writable", views("cpp"), "using", change=nowhere),
        Situation("three training steps under such a path", demo, change=shared),
    ]


def run(python: Path, situation: Situation, folder: Path) -> tuple[str, float]:
    """Return "ok" or what went wrong, and the seconds taken."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("BYOLA")}
    environment["PYTHONPATH"] = ""
    for name, value in situation.change.items():
        environment.pop(name, None)
        if value is not None:
            environment[name] = value
    if situation.before is not None:
        situation.before(folder)
    started = time.monotonic()
    done = subprocess.run([python, "-c", situation.code], env=environment, cwd=folder, capture_output=True, text=True)
    seconds = time.monotonic() - started
    message = done.stderr
    if done.returncode:
        return f"exit code {done.returncode}: {message[-300:]}", seconds
    if situation.wanted not in message:
        return f"expected {situation.wanted!r} on stderr, got {message[-300:]!r}", seconds
    if situation.unwanted in message:
        return f"did not expect {situation.unwanted!r}, got {message[-300:]!r}", seconds
    return "ok", seconds


def main(arguments: list[str] | None = None) -> int:
    """Try all environments; return 1 if any situation went wrong."""
    parser = argparse.ArgumentParser(description="Use the wheel in fresh environments with things missing.")
    parser.add_argument("--pythons", nargs="+", default=[sys.executable])
    parser.add_argument("--torch", nargs="+", default=["2.14"], help="a version for each Python, or one for all")
    options = parser.parse_args(arguments)
    versions = options.torch * (len(options.pythons) if len(options.torch) == 1 else 1)
    wrong = 0
    print("| Python | torch | situation | result | s |\n|---|---|---|---|---:|", flush=True)
    for python, version in zip(options.pythons, versions, strict=True):
        with tempfile.TemporaryDirectory(prefix="byola fast ü ") as temporary:
            folder = Path(temporary)
            inner = folder / "venv" / "bin" / "python"
            subprocess.run([python, "-m", "venv", folder / "venv"], check=True)
            pip = [inner, "-m", "pip", "install", "-qq", "--disable-pip-version-check"]
            tree = folder / "checkout"
            shutil.copytree(
                ROOT, tree, ignore=shutil.ignore_patterns(".git", "runs", "*.egg-info", "build", "__pycache__")
            )
            wheel = [inner, "-m", "pip", "wheel", "-qq", "--no-deps", "-w", folder / "wheels", tree]
            subprocess.run([*wheel, "--disable-pip-version-check"], check=True)
            shutil.rmtree(tree)
            (made,) = (folder / "wheels").glob("byola_fast-*.whl")
            subprocess.run([*pip, f"torch=={version}.*", f"{made}[eval]"], check=True)
            found = subprocess.run(
                [inner, "-c", "import torch, platform; print(platform.python_version(), torch.__version__)"],
                capture_output=True, text=True, check=True,
            ).stdout.split()  # fmt: skip
            for situation in situations(folder, folder / "cache é"):
                result, seconds = run(inner, situation, folder)
                wrong += result != "ok"
                print(
                    f"| {' | '.join([*found, situation.name, result.replace('|', '/'), f'{seconds:.0f}'])} |",
                    flush=True,
                )
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
