"""The version, the linters and the lists of public names agree wherever they stand."""

from __future__ import annotations

import ast
import re
import sys
from importlib import import_module
from pathlib import Path

import pytest
import yaml

import byola_fast

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[2]
CI = (ROOT / ".ci/run").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def read_yaml(path: str) -> dict:
    return yaml.safe_load((ROOT / path).read_text())


def test_the_version_stands_once():
    assert "version" in PROJECT["project"]["dynamic"]
    assert PROJECT["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "byola_fast.__version__"}
    definitions = [path for path in (ROOT / "byola_fast").rglob("*.py") if "__version__ =" in path.read_text()]
    assert definitions == [ROOT / "byola_fast/__init__.py"]
    assert str(read_yaml("CITATION.cff")["version"]) == byola_fast.__version__
    assert re.search(rf"^## \[.*{re.escape(byola_fast.__version__)}", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)


def test_pre_commit_runs_the_linters_of_ci():
    (repo,) = read_yaml(".pre-commit-config.yaml")["repos"]
    assert repo["repo"] == "local"  # works without a network
    assert {hook["language"] for hook in repo["hooks"]} == {"system"}
    lines = CI.partition("# linters")[2].partition("\n")[2].partition("\n#")[0].splitlines()
    assert [hook["entry"] for hook in repo["hooks"]] == [line.removesuffix(" csrc/*") for line in lines]
    assert len(lines) == 5


def test_what_ci_calls_is_installed_by_the_extra_dev():
    extras = PROJECT["project"]["optional-dependencies"]
    installed = "\n".join(extras["dev"] + extras["docs"])
    for tool in ("ruff", "codespell", "import-linter", "clang-format", "mypy", "mkdocs", "pytest-xdist", "pre-commit"):
        assert re.search(rf"^{tool}\W", installed, re.MULTILINE), tool
    assert "docs" in re.split(r"\W", extras["dev"][0])


def test_the_workflow_calls_ci_and_knows_the_versions():
    jobs = read_yaml(".github/workflows/ci.yml")["jobs"]
    commands = {name: [step["run"] for step in job["steps"] if "run" in step] for name, job in jobs.items()}
    assert commands["test"] == ["bash .ci/run"]
    assert jobs["test"]["strategy"]["matrix"]["python"][0] == PROJECT["project"]["requires-python"].strip(">=")
    (torch,) = [word for word in PROJECT["project"]["dependencies"] if re.match(r"torch\W", word)]
    assert torch in " ".join(commands["torch-alone"])
    assert ".ci/torch_alone.py" in commands["torch-alone"][-1]


def test_the_platform_jobs_install_what_their_tests_import():
    commands = [step.get("run", "") for step in read_yaml(".github/workflows/ci.yml")["jobs"]["platforms"]["steps"]]
    (installed,) = [words for words in commands if "-e" in words]
    (tested,) = [words.split()[1:] for words in commands if words.startswith("pytest")]
    extras = re.search(r"\[([\w,]+)\]", installed)[1].split(",")
    known = [*PROJECT["project"]["dependencies"], installed]
    known += [word for name in extras for word in PROJECT["project"]["optional-dependencies"][name]]
    files = [
        path for name in tested for path in ([ROOT / name] if name.endswith(".py") else (ROOT / name).glob("*.py"))
    ]
    imported = set()
    for node in [node for path in files for node in ast.parse(path.read_text(encoding="utf-8")).body]:
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [node.module] if isinstance(node, ast.ImportFrom) else [each.name for each in node.names]
            imported |= {str(name).partition(".")[0] for name in names}
    ours = {"byola_fast", "benchmarks", "helpers", "examples"} | sys.stdlib_module_names
    for name in imported - ours - {"scipy"}:  # scikit-learn brings scipy
        assert name in " ".join(known), name


def test_the_issue_form_asks_for_doctor():
    body = read_yaml(".github/ISSUE_TEMPLATE/bug.yml")["body"]
    (field,) = [item for item in body if "byola-fast doctor" in item["attributes"]["label"]]
    assert field["validations"]["required"] is True


@pytest.mark.parametrize("module", ["byola_fast", "byola_fast.ops", "byola_fast.audio"])
def test_the_api_page_holds_every_public_name(module):
    page = re.findall(r"^::: (\S+)$", (ROOT / "docs/api.md").read_text(), re.MULTILINE)
    assert len(page) == len(set(page))
    documented = {name.rpartition(".")[2] for name in page}
    names = set(import_module(module).__all__) - {"ops", "__version__"}
    assert names <= documented, names - documented


def test_every_page_is_in_the_navigation():
    nav = str(read_yaml("mkdocs.yml")["nav"])
    assert all(f"'{page.name}'" in nav for page in (ROOT / "docs").glob("*.md"))
