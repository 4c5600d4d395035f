"""Child processes: what those of ours import, when they end, how cells are forked, and how any command is supervised.

Whatever folder a command is started in may hold a numpy.py that somebody sent along, and Python looks there first. So a
child starts without that folder (-P), and so do its own children; and it finds the package gptlab in the folder that it
is given, whatever else is installed.

Cells of an experiment are forked from one process that has imported PyTorch: the import takes longer than much of what
small cells do. The runner starts a server, which imports what a cell needs, computes nothing, and then forks a process
for every cell that it is asked for. The rest is as in a process of the cell's own: a session, a null input, an output
file, the claim, default signal handlers, the exit code, and an end that comes with the runner's however that ends.
Requests and answers are JSON in one socket, so that a runner never waits for the server: a cell whose process is not
there yet is not over. Only where that is safe: on Linux, and where no GPU is, since its driver does not survive a fork.
runs/executor.py decides.

`supervise` is the process around one run of any command: whatever the command starts ends with it, however that ends.
Children that fork away from their parent come to this process, since it is their subreaper, and are found by asking
the kernel whose children live. It ends them when the command has ended, has used up its time or its disk, or when the
process that started this one asks or is gone. What the command prints is kept within bounds: its beginning and its end.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import json
import os
import resource
import select
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gptlab
from gptlab.files import GB, KB, MB, write_json, write_whole

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


LARGEST = 2**17
"""Bytes of a request: the kernel takes one of this size into an empty socket."""
IMPORTED = (
    "torch", "torch._dynamo", "gptlab.analysis.report", "gptlab.cli.data", "gptlab.cli.main", "gptlab.cli.progress",
    "gptlab.cli.train", "gptlab.interpret.generate", "gptlab.runs.session",
)  # fmt: skip


class ForkServer:
    """The server, as the runner sees it. Once it is gone, so are its cells."""

    def __init__(self) -> None:
        self._line, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        command = python_command("gptlab.processes:serve", str(os.getpid()))
        with theirs:
            self._process = subprocess.Popen(
                command,
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
        self._cells = 0
        self._codes: dict[int, int | None] = {}
        self._asked: set[int] = set()
        self.alive = True

    def fork(self, words: Sequence[str], output: int, claim: int) -> int:
        """Have `gptlab WORDS` run with these open files; a number that stands for its process."""
        self._cells += 1
        self._codes[self._cells] = None
        self._send({"cell": self._cells, "words": list(words)}, [output, claim])
        return self._cells

    def send_signal(self, cell: int, number: signal.Signals) -> None:
        """Send a signal to a cell's process; nothing where that has ended."""
        self._send({"cell": cell, "signal": int(number)})

    def code(self, cell: int) -> int | None:
        """A cell's exit code, None while it runs; the server's where that is gone, with which its cells end."""
        if self._codes[cell] is None and cell not in self._asked:
            self._asked.add(cell)
            self._send({"cell": cell})
        self._receive()
        if self._codes[cell] is None and not self.alive:
            self._codes[cell] = self._process.wait()
        return self._codes[cell]

    def close(self) -> None:
        """End the server, and with it what is left of its cells."""
        self._line.close()
        self._process.wait()
        self.alive = False

    def _send(self, request: dict[str, Any], files: Sequence[int] = ()) -> None:
        try:
            socket.send_fds(self._line, [json.dumps(request).encode()], files)
        except OSError:
            self.alive = False

    def _receive(self) -> None:
        with contextlib.suppress(ConnectionError):
            while self.alive and select.select([self._line], [], [], 0)[0]:
                answer = self._line.recv(LARGEST)
                if not answer:
                    break
                cell, code = json.loads(answer)
                self._asked.discard(cell)
                self._codes[cell] = code
            else:
                return
        self.alive = False


def serve(words: Sequence[str]) -> int:
    """Be the server of the process named, on the socket that is standard input; in a forked cell, be that cell."""
    end_with(int(words[0]), watch=False)  # a thread would be lost to the cells: the socket's end is watched instead
    for name in IMPORTED:
        importlib.import_module(name)
    line, server = socket.socket(fileno=os.dup(0)), os.getpid()
    processes: dict[int, int] = {}
    while True:
        message, files, _, _ = socket.recv_fds(line, LARGEST, 2)
        if not message:  # the runner is gone, or needs no more
            return 0
        request = json.loads(message)
        cell = request["cell"]
        if "words" in request:
            process = os.fork()
            if not process:
                line.close()
                return _cell(request["words"], server, *files)
            processes[cell] = process
            for file in files:
                os.close(file)
        elif "signal" in request:
            if cell in processes:  # it is not waited for yet, so the number is still its own
                os.kill(processes[cell], request["signal"])
        else:
            done, status = os.waitpid(processes[cell], os.WNOHANG)
            if done:
                del processes[cell]
            line.send(json.dumps([cell, os.waitstatus_to_exitcode(status) if done else None]).encode())


def _cell(words: Sequence[str], server: int, output: int, claim: int) -> int:
    """Be `gptlab WORDS` in a process that was just forked. The claim stays open until it ends."""
    os.setsid()
    end_with(server)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for file, standard in ((nothing, 0), (output, 1), (output, 2)):
        os.dup2(file, standard)
    os.close(nothing)
    os.close(output)
    os.set_inheritable(claim, False)
    sys.argv[1:] = words
    return importlib.import_module("gptlab.cli.main").main(words)


def wait_for(server: ForkServer, cell: int) -> int:
    """A cell's exit code, once it has ended."""
    while (code := server.code(cell)) is None:
        time.sleep(0.02)
    return code


PR_SET_CHILD_SUBREAPER = 36
HEAD, TAIL = 64 * KB, 4 * MB
"""What is kept of the output."""
LOOK_EVERY, MEASURE_EVERY = 0.1, 1.0
"""Seconds between two looks at the command, and at the disk."""
PATIENCE = 10.0
"""Seconds in which processes that were killed have to be gone."""


def supervise(words: list[str]) -> int:
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
