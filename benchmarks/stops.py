"""What becomes of a run that is stopped, or whose display goes, at each moment and under each way of watching it.

    python benchmarks/stops.py [--only WORDS]      keeps every cell when it is made, in place of the one before

Every cell of the table is a real run over the tiny corpus of the fault tests. Moments are not simulated: the run is
made slow by its options where they need it, and the event comes when its files or its process say that it is there.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import os
import pty
import signal
import subprocess
import sys
import tempfile
import termios
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests" / "faults"))

from figures import keep, measured  # noqa: E402
from harness import children, make_corpus, options, row_count, rows, wait_until  # noqa: E402 # pyright: ignore[reportMissingImports]

from gptlab.runs import checkpoint  # noqa: E402
from gptlab.runs.folder import newest  # noqa: E402

MOMENTS = ("start", "first step", "evaluation", "save", "report")
EVENTS = ("Ctrl-C", "SIGTERM", "SIGHUP", "display closed")
VIEWS = ("terminal", "tee", "head", "screen", "no tty", "torchrun")
SLOW = {
    "first step": {"total_batch_tokens": 65_536, "steps": 2},
    "evaluation": {"eval_every": 2, "eval_tokens": 99_000, "steps": 4},
    "save": {"n_embd": 384, "n_layer": 4, "n_head": 4, "checkpoint_every": 2, "eval_every": 0, "steps": 4},
}
"""Options that make a moment last long enough to be met."""

RECORDER = '''
"""Run a command as the shell would, whose end this sees whatever ends the shell: its code goes to a file."""
import os, signal, subprocess, sys
code, pid, *command = sys.argv[1:]
def defaults():
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, signal.SIG_IGN)
process = subprocess.Popen(command, preexec_fn=defaults)
open(pid, "w").write(str(process.pid))
code_now = process.wait()
open(code + ".part", "w").write(str(code_now))
os.replace(code + ".part", code)
'''


@dataclass
class Watched:
    """A run under way: the process that trains, and what the world does to it."""

    process: int
    interrupt: Callable[[], None]
    hang_up: Callable[[], None]
    close_display: Callable[[], None]
    end: Callable[[], int]
    """Waits, and gives the exit code of the command, or of torchrun's workers."""


@contextlib.contextmanager
def watched(view: str, command: list[str], folder: Path) -> Iterator[Watched]:
    """Start a command so that it is watched in this way; no process is left afterwards."""
    code, pid, recorder = folder / "code", folder / "pid", folder / "recorder.py"
    recorder.write_text(RECORDER)
    recorded = [sys.executable, str(recorder), str(code), str(pid), *command]
    quoted = " ".join(f"'{word}'" for word in recorded)
    line = {
        "tee": f"{quoted} 2>&1 | tee '{folder}/seen.txt'",
        "head": f"{quoted} 2>&1 | head -3 > '{folder}/seen.txt'",
    }.get(view, quoted)
    started: list[subprocess.Popen[bytes]] = []
    ends = contextlib.ExitStack()

    def trainer() -> int:
        wait_until(pid.exists, "the command's start")
        wait_until(lambda: pid.read_text(), "the command's process")
        return int(pid.read_text())

    def end() -> int:
        wait_until(code.exists, "the command's end")
        return int(code.read_text())

    try:
        if view == "screen":
            yield _in_screen(line, folder, trainer, end, ends)
        elif view in ("no tty", "torchrun"):
            reading, writing = os.pipe()
            process = subprocess.Popen(
                recorded, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=writing, stderr=writing, start_new_session=True
            )
            os.close(writing)
            started.append(process)
            seen = _drain(reading, folder / "seen.txt")
            yield Watched(
                trainer(), lambda: os.killpg(process.pid, signal.SIGINT), lambda: os.killpg(process.pid, signal.SIGHUP),
                seen, end,
            )  # fmt: skip
        else:
            own = view != "disowned"
            yield _in_terminal(["bash", "-c", line + "; :"] if own else recorded, own, folder, trainer, end, started)
    finally:
        ends.close()
        with contextlib.suppress(FileNotFoundError, ValueError):
            left = int(pid.read_text())
            for process_id in (*children(left), left):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process_id, signal.SIGKILL)
        for process in started:
            process.kill()
            process.wait()


