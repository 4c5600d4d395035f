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


def held(folder: Path, name: str = LOCK) -> bool:
    """Whether a process holds a folder's lock, a run's or one of another name; asking takes it for a moment, shared."""
    path = folder / name
    if not path.is_file():
        return False
    with path.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False
