"""The folder of a run: checkpoint, encoder, log and lock, each written whole."""

from __future__ import annotations

import errno
import json
import logging
import math
import os
import shutil
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from byola_fast.networks.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from byola_fast.networks.encoder_file import save_encoder
from byola_fast.networks.model_card import CARD, is_ours, write_card
from byola_fast.runtime.distributed import World
from byola_fast.runtime.figures import read_picture
from byola_fast.runtime.files import as_text, has_name, open_locked, printable, some_of, write_whole
from byola_fast.runtime.state import require_state
from byola_fast.training.config import PretrainConfig, differing_settings

logger = logging.getLogger("byola_fast")

CHECKPOINT, ENCODER, CONFIG = "checkpoint.pt", "encoder.pth", "config.yaml"
HPARAMS = "settings"  # folder in tensorboard/
LOG, LOCK, BOARD, DEMO_AUDIO = "log.jsonl", ".lock", "tensorboard", "demo_audio"
BEST = "encoder-best.pth"  # by the probe
NEW_ENCODER = ".encoder.pth"  # of a save that is not whole yet
RESULTS = ("loss", "spread", "effective_rank", "probe")  # of a line, that tell runs apart
CURVES_SEC = 60.0  # at least, between two drawings of the curves
COMPUTED = ("lr", "fused", "foreach", "capturable")  # options of Adam that change how it computes, not what