def _drain(descriptor: int, into: Path) -> Callable[[], None]:
    """Read what is shown into a file until the returned function closes the display."""
    closed = threading.Event()
    os.set_blocking(descriptor, False)

    def read() -> None:
        with into.open("wb") as file:
            while not closed.is_set():
                try:
                    piece = os.read(descriptor, 65_536)
                except BlockingIOError:
                    time.sleep(0.02)
                    continue
                except OSError:
                    break
                if not piece:
                    break
                file.write(piece)
                file.flush()
        os.close(descriptor)

    thread = threading.Thread(target=read, daemon=True)
    thread.start()

    def close() -> None:
        closed.set()
        thread.join()

    return close


def _in_terminal(
    command: list[str], own: bool, folder: Path, trainer: Callable[[], int], end: Callable[[], int],
    started: list[subprocess.Popen[bytes]],
) -> Watched:  # fmt: skip
    """A command that is shown in a terminal, which is closed as a window is: whose own it is gets SIGHUP then."""
    master, slave = pty.openpty()

    def become_its_own() -> None:
        os.setsid()
        if own:
            fcntl.ioctl(slave, termios.TIOCSCTTY, 0)
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    stdin = slave if own else subprocess.DEVNULL
    process = subprocess.Popen(
        command, cwd=ROOT, stdin=stdin, stdout=slave, stderr=slave, preexec_fn=become_its_own, pass_fds=[slave]
    )
    os.close(slave)
    started.append(process)
    typing = os.dup(master)
    close = _drain(master, folder / "screen.txt")

    def hang_up() -> None:
        os.close(typing)
        close()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGHUP)  # as an interactive shell does to its jobs; may come twice

    def close_display() -> None:
        readers = [child for child in children(process.pid) if _name(child) in ("tee", "head")]
        for reader in readers:
            os.kill(reader, signal.SIGKILL)
        if not own:
            os.close(typing)
            close()

    return Watched(trainer(), lambda: _type(typing, b"\x03"), hang_up, close_display, end)


def _type(descriptor: int, keys: bytes) -> None:
    os.write(descriptor, keys)


def _name(process: int) -> str:
    try:
        return Path(f"/proc/{process}/comm").read_text().strip()
    except OSError:
        return ""


def _in_screen(
    line: str, folder: Path, trainer: Callable[[], int], end: Callable[[], int], ends: contextlib.ExitStack
) -> Watched:
    sockets = ends.enter_context(tempfile.TemporaryDirectory(prefix="screen"))
    environment = os.environ | {"SCREENDIR": sockets}

    def screen(*words: str) -> None:
        subprocess.run(["screen", *words], env=environment, stdin=subprocess.DEVNULL, check=False, cwd=ROOT)

    screen("-S", "stops", "-dm", "bash", "-c", line)
    ends.callback(screen, "-S", "stops", "-X", "quit")
    return Watched(
        trainer(), lambda: screen("-S", "stops", "-X", "stuff", "\x03"), lambda: screen("-S", "stops", "-X", "quit"),
        lambda: screen("-S", "stops", "-X", "quit"), end,
    )  # fmt: skip


def catches_hang_up(process: int) -> bool:
    """Whether a process has set its own end for SIGHUP, as the trainer does when its options are read."""
    try:
        status = Path(f"/proc/{process}/status").read_text()
    except OSError:
        return False
    caught = next((line.split()[1] for line in status.splitlines() if line.startswith("SigCgt:")), "0")
    return bool(int(caught, 16) >> (signal.SIGHUP - 1) & 1)


def wait_for_moment(moment: str, run: Path, trainers: Callable[[], list[int]]) -> None:
    """Wait until a run is there, or has ended before."""
    saved, ended = run / "checkpoints", run.parent / "code"
    reached = {
        "start": lambda: trainers() and all(map(catches_hang_up, trainers())),
        "first step": lambda: (run / "metrics.jsonl").exists(),
        "evaluation": lambda: row_count(run) >= 2,
        "save": lambda: saved.is_dir() and any(not path.name.startswith("step_") for path in saved.iterdir()),
        "report": lambda: row_count(run) and rows(run)[-1].get("event") == "finished",
    }[moment]
    wait_until(lambda: reached() or ended.exists(), moment)
    if moment in ("first step", "evaluation"):
        time.sleep(0.5)


