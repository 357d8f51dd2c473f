"""Packages that the tests need and this machine lacks, and the test files that cannot run without them."""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
READING = "soxr"  # imported as files are read, which all tests do that write them with soundfile


def missing_packages() -> list[str]:
    """Return the packages that are not installed, of those that tests, benchmarks and examples import; and soxr."""
    packages = {READING} | {name.partition(".")[0] for path in _sources() for name in _imports(path)}
    ours = {path.stem for folder in (ROOT, ROOT / "tests") for path in folder.iterdir()}
    return sorted(name for name in packages - ours if importlib.util.find_spec(name) is None)


def unloadable_tests(packages: Iterable[str]) -> list[Path]:
    """Return the files in tests/ that import any of these packages, directly or through other files here.

    Helpers are among them: pytest looks for doctests in every file.
    """
    imports = {path: _imports(path) for path in _sources()}
    wanted = set(packages)
    wanted |= {"soundfile"} if READING in wanted else set()
    while True:
        found = [path for path, names in imports.items() if any(_is_in(name, wanted) for name in names)]
        modules = {_module(path) for path in found}
        if modules <= wanted:
            return [path for path in found if path.is_relative_to(ROOT / "tests")]
        wanted |= modules


def _sources() -> list[Path]:
    return sorted(path for folder in ("tests", "benchmarks", "examples") for path in (ROOT / folder).rglob("*.py"))


def _module(path: Path) -> str:
    """Return the name that imports a file; tests/ is on the path (pyproject.toml)."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[1:] if parts[0] == "tests" else parts).removesuffix(".__init__")


def _imports(path: Path) -> set[str]:
    """Return the absolute names that a file imports on loading; imports inside functions do not count."""
    names = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def _is_in(name: str, modules: set[str]) -> bool:
    """Return whether a dotted name is one of the modules or inside one."""
    return any(f"{name}.".startswith(f"{module}.") for module in modules)