class RunFolder:
    """Checkpoint and log of a run, written by one process.

    Args:
        path: the folder; ``open`` makes it.

    Attributes:
        saved_step: step of the checkpoint on disk; None if there is none.
        last_line: of the log; None if it is empty.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.saved_step: int | None = None
        self._saved_at = self._drawn_at = time.monotonic()
        self.last_line: dict[str, Any] | None = None
        self.provenance: dict[str, Any] = {}  # of this start, for the first line that it logs
        self._unsaid = True
        self._made: list[Path] = []  # files and folders to remove if the run does not begin
        self._lock: Any = None
        self._log: int | None = None
        self._size = 0
        self._unwritten = b""
        self._failed = False
        self._board: Any = None
        self._board_from: int | None = None

    def open(self, config: PretrainConfig) -> dict[str, Any] | None:
        """Make and lock the folder, and return the checkpoint to resume from.

        Raises:
            CheckpointError: the folder cannot be written, or its checkpoint cannot be read. ValueError: the checkpoint
            belongs to a run with other settings, or ``resume`` is set and there is none.
        """
        checkpoint = self.path / CHECKPOINT
        if config.resume and not checkpoint.exists():
            raise CheckpointError(f"{checkpoint}: no such file to resume; leave out resume to start a run")
        own = (self.path, self.path / LOCK, self.path / DEMO_AUDIO)
        made = [path for path in (*reversed(self.path.parents), *own) if not path.exists()]
        try:
            self._lock = open_locked(self.path / LOCK)
        except OSError as error:
            raise CheckpointError(f"{self.path}: cannot be written: {error.strerror or error}") from error
        if self._lock is None:
            raise CheckpointError(f"{self.path}: cannot be written: another run is writing there")
        self._made = made
        if config.restart:
            return None
        if not checkpoint.exists():
            if encoders := self._encoders():
                names = some_of([path.name for path in encoders])
                raise CheckpointError(
                    f"{self.path}: holds {names} of a run without its {CHECKPOINT}; give another out, or "
                    "restart to replace them"
                )
            return None
        try:
            saved = load_checkpoint(checkpoint)
        except CheckpointError as error:
            raise CheckpointError(f"{error}; give another out, or restart to replace it") from error
        if not {"model", "optimizer", "augment", "rng", "config", "step"} <= saved.keys():
            raise CheckpointError(f"{checkpoint}: no state to resume from; give another out, or restart to replace it")
        if not isinstance(saved["config"], Mapping) or type(saved["step"]) is not int:
            raise CheckpointError(f"{checkpoint}: damaged; give another out, or restart to replace it")
        if differing := differing_settings(saved["config"], config):
            raise ValueError(
                f"{checkpoint}: a run with other settings ({'; '.join(differing)}); give another out, the settings of "
                "that run to continue it, or restart to replace it"
            )
        self.saved_step = saved["step"]
        return saved

    def begin(self, step: int, config: PretrainConfig) -> None:
        """Truncate the log after a step, open it for appending, and write the settings for ``--config``.

        At step 0, what is left of another run is removed.
        """
        import yaml

        path = self.path / LOG
        self._made = []
        kept = [line for line in self.lines if line["step"] <= step] if step else []
        self.last_line = kept[-1] if kept else None
        content = "".join(json.dumps(line) + "\n" for line in kept).encode()
        try:
            if not step:
                card = self.path / CARD
                for old in (*self._encoders(), self.path / CHECKPOINT, *([card] if is_ours(card) else [])):
                    old.unlink(missing_ok=True)
            for left in self.path.glob("*.png.*.tmp"):  # by a run killed at its last picture
                left.unlink(missing_ok=True)
            write_whole(path, lambda file: file.write(content))
            settings = json.loads(
                json.dumps(asdict(config) | {"resume": False, "restart": False})
            )  # tuples become lists
            comments = "".join(f"# {name}: {printable(str(value))}\n" for name, value in self.provenance.items())
            text = comments + yaml.safe_dump(settings, sort_keys=False)
            write_whole(self.path / CONFIG, as_text(lambda file: file.write(text)))
            self._log = os.open(path, os.O_WRONLY | os.O_APPEND)
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be written: {error.strerror or error}") from error
        self._size = len(content)
        self._board_from = step if config.tensorboard else None

    def log(self, line: dict[str, Any]) -> None:
        """Append a line. If the disk is full, warn once and write the line as soon as there is room.

        The first line after a start also says where the run comes from.
        """
        self.last_line = line
        if self._unsaid and self.provenance:
            line = line | {"run": self.provenance}
        self._unsaid = False
        self._unwritten += json.dumps(line).encode() + b"\n"
        self._write_log()
        if self._board_from is not None:  # a run with nothing to do leaves no event file
            self._open_board(self._board_from)
            self._board_from = None
        if self._board is not None:
            try:
                for name, value in line.items():
                    if name not in ("step", "epoch", "run"):
                        self._board.add_scalar(name, value, line["step"])
            except OSError as error:  # of the thread that writes
                logger.warning("%s: %s; training continues without it", self.path / BOARD, error.strerror or error)
                self._board = None

    @property
    def lines(self) -> list[dict[str, Any]]:
        """The whole lines of the log, including earlier parts of the run; read from its file each time."""
        found = []
        with suppress(FileNotFoundError), open(self.path / LOG, "rb") as file:
            for text in file:
                try:
                    line = json.loads(text)
                    if "collapse" in line:  # the name of the spread in logs of version 0.1
                        line["spread"] = line.pop("collapse")
                    if line["step"] >= 0:
                        found.append(line)
                except (ValueError, TypeError, KeyError, RecursionError):
                    continue  # truncated by a kill, or damaged
        return found

    def _write_log(self) -> None:
        assert self._log is not None
        try:
            written = os.write(self._log, self._unwritten)
            if written < len(self._unwritten):  # leave no partial line
                os.ftruncate(self._log, self._size)
                raise OSError(errno.ENOSPC, "No space left on device")
        except OSError as error:
            if not self._failed:
                logger.warning(
                    "%s: cannot be written: %s; training continues", self.path / LOG, error.strerror or error
                )
            self._failed = True
            return
        self._size += written
        self._unwritten, self._failed = b"", False

    def save(
        self, content: Mapping[str, Any], encoder: nn.Module, *, last: bool, keep: bool = False, **described: Any
    ) -> None:
        """Replace checkpoint and encoder. If that fails, the old ones stay whole and the run continues.

        Args:
            content: of the checkpoint.
            encoder: saved in a file of its own.
            last: whether this is the last checkpoint, so that a failure is an error.
            keep: keep a copy of the encoder, ``encoder-STEP.pth``.
            described: config and stats for ``save_encoder``.

        Raises:
            CheckpointError: the last checkpoint cannot be written, or the folder is not this run's any more.
        """
        self._require_folder()
        new = self.path / NEW_ENCODER
        try:
            save_encoder(new, encoder, **described)
            save_checkpoint(self.path / CHECKPOINT, content)
            self.saved_step = content["step"]
            os.replace(new, self.path / ENCODER)
            if keep:
                save_encoder(self._kept, encoder, **described)
            self._write_card(**described)
        except (CheckpointError, OSError) as error:
            if last:
                raise
            logger.warning("%s; training continues, and the next checkpoint is tried later", error)
        finally:
            new.unlink(missing_ok=True)
        self._saved_at = time.monotonic()

    def complete(self, encoder: nn.Module, *, keep: bool, **described: Any) -> None:
        """Write the encoder of the checkpoint, which a killed run may not have written; arguments as for ``save``."""
        (self.path / NEW_ENCODER).unlink(missing_ok=True)
        save_encoder(self.path / ENCODER, encoder, **described)
        self._write_card(**described)
        if keep:
            save_encoder(self._kept, encoder, **described)

    def _write_card(self, config: Mapping[str, Any], stats: tuple[float, float] | None) -> None:
        results = {name: value for name, value in (self.last_line or {}).items() if name in RESULTS}
        try:
            write_card(self.path, config, stats, f"{self.path}/{ENCODER}", results)
        except OSError as error:
            logger.warning("%s: cannot be written: %s", self.path / CARD, error.strerror or error)

    def keep_best(self, encoder: nn.Module, **described: Any) -> None:
        """Replace ``encoder-best.pth``; if that fails, warn and keep the old one. Arguments as for ``save``."""
        try:
            save_encoder(self.path / BEST, encoder, **described)
        except (CheckpointError, OSError) as error:
            logger.warning("%s; training continues", error)

    @property
    def _kept(self) -> Path:
        return self.path / f"encoder-{self.saved_step}.pth"

    def _encoders(self) -> list[Path]:
        return sorted(path for name in (ENCODER, BEST, "encoder-[0-9]*.pth") for path in self.path.glob(name))

    def _require_folder(self) -> None:
        """Refuse to write to another folder of the same name, which may be another run's."""
        with suppress(OSError):  # which a write will report
            if not has_name(self._lock):
                saved = "nothing was saved yet" if self.saved_step is None else f"it has step {self.saved_step}"
                raise CheckpointError(f"{self.path}: this run's folder was renamed or removed; {saved}")

    def resume_hint(self) -> str:
        """Return a sentence on what is saved and how to resume."""
        checkpoint = self.path / CHECKPOINT
        if self.saved_step is None and not checkpoint.exists():
            return "nothing was saved yet"
        what = "a checkpoint" if self.saved_step is None else f"step {self.saved_step}"  # only rank 0 knows the step
        return f"{what} is safe in {checkpoint}; the same command (or --resume) resumes there"

    def curves_due(self) -> bool:
        """Return whether it is time to draw the curves again."""
        due = time.monotonic() - self._drawn_at >= CURVES_SEC
        if due:
            self._drawn_at = time.monotonic()
        return due

    @property
    def minutes_since_save(self) -> float:
        """Minutes since the last checkpoint, or since the start."""
        return (time.monotonic() - self._saved_at) / 60

    def close(self) -> None:
        """Close the log and unlock the folder. If the run did not begin, leave nothing behind."""
        if self._log is not None:
            os.close(self._log)
            self._log = None
        if self._board is not None:
            with suppress(OSError):  # of a full disk
                self._board.close()
            self._board = None
        with suppress(OSError):  # folders with other files stay
            for path in reversed(self._made):
                if path.name == DEMO_AUDIO:
                    shutil.rmtree(path, ignore_errors=True)
                elif path.name == LOCK:
                    path.unlink()
                else:
                    path.rmdir()
        self._made = []
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def compare(self, config: PretrainConfig, result: Mapping[str, float]) -> None:
        """Give TensorBoard the pictures, and settings with final scores, by which it compares runs."""
        if self._board is None:
            return
        settings = {
            name: value for name, value in asdict(config).items() if isinstance(value, bool | int | float | str)
        }
        step = (self.last_line or {}).get("step", 0)
        try:
            for picture in ("training", "views"):
                if (path := self.path / f"{picture}.png").exists():
                    self._board.add_image(picture, read_picture(path), step, dataformats="HWC")
            shutil.rmtree(self.path / BOARD / HPARAMS, ignore_errors=True)  # of an earlier part of the run
            scores = {f"final/{name}": value for name, value in result.items()}
            self._board.add_hparams(settings, scores, run_name=HPARAMS, global_step=step)
        except Exception as error:  # a comparison is worth no run
            logger.warning("%s: no settings and pictures: %s", self.path / BOARD, error)

    def _open_board(self, step: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            return
        self._board = SummaryWriter(str(self.path / BOARD), purge_step=step + 1)


class RunState(NamedTuple):
    """Everything that a run resumes from: networks, Adam's moments, memory bank, statistics, random state."""

    world: World
    learner: nn.Module
    optimizer: torch.optim.Optimizer
    augment: nn.Module

    def collect(self, more: Mapping[str, Any]) -> dict[str, Any]:
        """Return the state and more plain values. Every rank must call this, because each has its own generators."""
        rng = {"cpu": torch.get_rng_state()}
        if self.world.device.type == "cuda":
            rng["cuda"] = torch.cuda.get_rng_state(self.world.device)
        parts: dict[str, Any] = {"model": self.learner, "optimizer": self.optimizer, "augment": self.augment}
        return {name: part.state_dict() for name, part in parts.items()} | {"rng": self.world.gather(rng)} | dict(more)

    def restore(self, saved: Mapping[str, Any]) -> tuple[int, int]:
        """Restore what ``collect`` returned; return the steps done and the epoch.

        Adam keeps its options of computation (fused, capturable), so that a run of a GPU resumes on a CPU.

        Raises:
            CheckpointError: the state does not fit.
        """
        here = [{name: group[name] for name in COMPUTED if name in group} for group in self.optimizer.param_groups]
        try:
            optimizer = dict(saved["optimizer"])
            groups = zip(optimizer["param_groups"], here, strict=True)
            optimizer["param_groups"] = [dict(group) | options for group, options in groups]
            for part, state in ((self.learner, saved["model"]), (self.augment, saved["augment"])):
                require_state(part, state)
            self.learner.load_state_dict(saved["model"])
            self.optimizer.load_state_dict(optimizer)
            self.augment.load_state_dict(saved["augment"])
        except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{CHECKPOINT}: does not fit this run: {' '.join(str(error).split())}") from error
        for group, options in zip(self.optimizer.param_groups, here, strict=True):
            group["lr"] = options["lr"]  # a CUDA graph holds this very tensor
        if self.world.size != len(saved["rng"]):
            message = "%d processes resume a run of %d: dropout and BatchNorm's batches differ from now on"
            logger.warning(message, self.world.size, len(saved["rng"]))
        if self.world.rank < len(saved["rng"]):
            rng = saved["rng"][self.world.rank]
            torch.set_rng_state(rng["cpu"])
            if self.world.device.type == "cuda" and "cuda" in rng:
                torch.cuda.set_rng_state(rng["cuda"], self.world.device)
        return saved["step"], saved["epoch"]

    def check_finite(self, step: int, message: str) -> None:
        """Refuse to save a state that is not finite: weights, BatchNorm's statistics and Adam's moments.

        Raises:
            ValueError: a value is NaN or infinite.
        """
        running = [x for name, x in self.learner.named_buffers() if name.endswith(("running_mean", "running_var"))]
        states = [x for state in self.optimizer.state.values() for name, x in state.items() if name != "step"]
        moments = [x for x in states if isinstance(x, torch.Tensor) and x.is_floating_point()]
        floats = [x.detach() for x in (*self.learner.parameters(), *running, *moments)]
        norms = torch._foreach_norm(floats, ord=math.inf)
        if not bool(torch.stack([norm.float() for norm in norms]).isfinite().all()):
            raise ValueError(f"lr: the networks are not finite at step {step}; lower the learning rate; {message}")
