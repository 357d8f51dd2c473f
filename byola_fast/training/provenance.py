"""Where a run comes from: versions, commit, command, data and times."""

from __future__ import annotations

import shlex
import subprocess
import sys
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

PACKAGE = Path(__file__).parents[1]
GIT_SEC = 5.0


def provenance(**more: Any) -> dict[str, Any]:
    """Return plain values that say how a run was started: versions, commit of this package, command line, time.

    >>> list(provenance(clips=3))
    ['byola_fast', 'commit', 'torch', 'python', 'command', 'begun', 'clips']
    """
    import byola_fast

    return {
        "byola_fast": byola_fast.__version__,
        "commit": _commit(),
        "torch": str(torch.__version__),
        "python": sys.version.split()[0],
        "command": shlex.join(sys.argv),
        "begun": now(),
    } | more


def now() -> str:
    """Return the time in UTC, to the second."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def _commit() -> str | None:
    """Return the commit of this package's clone, with "-dirty" if its files differ; None if it is installed."""
    with suppress(OSError, subprocess.SubprocessError):
        _git("ls-files", "--error-unmatch", "__init__.py")  # the package may lie in a clone of something else
        return _git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    return None


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(PACKAGE), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=GIT_SEC).stdout.strip()
