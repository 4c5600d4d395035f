"""Interleaved timing: every contender once a round, in turn, so that a machine's drift falls on all of them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch


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
    told: Callable[[str], None] = print,
    also: Callable[[], None] = lambda: None,
) -> dict[str, Timing]:
    """Time every step `rounds` times in turn, after one round that warms up; `also` is called once in each.

    Each turn begins with a step that is not timed: the contender before left caches and the heap in its own state, and
    one who trains alone pays for that once, not in every step.
    """
    timings = {name: Timing() for name in steps}
    for round_ in range(rounds + 1):
        also()
        for name, step in steps.items():
            step()
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
