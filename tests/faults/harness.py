"""Training as a user starts it, in processes that can be stopped, killed and compared; every one ended by its id.

What the fault tests and benchmarks/faults.py share. No assertions: what must hold is told in the tests.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from gptlab.data.shards import write_shard
from gptlab.runs import checkpoint
from gptlab.runs.folder import RunFolder, newest

ROOT = Path(__file__).parents[2]
LAUNCHERS = {"none": "train_gpt2.py", "confidence": "train_gpt2_ben.py"}
MODEL = {"n_layer": 2, "n_embd": 32, "n_head": 2, "block_size": 32, "batch_size": 4, "total_batch_tokens": 256}
RUN = {
    "steps": 40,  # more than five epochs of the corpus below
    "learning_rate": 0.01,
    "warmup_steps": 3,
    "eval_every": 7,
    "checkpoint_every": 5,
    "sample_every": 20,
    "dose_every": 6,
    "dose_first": 0,
    "threads": 1,
}
CLOCKS = {"tokens_per_second", "mfu", "seconds", "steps_in_this_session"}
PATIENCE = 300.0
"""Seconds after which a process that was waited for is taken for stuck; a busy machine needs a minute for a start."""


def make_corpus(folder: Path, train: int = 1900, val: int = 800) -> Path:
    """A corpus of so many bytes of babble; the default's epoch is 7 updates and a bit, so that an update crosses it."""
    folder.mkdir()
    (folder / "tokenizer.txt").write_text("bytes\n")
    words = ["the", "king", "shall", "speak", "of", "love", "and", "war", "to", "all", "who", "hear", "hall\n"]
    chosen = np.random.Generator(np.random.PCG64(1)).integers(len(words), size=(train + val) // 2)
    text = " ".join(words[i] for i in chosen).encode()
    tokens = np.frombuffer(text, dtype=np.uint8).astype(np.uint16)
    write_shard(folder / "train_000000.bin", tokens[:train])
    write_shard(folder / "val_000000.bin", tokens[train : train + val])
    return folder


def options(corpus: Path, run: Path, **changes: Any) -> list[str]:
    """The tiny run's options under `changes`; a value of None makes a flag of an option."""
    values = {**MODEL, **RUN, "data": corpus, "out": run, **changes}
    return [str(word) for key, value in values.items() for word in (f"--{key}", value) if word is not None]


def wait_until(true: Callable[[], Any], what: str, patience: float = PATIENCE) -> None:
    """Wait for it; raises TimeoutError naming `what`."""
    deadline = time.monotonic() + patience
    while not true():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {patience:g} seconds for {what}")
        time.sleep(0.004)


def alive(process: int) -> bool:
    """Whether a process of that id runs; one that ended and was not waited for does not."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def children(process: int) -> list[int]:
    """The processes that a process started itself."""
    try:
        return [int(word) for word in Path(f"/proc/{process}/task/{process}/children").read_text().split()]
    except (FileNotFoundError, ProcessLookupError):
        return []


def told(process: int, name: str) -> int:
    """The number that torchrun gave to a process under that name."""
    variables = Path(f"/proc/{process}/environ").read_bytes().decode().split("\0")
    return int(dict(variable.partition("=")[::2] for variable in variables)[name])


def rank_of(process: int) -> int:
    """The rank that torchrun gave to a process."""
    return told(process, "RANK")


def row_count(run: Path) -> int:
    """Whole lines of metrics.jsonl."""
    try:
        return (run / "metrics.jsonl").read_bytes().count(b"\n")
    except FileNotFoundError:
        return 0


def rows(run: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl but for what a clock says."""
    return [{key: value for key, value in row.items() if key not in CLOCKS} for row in RunFolder(run).rows()]


def outcome(run: Path) -> tuple[tuple[str, int], list[dict[str, Any]]]:
    """What two identical runs have alike: the digest with its step, and every row."""
    return checkpoint.digest(newest(run)), rows(run)


@dataclass(frozen=True)
class Ended:
    code: int
    out: str
    err: str

    @property
    def exit_codes(self) -> dict[int, int]:
        """Rank -> exit code, of the workers that torchrun tells of."""
        told = re.findall(r"^  rank +: (\d+) .*\n  exitcode +: (-?\d+)", self.err, flags=re.MULTILINE)
        return {int(rank): int(code) for rank, code in told}

    @property
    def ours(self) -> list[str]:
        """Our own lines on standard error."""
        return [line for line in self.err.splitlines() if line.startswith("gptlab: ")]


class Running:
    """A training command under way: by itself (processes=0), or under torchrun."""

    def __init__(
        self, command: list[str], log: Path, limit: int | None = None, environment: Mapping[str, str] | None = None
    ) -> None:
        """limit: bytes that no file it writes may exceed, as on a full disk; environment: variables besides ours."""
        self._out, self._err = log.with_suffix(".out"), log.with_suffix(".err")
        with self._out.open("wb") as out, self._err.open("wb") as err:
            self._process = subprocess.Popen(
                command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=out, stderr=err, start_new_session=True,
                env=os.environ | (environment or {}),
                preexec_fn=partial(resource.setrlimit, resource.RLIMIT_FSIZE, (limit, limit)) if limit else None,
            )  # fmt: skip
        self._seen: set[int] = set()

    @property
    def id(self) -> int:
        return self._process.pid

    @property
    def over(self) -> bool:
        return self._process.poll() is not None

    def workers(self) -> list[int]:
        """The processes that torchrun started, as far as they run."""
        self._seen |= set(children(self.id))
        return sorted(filter(alive, self._seen))

    def send(self, number: signal.Signals, *processes: int) -> None:
        """Send a signal to these processes, or to the command itself."""
        self.workers()
        for process in processes or (self.id,):
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, number)

    def wait_for_rows(self, run: Path, count: int) -> None:
        """Wait until so many rows stand in the run's metrics, or the command is over."""
        wait_until(lambda: self.over or (self.workers(), row_count(run))[1] >= count, f"row {count} of {run}")

    def wait_for_words(self, words: str) -> None:
        """Wait until they stand on standard error, or the command is over."""
        wait_until(lambda: self.over or words in self._err.read_text(), f"{words!r}")

    def end(self) -> Ended:
        """Wait for the command's end."""
        code = self._process.wait(PATIENCE)
        return Ended(code, self._out.read_text(), self._err.read_text())

    def abandon(self) -> None:
        """Kill what is left of it."""
        left = [*self.workers(), *([] if self.over else [self.id])]
        self.send(signal.SIGKILL, *left) if left else None
        self._process.wait(PATIENCE)


