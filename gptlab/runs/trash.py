"""Deleting runs: they are moved into a trash folder beside them, out of `gptlab runs`' sight, and can be moved back."""

from __future__ import annotations

import os
from pathlib import Path

from gptlab.errors import CheckpointError, UsageError
from gptlab.runs.folder import RunFolder

TRASH = ".trash"


def deletable(root: Path, name: str) -> Path:
    """The run in `root` that `name` means: a path below it, or as seen from here.

    Raises UsageError where it lies anywhere else, is a link, is `root` itself, or is no run.
    """
    inside = root.resolve()
    path = root / name if (root / name).exists() else Path(name)
    if not os.path.lexists(path):
        raise UsageError(f"expected a run in {root}, found none named {name}; see `gptlab runs {root}`")
    real = path.resolve()
    if path.is_symlink() or real == inside or inside not in real.parents:
        raise UsageError(f"expected a run inside {root}, found {name}; nothing elsewhere is deleted")
    if TRASH in real.relative_to(inside).parts:
        raise UsageError(f"{name} is in the trash already")
    if not RunFolder(real).exists():
        raise UsageError(f"expected a run at {name}, found no config.json there; see `gptlab runs {root}`")
    return real


def move_to_trash(root: Path, run: Path) -> Path:
    """Move a run into `root`/.trash and give its place; raises CheckpointError where a process is writing it.

    The run's lock is held meanwhile, so that nobody can begin to write it.
    """
    folder = RunFolder(run)
    folder.lock(patience=0.0)
    try:
        trash = root.resolve() / TRASH
        trash.mkdir(exist_ok=True)
        if trash.resolve() != trash:
            raise CheckpointError(f"{trash} is a link to elsewhere; remove the link to delete runs")
        name = "-".join(run.relative_to(root.resolve()).parts)
        target, number = trash / name, 2
        while target.exists():
            target, number = trash / f"{name}-{number}", number + 1
        run.rename(target)
    finally:
        folder.close()
    return target
