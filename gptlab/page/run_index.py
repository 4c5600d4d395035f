"""The runs and experiments below a folder, each by a key that a request can name; and what is kept of them.

A key is a hash of a name that was found by looking through the folder, and is only ever looked up among those: nothing
that a request says becomes a path.
"""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from gptlab.analysis.load import EXPERIMENT
from gptlab.analysis.run import FIGURES, Listed, find_runs, listed
from gptlab.files import LOCK, is_locked
from gptlab.runs.records import CONFIG, ENVIRONMENT, METRICS

T = TypeVar("T")

SHARE = 0.2
"""Of one core's time: what looking at runs, or drawing one of them again and again, may take."""

MOST_ROWS = 10_000
"""Runs whose rows in the list are kept."""

ROW_SECONDS, LIST_SECONDS = 30.0, 2.0
"""CPU seconds that reading one run for the list may take, and seconds that the list waits for runs to be read."""


@dataclass(frozen=True)
class Kept:
    """mark: of what it was made from; seconds: its making took; made_at: on the monotonic clock."""

    value: Any
    mark: Hashable
    seconds: float
    made_at: float


class Cache:
    """The last `size` results, each renewed when what it is made from has changed, but not all the time.

    share: of one core's time that renewing a result may take. A page that is costly to draw is drawn less often, so
    that to watch a run does not slow it down. Threads that ask for the same result wait for it together.
    """

    def __init__(self, size: int, share: float = 1.0, clock: Callable[[], float] = time.monotonic) -> None:
        self._size, self._share, self._clock = size, share, clock
        self._kept: OrderedDict[Hashable, Kept] = OrderedDict()
        self._lock, self._making = threading.Lock(), {}

    def get(self, key: Hashable, mark: Hashable, make: Callable[[], T]) -> tuple[T, Hashable]:
        """The result of `key` and the mark that it was made at."""
        with self._lock:
            if kept := self._current(key, mark):
                return kept.value, kept.mark
            making = self._making.setdefault(key, threading.Lock())
        with making:
            with self._lock:
                if kept := self._current(key, mark):  # another thread has just made it
                    return kept.value, kept.mark
                self._kept.pop(key, None)  # freed before another one is made, which may need the room
                while len(self._kept) >= self._size:
                    self._kept.popitem(last=False)
            begun = self._clock()
            value = make()
            made_at = self._clock()
            with self._lock:
                self._kept[key] = Kept(value, mark, made_at - begun, made_at)
                self._making.pop(key, None)
        return value, mark

    def _current(self, key: Hashable, mark: Hashable) -> Kept | None:
        """What is kept of `key`, if it need not be renewed yet; it is then the newest in use."""
        kept = self._kept.get(key)
        rest = 1 / self._share - 1  # how much longer than its making a result is left alone
        if kept is None or (kept.mark != mark and self._clock() - kept.made_at >= kept.seconds * rest):
            return None
        self._kept.move_to_end(key)
        return kept


@dataclass(frozen=True)
class Indexed:
    """runs, experiments: their folders by key; names: of both by key."""

    runs: Mapping[str, Path]
    experiments: Mapping[str, Path]
    names: Mapping[str, str]


class RunIndex:
    """What lies below `root`, looked through at most once a second."""

    def __init__(self, root: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self.root, self._clock = root, clock
        self._whole, self._rows = Cache(1, SHARE, clock), Cache(MOST_ROWS, SHARE, clock)
        self._readers = ThreadPoolExecutor(2, thread_name_prefix="rows")
        self._reading: dict[Path, Future[Listed]] = {}

    def look(self) -> Indexed:
        """What is there; raises OSError where the folder cannot be read."""
        return self._whole.get("", int(self._clock()), self._look)[0]

    @property
    def pending(self) -> tuple[int, int]:
        """How many runs were still being read when the list was last made, and how many of them are read by now."""
        reading = list(self._reading.values())
        return len(reading), sum(future.done() for future in reading)

    def rows(self, runs: Mapping[str, Path]) -> dict[str, Listed]:
        """{key: its row in the list}; of a run that takes long to read, that it is being read. Used by one thread."""
        for path in runs.values():
            if path not in self._reading:
                self._reading[path] = self._readers.submit(self._row, path)
        wait([self._reading[path] for path in runs.values()], LIST_SECONDS)
        done = {key: path for key, path in runs.items() if self._reading[path].done()}
        rows = {key: self._reading.pop(path).result() for key, path in done.items()}
        return {key: rows[key] if key in rows else self._unread(path) for key, path in runs.items()}

    def _unread(self, path: Path) -> Listed:
        figures = dict.fromkeys(FIGURES) | {"run": self._name(path), "state": "unread"}
        return Listed(path, figures, {}, "it takes long to read; it will stand here once it is read")

    def close(self) -> None:
        self._readers.shutdown(wait=False, cancel_futures=True)

    def _row(self, path: Path) -> Listed:
        return self._rows.get(path, mark_of(path), lambda: listed(self.root, path, time.thread_time() + ROW_SECONDS))[0]

    def _look(self) -> Indexed:
        runs, experiments, names = {}, {}, {}
        for path in find_runs(self.root):
            runs[key_of(name := self._name(path))] = path
            names[key_of(name)] = name
            for folder in path.parents:
                if not folder.is_relative_to(self.root):
                    break
                if folder not in experiments and (folder / EXPERIMENT).is_file():
                    experiments[folder] = self._name(folder)
        keys = {key_of(f"experiment {name}"): (folder, name) for folder, name in experiments.items()}
        names |= {key: name for key, (_, name) in keys.items()}
        return Indexed(runs, {key: folder for key, (folder, _) in keys.items()}, names)

    def _name(self, path: Path) -> str:
        return path.relative_to(self.root).as_posix() if path != self.root else path.name


def key_of(name: str) -> str:
    """Sixteen hexadecimal digits for a name, whatever it is made of."""
    return hashlib.sha256(os.fsencode(name)).hexdigest()[:16]


def mark_of(run: Path) -> Hashable:
    """Another one whenever the run's files have changed, or it began or ended."""
    return (*(stamp(run / name) for name in (CONFIG, ENVIRONMENT, METRICS)), is_locked(run / LOCK))


def stamp(path: Path) -> tuple[int, int] | None:
    """A file's size and time of change, None where there is none."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_size, found.st_mtime_ns