class Trainer:
    """Starts runs over one corpus; `close` ends every process that is left."""

    def __init__(self, corpus: Path, folder: Path) -> None:
        self.corpus, self.folder = corpus, folder
        self._started: list[Running] = []

    def start(
        self,
        run: Path,
        *,
        processes: int = 0,
        signal_name: str = "confidence",
        limit: int | None = None,
        launcher: Path | None = None,
        restarts: int = 0,
        torchrun: Sequence[str] = ("--standalone",),
        environment: Mapping[str, str] | None = None,
        **changes: Any,
    ) -> Running:
        """The launcher for that signal, over the tiny run's options and `changes`, in so many processes of torchrun
        (0: without), which starts them anew up to `restarts` times. torchrun: how its agents find each other."""
        agent = ["-m", "torch.distributed.run", *torchrun, f"--nproc_per_node={processes}"]
        agent += [f"--max-restarts={restarts}"] * bool(restarts)
        command = [sys.executable, *(agent if processes else []), str(launcher or LAUNCHERS[signal_name])]
        log = self.folder / f"{len(self._started)}.log"
        self._started.append(Running([*command, *options(self.corpus, run, **changes)], log, limit, environment))
        return self._started[-1]

    def train(self, run: Path, **how: Any) -> Ended:
        """Start as `start` does, and wait."""
        return self.start(run, **how).end()

    def close(self) -> None:
        for running in self._started:
            running.abandon()


def kill(running: Running, victim: str, choose: random.Random) -> None:
    """SIGKILL to a "worker", to "torchrun" or to "both"; a run without torchrun is its own worker."""
    worker = choose.choice(running.workers() or [running.id])
    targets = {"worker": [worker], "torchrun": [running.id], "both": [running.id, worker]}[victim]
    running.send(signal.SIGKILL, *targets)


def settle(running: Running, run: Path, patience: float = 35.0) -> tuple[list[int], int]:
    """What is wrong after a kill: the workers that still run after `patience` seconds, and rows written since.

    torchrun gives the workers that are left 30 seconds.
    """
    with contextlib.suppress(TimeoutError):
        wait_until(lambda: not running.workers(), "the workers' end", patience)
    left, before = running.workers(), row_count(run)
    time.sleep(0.3)
    return left, row_count(run) - before


def as_json(path: Path) -> Any:
    return json.loads(path.read_text())
