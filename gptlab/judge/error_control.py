"""What keeps a ledger's false keeps rare: whom screening lets pass, and the level at which fresh seeds confirm.

An idea is first screened on seeds that all ideas share, at no cost in level: screening only chooses what is confirmed.
It is then confirmed on seeds that no run has used. Given everything that happened before, its p on these seeds is
that of a fresh test, whatever baselines, seeds or suggestions earlier ideas shared. Let the levels a_1, a_2, ... of
confirmations depend on the past alone, with the levels of those that did not end in a keep adding up to at most a.
Up to and with the first false keep every keep before it is right, so that the levels of ideas without a gain that were
tried till then add up to at most a as well, and the first false keep has at most that probability. A keep therefore
costs nothing. After m confirmations without one, the next gets a c/((m + c)(m + c + 1)), and a c/(m + c) is left: the
sum of all is a, and it is never used up.

Gains (..., n) are one number a seed, positive where the idea is better; leading axes are for simulations.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from gptlab.analysis.statistics import critical_t, look_level, paired_t, sign_flip_p, spent, two_sided_p

SLOWNESS = 10
"""c: half of the error rate is left after so many confirmations without a keep."""

PASS, EARLY_PASS, FUTILE = 1.3, 2.5, 0.0
"""Screening, in standard errors of the mean gain: passed at the last look, passed at an earlier one, given up."""

PRIOR_FREEDOM = 4
"""Degrees of freedom that the baseline's own spread counts for in screening, where 2 seeds alone show no spread."""

FEWEST_SIMULATED = 1e-3
"""Below this two-sided level too few simulated experiments are left to find a look's level by."""


def next_level(error_rate: float, failures: int) -> float:
    """The one-sided level of the next confirmation, after so many that did not end in a keep or have not ended.

    >>> round(next_level(0.05, 0), 5), round(next_level(0.05, 10), 5)
    (0.00455, 0.00119)
    """
    return error_rate * SLOWNESS / ((failures + SLOWNESS) * (failures + SLOWNESS + 1))


def level_left(error_rate: float, failures: int) -> float:
    """What is left of the error rate for all confirmations to come.

    >>> round(level_left(0.05, 10), 5)
    0.025
    """
    return error_rate * SLOWNESS / (failures + SLOWNESS)


def screening_z(gains: np.ndarray, floor: np.ndarray | float) -> np.ndarray:
    """Mean gain (...) over its standard error; the spread is the gains' own and the one that `floor` lets expect.

    floor: the baseline's standard deviation over seeds (...); two runs differ by sqrt(2) of it where pairing is of no
    help.
    """
    n = gains.shape[-1]
    mean, own = gains.mean(-1), gains.var(-1, ddof=1)
    variance = ((n - 1) * own + PRIOR_FREEDOM * 2 * np.square(floor)) / (n - 1 + PRIOR_FREEDOM)
    with np.errstate(divide="ignore", invalid="ignore"):
        z = mean / np.sqrt(variance / n)
    return np.where(variance > 0, z, np.where(mean == 0, 0.0, np.copysign(np.inf, mean)))


def screened(gains: np.ndarray, floor: np.ndarray | float, *, last: bool) -> np.ndarray:
    """1 where an idea passes to confirmation, -1 where it is given up, 0 where the next look is to say (...)."""
    z = screening_z(gains, floor)
    return np.where(z >= (PASS if last else EARLY_PASS), 1, np.where(last | (z <= FUTILE), -1, 0))


@lru_cache(maxsize=1024)
def critical_value(level: float, looks: tuple[int, ...], k: int) -> float:
    """The t that a confirmation has to exceed at look k, so that it exceeds one at any look with probability `level`.

    Looks share the level as `gptlab compare`'s do; where it is too small to be simulated, each has what is spent
    there, which promises as much and finds a little less.
    """
    two_sided = 2 * level
    if two_sided >= FEWEST_SIMULATED:
        nominal = look_level(two_sided, looks, looks[k])
    else:
        shares = [spent(two_sided, n / looks[-1]) for n in looks]
        nominal = shares[k] - (shares[k - 1] if k else 0.0)
    return critical_t(nominal, looks[k] - 1)


def confirmed(gains: np.ndarray, level: float, looks: tuple[int, ...], k: int) -> np.ndarray:
    """1 where the gains on the fresh seeds of look k are a keep, -1 where a keep has become hopeless, else 0 (...)."""
    mean, deviation = gains.mean(-1), gains.std(-1, ddof=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        t = mean / (deviation / math.sqrt(gains.shape[-1]))
    last = k == len(looks) - 1
    return np.where(t > critical_value(level, looks, k), 1, np.where(last | ~(mean > 0), -1, 0))


def keeps(baseline: Sequence[float], gains: Sequence[float], level: float, looks: tuple[int, ...], k: int) -> int:
    """`confirmed` of one idea, made safe for metrics of few digits.

    Where the baseline gives few values on many seeds, gains repeat too, and their spread says too little: then the
    exact test of all flips of their signs has to agree. Gains without any spread over a baseline that has all its
    digits, or that never changes, are those of a trainer without noise, and stand for themselves.
    """
    x = np.asarray(gains, dtype=np.float64)
    noiseless = paired_t(gains).deviation == 0
    found = int(np.where(x[0] > 0, 1, -1) if noiseless else confirmed(x, level, looks, k))
    few_digits = 1 < len(set(baseline)) < len(baseline)
    if found == 1 and few_digits and sign_flip_p(gains) > two_sided_p(critical_value(level, looks, k), len(gains) - 1):
        return -1 if k == len(looks) - 1 else 0
    return found


def design(sigma: float, looks: Sequence[int], confirm: Sequence[int], error_rate: float) -> dict[str, Any]:
    """What a lab can find and what it costs, for differences between paired runs of standard deviation `sigma`."""
    from gptlab.analysis.power import smallest_difference

    level = 2 * next_level(error_rate, 0)
    tired = 2 * next_level(error_rate, SLOWNESS)
    return {
        "sigma": sigma,
        "smallest_effect": smallest_difference(sigma, confirm[-1], level),
        "smallest_effect_later": smallest_difference(sigma, confirm[-1], tired),
        "runs_of_a_discarded_idea": [looks[0], looks[-1]],
        "runs_of_a_kept_idea": [looks[0] + 2 * confirm[0], looks[-1] + 2 * confirm[-1]],
    }
