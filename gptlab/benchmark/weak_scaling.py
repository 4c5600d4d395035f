"""Weak scaling on one machine: as much work a thread, in one process and in two that sum their gradients.

One thread alone is what the others are compared with: twice the threads should make twice the tokens. Two processes of
one thread each are what `torchrun --nproc_per_node=2` starts; one of two threads is what the trainer does without it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

from gptlab.benchmark.ladder import STEPS, Ladder
from gptlab.benchmark.measure import Timing, interleave
from gptlab.benchmark.sizes import SIZES
from gptlab.device import Machine, choose_compute

TEAMS = {"1 process, 1 thread": (1, 1), "1 process, 2 threads": (1, 2), "2 processes, 1 thread each": (2, 1)}
"""name -> processes, threads of each."""


def weak_scaling(size: str, rounds: int, per_round: int = 1, told: Callable[[str], None] = print) -> dict[str, Any]:
    """Measure the teams in turn at one size; JSON values."""
    machine = Machine.probe()
    placement = choose_compute(machine, n_embd=SIZES[size]["n_embd"], compile="off")
    batch = SIZES[size]["batch"]
    with ExitStack() as running:
        teams = {
            name: running.enter_context(
                Ladder(size, placement, processes, threads=threads, batch=batch * threads, together=processes > 1)
            )
            for name, (processes, threads) in TEAMS.items()
        }
        timings = interleave({name: team.steps for name, team in teams.items()}, rounds, per_round, told)
    return {
        "size": size,
        "batch_per_thread": batch,
        "dtype": placement.dtype_name,
        "processor": machine.processor,
        "bf16": machine.cpu_bf16,
        "rounds": rounds,
        "rows": rows(timings, STEPS * batch * SIZES[size]["block_size"]),
    }


def rows(timings: Mapping[str, Timing], tokens: int) -> list[dict[str, Any]]:
    """A row a team, of `tokens` tokens a thread in each timed step.

    efficiency: the rate a thread over that of one thread alone. ratio_to_one_process: the rate over that of one process
    with as many threads in all.
    """
    rates = {(p, t): tokens * p * t / timings[name].median for name, (p, t) in TEAMS.items()}  # tokens/s
    return [
        {
            "name": name,
            "processes": processes,
            "threads": threads,
            "tokens_per_second": rates[processes, threads],
            "spread": timings[name].spread,
            "efficiency": rates[processes, threads] / (processes * threads * rates[1, 1]),
            "ratio_to_one_process": rates[processes, threads] / rates[1, processes * threads],
        }
        for name, (processes, threads) in TEAMS.items()
    ]
