"""The process around one run of any command: whatever the command starts ends with it, however that ends.

Children that fork away from their parent come to this process, since it is their subreaper, and are found by asking
the kernel whose children live. It ends them when the command has ended, has used up its time or its disk, or when the
process that started this one asks or is gone. What the command prints is kept within bounds: its beginning and its end.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import resource
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from gptlab.files import GB, KB, MB, write_json, write_whole
from gptlab.processes import PR_SET_PDEATHSIG

PR_SET_CHILD_SUBREAPER = 36
HEAD, TAIL = 64 * KB, 4 * MB
"""What is kept of the output."""
LOOK_EVERY, MEASURE_EVERY = 0.1, 1.0
"""Seconds between two looks at the command, and at the disk."""
PATIENCE = 10.0
"""Seconds in which processes that were killed have to be gone."""


def main(words: list[str]) -> int:
    """Run as JSON says: argv, cwd, environment, output, result (files), time_limit (s), disk (bytes), parent (pid)."""
    asked = json.loads(words[0])
    stop: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda number, frame: stop.append(number))
    if sys.platform == "linux":
        library = ctypes.CDLL(None)
        library.prctl(PR_SET_CHILD_SUBREAPER, 1)
        library.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    work, started = Path(asked["cwd"]), time.monotonic()
    room = min(asked["disk"], shutil.disk_usage(work).free // 2)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))  # for the command, which inherits it
    os.environ.pop("PYTHONSAFEPATH", None)  # that is for our own processes; a trainer imports what lies next to it
    command = subprocess.Popen(
        asked["argv"], cwd=work, env={**os.environ, **asked["environment"]}, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert command.stdout
    os.set_blocking(command.stdout.fileno(), False)
    output, ended, measured = bytearray(), "", started
    while command.poll() is None and not ended:
        _read(command.stdout.fileno(), output, LOOK_EVERY)
        now = time.monotonic()
        if stop or os.getppid() != asked["parent"]:
            ended = "stopped"
        elif now - started > asked["time_limit"]:
            ended = f"took longer than its time limit of {asked['time_limit']:g} s"
        elif now - measured > MEASURE_EVERY:
            measured = now
            ended = f"wrote more than {room / GB:.3g} GB, its share of the disk" if _used(work) > room else ""
    seconds = time.monotonic() - started
    _end_descendants(command)
    while _read(command.stdout.fileno(), output, 0.0):
        pass
    if command.returncode == -signal.SIGXFSZ:
        ended = f"wrote a file of more than {room / GB:.3g} GB, its share of the disk"
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * (1 if sys.platform == "darwin" else KB)
    write_whole(asked["output"], bytes(output))
    write_json(asked["result"], {"code": command.returncode, "ended": ended, "seconds": seconds, "peak_bytes": peak})
    return 0


def _read(descriptor: int, output: bytearray, wait: float) -> bool:
    """Add what the command has printed; whether there was any. The middle of a long output is dropped."""
    if not select.select([descriptor], [], [], wait)[0]:
        return False
    with contextlib.suppress(BlockingIOError):
        if not (read := os.read(descriptor, MB)):
            time.sleep(wait)  # it has closed its output and works on
            return False
        output += read
    if len(output) > HEAD + 2 * TAIL:
        output[HEAD:-TAIL] = b"\n[...]\n"
    return True


def _used(folder: Path) -> int:
    """Bytes of disk below a folder; links are not followed."""
    total = 0
    for root, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                total += os.lstat(os.path.join(root, name)).st_blocks * 512
    return total


def _end_descendants(command: subprocess.Popen[bytes]) -> None:
    """Kill all that live, and what they start meanwhile, until none does."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(command.pid, signal.SIGKILL)
        living = descendants(os.getpid())
        for process in living:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(process, signal.SIGKILL)
        command.poll()
        with contextlib.suppress(ChildProcessError):
            while command.returncode is not None and os.waitpid(-1, os.WNOHANG)[0]:
                pass
        if command.returncode is not None and not living:
            return
        time.sleep(0.01)


def descendants(of: int) -> list[int]:
    """The processes that descend from one, as the kernel lists them now; none where it has no /proc."""
    parents: dict[int, int] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, ValueError, IndexError):
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
    found, level = [], {of}
    while level := {process for process, parent in parents.items() if parent in level}:
        found += level
    return found
