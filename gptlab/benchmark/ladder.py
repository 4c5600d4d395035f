"""The ladder: one small run a core, side by side, as an experiment's cells run; their steps summed.

Each run is a process of its own with one thread. A round tells all of them to go at once and waits for the last.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from types import TracebackType
from typing import Any

from gptlab.device import Placement

STEPS = 4
"""Steps that a run makes before it waits for the others."""


class Ladder:
    """`runs` processes at the same size and dtype, ended at the end of the block."""

    def __init__(self, size: str, placement: Placement, runs: int) -> None:
        command = [sys.executable, "-m", "gptlab.benchmark.ladder", size, placement.dtype_name]
        self._runs = [
            subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(runs)
        ]

    def __enter__(self) -> Ladder:
        for run in self._runs:
            _heard(run)
        return self

    def steps(self) -> None:
        """Every run makes STEPS steps."""
        for run in self._runs:
            assert run.stdin is not None
            run.stdin.write("1\n")
            run.stdin.flush()
        for run in self._runs:
            _heard(run)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for run in self._runs:
            assert run.stdin is not None
            assert run.stdout is not None
            run.stdin.close()
            run.wait(60)
            run.stdout.close()


def _heard(run: subprocess.Popen[str]) -> str:
    assert run.stdout is not None
    line = run.stdout.readline()
    assert line, "a run of the ladder ended early"
    return json.loads(line)


def _serve(size: str, dtype: str) -> None:
    """One run: a step for every line on standard input."""
    from gptlab.benchmark.contenders import Work, ours, placed
    from gptlab.benchmark.sizes import SIZES
    from gptlab.device import Machine, decide
    from gptlab.model.gpt import GPTConfig

    sizes: dict[str, Any] = dict(SIZES[size])
    batch = sizes.pop("batch")
    placement = placed(replace(decide(Machine.probe(), threads=1, compile="off"), threads=1), dtype)
    placement.apply()
    (step,) = ours(Work(GPTConfig(**sizes), batch), placement)
    step()
    print(json.dumps("ready"), flush=True)
    for _ in sys.stdin:
        for _ in range(STEPS):
            step()
        print(json.dumps("done"), flush=True)


if __name__ == "__main__":
    _serve(*sys.argv[1:])
