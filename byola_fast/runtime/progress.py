"""Progress bars on stderr."""

from __future__ import annotations

import sys
import time

from byola_fast.runtime.console import say

LINE_SEC = 5.0  # between two lines without a terminal


class Progress:
    """A progress bar on a terminal, otherwise a line every 5 seconds: count, message, remaining time.

    Args:
        what: unit of the count: "steps", "files".
        total: final count; None if only ``show`` gives it.
        begun: count at the start, of a resumed run.
    """

    def __init__(self, what: str, total: int | None = None, begun: int = 0) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        console = Console(stderr=True)
        columns = (what, BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[message]}"), TimeRemainingColumn())
        self.bar = Progress(*columns, console=console) if console.is_terminal else None
        self.task = self.bar.add_task("", total=total, completed=begun, message="") if self.bar is not None else None
        self.what, self.total = what, total or 0
        self.first: tuple[int, float] | None = None  # count and time of the first ``show``
        self.shown_at = time.monotonic()

    def __enter__(self) -> Progress:
        if self.bar is not None:
            self.bar.start()
        return self

    def __exit__(self, *_exception: object) -> None:
        if self.bar is not None:
            self.bar.stop()

    def show(self, done: int, message: str = "", total: int | None = None) -> None:
        """Show the count and a message."""
        self.total = self.total if total is None else total
        now = time.monotonic()
        self.first = self.first or (done, now)  # compilation and warm-up come before it
        if self.bar is not None and self.task is not None:
            self.bar.update(self.task, completed=done, total=self.total, message=message)
        elif now - self.shown_at >= LINE_SEC or done == self.total:
            begun, since = self.first
            left = (now - since) / (done - begun) * (self.total - done) if done > begun else None
            parts = [f"{self.what} {done}/{self.total}", message, f"{left:.0f} s left" if left is not None else ""]
            say("  ".join(part for part in parts if part), sys.stderr)
            self.shown_at = now
