"""Every command and script in README and docs runs as printed, with settings that keep it small."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from helpers.data_sets import TREES, write
from helpers.tasks import PITCHES, make_task

from byola_fast import cli

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
SMALL = ["--feature-d=16", "--proj-size=8", "--proj-dim=32", "--steps=2", "--n-memory=8", "--workers=0", "--threads=1"]
MORE = {
    "pretrain": [*SMALL, "--stats-segments=8"],
    "eval": ["--keep-going"],
    "whiten": ["--segments=40", "--workers=0"],
}
OTHERS = (
    "pip install",
    "pytest",
    "torchrun",
    "python -m benchmarks",
    "hear-validator",
    "pre-commit",
)  # run by CI, or tests of their own


def commands() -> list[str]:
    """Return the commands indented on any page, in order, once each; && joins two."""
    found: dict[str, None] = {}
    for page in PAGES:
        text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
        for line in re.findall(r"^    (\S.*)$", text, flags=re.MULTILINE):
            for command in line.split("  #")[0].split(" && "):
                if "->" not in command:
                    found[command.strip()] = None
    return list(found)


def scripts() -> list[str]:
    """Return the Python blocks that are not doctests; they run after the commands, on their output."""
    blocks = [block for page in PAGES for block in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)]
    return [block for block in blocks if ">>>" not in block]


@pytest.mark.slow
def test_every_command_runs(tmp_path, monkeypatch, capsys):
    labels = [name for _ in range(10) for name in PITCHES]
    part = lambda n: ("train", "train", "train", "valid", "test")[n // 3 % 5]  # noqa: E731
    make_task(tmp_path, labels, part, "file_name,label,split").rename(tmp_path / "TASK.csv")
    (tmp_path / "audio").rename(tmp_path / "my_sounds")
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "small.csv").symlink_to(tmp_path / "TASK.csv")
    (tmp_path / "tasks" / "audio").symlink_to(tmp_path / "my_sounds")
    (tmp_path / "FOLDER").symlink_to("my_sounds")
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "audio").symlink_to(tmp_path / "my_sounds")
    for number, label in enumerate(labels):
        (tmp_path / "my_classes" / label).mkdir(parents=True, exist_ok=True)
        (tmp_path / "my_classes" / label / f"{number}.wav").symlink_to(tmp_path / "my_sounds" / f"{number}.wav")
    write(tmp_path / "ESC-50-master", TREES["esc50"])
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RANK", raising=False)
    ran = set()
    for command in commands():
        first, *rest = shlex.split(command)
        if first == "byola-fast" and "W.pth" not in command:  # its task folder holds empty files
            if "--demo" in rest:
                rest += ["--batch-size=4"]
            code = cli.main([*rest, *MORE.get(rest[0], [])])
            assert code == 0, f"{command}: {code}, {capsys.readouterr().err[-500:]}"
            ran.add(rest[0])
        elif first == "torchrun":
            given = rest[rest.index("byola_fast") + 1 :]
            cli._make_parser(demo=False).parse_args([cli._with_underscores(word) for word in given if word != "..."])
        else:
            assert first == "byola-fast" or command.startswith(OTHERS), f"no test runs {command!r}"
    for script in scripts():
        exec(script, {})
    assert scripts()
    assert ran >= {"pack", "pretrain", "embed", "export", "eval", "recipes"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page):
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8")):
        assert target.startswith("https://") or (page.parent / target).exists(), f"{page.name}: {target}"


def test_every_test_and_script_that_the_pages_name_exists():
    sources = {path.name: path.read_text() for path in (ROOT / "tests").rglob("*.py")}
    for page in [*PAGES, *(ROOT / "benchmarks").rglob("*.md")]:
        text = page.read_text(encoding="utf-8")
        for path in re.findall(r"\b((?:tests|benchmarks|examples|byola_fast)/[\w/]+\.(?:py|sh))\b", text):
            assert "NAME" in path or (ROOT / path).exists(), f"{page.name}: {path}"
        for name in re.findall(r"`(test_\w+)`", text):
            assert any(f"def {name}(" in source for source in sources.values()), f"{page.name}: {name}"
        for name in re.findall(r"`(test_\w+\.py)`", text):
            assert name in sources, f"{page.name}: {name}"
