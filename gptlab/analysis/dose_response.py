"""Dose and response: how many times the tokens a known error costs, against theory, and whether errors compound.

Pure functions of numbers, in logarithms, since costs multiply: a multiplier's mean over seeds is geometric. Which runs
belong together is in dose_response_runs.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from gptlab.analysis.statistics import Interval, paired_t

LogRatios = Mapping[int, float]
"""{seed: log of tokens with the error over tokens without}, of seeds in which both arrived."""
THEORIES: dict[str, tuple[str, Callable[[float, int], float]]] = {
    "uniform": ("1/(1-ρV/(V-1))^a", lambda dose, vocabulary: -_log(1 - dose * vocabulary / (vocabulary - 1))),
    "parity": ("1/(1-2ρ)^a", lambda dose, vocabulary: -_log(1 - 2 * dose)),
    "gaussian": ("(1+s²)^a", lambda dose, vocabulary: math.log1p(dose * dose)),
}
"""By the kind of error: the multiplier as a formula, and log multiplier for a = 1 as (dose, vocabulary) -> number.

uniform: the share of a flipped target's expected gradient that is the true one's. parity: what is left of a label's
correlation with the truth, which enters the samples needed squared (a = 2; Blum, Kalai and Wasserman 2003). gaussian:
the squared length of a gradient with noise over that without.
"""


def _log(x: float) -> float:
    return math.log(x) if x > 0 else -math.inf


def tokens_to_reach(
    tokens: Sequence[float], values: Sequence[float], level: float, *, rising: bool = False
) -> float | None:
    """Tokens at which a validated figure first falls (or rises) to `level`, linear between rows; None where never.

    At the first row, before which nothing is known, its own tokens: they are an upper bound.

    >>> tokens_to_reach([10, 20, 30], [3.0, 2.0, 1.5], 1.75)
    25.0
    """
    sign = -1 if rising else 1
    for i, value in enumerate(values):
        if sign * value <= sign * level:
            if i == 0:
                return float(tokens[0])
            share = (values[i - 1] - level) / (values[i - 1] - value)
            return float(tokens[i - 1] + share * (tokens[i] - tokens[i - 1]))
    return None


@dataclass(frozen=True)
class Multiplier:
    """Tokens with an error over tokens without, paired by seed: the geometric mean over n seeds, its 95% interval.

    Censored seeds (which did not arrive within their run) count as arriving at its end: the ratio is then a lower bound
    without an interval. logs: of the seeds that arrived; bounds: of all seeds. None: no pair.
    """

    n: int
    censored: int
    ratio: float | None
    interval: Interval | None
    logs: LogRatios = field(default_factory=dict)
    bounds: LogRatios = field(default_factory=dict)

    @property
    def whole(self) -> bool:
        return self.n > 0 and not self.censored


def multiplier(
    reached: Mapping[int, float | None], reference: Mapping[int, float | None], ends: Mapping[int, float]
) -> Multiplier:
    """The multiplier of runs against a reference, both {seed: tokens to reach the level, None where never}.

    ends: {seed: tokens that the run saw in all}. Seeds whose reference never arrived are left out.
    """
    paired = {seed: base for seed, base in reference.items() if base is not None and seed in reached}
    if not paired:
        return Multiplier(0, 0, None, None)
    logs = {seed: math.log(own / base) for seed, base in paired.items() if (own := reached[seed]) is not None}
    censored = len(paired) - len(logs)
    bounds = {seed: logs.get(seed, math.log(ends[seed] / base)) for seed, base in paired.items()}
    interval = None if censored else _ratio_interval(list(logs.values()), [0.0] * len(logs))
    return Multiplier(len(paired), censored, math.exp(sum(bounds.values()) / len(bounds)), interval, logs, bounds)


@dataclass(frozen=True)
class Fit:
    """The exponent a of a theory, fitted to logarithms through multiplier 1 at dose 0, one fit a seed; 95% interval.

    worst: the largest factor between a dose's mean multiplier and the fit's.
    """

    exponent: float
    interval: Interval | None
    doses: int
    worst: float


def fit_exponent(found: Sequence[tuple[float, LogRatios]]) -> Fit | None:
    """Fit log multiplier = a·x to pairs (x of the dose, log ratios by seed); None where no seed is in all of them.

    Doses at which some seed is censored must be left out by the caller: a fit of those that arrived is too good.
    """
    found = [(x, logs) for x, logs in found if math.isfinite(x) and x > 0]
    seeds = sorted(set.intersection(*(set(logs) for _, logs in found))) if found else []
    if not seeds:
        return None
    x = np.array([x for x, _ in found])
    y = np.array([[logs[seed] for seed in seeds] for _, logs in found])  # (doses, seeds)
    by_seed = x @ y / (x @ x)
    interval = paired_t(by_seed.tolist()).interval() if len(seeds) > 1 else None
    exponent = float(by_seed.mean())
    return Fit(exponent, interval, len(x), float(np.exp(np.abs(y.mean(1) - exponent * x).max())))


@dataclass(frozen=True)
class Compounding:
    """Noise at every block against noise at each block alone: multipliers, geometric means over seeds.

    sum: of what each costs beyond 1. against: 95% intervals of everywhere over the product and over the sum. bounds:
    what is only a lower bound, since runs are censored: "singles" (so the product and the sum too), "everywhere", "all"
    or "". verdict: product, sum, both (they cannot be distinguished), neither, or undecided.
    """

    n: int
    everywhere: float
    product: float
    sum: float
    against_product: Interval | None
    against_sum: Interval | None
    verdict: str
    bounds: str


def compounding(singles: Sequence[Multiplier], everywhere: Multiplier) -> Compounding | None:
    """Whether the multiplier at every block is the product of the single blocks' or the sum; None without a seed.

    A sum that is not above 0 (errors that save more tokens than there are) has no logarithm, so None as well.
    """
    seeds = sorted(set(everywhere.bounds).intersection(*(single.bounds for single in singles)))
    ratios = {seed: [math.exp(single.bounds[seed]) for single in singles] for seed in seeds}
    sums = {seed: 1 + sum(ratio - 1 for ratio in ratios[seed]) for seed in seeds}
    if not seeds or not singles or min(sums.values()) <= 0:
        return None
    every = [everywhere.bounds[seed] for seed in seeds]
    products = [sum(single.bounds[seed] for single in singles) for seed in seeds]
    added = [math.log(sums[seed]) for seed in seeds]
    against = {"product": _ratio_interval(every, products), "sum": _ratio_interval(every, added)}
    of_singles = any(single.censored for single in singles)
    bounds = ("all" if of_singles else "everywhere") if everywhere.censored else "singles" if of_singles else ""
    mean, product, total = (math.exp(sum(logs) / len(seeds)) for logs in (every, products, added))
    verdict = _compounds(against, bounds)
    return Compounding(len(seeds), mean, product, total, against["product"], against["sum"], verdict, bounds)


def _compounds(against: Mapping[str, Interval | None], bounds: str) -> str:
    intervals = {name: interval for name, interval in against.items() if interval}
    if len(intervals) < len(against):
        return "undecided"
    fits = [name for name, (low, high) in intervals.items() if low <= 1 <= high]
    below, above = all(high < 1 for _, high in intervals.values()), all(low > 1 for low, _ in intervals.values())
    decided = {"": True, "singles": below, "everywhere": above, "all": False}
    if not decided[bounds]:
        return "undecided: not all runs arrived"
    return {0: "neither", 1: "".join(fits), 2: "both"}[len(fits)]


def growth(early: LogRatios, late: LogRatios) -> tuple[float, Interval | None] | None:
    """The multiplier at a late level over that at an early one, with its 95% interval; None without a seed in both.

    Above 1, the error costs more the further training is.
    """
    seeds = sorted(set(early) & set(late))
    if not seeds:
        return None
    a, b = [late[seed] for seed in seeds], [early[seed] for seed in seeds]
    return math.exp((sum(a) - sum(b)) / len(seeds)), _ratio_interval(a, b)


def _ratio_interval(logs: Sequence[float], others: Sequence[float]) -> Interval | None:
    """The 95% interval of a ratio of multipliers, paired by seed; None below two seeds."""
    if len(logs) < 2:
        return None
    low, high = paired_t([a - b for a, b in zip(logs, others, strict=True)]).interval()
    return math.exp(low), math.exp(high)
