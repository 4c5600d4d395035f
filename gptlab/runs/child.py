"""The process that trains a cell: `gptlab train` from a given copy of the code, which ends when its runner is gone."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

PR_SET_PDEATHSIG = 1

_START = (
    "import sys; sys.path.insert(0, sys.argv[1]); "
    "from gptlab.runs.child import end_with; end_with(int(sys.argv[2])); "
    "from gptlab.cli.main import main; sys.exit(main(sys.argv[3:]))"
)


def start(code: Path, words: Sequence[str], output: Path, keep_open: Sequence[int] = ()) -> subprocess.Popen[bytes]:
    """Start `gptlab WORDS` with the package in folder `code`, what it prints going to a file that begins anew.

    In a session of its own: a Ctrl-C reaches the runner alone, which asks its children to stop, once.
    """
    with output.open("wb") as file:
        return subprocess.Popen(
            [sys.executable, "-c", _START, str(code), str(os.getpid()), *words],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            pass_fds=keep_open,
        )


def end_with(parent: int) -> None:
    """Make this process end when its parent ends, however that ends. A killed cell goes on exactly where it was.

    On Linux the kernel sends SIGKILL at once; elsewhere a thread looks every second.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os._exit(1)

    if sys.platform != "linux":
        threading.Thread(target=watch, daemon=True, name="runner-watch").start()


def how_it_ended(code: int) -> str:
    """The exit code of a process that said nothing itself, in words."""
    if code >= 0:
        return f"ended with exit code {code}"
    name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
    return f"ended by {name}" + ("; was memory short?" if code == -signal.SIGKILL else "")
