"""Progress of long work, on stderr."""

from __future__ import annotations

import sys
import time

LINE_SEC = 5.0  # between two lines where there is no terminal


class Progress:
    """A bar with what is done, a remark and the remaining time on a terminal, elsewhere a line every few seconds.

    Args:
        what: is counted, in one word: "steps", "files".
        total: how many there are; None where only ``show`` will tell.
        begun: how many were done before, at no time of this bar's.
    """

    def __init__(self, what: str, total: int | None = None, begun: int = 0) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        console = Console(stderr=True)
        columns = (what, BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[message]}"), TimeRemainingColumn())
        self.bar = Progress(*columns, console=console) if console.is_terminal else None
        self.task = self.bar.add_task("", total=total, completed=begun, message="") if self.bar is not None else None
        self.what, self.total = what, total or 0
        self.first: tuple[int, float] | None = None  # what was done, and when, as ``show`` was first called
        self.shown_at = time.monotonic()

    def __enter__(self) -> Progress:
        if self.bar is not None:
            self.bar.start()
        return self

    def __exit__(self, *_exception: object) -> None:
        if self.bar is not None:
            self.bar.stop()

    def show(self, done: int, message: str = "", total: int | None = None) -> None:
        """Show how many are done, and a remark."""
        self.total = self.total if total is None else total
        now = time.monotonic()
        self.first = self.first or (done, now)  # before it lie compilation and warming up, which do not come again
        if self.bar is not None and self.task is not None:
            self.bar.update(self.task, completed=done, total=self.total, message=message)
        elif now - self.shown_at >= LINE_SEC or done == self.total:
            begun, since = self.first
            left = (now - since) / (done - begun) * (self.total - done) if done > begun else None
            parts = [f"{self.what} {done}/{self.total}", message, f"{left:.0f} s left" if left is not None else ""]
            print("  ".join(part for part in parts if part), file=sys.stderr, flush=True)
            self.shown_at = now
