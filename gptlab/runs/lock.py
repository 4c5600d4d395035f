"""The lock on a folder that has one writer: taken, or only asked for.

The kernel lets go of it however its holder ends. It is on the file, not on its path: a folder may be moved away, and
another be made in its place, while somebody waits.
"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from typing import IO

LOCK = ".lock"


def take(path: Path) -> IO[str] | None:
    """The file at a path, made where it is missing, locked for as long as it is open; None while another holds it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.open("a+", encoding="utf-8")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(file.fileno()), path.stat()):
            return file
    except (BlockingIOError, FileNotFoundError):
        pass
    file.close()
    return None


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
