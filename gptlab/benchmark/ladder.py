"""Steps timed in turn, of one process and of several: the ladder.

Interleaved timing: every contender runs once a round, so that a machine's drift falls on all of them alike. The ladder
is one small run a core, as an experiment's cells run, their steps summed.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist

from gptlab.benchmark import SIZES
from gptlab.benchmark.contenders import Work, ours, placed
from gptlab.device import ComputeConfig, Machine, choose_compute
from gptlab.distributed import World
from gptlab.model.gpt import GPTConfig
from gptlab.processes import python_command

STEPS = 4
"""Steps that a run of the ladder makes before it waits for the others."""


@dataclass
class Timing:
    """Seconds of a step in each round."""

    seconds: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """Half the range between the quartiles, as a share of the median."""
        if len(self.seconds) < 3:
            return (max(self.seconds) - min(self.seconds)) / 2 / self.median
        low, _, high = statistics.quantiles(self.seconds, n=4)
        return (high - low) / 2 / self.median


def interleave(
    steps: Mapping[str, Callable[[], Any]],
    rounds: int,
    per_round: int = 1,
    report: Callable[[str], None] = print,
    also: Callable[[], None] = lambda: None,
) -> dict[str, Timing]:
    """Time every step `rounds` times in turn, after one round that warms up; `also` is called once in each.

    Each turn begins with a step that is not timed: the contender before left caches and heap in its own state, for
    which a run by itself pays once, not in every step.
    """
    timings = {name: Timing() for name in steps}
    for round_ in range(rounds + 1):
        also()
        for name, step in steps.items():
            step()
            wait()
            start = time.perf_counter()
            for _ in range(per_round):
                step()
            wait()
            if round_:
                timings[name].seconds.append((time.perf_counter() - start) / per_round)
        report(f"round {round_} of {rounds}" if round_ else "warmed up")
    return timings


def wait() -> None:
    """Until the GPU, where there is one, has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


class Ladder:
    """`runs` processes at the same size and dtype, ended at the end of the block.

    threads: of each; batch: sequences of a step of each, 0 = the size's own; together: they make each step as one run.
    """

    def __init__(
        self, size: str, placement: ComputeConfig, runs: int, *, threads: int = 1, batch: int = 0,
        together: bool = False,
    ) -> None:  # fmt: skip
        where = ""
        if together:
            self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
            where = f"127.0.0.1:{self._store.port}"
        asked = [size, placement.dtype_name, str(threads), str(batch), where]
        commands = [python_command("gptlab.benchmark.ladder:run_of_ladder", *asked, f"{k}/{runs}") for k in range(runs)]
        self._runs = [
            subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for command in commands
        ]

    def __enter__(self) -> Ladder:
        for run in self._runs:
            _gradient_norm(run)
        return self

    def steps(self) -> list[float]:
        """Every run makes STEPS steps; the norm of each one's last gradient."""
        for run in self._runs:
            assert run.stdin is not None
            run.stdin.write("1\n")
            run.stdin.flush()
        return [_gradient_norm(run) for run in self._runs]

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for run in self._runs:
            assert run.stdin is not None
            assert run.stdout is not None
            run.stdin.close()
            run.wait(60)
            run.stdout.close()


def _gradient_norm(run: subprocess.Popen[str]) -> float:
    assert run.stdout is not None
    line = run.stdout.readline()
    assert line, "a run of the ladder ended early"
    return json.loads(line)


def run_of_ladder(words: list[str]) -> None:
    """One run, or process `place` ("rank/number") of one: some steps for every line on standard input."""
    size, dtype, threads, batch, store, place = words
    sizes: dict[str, Any] = dict(SIZES[size])
    own = sizes.pop("batch")
    count = int(threads)
    placement = placed(replace(choose_compute(Machine.probe(), device="cpu", threads=count), threads=count), dtype)
    placement.apply()
    rank, number = map(int, place.split("/"))
    world = World(rank, number, rank, number, store=store, store_stays=True) if store else World()
    world.connect(placement.device)
    (step,) = ours(Work(GPTConfig(**sizes), int(batch) or own), placement, world=world)
    done = step()
    print(json.dumps(done.grad_norm), flush=True)
    for _ in sys.stdin:
        for _ in range(STEPS):
            done = step()
        print(json.dumps(done.grad_norm), flush=True)
    world.disconnect()
