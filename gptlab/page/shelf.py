"""The runs and experiments below a folder, each by a key that a request can name. Reads only.

A key is a hash of a name that was found by looking through the folder, and is only ever looked up among those: nothing
that a request says becomes a path.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from pathlib import Path

from gptlab.analysis.listing import Listed, find_runs, listed
from gptlab.analysis.load import EXPERIMENT
from gptlab.files import LOCK, is_locked
from gptlab.page.line import Cache

SHARE = 0.2
"""Of one core's time: what looking at runs, or drawing one of them anew and anew, may take."""

MOST = 10_000
"""Runs whose rows in the list are kept."""


@dataclass(frozen=True)
class Shelved:
    """runs, experiments: by key; names: of experiments by key; marks: by key of a run, another when it has changed."""

    runs: Mapping[str, Listed]
    experiments: Mapping[str, Path]
    names: Mapping[str, str]
    marks: Mapping[str, Hashable]


class Shelf:
    """What lies below `root`, looked through at most once a second. Used by one thread."""

    def __init__(self, root: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self.root, self._clock = root, clock
        self._whole, self._rows = Cache(1, SHARE, clock), Cache(MOST, SHARE, clock)

    def look(self) -> Shelved:
        """What is there; raises OSError where the folder cannot be read."""
        return self._whole.get("", int(self._clock()), self._look)[0]

    def _look(self) -> Shelved:
        runs, marks, experiments = {}, {}, {}
        for path in find_runs(self.root):
            mark, key = mark_of(path), key_of(self._name(path))
            runs[key], marks[key] = self._rows.get(path, mark, lambda path=path: listed(self.root, path))
            for folder in path.parents:
                if not folder.is_relative_to(self.root):
                    break
                if (folder / EXPERIMENT).is_file():
                    experiments[folder] = self._name(folder)
        named = {key_of(name): (folder, name) for folder, name in experiments.items()}
        folders = {key: folder for key, (folder, _) in named.items()}
        return Shelved(runs, folders, {key: name for key, (_, name) in named.items()}, marks)

    def _name(self, path: Path) -> str:
        return path.relative_to(self.root).as_posix() if path != self.root else path.name


def key_of(name: str) -> str:
    """Sixteen hexadecimal digits for a name, whatever it is made of."""
    return hashlib.sha256(os.fsencode(name)).hexdigest()[:16]


def mark_of(run: Path) -> Hashable:
    """Another one whenever the run's files have changed, or it began or ended."""
    return (
        *(stamp(run / name) for name in ("config.json", "environment.json", "metrics.jsonl")),
        is_locked(run / LOCK),
    )


def stamp(path: Path) -> tuple[int, int] | None:
    """A file's size and time of change, None where there is none."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_size, found.st_mtime_ns
