"""A run killed by its own hand at the k-th thing it does in its folder, then started again: `python killed_inside.py`.

With `--signal SIGTERM` it is asked to stop there instead.

Started by the tests and by benchmarks/faults.py, with the run's options after `--`. Python's audit hook tells of every
file that is opened, made, renamed or removed just before it happens, so that nothing of gptlab is replaced. A kill in
the middle of a write comes from the kernel, at a file-size limit. Every trial is a process of its own, forked from
this one, which has loaded torch already. One JSON object a trial goes to standard output.
"""

from __future__ import annotations

import json
import os
import resource
import signal
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
from gptlab.runs import checkpoint

CHANGES = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "shutil.rmtree"}


def kill_at(k: int, run: Path, told: Path, number: signal.Signals) -> None:
    """Send this process a signal at the k-th (from 0) change in `run`; `told` says which it was."""
    seen = 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal seen
        if event not in CHANGES or not isinstance(arguments[0], str | os.PathLike):
            return
        path = os.fspath(arguments[0])
        if not path.startswith(str(run)) and "/" in path:  # removals go by names inside an open folder
            return
        if seen == k:
            seen += 1  # the next line opens a file too
            told.write_text(f"{event} {Path(path).name}")
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


def trial(run: Path, options: list[str], before: Callable[[], None], told: Path) -> dict[str, Any]:
    """Kill the run inside, look at what it left, start it again."""
    options = [*options, "--out", str(run)]
    died = train_in_child(options, before)
    left = checkpoint.complete(run / "checkpoints")
    damaged = [f"{p.file}: {p.problem}" for folder in left for p in checkpoint.verify(folder)]
    ended = train_in_child(options, lambda: None)
    debris = sorted(p.name for p in run.rglob(".*") if p.name != ".lock")
    where = told.read_text() if told.exists() else ""
    told.unlink(missing_ok=True)
    return {"run": str(run), "died": died, "where": where, "damaged": damaged, "ended": ended, "debris": debris}


def all_trials(argv: list[str]) -> None:
    parser = ArgumentParser()
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--at", type=int, nargs="*", help="which changes; without it, every one", default=None)
    parser.add_argument("--signal", default="SIGKILL")
    parser.add_argument("--sizes", type=int, nargs="*", default=[], help="file-size limits in bytes")
    ours, options = argv[: argv.index("--")], argv[argv.index("--") + 1 :]
    chosen = parser.parse_args(ours)
    told, number = chosen.folder / "told", signal.Signals[chosen.signal]
    for k in range(10_000) if chosen.at is None else chosen.at:
        run = chosen.folder / f"at_{k}"
        result = trial(run, options, partial(kill_at, k, run, told, number), told)
        print(json.dumps({"k": k, **result}), flush=True)
        if not result["where"]:  # the run has no k-th change
            break
    for size in chosen.sizes:
        result = trial(chosen.folder / f"size_{size}", options, partial(kill_at_size, size), told)
        print(json.dumps({"size": size, **result}), flush=True)


if __name__ == "__main__":
    all_trials(sys.argv[1:])
