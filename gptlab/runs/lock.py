"""Whether somebody writes a run now, asked without becoming its writer (which folder.py's `lock` is for)."""

from __future__ import annotations

import fcntl
from pathlib import Path

LOCK = ".lock"


def held(run: Path) -> bool:
    """Whether a process holds the run's lock."""
    path = run / LOCK
    if not path.is_file():
        return False
    with path.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False
