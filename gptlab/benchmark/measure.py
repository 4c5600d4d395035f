"""Interleaved timing: every contender once a round, in turn, so that a machine's drift falls on all of them alike."""

from __future__ import annotations

import gc
import statistics
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from gptlab.device import return_freed_memory


@dataclass
class Timing:
    """Seconds of each round's steps, and the highest resident memory seen above the start of the step, in bytes."""

    seconds: list[float] = field(default_factory=list)
    peak_bytes: int = 0

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
    told: Callable[[str], None] = print,
    also: Callable[[], None] = lambda: None,
) -> dict[str, Timing]:
    """Time every step `rounds` times in turn, after one round that warms up; `also` is called once in each."""
    timings = {name: Timing() for name in steps}
    for name, step in steps.items():  # memory apart from time: freed memory is given back before each
        step()
        gc.collect()
        return_freed_memory()
        with ResidentPeak() as memory:
            step()
        timings[name].peak_bytes = memory.peak
        told(f"memory of {name}: {memory.peak / 2**20:,.0f} MiB above its model and moments")
    for round_ in range(rounds + 1):
        also()
        for name, step in steps.items():
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(per_round):
                step()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if round_:
                timings[name].seconds.append((time.perf_counter() - start) / per_round)
        told(f"round {round_} of {rounds}" if round_ else "warmed up")
    return timings


class ResidentPeak:
    """The highest resident memory of this process while the block ran, above what it was before (Linux; else 0)."""

    def __enter__(self) -> ResidentPeak:
        self.peak, self._done = 0, threading.Event()
        self._before = _resident()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._done.wait(0.005):
            self.peak = max(self.peak, _resident() - self._before)

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()


def _resident() -> int:
    path = Path("/proc/self/statm")
    return int(path.read_text().split()[1]) * 4096 if path.exists() else 0
