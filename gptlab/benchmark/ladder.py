"""The ladder: one small run a core, side by side, as an experiment's cells run; their steps summed.

Each run is a process of its own. A round tells all of them to go at once and waits for the last. They may also be the
processes of one run, which sum their gradients: see weak_scaling.py.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from types import TracebackType
from typing import Any

from gptlab.device import ComputeConfig
from gptlab.processes import python_command

STEPS = 4
"""Steps that a run makes before it waits for the others."""


class Ladder:
    """`runs` processes at the same size and dtype, ended at the end of the block.

    threads: of each; batch: sequences of a step of each, 0 = the size's own; together: they make each step as one run.
    """

    def __init__(
        self,
        size: str,
        placement: ComputeConfig,
        runs: int,
        *,
        threads: int = 1,
        batch: int = 0,
        together: bool = False,
    ) -> None:
        where = ""
        if together:
            import torch.distributed as dist

            self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
            where = f"127.0.0.1:{self._store.port}"
        asked = [size, placement.dtype_name, str(threads), str(batch), where]
        commands = [python_command("gptlab.benchmark.ladder:main", *asked, f"{k}/{runs}") for k in range(runs)]
        self._runs = [
            subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for command in commands
        ]

    def __enter__(self) -> Ladder:
        for run in self._runs:
            _heard(run)
        return self

    def steps(self) -> list[float]:
        """Every run makes STEPS steps; the length of each one's last gradient."""
        for run in self._runs:
            assert run.stdin is not None
            run.stdin.write("1\n")
            run.stdin.flush()
        return [_heard(run) for run in self._runs]

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for run in self._runs:
            assert run.stdin is not None
            assert run.stdout is not None
            run.stdin.close()
            run.wait(60)
            run.stdout.close()


def _heard(run: subprocess.Popen[str]) -> float:
    assert run.stdout is not None
    line = run.stdout.readline()
    assert line, "a run of the ladder ended early"
    return json.loads(line)


def main(words: list[str]) -> None:
    """One run, or process `place` ("rank/number") of one: some steps for every line on standard input."""
    from gptlab.benchmark.contenders import Work, ours, placed
    from gptlab.benchmark.sizes import SIZES
    from gptlab.device import Machine, choose_compute
    from gptlab.distributed import World
    from gptlab.model.gpt import GPTConfig

    size, dtype, threads, batch, store, place = words
    sizes: dict[str, Any] = dict(SIZES[size])
    own = sizes.pop("batch")
    count = int(threads)
    placement = placed(replace(choose_compute(Machine.probe(), threads=count, compile="off"), threads=count), dtype)
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
