"""A run killed by its own hand at the k-th thing it does in its folder, then started again: `python killed_inside.py`.

With `--signal SIGTERM` it is asked to stop there instead. With `--sittings` alone it trains a JSON list of
[processes, options] from standard input one after another, each in so many ranks over gloo that are forked from this
process, and prints their exit codes, a list an entry.

Started by the tests and by benchmarks/faults.py, with the run's options after `--`. Python's audit hook tells of every
file that is opened, made, renamed or removed just before it happens, so that nothing of gptlab is replaced. A kill in
the middle of a write comes from the kernel, at a file-size limit. Every trial is a process of its own, forked from
this one, which has loaded torch already. One JSON object a trial goes to standard output.
"""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import socket
import sys
import time
import traceback
from argparse import ArgumentParser
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib.figure  # noqa: F401 - what a run loads on its way is loaded here, once for all trials
import torch._dynamo  # noqa: F401

import gptlab.analysis.report.run
import gptlab.runs.session
import gptlab.training.loop  # noqa: F401
from gptlab.cli.main import guarded
from gptlab.cli.train import main
from gptlab.distributed import end_with_launcher
from gptlab.runs import checkpoint

CHANGES = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "shutil.rmtree"}


def kill_at(moment: int | str, run: Path, note: Path, number: signal.Signals) -> None:
    """Send this process a signal at a change in `run`, the k-th from 0 or the first of a name; `note` gets its name."""
    seen = sent = 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal seen, sent
        if sent or event not in CHANGES or not isinstance(arguments[0], str | os.PathLike):
            return
        path = os.fspath(arguments[0])
        if not path.startswith(str(run)) and "/" in path:  # removals go by names inside an open folder
            return
        name = re.sub(r"\.[0-9a-f]{16}\.tmp$", ".tmp", f"{event} {Path(path).name}")
        if moment in (seen, name):
            sent = 1  # the next line opens a file too
            note.write_text(name)
            os.kill(os.getpid(), number)
            time.sleep(60 if number == signal.SIGKILL else 0)
        seen += 1

    sys.addaudithook(hook)


def kill_at_size(limit: int) -> None:
    """Let the kernel end this process at the first byte that any file is to have beyond `limit`."""
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def train_in_child(options: list[str], before: Callable[[], None]) -> int:
    """Train in a fork of this process; its exit code, negative for a signal."""
    return ended(start_in_child(options, before))


def ended(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def start_in_child(options: list[str], before: Callable[[], None]) -> int:
    """Start to train in a fork of this process; its id."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        before()
        code = guarded(partial(main, defaults={"signal.name": "confidence"}), options)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def trial(run: Path, options: list[str], before: Callable[[], None], note: Path) -> dict[str, Any]:
    """Kill the run inside, look at what it left, start it again."""
    options = [*options, "--out", str(run)]
    died = train_in_child(options, before)
    left = checkpoint.complete(run / "checkpoints")
    damaged = [f"{p.file}: {p.problem}" for folder in left for p in checkpoint.verify(folder)]
    ended = train_in_child(options, lambda: None)
    debris = sorted(p.name for p in run.rglob(".*") if p.name != ".lock")
    where = note.read_text() if note.exists() else ""
    note.unlink(missing_ok=True)
    return {"run": str(run), "died": died, "where": where, "damaged": damaged, "ended": ended, "debris": debris}


def all_trials(argv: list[str]) -> None:
    parser = ArgumentParser()
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--at", nargs="*", help="which changes, by number or name; without it, every one", default=None)
    parser.add_argument("--signal", default="SIGKILL")
    parser.add_argument("--sizes", type=int, nargs="*", default=[], help="file-size limits in bytes")
    ours, options = argv[: argv.index("--")], argv[argv.index("--") + 1 :]
    chosen = parser.parse_args(ours)
    note, number = chosen.folder / "note", signal.Signals[chosen.signal]
    moments = range(10_000) if chosen.at is None else [int(word) if word.isdigit() else word for word in chosen.at]
    for moment in moments:
        run = chosen.folder / f"at_{moment}".replace(" ", "_")
        result = trial(run, options, partial(kill_at, moment, run, note, number), note)
        print(json.dumps({"k": moment, **result}), flush=True)
        if not result["where"]:  # the run has no k-th change
            break
    for size in chosen.sizes:
        result = trial(chosen.folder / f"size_{size}", options, partial(kill_at_size, size), note)
        print(json.dumps({"size": size, **result}), flush=True)


def become(rank: int, size: int, port: int) -> None:
    """Be that rank, and end with the process that this one was forked from."""
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in names.items()} | {"MASTER_ADDR": "127.0.0.1"}
    end_with_launcher()


def sitting(processes: int, options: list[str]) -> list[int]:
    """Train in so many processes; their exit codes, by rank."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = [start_in_child(options, partial(become, rank, processes, port)) for rank in range(processes)]
    return [ended(rank) for rank in ranks]


if __name__ == "__main__":
    if sys.argv[1:] == ["--sittings"]:
        print(json.dumps([sitting(processes, options) for processes, options in json.load(sys.stdin)]))
    else:
        all_trials(sys.argv[1:])
