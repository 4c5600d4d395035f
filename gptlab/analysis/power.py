"""How many seeds a question needs: the power planner behind `gptlab compare --plan` and behind `more_seeds`.

It plans a paired t test and an equivalence test for a known sigma, the standard deviation of the paired differences
between seeds. It says nothing of data that are there already; verdict.py does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from gptlab.analysis.statistics import ALPHA, EQUIVALENCE, critical_t, look_level

POWER, MOST_SEEDS, _QUANTILES = 0.8, 10_000, 512
"""What is aimed for; where a search for a number of seeds gives up; how finely a distribution is averaged over."""
COMMON = (3, 5, 8, 10, 15, 20, 30)
"""Numbers of seeds whose smallest difference a plan shows."""


def plan(
    sigma: float, difference: float, *, delta: float | None = None, arms: int = 1, power: float = POWER,
    looks: Sequence[int] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """What `gptlab compare --plan` prints: seeds for a question, and what common numbers of seeds can show.

    It plans for the strictest level that Holm may ask of one of `arms`, with looks for the last one's. sigma,
    difference, delta in nats; without a delta nothing is planned for it.
    """
    last = looks[-1] if looks else 0
    strict, equivalence = look_level(ALPHA / arms, looks, last), look_level(EQUIVALENCE, looks, last)
    for_none = None if delta is None else seeds_for_equivalence(delta, sigma, 0.0, equivalence, power)
    shown = [{"n": n, "smallest_difference": smallest_difference(sigma, n, strict, power)} for n in looks or COMMON]
    return {
        "sigma": sigma, "difference": difference, "delta": delta, "arms": arms, "power": power,
        "looks": list(looks) if looks else None,
        "level": strict,
        "seeds_for_difference": seeds_for_difference(difference, sigma, strict, power),
        "seeds_for_no_difference": for_none,
        "seeds": shown,
    }  # fmt: skip


def pooled_sigma(arms: Mapping[str, Mapping[str, Any]]) -> float | None:
    """The spread of paired differences over all arms of `compare`'s result; None where none has 2 seeds."""
    found = [arm["sigma"] for arm in arms.values() if arm["sigma"] is not None]
    return math.sqrt(sum(s * s for s in found) / len(found)) if found else None


def smallest_delta(sigma: float, n: int, level: float = 0.10, power: float = POWER) -> float:
    """The smallest delta within which n seeds show no effect to lie with probability `power`, to a thousandth of it.

    >>> round(smallest_delta(0.017, 26), 3)
    0.01
    """
    return _least(lambda delta: power_of_equivalence(0.0, sigma, n, delta, level) >= power, sigma, 1e-3)


def power_of_difference(difference: float, sigma: float, n: int, level: float = 0.05) -> float:
    """The probability that n seeds show a true `difference` (nats): that the paired t test's p is below `level`."""
    from scipy.special import ndtr

    if sigma == 0:
        return float(difference != 0)
    bound, shift = critical_t(level, n - 1) * _spreads(n), abs(difference) * math.sqrt(n) / sigma
    return float(np.mean(ndtr(shift - bound) + ndtr(-shift - bound)))


def power_of_equivalence(difference: float, sigma: float, n: int, delta: float, level: float = 0.10) -> float:
    """The probability that the interval of level 1 - `level` of n seeds lies within ±delta, at a true `difference`."""
    from scipy.special import ndtr

    if sigma == 0:
        return float(abs(difference) <= delta)
    bound, shift = critical_t(level, n - 1) * _spreads(n), difference * math.sqrt(n) / sigma
    room = delta * math.sqrt(n) / sigma - bound
    return float(np.mean(np.where(room > 0, ndtr(room - shift) - ndtr(-room - shift), 0.0)))


def seeds_for_difference(difference: float, sigma: float, level: float = 0.05, power: float = POWER) -> int | None:
    """The fewest seeds that show a true `difference` with probability `power`; None above MOST_SEEDS."""
    return _fewest(lambda n: power_of_difference(difference, sigma, n, level) >= power)


def seeds_for_equivalence(
    delta: float, sigma: float, difference: float = 0.0, level: float = 0.10, power: float = POWER
) -> int | None:
    """The fewest seeds that show a true `difference` to lie within ±delta; None above MOST_SEEDS, or outside it."""
    within = abs(difference) <= delta
    return _fewest(lambda n: power_of_equivalence(difference, sigma, n, delta, level) >= power) if within else None


def smallest_difference(sigma: float, n: int, level: float = 0.05, power: float = POWER) -> float:
    """The smallest true difference (nats) that n seeds show with probability `power`, to a ten-thousandth of it."""
    return sigma * _smallest_in_sigmas(n, level, power)


@lru_cache(maxsize=1024)
def _smallest_in_sigmas(n: int, level: float, power: float) -> float:
    return _least(lambda difference: power_of_difference(difference, 1.0, n, level) >= power, 1.0, 1e-4)


def _least(enough: Callable[[float], bool], high: float, precision: float) -> float:
    """The least number that is enough, to a share `precision` of itself, where more is never less; high: a guess."""
    low = 0.0
    while not enough(high):
        low, high = high, 2 * high
    while high - low > precision * high:
        middle = (low + high) / 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


def _fewest(enough: Callable[[int], bool]) -> int | None:
    """The smallest n from 2 on that is enough, where more is never less; None above MOST_SEEDS."""
    low, high = 1, 2
    while not enough(high):
        if high >= MOST_SEEDS:
            return None
        low, high = high, min(2 * high, MOST_SEEDS)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


@lru_cache(maxsize=1024)
def _spreads(n: int) -> np.ndarray:
    """Equally likely values (_QUANTILES,) of s/sigma, the spread that n seeds happen to show.

    The t statistic is a normal number divided by it, so that a mean over them is its distribution, noncentral too.
    """
    from scipy.special import gammaincinv

    middle = (np.arange(_QUANTILES) + 0.5) / _QUANTILES
    return np.sqrt(2 * gammaincinv((n - 1) / 2, middle) / (n - 1))
