"""Child processes that run Python of ours: what they import, and when they end.

Whatever folder a command is started in may hold a numpy.py that somebody sent along, and Python looks there first. So a
child starts without that folder (-P), and so do its own children; and it finds the package gptlab in the folder that it
is given, whatever else is installed.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time
from pathlib import Path

import gptlab

PR_SET_PDEATHSIG = 1

_START = (
    "import os, sys; os.environ['PYTHONSAFEPATH'] = '1'; "
    "sys.path.insert(0, sys.argv[1]); import gptlab; del sys.path[0]; "  # next to the package may lie anything
    "from gptlab.processes import end_with; parent = int(sys.argv[2]); parent and end_with(parent); "
    "from {module} import {function}; sys.exit({function}(sys.argv[3:]))"
)


def usable_cores() -> int:
    """The processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def package() -> Path:
    """The folder of the package that is running."""
    return Path(gptlab.__file__).resolve().parent


def python_command(entry: str, *words: str, code: Path | None = None, ends_with_us: bool = False) -> list[str]:
    """The command of a process that runs `entry`, MODULE:FUNCTION of ours, on words; the function gives its exit code.

    code: the folder that holds the package gptlab [that of the package which is running]
    ends_with_us: whether it ends when this process does, however that ends
    """
    module, _, function = entry.partition(":")
    parent = os.getpid() if ends_with_us else 0
    start = _START.format(module=module, function=function)
    return [sys.executable, "-P", "-c", start, str(code or package().parent), str(parent), *words]


def environment(*, without: str, **more: str) -> dict[str, str]:
    """This process's environment for a child of another program, without the variables that begin so, and with more."""
    return {**{key: value for key, value in os.environ.items() if not key.startswith(without)}, **more}


def end_with(parent: int, *, watch: bool = True) -> None:
    """Make this process end when its parent ends, so that no orphan writes on; at once where that is gone already.

    On Linux the kernel sends SIGKILL; elsewhere, and in a container whose first process takes orphans over, a thread
    looks every second, unless `watch` is False.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)

    def look() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os._exit(1)

    if watch:
        threading.Thread(target=look, daemon=True, name="parent-watch").start()


def how_it_ended(code: int) -> str:
    """The exit code of a process that said nothing itself, in words."""
    if code >= 0:
        return f"ended with exit code {code}"
    name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
    return f"ended by {name}" + ("; was memory short?" if code == -signal.SIGKILL else "")
