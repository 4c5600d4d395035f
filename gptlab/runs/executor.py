"""How a cell's process is started and asked about: here as a child of the runner, in cluster.py as a cluster's job."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from gptlab.errors import Stopped
from gptlab.runs import child
from gptlab.runs.cells import OUTPUT, Cell, Claim
from gptlab.runs.job import withdraw


class Worker(Protocol):
    """What trains a cell, wherever that is."""

    def over(self) -> bool:
        """Whether it has ended."""
        ...

    def stop(self) -> None:
        """Ask it to save and to end."""
        ...

    def kill(self) -> None:
        """End it now."""
        ...

    def close(self) -> str | None:
        """Let go of the cell. Gives the end that a worker could not tell itself in words, None where there was none."""
        ...


class Executor(Protocol):
    """Where workers come from."""

    def find(self, cell: Cell) -> Worker | None:
        """The cell's worker that another runner has left behind or shares, if there is one."""
        ...

    def start(self, cell: Cell, claim: Claim, code: Path, words: Sequence[str]) -> Worker | None:
        """Have `gptlab WORDS` run with the package in folder `code`; None where there is no room after all.

        From then on the claim is the worker's.
        """
        ...

    def again(self, cell: Cell) -> bool:
        """Whether a cell that could go on, and whose worker has ended nevertheless, is to be started again."""
        ...


class Child:
    """A process of this machine, which ends with its runner."""

    def __init__(self, process: subprocess.Popen[bytes], claim: Claim) -> None:
        self._process, self._claim = process, claim

    def over(self) -> bool:
        return self._process.poll() is not None

    def stop(self) -> None:
        self._process.terminate()

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()
        self._process.wait()

    def close(self) -> str | None:
        self._claim.release()
        code = self._process.returncode
        return None if code in (0, Stopped.exit_code) else child.how_it_ended(code)


class Children:
    """Starts cells as processes of this machine. One that was killed is not tried again before the next `run`."""

    def find(self, cell: Cell) -> Child | None:
        return None

    def start(self, cell: Cell, claim: Claim, code: Path, words: Sequence[str]) -> Child:
        withdraw(cell.folder)  # a job that still waits for this cell somewhere is not needed any more
        return Child(child.start(code, words, cell.folder / OUTPUT, keep_open=[claim.descriptor]), claim)

    def again(self, cell: Cell) -> bool:
        return False
