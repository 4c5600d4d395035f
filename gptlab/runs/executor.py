"""How a cell's process is started and asked about: here as a child of the runner, in cluster.py as a cluster's job."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from gptlab.errors import Stopped
from gptlab.files import open_new
from gptlab.processes import how_it_ended, python_command
from gptlab.runs.cells import OUTPUT, Cell, Claim, revoke
from gptlab.runs.patches import PatchedPackage


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

    def start(self, cell: Cell, claim: Claim, code: PatchedPackage | None, words: Sequence[str]) -> Worker | None:
        """Have `gptlab WORDS` run with that code, or the package in use; None where there is no room after all.

        From then on the claim is the worker's.
        """
        ...

    def again(self, cell: Cell) -> bool:
        """Whether a cell that could continue, and whose worker has ended nevertheless, is to be started again."""
        ...


class Child:
    """A process of this machine that runs `gptlab WORDS` for the cell in a folder, and ends with this process."""

    def __init__(self, folder: Path, claim: Claim, code: PatchedPackage | None, words: Sequence[str]) -> None:
        """In a session of its own: a Ctrl-C reaches the runner alone, which asks its children to stop, once."""
        self._claim = claim
        self._code = code.unpack() if code else None
        command = python_command("gptlab.cli.main:main", *words, code=self._code, ends_with_us=True)
        with open_new(folder / OUTPUT) as output:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                pass_fds=[claim.descriptor],
            )

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
        if self._code:
            shutil.rmtree(self._code, ignore_errors=True)
        return None if self.code in (0, Stopped.exit_code) else how_it_ended(self.code)

    @property
    def code(self) -> int:
        """The exit code of a process that is over."""
        return self._process.returncode


class Children:
    """Starts cells as processes of this machine. One that was killed is not tried again before the next `run`."""

    def find(self, cell: Cell) -> Child | None:
        return None

    def start(self, cell: Cell, claim: Claim, code: PatchedPackage | None, words: Sequence[str]) -> Child:
        revoke(cell.folder)  # a job that still waits for this cell somewhere is not needed any more
        return Child(cell.folder, claim, code, words)

    def again(self, cell: Cell) -> bool:
        return False
