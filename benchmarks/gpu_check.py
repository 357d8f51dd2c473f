"""Check and measure everything that needs a GPU, in one command: ``python -m benchmarks.gpu_check [--only STAGE...]``.

Stages are independent. Each leaves OUT/STAGE.json as soon as it ends; one that fails leaves its error there and stops
no other. Together they make OUT/gpu.json, from which README's table is made. Without a GPU this is a dry run:
every stage does on the CPU, in miniature, what does not need one, and says what it left out; its file is marked so, and
no table is made from it.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks import gpu_stages
from benchmarks.measure import machine, versions

ROOT = Path(__file__).resolve().parents[1]
ON_CUDA = "cuda or triton_kernels or triton_ema_update"
PACKAGES_OF_TESTS = ("hypothesis", "soundfile", "jsonargparse", "sklearn")  # files that need a missing one are left out
SANITIZED = ("log_mixup_exp", "resize_crop", "bank_push", "triton_kernels", "ema_update")  # files of tests


@dataclass
class Context:
    """What stages share.

    Attributes:
        device: "cuda", or "cpu" in a dry run.
        out: folder of the results.
        left_out: what a stage could not do here, in words.
    """

    device: str
    out: Path
    left_out: list[str] = field(default_factory=list)

    @property
    def dry(self) -> bool:
        return self.device == "cpu"

    def skip(self, what: str) -> bool:
        """Return whether this is a dry run, and note what it leaves out."""
        if self.dry and what not in self.left_out:
            self.left_out.append(what)
        return self.dry


def environment(context: Context) -> dict[str, Any]:
    """Versions, GPU, and the backend of every op."""
    import byola_fast

    report = byola_fast.doctor()
    found: dict[str, Any] = {**machine(), "versions": versions(), "doctor": str(report)}
    if not context.skip("reading the GPU's name, memory and multiprocessors"):
        properties = torch.cuda.get_device_properties(0)
        found |= {"gpu": properties.name, "memory_gib": properties.total_memory / 2**30}
        found |= {"multiprocessors": properties.multi_processor_count, "l2_mib": properties.L2_cache_size / 2**20}
        fallbacks = [op for (key, op), name in report.backends.items() if key == "CUDA" and name == "reference"]
        found["reference_on_cuda"] = [op for op in fallbacks if op not in ("augment_views", "augment_views_backward")]
    return found


def tests(context: Context) -> dict[str, Any]:
    """All tests that run on CUDA: those that take a device, opcheck among them, and those of the Triton kernels."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests"]
    command += ["--collect-only"] if context.skip("running the tests on CUDA: all only collected") else ["-k", ON_CUDA]
    missing = [name for name in PACKAGES_OF_TESTS if importlib.util.find_spec(name) is None]
    command += [f"--ignore={path.relative_to(ROOT)}" for path in files_that_import(missing)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=420)
    (context.out / "tests.log").write_text(done.stdout + done.stderr)
    summary = [line for line in done.stdout.splitlines() if line.strip()][-1:]
    return {"returncode": done.returncode, "summary": summary[0] if summary else "", "missing_packages": missing}


def files_that_import(names: Sequence[str]) -> list[Path]:
    """Return the files of tests that import any of these, or import one that does."""
    found: dict[str, Path] = {}
    while True:
        wanted = "|".join([*names, *found])
        imports = re.compile(rf"^(?:import|from) (?:{wanted})\b", re.M)
        files = sorted((ROOT / "tests").glob("*.py")) if wanted else []
        more = {path.stem: path for path in files if path.stem not in found and imports.search(path.read_text())}
        if not more:
            return list(found.values())
        found |= more


def sanitizers(context: Context) -> dict[str, Any]:
    """compute-sanitizer's memcheck and racecheck over the tests of the kernels; by hand, for it takes long."""
    program = shutil.which("compute-sanitizer")
    if program is None or context.skip("compute-sanitizer over the tests of the kernels"):
        return {"found": program is not None}
    results: dict[str, Any] = {"found": True}
    for check in ("memcheck", "racecheck"):
        files = [str(ROOT / "tests" / f"test_{name}.py") for name in SANITIZED]
        command = [program, "--tool", check, "--error-exitcode", "9", sys.executable, "-m", "pytest", "-q", "-x"]
        done = subprocess.run([*command, "-k", "cuda", *files], cwd=ROOT, capture_output=True, text=True)
        (context.out / f"{check}.log").write_text(done.stdout + done.stderr)
        results[check] = {"returncode": done.returncode, "summary": done.stdout.splitlines()[-1:]}
    return results


STAGES: dict[str, Callable[[Context], dict[str, Any]]] = {
    "environment": environment,
    "properties": gpu_stages.properties,
    "ceilings": gpu_stages.ceilings,
    "views": gpu_stages.views,
    "designs": gpu_stages.designs,
    "ema": gpu_stages.ema,
    "front_end": gpu_stages.front_end,
    "training": gpu_stages.training,
    "tests": tests,
    "sanitizers": sanitizers,
}
BY_HAND = ("sanitizers",)


def run(stages: Sequence[str], out: Path, device: str) -> dict[str, Any]:
    """Run stages, write their files and the joint one, and return what that holds."""
    out.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {"dry_run": device == "cpu", "stages": {}}
    for name in stages:
        context = Context(device, out)
        started = time.perf_counter()
        torch.manual_seed(0)
        try:
            found = STAGES[name](context)
        except Exception as error:
            found = {"error": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}
        found |= {"seconds": round(time.perf_counter() - started, 2), "left_out": context.left_out}
        (out / f"{name}.json").write_text(json.dumps(found, indent=1, default=str) + "\n")
        results["stages"][name] = found
        print(f"{name}: {found['seconds']} s{', FAILED: ' + found['error'] if 'error' in found else ''}", flush=True)
        for what in context.left_out:
            print(f"  without a GPU, left out: {what}", flush=True)
    (out / "gpu.json").write_text(json.dumps(results, indent=1, default=str) + "\n")
    return results


def table(results: dict[str, Any]) -> str:
    """Return the goals with what was measured, as Markdown.

    Raises:
        ValueError: the results are of a dry run.
    """
    if results["dry_run"]:
        raise ValueError("a dry run measures nothing: run this on a machine with a GPU")
    rows = [row for stage in results["stages"].values() for row in stage.get("rows", [])]
    lines = ["| work | measured | goal |", "|---|---|---|"]
    return "\n".join([*lines, *(f"| {row['work']} | {row['measured']} | {row['goal']} |" for row in rows)])


def main(arguments: list[str] | None = None) -> int:
    """Run the stages asked for; return 1 if one failed."""
    parser = argparse.ArgumentParser(description="Check and measure everything that needs a GPU.")
    parser.add_argument("--only", nargs="+", choices=list(STAGES), help="stages to run; by default all but sanitizers")
    parser.add_argument("--out", type=Path, default=Path("gpu_check"), help="folder for the JSON files and logs")
    parser.add_argument("--device", choices=["cuda", "cpu"], help="cpu makes it a dry run; by default what is there")
    options = parser.parse_args(arguments)
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    stages = options.only or [name for name in STAGES if name not in BY_HAND]
    results = run(stages, options.out, device)
    print("dry run: nothing was measured" if results["dry_run"] else table(results))
    failed = [name for name, found in results["stages"].items() if "error" in found or found.get("returncode")]
    if failed:
        print(f"failed: {', '.join(failed)}; see {options.out}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