def cell(moment: str, event: str, view: str, corpus: Path, folder: Path) -> dict[str, object]:
    """What came of one run."""
    run = folder / "run"
    changes = {"sample_every": 0, "dose_every": 0, **SLOW.get(moment, {})}
    words = ["train_gpt2.py", *options(corpus, run, **changes)]
    command = [sys.executable, *words]
    if view == "torchrun":
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *words]
    disowned = (view, event) == ("terminal", "display closed")
    with watched("disowned" if disowned else view, command, folder) as it:

        def trainers() -> list[int]:
            return children(it.process) if view == "torchrun" else [it.process]

        wait_for_moment(moment, run, trainers)
        if event == "SIGTERM":
            os.kill(it.process, signal.SIGTERM)
        else:
            {"Ctrl-C": it.interrupt, "SIGHUP": it.hang_up, "display closed": it.close_display}[event]()
        code = it.end()
    return {"moment": moment, "event": event, "view": view, "code": code, **left(run)}


def left(run: Path) -> dict[str, object]:
    """What a run's folder holds: its newest checkpoint's step, whether that is whole, and whether log.txt is."""
    found: dict[str, object] = {"step": None, "whole": True, "logged": True, "last": None}
    if not (run / "metrics.jsonl").exists():
        return found
    recorded = rows(run)
    logged = (run / "log.txt").read_text().splitlines() if (run / "log.txt").exists() else []
    found["logged"] = len(logged) == sum(row["kind"] in ("train", "val") for row in recorded)
    found["last"] = recorded[-1].get("event") if recorded else None
    if any((run / "checkpoints").glob("step_*")):
        path = newest(run)
        found |= {"step": int(path.name.removeprefix("step_")), "whole": not checkpoint.verify(path)}
    return found


def as_text(found: dict[str, object]) -> str:
    step = "no checkpoint" if found["step"] is None else f"step {found['step']}"
    faults = "".join(f", {what} damaged" for what in ("whole", "logged") if not found[what])
    worker = f" ({found['last'] or 'no row'})" if found["view"] == "torchrun" else ""  # torchrun's own code is 1 or 0
    return f"{found['code']}{worker}, {step}{faults}"


def table(cells: list[dict[str, object]]) -> str:
    """Markdown: a row for a way of watching and an event, a column a moment; exit code and newest checkpoint."""
    lines = ["| | | " + " | ".join(MOMENTS) + " |", "|---|---|" + "---|" * len(MOMENTS)]
    for view in VIEWS:
        for event in EVENTS:
            row = {c["moment"]: as_text(c) for c in cells if (c["view"], c["event"]) == (view, event)}
            if row:
                lines.append(f"| {view} | {event} | " + " | ".join(row.get(m, "") for m in MOMENTS) + " |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="cells whose words hold this, as in 'tee Ctrl-C'")
    asked = parser.parse_args()
    cells = {(one["view"], one["event"], one["moment"]): one for one in measured("stops").get("cells", [])}
    with tempfile.TemporaryDirectory(prefix="stops") as scratch:
        corpus = make_corpus(Path(scratch) / "corpus", val=100_000)
        for number, (moment, event, view) in enumerate(product(MOMENTS, EVENTS, VIEWS)):
            chosen = all(word in f"{view} {event} {moment}" for word in asked.only.split())
            if not chosen or (view, event) == ("screen", "display closed"):
                continue  # closing a screen is a SIGHUP
            folder = Path(scratch) / str(number)
            folder.mkdir()
            made = cells[view, event, moment] = cell(moment, event, view, corpus, folder)
            print(f"{view}, {event}, {moment}: {as_text(made)}", file=sys.stderr, flush=True)
            keep("stops", {"cells": list(cells.values())})
    print(table(list(cells.values())))
    return 0


if __name__ == "__main__":
    sys.exit(main())
