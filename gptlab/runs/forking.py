"""Cells forked from one process that has imported PyTorch: the import takes longer than much of what small cells do.

The runner starts a server, which imports what a cell needs, computes nothing, and then forks a process for every cell
that it is asked for. The rest is as in a process of the cell's own: a session, a null input, an output file, the claim,
default signal handlers, the exit code, and an end that comes with the runner's however that ends. Requests and answers
are JSON in one socket, so that a runner never waits for the server: a cell whose process is not there yet is not over.

Only where that is safe: on Linux, and where no GPU is, since its driver does not survive a fork. executor.py decides.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

from gptlab.processes import end_with, python_command

LARGEST = 2**17
"""Bytes of a request: the kernel takes one of this size into an empty socket."""
IMPORTED = (
    "torch", "torch._dynamo", "gptlab.analysis.report", "gptlab.cli.data", "gptlab.cli.main", "gptlab.cli.progress",
    "gptlab.cli.train", "gptlab.interpret.generate", "gptlab.runs.session", "gptlab.runs.trackers",
)  # fmt: skip


class ForkServer:
    """The server, as the runner sees it. Once it is gone, so are its cells."""

    def __init__(self) -> None:
        self._line, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        command = python_command("gptlab.runs.forking:serve", str(os.getpid()))
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
