"""Check and measure everything that needs a GPU: ``python -m benchmarks.gpu_check [--only STAGE...] [--out FOLDER]``.

Stages are independent. On a GPU each runs in its own process with a time limit, because an illegal access or a hanging
kernel breaks everything after it in the same process. Each stage writes OUT/STAGE.json when it ends, and partial
results while it runs; a failed stage writes its error there and stops no other. After each stage OUT/gpu.json, the
source of the table in docs, is joined again from all stage files in OUT, earlier commands included. So stages can be
run one at a time; ``--only`` without a name only joins. ``--only checks``, ``--only kernels`` and ``--only steps`` are
all stages in three commands of at most nine minutes each.

Without a GPU this is a dry run: every stage runs in miniature on the CPU and lists what it skipped; its file is marked
as dry, and no table is made from it.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu import blocks, stages, trainer
from benchmarks.gpu.missing import missing_packages, unloadable_tests
from benchmarks.measure import cores, machine, versions

ROOT = Path(__file__).resolve().parents[1]
# for pytest -k
ON_CUDA = "(cuda or triton_kernels or triton_two_views or triton_ema_update) and not under_the_interpreter"
ALL_TESTS = ["-p", "no:cacheprovider", "-m", "slow or not slow"]  # pyproject.toml leaves the slow ones out
# tests/ops/test_NAME.py
SANITIZED = ("log_mixup_exp", "resize_crop", "bank_push", "triton_kernels", "triton_two_views", "ema_update")
LIMIT_S = 180.0  # time limit of a stage
LIMITS_S = {"views": 240.0, "training": 360.0, "trainer": 300.0, "tests": 420.0, "sanitizers": 590.0}
GROUP_S = 530.0  # time limit of a group of stages; then the rest of it fails
GROUPS = {
    "checks": ("compilation", "environment", "properties", "tests"),
    "kernels": ("ceilings", "views", "ema", "front_end", "blocks", "designs"),
    "steps": ("training", "trainer", "ranks"),
}
WORKERS = max(
    2, min(14, cores() - 2)
)  # test processes, if pytest-xdist is installed; most of their time is compilation

# First calls that compile longest; each runs in its own process, all at once.
FIRST_CALLS = {
    "two views": "byola_fast.Augment(seed=0, shape=(64, 96)).to(d)(torch.randn(256, 64, 96, device=d))",
    "two views, bicubic": "byola_fast.augment(torch.randn(256, 64, 96, device=d), interpolation='bicubic')",
    "log-mel": "byola_fast.LogMel().to(d)(torch.randn(256, 15200, device=d))",
    "log-mel, int16": "byola_fast.LogMel().to(d)(torch.zeros(256, 15200, device=d, dtype=torch.int16))",
    "log-mel, odd length": "byola_fast.LogMel().to(d)(torch.randn(3, 16001, device=d))",
    "moving average": "byola_fast.ops.ema_update_([torch.zeros(5, device=d)], [torch.ones(5, device=d)], 0.5)",
    "kernels of the CPU": "byola_fast.augment(torch.randn(2, 64, 96))",
}


@dataclass
class Context:
    """State of one stage.

    Attributes:
        device: "cuda", or "cpu" in a dry run.
        out: folder of the results.
        stage: name of the stage.
        left_out: descriptions of what the stage skipped here, in a dry run or for lack of a package.
    """

    device: str
    out: Path
    stage: str = ""
    left_out: list[str] = field(default_factory=list)

    @property
    def dry(self) -> bool:
        return self.device == "cpu"

    def skip(self, what: str) -> bool:
        """Return whether this is a dry run, and note what it skips."""
        if self.dry and what not in self.left_out:
            self.left_out.append(what)
        return self.dry

    def keep(self, found: dict[str, Any]) -> None:
        """Write partial results, in case the stage does not finish."""
        write_stage(self, {**found, "error": "did not finish"})


def environment(context: Context) -> dict[str, Any]:
    """Versions, GPU, and the backend of every op."""
    import byola_fast

    report = byola_fast.doctor()
    today = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    found: dict[str, Any] = {**machine(), "versions": versions(), "date": today, "doctor": str(report)}
    if not context.skip("reading the GPU's name, memory and multiprocessors"):
        properties = torch.cuda.get_device_properties(0)
        found |= {"gpu": properties.name, "memory_gib": properties.total_memory / 2**30}
        found |= {"multiprocessors": properties.multi_processor_count, "l2_mib": properties.L2_cache_size / 2**20}
        fallbacks = [op for (key, op), name in report.backends.items() if key == "CUDA" and name == "reference"]
        found["reference_on_cuda"] = [op for op in fallbacks if op not in ("augment_views", "augment_views_backward")]
    return found


def tests(context: Context) -> dict[str, Any]:
    """Run all tests on CUDA: those with a ``device`` fixture, opcheck included, and those of the Triton kernels."""
    command = [sys.executable, "-m", "pytest", "-q", *ALL_TESTS, "tests"]
    if context.skip("running the tests on CUDA: they are only collected"):
        command += ["--collect-only"]
    else:
        command += ["-k", ON_CUDA, "--durations=20"]
        one_by_one = ["-n", str(WORKERS), "--maxschedchunk=1"]  # neighbours tend to be slow alike
        command += one_by_one if importlib.util.find_spec("xdist") else []
    missing = missing_packages()
    left_out = [str(path.relative_to(ROOT)) for path in unloadable_tests(missing)]
    command += [f"--ignore={path}" for path in left_out]
    context.left_out += [f"{path}: needs {' or '.join(missing)}" for path in left_out]
    found = _logged(command, context.out / "tests.log", LIMITS_S["tests"] - 20)
    return found | {"missing_packages": missing, "files_left_out": left_out}


def _logged(command: list[str], log: Path, limit_s: float, **environment: str) -> dict[str, Any]:
    """Run a command with its output in a log, up to a time limit; return the exit code and the last line."""
    with open(log, "wb") as file:
        to_log: dict[str, Any] = {"stdout": file, "stderr": subprocess.STDOUT, "start_new_session": True}
        code = _wait(subprocess.Popen(command, cwd=ROOT, env=os.environ | environment, **to_log), limit_s)
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    found: dict[str, Any] = {"returncode": 124 if code is None else code, "summary": lines[-1] if lines else ""}
    return found if code is not None else found | {"stopped_after_s": limit_s}


def _wait(process: subprocess.Popen[Any], limit_s: float) -> int | None:
    """Return the exit code of a session leader, or None if it took too long; end its whole process group."""
    try:
        return process.wait(limit_s)
    except subprocess.TimeoutExpired:
        return None
    finally:
        for number in (signal.SIGTERM, signal.SIGKILL):  # on SIGTERM it ends the sessions that it started
            with suppress(ProcessLookupError):
                os.killpg(process.pid, number)
            with suppress(subprocess.TimeoutExpired):
                process.wait(5)


def compilation(context: Context) -> dict[str, Any]:
    """Time first calls with compilation, all at once; later stages find the kernels on disk."""
    if context.skip("first calls of the kernels: they compile for a GPU"):
        return {}
    code = "import time, torch, byola_fast\nd = 'cuda'\ntorch.zeros(1, device=d)\nbegun = time.perf_counter()\n"
    end = "\ntorch.cuda.synchronize()\nprint(f'seconds {time.perf_counter() - begun:.1f}')"
    logs = {name: context.out / f"compilation-{number}.log" for number, name in enumerate(FIRST_CALLS)}
    processes = {}
    for name, call in FIRST_CALLS.items():
        with open(logs[name], "wb") as file:
            processes[name] = subprocess.Popen(
                [sys.executable, "-c", code + call + end],
                cwd=ROOT,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
    found: dict[str, Any] = {"seconds_of_first_calls": {}, "failed": {}}
    ends_at = time.monotonic() + LIMIT_S - 10
    for name, process in processes.items():
        code_of = _wait(process, max(0.1, ends_at - time.monotonic()))
        text = logs[name].read_text(errors="replace")
        if code_of == 0 and (seconds := re.search(r"^seconds ([\d.]+)", text, re.M)):
            found["seconds_of_first_calls"][name] = float(seconds[1])
        else:
            found["failed"][name] = f"exit code {code_of}: {text[-800:]}"
        logs[name].unlink()
    return found | ({"error": f"failed: {', '.join(found['failed'])}"} if found["failed"] else {})


def sanitizers(context: Context) -> dict[str, Any]:
    """Run compute-sanitizer's memcheck and racecheck over the tests of the kernels; only by name, as it takes long."""
    program = shutil.which("compute-sanitizer")
    if program is None or context.skip("compute-sanitizer over the tests of the kernels"):
        return {"found": program is not None}
    results: dict[str, Any] = {"found": True, "returncode": 0}
    files = [f"tests/ops/test_{name}.py" for name in SANITIZED]
    which = f"{ON_CUDA} and not graph and not gradcheck"
    for check, limit_s in (("memcheck", 360.0), ("racecheck", 200.0)):
        command = [program, "--tool", check, "--error-exitcode", "9", sys.executable, "-m", "pytest", "-q", "-x"]
        command += [*ALL_TESTS, "-k", which, *files]
        # One allocation per tensor, as memcheck cannot see ends inside a cached block; no graph capture then.
        results[check] = _logged(command, context.out / f"{check}.log", limit_s, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
        results["returncode"] = results["returncode"] or results[check]["returncode"]
        context.keep(results)
    return results


STAGES: dict[str, Callable[[Context], dict[str, Any]]] = {
    "compilation": compilation,
    "environment": environment,
    "properties": stages.properties,
    "ceilings": stages.ceilings,
    "views": stages.views,
    "ema": stages.ema,
    "front_end": stages.front_end,
    "blocks": blocks.blocks,
    "training": stages.training,
    "trainer": trainer.trainer,
    "ranks": trainer.ranks,
    "tests": tests,
    "designs": stages.designs,
    "sanitizers": sanitizers,
}
BY_HAND = ("sanitizers",)
HEADLINES = ("views", "front_end", "blocks", "training", "ema")


def run(
    stages: Sequence[str], out: Path, device: str, *, apart: bool = False, limit_s: float = math.inf
) -> dict[str, Any]:
    """Run stages in this process, or each in its own (``apart``); write their files and return the joined results.

    Stages in their own processes are stopped when all together have taken ``limit_s``.
    """
    out.mkdir(parents=True, exist_ok=True)
    ends_at = time.monotonic() + limit_s
    for name in stages:
        context = Context(device, out, name)
        (out / f"{name}.json").unlink(missing_ok=True)
        started = time.perf_counter()
        found = _run_apart(context, ends_at - time.monotonic()) if apart else _run_here(context)
        found["seconds"] = round(time.perf_counter() - started, 2)
        write_stage(context, found)
        _join(out)
        print(f"{name}: {found['seconds']} s{', FAILED: ' + found['error'] if 'error' in found else ''}", flush=True)
        for what in found["left_out"]:
            print(f"  skipped{' without a GPU' if context.dry else ''}: {what}", flush=True)
    return _join(out)


def write_stage(context: Context, found: dict[str, Any]) -> None:
    """Write a stage's file."""
    content = {"dry_run": context.dry, "left_out": context.left_out} | found
    (context.out / f"{context.stage}.json").write_text(json.dumps(content, indent=1, default=str) + "\n")


def _run_here(context: Context) -> dict[str, Any]:
    torch.manual_seed(0)
    try:
        found = STAGES[context.stage](context)
    except Exception as error:
        found = {"error": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}
        with suppress(OSError, ValueError):  # partial results
            found = json.loads((context.out / f"{context.stage}.json").read_text()) | found
    return {"dry_run": context.dry, "left_out": context.left_out} | found


def _run_apart(context: Context, left_s: float) -> dict[str, Any]:
    path = context.out / f"{context.stage}.json"
    limit_s = max(0.0, min(LIMITS_S.get(context.stage, LIMIT_S), left_s))
    log = context.out / f"{context.stage}.out"
    # Strict, so that no fallback is measured under a backend's name; the environment stage reports fallbacks.
    strict = os.environ.get("BYOLA_FAST_STRICT", "0" if context.stage == "environment" else "1")
    ended = _logged(_command(context), log, limit_s, BYOLA_FAST_STRICT=strict)
    found: dict[str, Any] = {"dry_run": context.dry, "left_out": []}
    with suppress(OSError, ValueError):
        found |= json.loads(path.read_text())
    if "stopped_after_s" in ended:
        found["error"] = f"stopped after {limit_s:.0f} s"
    elif ended["returncode"] not in (0, 1) or "seconds" not in found:
        found["error"] = f"its process ended with exit code {ended['returncode']}"
    if "error" in found:
        found["output"] = log.read_text(errors="replace")[-3000:]
    log.unlink()
    return found


def _command(context: Context) -> list[str]:
    """Return the command that runs one stage in its own process."""
    command = [sys.executable, "-m", "benchmarks.gpu_check", "--only", context.stage, "--here"]
    return [*command, "--out", str(context.out.resolve()), "--device", context.device]


def _join(out: Path) -> dict[str, Any]:
    """Join all stage files of a folder, and return them."""
    stages = {name: json.loads(path.read_text()) for name in STAGES if (path := out / f"{name}.json").exists()}
    results = {"dry_run": any(found["dry_run"] for found in stages.values()), "stages": stages}
    (out / "gpu.json").write_text(json.dumps(results, indent=1) + "\n")
    return results


def table(results: dict[str, Any]) -> str:
    """Return the measurements and goals as a Markdown table.

    Raises:
        ValueError: the results come from a dry run.
    """
    if results["dry_run"]:
        raise ValueError("a dry run measures nothing: run this on a machine with a GPU")
    rows = [row for stage in results["stages"].values() for row in stage.get("rows", [])]
    lines = ["| work | measured | goal |", "|---|---|---|"]
    lines += [f"| {row['work']} | {row['measured']} | {row['goal']} |" for row in rows]
    missed = [f"- {row['work']}: {', '.join(row['missed'])}" for row in rows if row.get("missed")]
    lines += ["", where(results), "", "Goals missed:" if missed else "All goals were met.", "", *missed]
    left = [name for name in STAGES if name not in results["stages"] and name not in BY_HAND]
    for what, names in (("that failed", failures(results)), ("not run", left)):
        lines += ["", f"Stages {what}: {', '.join(names)}."] if names else []
    return "\n".join(lines).rstrip()


def summary(results: dict[str, Any]) -> str:
    """Return the first measurement of each of ``HEADLINES`` as a Markdown table.

    Raises:
        ValueError: the results come from a dry run.
    """
    headlines = {name: {"rows": results["stages"].get(name, {}).get("rows", [])[:1]} for name in HEADLINES}
    lines = table({"dry_run": results["dry_run"], "stages": headlines}).partition("\n\n")[0]
    return f"{lines}\n\n{where(results)}"


def where(results: dict[str, Any]) -> str:
    """Return the GPU, the versions and the date of the results."""
    found = results["stages"].get("environment", {})
    used = [f"{name} {version}" for name, version in found.get("versions", {}).items() if name != "byola_fast"]
    return ", ".join([found.get("gpu", "unknown GPU"), *used, found.get("date", "unknown date")]) + "."


def failures(results: dict[str, Any]) -> list[str]:
    """Return the names of the stages that failed."""
    return [name for name, found in results["stages"].items() if "error" in found or found.get("returncode")]


def main(arguments: list[str] | None = None) -> int:
    """Run the chosen stages; return 1 if any stage in the folder failed."""
    parser = argparse.ArgumentParser(description="Check and measure everything that needs a GPU.")
    parser.add_argument(
        "--only",
        nargs="*",
        metavar="STAGE",
        help=f"{', '.join(GROUPS)}: groups of stages, each within nine minutes; or {', '.join(STAGES)}; "
        f"default: all but {', '.join(BY_HAND)}",
    )
    parser.add_argument("--out", type=Path, default=Path("gpu_check"), help="folder for the JSON files and logs")
    parser.add_argument("--device", choices=["cuda", "cpu"], help="cpu makes it a dry run; default: cuda if available")
    parser.add_argument("--here", action="store_true", help="run stages in this process, without time limits")
    options = parser.parse_args(arguments)
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    named = [name for name in STAGES if name not in BY_HAND] if options.only is None else options.only
    stages = [stage for name in named for stage in GROUPS.get(name, (name,))]
    if unknown := [name for name in stages if name not in STAGES]:
        parser.error(f"--only: expected stages of {', '.join([*GROUPS, *STAGES])}, got {', '.join(unknown)}")
    limit_s = sum(GROUP_S for name in named if name in GROUPS) or math.inf
    apart = device == "cuda" and not options.here
    results = run(stages, options.out, device, apart=apart, limit_s=limit_s)
    print("dry run: nothing was measured" if results["dry_run"] else table(results))
    if failed := failures(results):
        print(f"failed: {', '.join(failed)}; see {options.out}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # an exception, so that _wait ends the stage's processes
    sys.exit(main())
