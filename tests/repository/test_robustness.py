"""The scripts of tests/robustness, which are run by hand, still fit the package."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from robustness import fuzz

from byola_fast.embedding import unfinished

pytestmark = pytest.mark.slow

SCRIPTS = Path(__file__).parents[1] / "robustness"


@pytest.mark.parametrize("name", fuzz.TARGETS)
def test_a_fuzz_target_reads_its_seeds_and_refuses_cut_ones(name, tmp_path, monkeypatch):
    monkeypatch.setattr(unfinished, "fingerprint", unfinished.fingerprint)  # the target replaces it
    target = fuzz.TARGETS[name]
    outcomes = []
    for number, seed in enumerate(target.seeds()):
        for content in (seed, seed[: len(seed) // 2]):
            folder = tmp_path / f"{number}-{len(content)}"
            folder.mkdir(exist_ok=True)
            (folder / target.name).write_bytes(target.wrap(content))
            try:
                outcomes.append(target.run(folder / target.name))
            except target.allowed() as error:
                outcomes.append(type(error).__name__)
    assert set(outcomes) - {error.__name__ for error in target.allowed()} or name == "run"  # its seed has no weights


def test_fuzz_targets_run_no_code_of_a_pickle(tmp_path):
    target = fuzz.TARGETS["pickle"]
    path = tmp_path / target.name
    path.write_bytes(target.wrap(target.seeds()[-1]))
    with pytest.raises(target.allowed(), match="refused"):
        target.run(path)


@pytest.mark.parametrize("command", ["faults.py --only changing_store", "soak.py calls --count 200"])
def test_a_script_finds_nothing_wrong(command):
    script, *arguments = command.split()
    done = subprocess.run([sys.executable, SCRIPTS / script, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
