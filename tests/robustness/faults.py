"""Break running jobs and compare their results with undisturbed ones: nothing may be lost. Run by hand.

    python tests/robustness/faults.py [--only kill_pack kill_pretrain ...] [--kills 50]

Jobs run the command line (``byola_fast.cli.main``) in forks of this process, which has imported everything, so that a
random moment falls in the work and not in the imports. Prints what was done and what was found.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch

from byola_fast import cli
from byola_fast.audio.store import SegmentStore
from byola_fast.embedding import unfinished
from byola_fast.networks.checkpoint import load_checkpoint

ROOT = Path(__file__).parents[2]
RATE = 16000
ERROR = 2  # exit code of a reported error
PRETRAIN = (
    "--feature_d 16 --n_mels 16 --proj_size 8 --proj_dim 16 --batch_size 8 --n_memory 32 --stats_segments 16 "
    "--epochs 1000 --threads 1 --device cpu --no_tensorboard --save_every 2 --keep_every 10"
)


class Job:
    """A command in its own process.

    Attributes:
        output: everything it wrote to stdout and stderr.
    """

    def __init__(self, arguments: Sequence[object], log: Path) -> None:
        self.log, self.started = log, time.monotonic()
        sys.stdout.flush()
        self.pid = os.fork()
        if self.pid == 0:
            code = 70
            try:
                os.setsid()
                descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
                os.dup2(descriptor, 1)
                os.dup2(descriptor, 2)
                torch.set_num_threads(1)
                unfinished.KEEP_SEC = 0.1  # the default of 15 s outlasts a whole job here
                code = cli.main([str(argument) for argument in arguments])
            except SystemExit as exit:
                code = exit.code if isinstance(exit.code, int) else 1
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)

    def end(self, seconds: float = 300.0) -> int:
        """Wait and return the exit code, or minus the signal that killed the job."""
        deadline = time.monotonic() + seconds
        while (done := os.waitpid(self.pid, os.WNOHANG))[0] == 0:
            if time.monotonic() > deadline:
                os.killpg(self.pid, signal.SIGKILL)
                raise AssertionError(f"hung: {self.output}")
            time.sleep(0.01)
        return os.waitstatus_to_exitcode(done[1])

    def kill_after(self, seconds: float) -> int:
        time.sleep(seconds)
        os.kill(self.pid, signal.SIGKILL)  # still a zombie if it has ended by itself
        return self.end()

    @property
    def output(self) -> str:
        return self.log.read_text(errors="replace").replace("\r", "\n")

    def wait_for(self, found: Callable[[], object], seconds: float = 60.0) -> Any:
        """Wait until ``found`` returns something true, while the job runs."""
        deadline = time.monotonic() + seconds
        while not (answer := found()):
            assert time.monotonic() < deadline, f"never seen: {self.output}"
            time.sleep(0.01)
        return answer

    def outlived(self, seconds: float = 3.0) -> int:
        """Wait for the processes of its group to end; kill those that remain and return their number."""
        deadline, left = time.monotonic() + seconds, [0]
        while left and time.monotonic() < deadline:
            left = [int(path.parent.name) for path in Path("/proc").glob("[0-9]*/stat") if _group(path) == self.pid]
            time.sleep(0.05 if left else 0)
        for pid in left:
            os.kill(pid, signal.SIGKILL)
        return len(left)

    def workers(self) -> list[int]:
        children = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()
        return [int(child) for child in children]


def _group(stat: Path) -> int:
    """Return the process group of a live process, or 0."""
    try:
        state, _parent, group = stat.read_text().rpartition(")")[2].split()[:3]
    except OSError:
        return 0
    return 0 if state == "Z" else int(group)


def expect(condition: object, message: str) -> None:
    if not condition:
        raise AssertionError(message)


def write_audio(folder: Path, count: int = 40, seconds: float = 3.0) -> Path:
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        wav = 0.1 * rng.standard_normal(round(rng.uniform(0.5, 1.5) * seconds * RATE))
        soundfile.write(folder / f"{number:03}.{('wav', 'flac', 'ogg')[number % 3]}", wav, RATE)
    return folder


def same(a: Any, b: Any) -> bool:
    """Compare bit for bit, through dicts and lists; NaN equals NaN."""
    if isinstance(a, torch.Tensor):
        return a.shape == b.shape and bool((a == b).logical_or((a != a) & (b != b)).all())
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[name], b[name]) for name in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b or a != a)


def leftovers(*folders: Path) -> list[str]:
    return [
        str(path) for folder in folders for path in folder.rglob("*") if ".tmp" in path.name or ".parts" in path.name
    ]


class Scenarios:
    """Each scenario counts its steps in ``seen`` and raises if something was lost."""

    def __init__(self, work: Path, kills: int) -> None:
        self.work, self.kills, self.random = work, kills, random.Random(0)
        self.audio = write_audio(work / "audio")
        self.log = work / "log.txt"

    def run(self, *arguments: object) -> str:
        job = Job(arguments, self.log)
        code = job.end()
        expect(code == 0, f"exit {code}: {job.output}")
        return job.output

    def fails(self, wanted: str, job: Job) -> None:
        code = job.end()
        expect(code == ERROR, f"exit {code}: {job.output}")
        expect(re.search(wanted, job.output), f"expected {wanted!r}, got {job.output}")
        expect("Traceback" not in job.output, f"a traceback: {job.output}")

    def pack(self, out: Path, *more: object) -> list[object]:
        return ["pack", self.audio, out, *more]

    def train(self, out: Path, steps: int, *more: object) -> list[object]:
        return ["pretrain", self.audio, "--out", out, "--steps", steps, *PRETRAIN.split(), *more]

    def embed(self, out: Path, *more: object) -> list[object]:
        return ["embed", self.weights(), self.audio, "--out", out, "--batch_sec", 4, *more]

    def weights(self) -> Path:
        out = self.work / "encoder"
        if not (out / "encoder.pth").exists():
            self.run(*self.train(out, 2))
        return out / "encoder.pth"

    def until_done(self, seen: Counter[str], command: Sequence[object], longest: float) -> str:
        """Run and kill at random moments until a run ends by itself; return its output."""
        while True:
            job = Job(command, self.log)
            code = job.kill_after(self.random.uniform(0, longest))
            if code == 0:
                seen["ended"] += 1
                return job.output
            expect(code == -signal.SIGKILL, f"exit {code}: {job.output}")
            seen["kill -9"] += 1
            seen["processes that outlived their job"] += job.outlived()

    def duration(self, command: Sequence[object]) -> float:
        started = time.monotonic()
        self.run(*command)
        return time.monotonic() - started

    # kill -9 at random moments

    def kill_pack(self, seen: Counter[str]) -> None:
        plain, out = self.work / "plain_store", self.work / "killed_store"
        took = max(self.duration(self.pack(plain, "--parts", 3, "--part", part)) for part in range(3))
        wanted = {path.name: path.read_bytes() for path in plain.iterdir()}
        while seen["kill -9"] < self.kills:
            for part in range(3):
                workers = self.random.choice([0, 2])
                more = ("--force",) if seen["stores compared"] else ()
                command = self.pack(out, "--parts", 3, "--part", part, "--workers", workers, *more)
                self.until_done(seen, command, 2 * took)
                if seen["stores compared"]:  # the old store stays whole all along
                    SegmentStore(out).verify()
            found = {path.name: path.read_bytes() for path in out.iterdir()}
            expect(found == wanted, f"{sorted(found)} instead of {sorted(wanted)}, or other bytes")
            seen["stores compared"] += 1

    def kill_pretrain(self, seen: Counter[str]) -> None:
        plain, steps = self.work / "plain_run", 60
        took = self.duration(self.train(plain, steps))
        wanted = load_checkpoint(plain / "checkpoint.pt")
        while seen["kill -9"] < self.kills:
            out = self.work / f"killed_run{seen['runs compared']}"
            workers = self.random.choice([0, 2])
            self.until_done(seen, self.train(out, steps, "--workers", workers), took / 3)
            self.same_run(out, plain, wanted)
            seen["runs compared"] += 1

    def same_run(self, out: Path, plain: Path, wanted: dict[str, Any]) -> None:
        found = load_checkpoint(out / "checkpoint.pt")
        for name in ("model", "optimizer", "augment", "rng", "step", "epoch", "stats"):
            expect(same(found[name], wanted[name]), f"another {name}")
        for path in plain.glob("encoder*.pth"):
            one, other = load_checkpoint(path), load_checkpoint(out / path.name)
            expect(same(one, other), f"another {path.name}")
        steps = [re.search(r'"step": (\d+)', line)[1] for line in (out / "log.jsonl").read_text().splitlines()]  # type: ignore[index]
        expect(steps == [str(step) for step in range(1, wanted["step"] + 1)], f"log of steps {steps}")
        expect(not leftovers(out), str(leftovers(out)))

    def kill_embed(self, seen: Counter[str]) -> None:
        plain = self.work / "plain.npz"
        took = self.duration(self.embed(plain))
        while seen["kill -9"] < self.kills:
            out = self.work / f"killed{seen['tables compared']}.npz"
            self.until_done(seen, self.embed(out, "--workers", self.random.choice([0, 2])), 0.8 * took)
            self.same_table(out, plain)
            seen["tables compared"] += 1
        expect(not leftovers(self.work), str(leftovers(self.work)))

    def same_table(self, out: Path, plain: Path) -> None:
        with np.load(out) as found, np.load(plain) as wanted:
            expect((found["file_names"] == wanted["file_names"]).all(), "other names")
            error = np.abs(found["embeddings"] - wanted["embeddings"]).max()
            expect(error < 1e-5, f"embeddings differ by {error}")

    # a full disk

    def full_disk(self, seen: Counter[str]) -> None:
        disk = self.work / "disk"
        disk.mkdir()
        if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", disk]).returncode:
            seen["SKIPPED: mount needs root"] += 1
            return
        try:
            self._full_disk(seen, disk)
        finally:
            subprocess.run(["umount", disk], check=True)

    def _full_disk(self, seen: Counter[str], disk: Path) -> None:
        ballast = disk / "ballast"

        def fill(leave: int) -> None:
            free = os.statvfs(disk)
            ballast.write_bytes(bytes(max(0, free.f_bavail * free.f_frsize - leave)))
            seen["disks filled"] += 1

        few = write_audio(self.work / "few", 4, 2.0)
        out = disk / "store"
        self.run("pack", few, out)
        before = {path.name: path.read_bytes() for path in out.iterdir()}
        for leave in (0, 4096, 50_000, 200_000):
            fill(leave)
            os.utime(few / "000.wav")
            self.fails("cannot be written: No space left", Job(["pack", few, out], self.log))
            expect({path.name: path.read_bytes() for path in out.iterdir()} == before, "the old store is not whole")
            ballast.unlink()
        shutil.rmtree(out)

        run, plain = disk / "run", self.work / "plain_disk"
        self.run(*self.train(plain, 12))
        self.run(*self.train(run, 4))
        size = (run / "checkpoint.pt").stat().st_size
        for leave in (0, 4096, size // 2, size - 4096):
            kept = (run / "checkpoint.pt").read_bytes()
            fill(leave)
            job = Job(self.train(run, 12), self.log)
            self.fails("No space left|cannot be written", job)
            expect((run / "checkpoint.pt").read_bytes() == kept, "the old checkpoint is not whole")
            expect(not leftovers(run), str(leftovers(run)))
            ballast.unlink()
        self.run(*self.train(run, 12))
        self.same_run(run, plain, load_checkpoint(plain / "checkpoint.pt"))
        shutil.rmtree(run)

        table, plain = disk / "e.npz", self.work / "full.npz"
        self.run(*self.embed(plain))
        for leave in (0, 1000, 4096):
            fill(leave)
            self.fails("No space left", Job(self.embed(table), self.log))
            expect(not table.exists(), "half a table")
            ballast.unlink()
        self.run(*self.embed(table))
        self.same_table(table, plain)
        expect(not leftovers(disk), str(leftovers(disk)))

    # files that change during a run

    def vanishing_files(self, seen: Counter[str]) -> None:
        """Runs skip and report audio that is removed or cut short meanwhile, and end well."""
        for kind in ("pack", "pretrain", "embed"):
            folder = self.work / f"vanishing_{kind}"
            shutil.copytree(self.audio, folder)
            commands = {
                "pack": ["pack", folder, self.work / "vanished"],
                "pretrain": ["pretrain", folder, *self.train(self.work / "vanished_run", 30)[2:]],
                "embed": ["embed", self.weights(), folder, "--out", self.work / "vanished.npz", "--workers", 0],
            }
            job = Job(commands[kind], self.log)
            for path in sorted(folder.iterdir(), reverse=True)[:12]:
                time.sleep(0.02)
                if seen["files removed"] <= seen["files cut short"]:
                    path.unlink()
                    seen["files removed"] += 1
                else:
                    os.truncate(path, self.random.choice([0, 20, 100, 2000]))
                    seen["files cut short"] += 1
            code = job.end()
            expect(code == 0, f"{kind}: exit {code}: {job.output}")
            seen["runs that ended well"] += 1
            seen["files reported"] += job.output.count("skipping ")

    def changing_store(self, seen: Counter[str]) -> None:
        """A data file that is cut short or written to during a run is an error; replacing the file does no harm."""
        store = self.work / "changing"
        self.run(*self.pack(store))
        data = next(store.glob("*.int16"))
        content = data.read_bytes()
        for change in ("cut short", "written to", "replaced"):
            out = self.work / f"changing_{change.replace(' ', '_')}"
            job = Job(["pretrain", store, *self.train(out, 60)[2:]], self.log)
            job.wait_for((out / "checkpoint.pt").exists)
            if change == "cut short":
                os.truncate(data, len(content) // 3)
            elif change == "written to":
                with open(data, "r+b") as file:
                    file.write(bytes(1000))
            else:
                data.with_name("new").write_bytes(bytes(len(content)))
                os.replace(data.with_name("new"), data)
            seen[f"stores {change}"] += 1
            if change == "replaced":
                expect(job.end() == 0, job.output)
            else:
                self.fails(rf"{data.name}: {change} since the store was opened", job)
                load_checkpoint(out / "checkpoint.pt")
            data.write_bytes(content)

    # killed processes

    def killed_workers(self, seen: Counter[str]) -> None:
        """A killed decoder is a clear error; the rerun gives the result of an undisturbed run."""
        plain = self.work / "plain_workers"
        self.run(*self.train(plain, 40))
        self.run(*self.pack(self.work / "store_workers"))
        self.run(*self.embed(self.work / "workers.npz"))
        for turn in range(4):
            out = self.work / f"workers{turn}"
            for command in (self.pack(out), self.train(out / "run", 40), self.embed(out / "e.npz")):
                out.mkdir(exist_ok=True)
                command = [*command, "--workers", 2]
                job = Job(command, self.log)
                victim = job.wait_for(job.workers)[0]
                time.sleep(self.random.uniform(0, 0.3))
                try:
                    os.kill(victim, signal.SIGKILL)
                except ProcessLookupError:
                    seen["too late"] += 1
                code = job.end()
                if code:
                    expect(code == ERROR, f"exit {code}: {job.output}")
                    expect("a process that reads audio was killed" in job.output, job.output)
                    seen["workers killed, and reported"] += 1
                else:
                    seen["workers killed after their work"] += 1
                self.run(*command)
            self.same_run(out / "run", plain, load_checkpoint(plain / "checkpoint.pt"))
            self.same_table(out / "e.npz", self.work / "workers.npz")
            SegmentStore(out).verify()

    def killed_rank(self, seen: Counter[str]) -> None:
        """One of two torchrun processes is killed: torchrun ends with an error, and the same command resumes."""
        plain, out = self.work / "plain_ranks", self.work / "ranks"

        def torchrun(folder: Path) -> subprocess.Popen[str]:
            command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
            command += ["-m", "byola_fast", *map(str, self.train(folder, 40, "--workers", 0))]
            environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
            return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)

        whole = torchrun(plain)
        expect(whole.wait() == 0, whole.stderr.read() if whole.stderr else "")
        for turn in range(3):
            process = torchrun(out)
            deadline = time.monotonic() + 120
            before = (out / "checkpoint.pt").stat().st_mtime if turn else 0
            while not (out / "checkpoint.pt").exists() or (out / "checkpoint.pt").stat().st_mtime == before:
                expect(time.monotonic() < deadline, "no checkpoint in 120 s")
                time.sleep(0.02)
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            ranks = [pid for pid in children if b"pretrain" in Path(f"/proc/{pid}/cmdline").read_bytes()]
            os.kill(int(ranks[turn % 2]), signal.SIGKILL)
            _, message = process.communicate(timeout=120)
            expect(process.returncode != 0, message)
            seen["ranks killed"] += 1
            seen["reported by the other rank"] += "lost another rank" in message
            seen["reported by torchrun"] += "SIGKILL" in message or "Signal 9" in message
        process = torchrun(out)
        expect(process.wait() == 0, process.stderr.read() if process.stderr else "")
        self.same_run(out, plain, load_checkpoint(plain / "checkpoint.pt"))
        seen["runs compared"] += 1

    def first_imports(self, seen: Counter[str]) -> None:
        """Ten processes use the kernels for the first time at once, with an empty cache, and compile once in all."""
        code = (
            "import torch, byola_fast\nassert byola_fast.augment(torch.randn(2, 8, 12))[0].isfinite().all()\n"
            "print(byola_fast.doctor().backends['CPU', 'resize_crop'])"
        )
        environment = os.environ | {"BYOLA_FAST_CACHE": str(self.work / "cache"), "PYTHONPATH": str(ROOT)}
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        together = [subprocess.Popen([sys.executable, "-c", code], env=environment, **pipes) for _ in range(10)]
        answers = [process.communicate() for process in together]
        expect([out.strip() for out, _ in answers] == ["cpp"] * 10, str(answers))
        seen["processes"] = len(together)
        seen["compilations"] = sum(message.count("compiling the C++ kernels") for _, message in answers)
        expect(seen["compilations"] == 1, str(answers))


SCENARIOS = (
    *("kill_pack", "kill_pretrain", "kill_embed", "full_disk", "vanishing_files", "changing_store"),
    *("killed_workers", "killed_rank", "first_imports"),
)


def main() -> int:
    parser = argparse.ArgumentParser(description="Break running jobs and check that nothing is lost.")
    parser.add_argument("--only", nargs="+", choices=SCENARIOS, default=SCENARIOS)
    parser.add_argument("--kills", type=int, default=50, help="minimum number of kills of each command")
    options = parser.parse_args()
    torch.set_num_threads(1)
    failed = 0
    for name in options.only:
        work, seen, started = Path(tempfile.mkdtemp(prefix="faults-")), Counter[str](), time.monotonic()
        try:
            getattr(Scenarios(work, options.kills), name)(seen)
            verdict = "nothing lost"
        except AssertionError as error:
            verdict, failed = f"FAILED: {error}", failed + 1
        shutil.rmtree(work, ignore_errors=True)
        message = ", ".join(f"{count} {what}" for what, count in seen.items())
        print(f"{name}: {message}: {verdict} ({time.monotonic() - started:.0f} s)", flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
