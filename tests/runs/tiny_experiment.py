"""An experiment of a few seconds, and its runner in a process of its own that can be killed; ended by its id.

What the tests of experiments and benchmarks/experiment_kills.py share. No assertions.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from harness import ROOT, alive, children, make_corpus, wait_until  # pyright: ignore[reportMissingImports]

from gptlab.cli.main import main
from gptlab.runs.executor import Packing
from gptlab.runs.experiment_runner import Runner
from gptlab.runs.experiment_spec import read_experiment

HEAD = {"name": "tiny", "preset": "shakespeare-tiny-v1", "baseline": "plain", "seeds": [1, 2]}
OPTIONS = {
    "n_layer": 2, "n_embd": 32, "n_head": 2, "block_size": 32, "batch_size": 4, "total_batch_tokens": 256, "steps": 24,
    "learning_rate": 0.01, "warmup_steps": 3, "eval_every": 8, "eval_tokens": 512, "checkpoint_every": 5,
    "sample_every": 0, "dose_every": 6, "dose_first": 0,
}  # fmt: skip
ARMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "sure": {"signal.name": "confidence"},
    "bad": {"learning_rate": 1e9, "grad_clip": 0.0},  # diverges at once
}


def write(
    folder: Path,
    arms: Mapping[str, Mapping[str, Any]] = ARMS,
    head: Mapping[str, Any] = HEAD,
    tune: Mapping[str, Any] | None = None,
    **options: Any,
) -> Path:
    """An experiment file in `folder`, over a corpus next to it that is made where it is missing."""
    corpus = folder / "corpus"
    if not corpus.is_dir():
        make_corpus(corpus)
    tables = {"options": {**OPTIONS, "data": str(corpus), **options}, **({"tune": tune} if tune else {})}
    lines = [f"{key} = {json.dumps(value)}" for key, value in head.items()]
    for table, values in {**tables, **{f"arms.{arm}": own for arm, own in arms.items()}}.items():
        lines += [f"[{table}]", *(f"{key} = {json.dumps(value)}" for key, value in values.items())]
    path = folder / "tiny.toml"
    path.write_text("\n".join(lines) + "\n")
    return path


def train_here(file: Path, out: Path) -> None:
    """The experiment's cells one after the other in this process, which has PyTorch already; and its results."""
    runner = Runner(read_experiment(file), out, Packing(1))
    runner.prepare()
    codes = [main(runner.words(cell, 0)) for cell in runner.cells]
    assert codes == [0] * len(codes)
    assert main(["experiment", "run", str(file), "--out", str(out)]) == 0, "nothing was left to run"


class RunnerProcess:
    """`gptlab experiment run` under way."""

    def __init__(self, file: Path, out: Path, *words: str) -> None:
        self.out, self._log = out, out.with_name(f"{out.name}.{id(self)}.err")
        with self._log.open("wb") as err:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "gptlab", "experiment", "run", str(file), "--out", str(out), "--json", *words],
                cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=err, start_new_session=True,
            )  # fmt: skip
        self._seen: set[int] = set()

    @property
    def over(self) -> bool:
        return self.process.poll() is not None

    def trainers(self) -> list[int]:
        """The processes that it started, and those that they forked, as far as they run."""
        started = children(self.process.pid)
        self._seen |= {*started, *(cell for server in started for cell in children(server))}
        return sorted(filter(alive, self._seen))

    def wait_for_rows(self, count: int) -> None:
        """Wait until the cells have so many rows together, or the runner is over."""
        wait_until(lambda: self.over or (self.trainers(), rows(self.out))[1] >= count, f"row {count} in {self.out}")

    def send(self, number: signal.Signals) -> None:
        self.trainers()
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.process.pid, number)

    def log(self) -> str:
        """What it has said so far."""
        return self._log.read_text()

    def end(self) -> tuple[int, str, str]:
        """Wait for its end, and for its children's: exit code, standard output, standard error."""
        out, _ = self.process.communicate()
        wait_until(lambda: not self.trainers(), "the end of the runner's children", 30.0)
        return self.process.returncode, out.decode(), self.log()

    def abandon(self) -> None:
        """Kill what is left of it."""
        for process in [*self.trainers(), *([] if self.over else [self.process.pid])]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        self.process.wait()
        if self.process.stdout:
            self.process.stdout.close()


def rows(out: Path) -> int:
    """Rows of all cells together, trials too."""
    count = 0
    for path in [*out.glob("*/seed_*/metrics.jsonl"), *out.glob(".tune/*/seed_*/metrics.jsonl")]:
        with contextlib.suppress(FileNotFoundError):
            count += path.read_bytes().count(b"\n")
    return count
