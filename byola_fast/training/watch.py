"""Log, warn, and decide when to save and stop."""

from __future__ import annotations

import logging
import math
import os
import signal
import threading
import time
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from types import FrameType
from typing import Any

from torch import Tensor

from byola_fast.objectives.collapse import effective_rank, spread
from byola_fast.runtime.distributed import World
from byola_fast.runtime.progress import Progress
from byola_fast.training.config import PretrainConfig
from byola_fast.training.run_folder import RunFolder

logger = logging.getLogger("byola_fast")

COLLAPSED = 0.1  # spread of the projections; 1 is healthy
COLLAPSED_RANK = 2.0  # their effective rank; of projections on a line it is 1, and their spread 0.8
COLLAPSED_LINES = 5  # in a row, before the warning
STOPPING = "\nbyola-fast: stopping after this step, then saving; Ctrl-C again goes back to the last checkpoint\n"


class Watch:
    """Log, show, warn, and decide when to save and stop.

    All processes decide alike: they exchange signals on the CPU, where a dead process is noticed at once.

    Args:
        config: resolved settings.
        world: the processes of the run.
        run: folder that rank 0 writes to.
        step: steps done so far.
        total: steps of the whole run.
        probe_every: steps between two scores of the probe; None for no probe.

    Attributes, set by ``after_step``:
        saving: a checkpoint is due.
        ending: it is the last one.
        stopped_by: number of the signal that ends the run now, 0 for none.
    """

    def __init__(
        self, config: PretrainConfig, world: World, run: RunFolder, step: int, total: int, probe_every: int | None
    ) -> None:
        self.config, self.world, self.run, self.total = config, world, run, total
        self.begun = self.last = step
        self.saving = self.ending = False
        self.stopped_by = 0
        self._collapse = CollapseWatch()
        self._save_every = [n for n in (config.save_every, config.keep_every) if n]
        self._probe_every = [probe_every] if probe_every else []

    def __enter__(self) -> Watch:
        self._progress = None
        with ExitStack() as stack:
            self._stop = stack.enter_context(StopSignal(STOPPING if self.world.first else ""))
            if self.world.first:
                self.run.begin(self.begun, self.config)
                self._progress = stack.enter_context(Progress("steps", self.total, self.begun))
            self._stack = stack.pop_all()
        self._logged = time.perf_counter()
        return self

    def __exit__(self, *exception: Any) -> bool | None:
        return self._stack.__exit__(*exception)

    def due(self, step: int) -> bool:
        """Return whether ``after_step`` must be called; waits for no GPU and no process."""
        every = (self.config.log_every or 1, *self._save_every, *self._probe_every)
        return step == self.total or any(step % n == 0 for n in every) or (self.world.size == 1 and bool(self._stop))

    def after_step(
        self,
        step: int,
        epoch: int,
        loss: Tensor,
        projection: Tensor,
        *,
        lr: float,
        refused: Tensor,
        probe: float | None = None,
    ) -> None:
        """Log a step and decide what is due.

        Args:
            step: steps done. epoch: of the last step.
            loss: 0-d, of this process.
            projection: ``(b, proj_size)``, of this process.
            lr: learning rate of the step.
            refused: 0-d, number of samples kept out of the bank so far.
            probe: score of the probe at this step.

        Raises:
            ValueError: the mean loss over processes is not finite.
        """
        self.stopped_by, late = self.world.all_max(self._stop.number, self._is_late())
        self.ending = bool(self.stopped_by) or step == self.total
        self.saving = self.ending or bool(late) or any(step % n == 0 for n in self._save_every)

        values = self.world.mean(loss.item(), spread(projection).item(), effective_rank(projection).item())
        now = time.perf_counter()
        if not math.isfinite(values[0]):
            message = (
                f"lr: the loss became {values[0]} at step {step}; lower the learning rate; {self.run.resume_hint()}"
            )
            raise ValueError(message)
        line: dict[str, Any] = {"step": step, "epoch": epoch}
        line |= dict(zip(("loss", "spread", "effective_rank"), values, strict=True))
        line |= {} if probe is None else {"probe": probe}
        line["samples_per_s"] = round((step - self.last) * self.config.batch_size / (now - self._logged), 1)
        line |= {"refused": int(refused), "lr": lr}
        self.last, self._logged = step, now
        if self._progress is not None:
            self.run.log(line)
            message = f"loss {line['loss']:.3f}  spread {line['spread']:.2f}  {line['samples_per_s']:.0f} samples/s"
            message += "" if probe is None else f"  probe {probe:.1%}"
            self._progress.show(step, message)
            if warning := self._collapse(line, largest_rank=min(projection.shape)):
                logger.warning("%s", warning)

    def _is_late(self) -> bool:
        return self.world.first and self.run.minutes_since_save >= self.config.save_minutes


class CollapseWatch:
    """Warn of collapsed representations: projections whose spread stays near 0, or their effective rank near 1."""

    def __init__(self) -> None:
        self.low = 0
        self.warned = False

    def __call__(self, line: Mapping[str, Any], largest_rank: int) -> str | None:
        """Return a warning after several collapsed lines, once until both recover.

        Args:
            line: of the log.
            largest_rank: the rank that the projections can have; few samples have a low one anyway.
        """
        narrow = line["effective_rank"] < min(COLLAPSED_RANK, largest_rank / 4)
        self.low = self.low + 1 if line["spread"] < COLLAPSED or narrow else 0
        if not self.low:
            self.warned = False
        if self.low < COLLAPSED_LINES or self.warned:
            return None
        self.warned = True
        measures = f"spread {line['spread']:.3f} (1 is healthy, 0 is one vector for all sounds)"
        measures += f", effective rank {line['effective_rank']:.2f} (1 is one line for all sounds)"
        return f"step {line['step']}: representations collapse: {measures}; try a lower lr or a larger batch_size"


class StopSignal:
    """Record Ctrl-C and SIGTERM, so that the run ends after the current step with everything saved.

    A second Ctrl-C, at least a second after the first, interrupts at once.

    Args:
        message: printed on stderr at the first signal.

    Attributes:
        number: of the signal received, 0 for none.
    """

    def __init__(self, message: str = "") -> None:
        self.number, self.message = 0, message
        self._received = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignal:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def __bool__(self) -> bool:
        return self.number != 0

    def _note(self, number: int, _frame: FrameType | None) -> None:
        now = time.monotonic()
        if number == signal.SIGINT and self.number and now - self._received > 1:
            raise KeyboardInterrupt
        if not self.number and self.message:
            with suppress(OSError):
                os.write(2, self.message.encode())  # not print, which the signal may have interrupted
        self.number = self.number or number
        self._received = now
