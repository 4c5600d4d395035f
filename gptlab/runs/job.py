"""What a node of a cluster runs for a cell: a plain function of strings, which trains the cell in a child of its own.

A job has a licence, a file in the cell's folder that the runner writes and withdraws. A job that finds it gone, or
another's, ends, and saves first if it has begun. So a cell is never trained by two jobs, however many were submitted
by runners that were killed, and a job is stopped in the same way whether it waits or runs, and wherever that is.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

from gptlab.errors import Stopped
from gptlab.parsing import parse_json
from gptlab.runs import child
from gptlab.runs.cells import OUTPUT, Claim

LICENCE = ".job"

PATIENCE = 60.0
"""Seconds that a job waits for the cell's claim: the runner has it while it submits."""

LOOK_EVERY = 1.0
"""Seconds between two looks at the licence."""


def license_job(folder: Path, token: str, **about: str) -> None:
    """Write the licence of the job with this token, in place of any other; about: what finds the job again."""
    building = folder / f"{LICENCE}.{token}"
    building.write_text(json.dumps({"token": token, **about}), encoding="utf-8")
    building.replace(folder / LICENCE)


def licensed(folder: Path) -> Mapping[str, Any]:
    """The licence that a cell's folder holds; empty where there is none."""
    try:
        found = parse_json((folder / LICENCE).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def withdraw(folder: Path, token: str | None = None) -> None:
    """Take a job's licence away, only that of this token if one is given."""
    if token is None or licensed(folder).get("token") == token:
        (folder / LICENCE).unlink(missing_ok=True)


def train_cell(code: str, folder: str, token: str, with_launcher: str, *words: str) -> int:
    """Run `gptlab WORDS` with the package in folder `code`; the exit code, Stopped's where the job is not needed.

    with_launcher: "yes" ends this process when the one that started it ends. SIGTERM, and the signal by which a cluster
    announces that time is up, ask the training to save and to end, once.
    """
    if with_launcher == "yes":
        child.end_with(os.getppid())
    asked = _Asked(Path(folder), token)
    claim = _claim(Path(folder), asked)
    if claim is None:
        print("this job is not needed any more, or another process has the cell")
        return Stopped.exit_code
    with blocked(_announcement()):  # some clusters signal the whole tree: it means this process
        process = child.start(Path(code), words, Path(folder) / OUTPUT, keep_open=[claim.descriptor])
    told = False
    while process.poll() is None:
        time.sleep(0.1)
        if not told and asked():
            process.terminate()
            told = True
    return process.returncode


class _Asked:
    """Called, it says whether the job is to end: a signal came, or its licence is gone."""

    def __init__(self, folder: Path, token: str) -> None:
        self._folder, self._token = folder, token
        self._asked, self._looked = False, 0.0
        for number in (signal.SIGTERM, _announcement()):
            signal.signal(number, self._hear)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        self._asked = True

    def __call__(self) -> bool:
        now = time.monotonic()
        if not self._asked and now - self._looked >= LOOK_EVERY:
            self._looked = now
            self._asked = licensed(self._folder).get("token") != self._token
        return self._asked


def _claim(folder: Path, asked: _Asked) -> Claim | None:
    """The cell's claim, or None where the job is to end or another process keeps it."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline and not asked():
        if claim := Claim.in_folder(folder):
            return claim
        time.sleep(0.1)
    return None


def _announcement() -> signal.Signals:
    """The signal by which submitit has a cluster announce the end of a job's time: USR2, unless the user chose."""
    from submitit import JobEnvironment

    return signal.Signals[f"SIG{JobEnvironment.USR_SIG}"]


@contextlib.contextmanager
def blocked(number: signal.Signals) -> Iterator[None]:
    """Block a signal for a while; processes started meanwhile never hear it."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {number})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
