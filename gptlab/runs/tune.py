"""[tune] of an experiment file: which trials every arm gets, on which seeds. Read with clear refusals, nothing is run.

seeds = [101, 102]              kept apart from the verdict's: what chose an option must not also judge it
learning_rate = [0.5, 1, 2]     factors of the arm's learning rate; these unless it says otherwise
dose = [1]                      factors of the arm's signal.dose, or of its weight where no dose is held
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from gptlab.errors import ConfigError, did_you_mean

KEYS = ("seeds", "learning_rate", "dose")
APART = 1.01
"""The smallest ratio of neighbouring factors; closer ones would be the same trial."""


@dataclass(frozen=True)
class Tune:
    """Factors rise. An arm with a dose gets every pair of a learning rate and a dose.

    A dose is not tuned unless it is asked for: it is mostly what an arm is about, and three of them cost three times
    as much.
    """

    seeds: tuple[int, ...]
    learning_rate: tuple[float, ...] = (0.5, 1, 2)
    dose: tuple[float, ...] = (1,)

    @property
    def trials(self) -> int:
        """Trials of every arm, each on all seeds."""
        return len(self.learning_rate) * len(self.dose)

    @property
    def only_learning_rate(self) -> tuple[float, ...]:
        """As many learning rates as there are trials: those of an arm without a dose."""
        return finer(self.learning_rate, self.trials)


def finer(factors: Sequence[float], count: int) -> tuple[float, ...]:
    """`count` factors from the first to the last of `factors`, all of which are among them.

    The widest gap, as a ratio, is divided first, into equal ratios. New ones have four digits, to be read and typed.

    >>> finer((0.5, 1, 2), 9)
    (0.5, 0.5946, 0.7071, 0.8409, 1, 1.189, 1.414, 1.682, 2)
    """
    gaps = [math.log(high / low) for low, high in pairwise(factors)]
    parts = [1] * len(gaps)
    for _ in range(count - len(factors)):
        widest = max(range(len(gaps)), key=lambda i: round(gaps[i] / parts[i], 9))
        parts[widest] += 1
    found: list[float] = []
    for (low, high), many in zip(pairwise(factors), parts, strict=True):
        found += [low, *(float(f"{low * (high / low) ** (k / many):.4g}") for k in range(1, many))]
    return (*found, factors[-1])


def read_tune(table: Mapping[str, Any], verdict: Collection[int]) -> Tune:
    """The table [tune]; raises ConfigError for what cannot be tried, and for seeds that the verdict uses too."""
    for key in table:
        if key not in KEYS:
            raise ConfigError(f"[tune] unknown key {key!r}{did_you_mean(key, KEYS)}; there are {', '.join(KEYS)}")
    seeds = table.get("seeds")
    if not isinstance(seeds, list) or not seeds or not all(type(n) is int and n >= 0 for n in seeds):
        raise ConfigError(f"[tune] seeds: expected a list of whole numbers such as [101, 102], found {seeds!r}")
    if len(set(seeds)) < len(seeds):
        raise ConfigError(f"[tune] seeds: expected each seed once, found {seeds}")
    if shared := sorted(set(seeds) & set(verdict)):
        raise ConfigError(
            f"[tune] seeds: {', '.join(map(str, shared))} of the verdict's seeds; what chose an option must not judge "
            f"it: take others, such as [{max(verdict) + 100}, {max(verdict) + 101}]"
        )
    tune = Tune(
        tuple(seeds),
        _factors(table, "learning_rate", Tune.learning_rate),
        _factors(table, "dose", Tune.dose),
    )
    if len(tune.learning_rate) < 2:
        raise ConfigError(
            "[tune] learning_rate: expected at least 2 factors, found 1; an arm without a signal has nothing else to "
            "spend its trials on"
        )
    if any(high / low < APART for low, high in pairwise(tune.only_learning_rate)):
        raise ConfigError(
            f"[tune] learning_rate: {tune.trials} trials do not fit between {tune.learning_rate[0]:g} and "
            f"{tune.learning_rate[-1]:g}; give a wider range, or fewer doses"
        )
    return tune


def _factors(table: Mapping[str, Any], key: str, default: tuple[float, ...]) -> tuple[float, ...]:
    given = table.get(key, list(default))
    right = isinstance(given, list) and all(type(x) in (int, float) and 0 < x < math.inf for x in given)
    if not right or not given:
        raise ConfigError(f"[tune] {key}: expected a list of factors above 0, such as [0.5, 1, 2], found {given!r}")
    factors = tuple(sorted(given))
    if any(high / low < APART for low, high in pairwise(factors)):
        raise ConfigError(f"[tune] {key}: expected factors that differ by 1% or more, found {given}")
    return factors
