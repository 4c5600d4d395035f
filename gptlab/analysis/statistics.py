"""The statistics under a verdict: paired and Welch's t, Wilcoxon, Holm, jackknife, and levels for repeated looks.

Pure functions of numbers; what a verdict makes of them is in verdict.py. scipy is imported when first
needed.

How small p must be at look k so that looking again and again keeps the promised error: the error is spent over the
looks by the Pocock-type function of Lan and DeMets (1983), after a share f of the seeds alpha * log(1 + (e - 1) f) of
it. The level at each look is found by simulating the paired t statistics of all looks together, since with few seeds
they are far from the normal ones that published tables assume.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from gptlab.errors import ConfigError

Interval = tuple[float, float]


@dataclass(frozen=True)
class PairedT:
    """n paired differences: their mean, their standard deviation (n - 1), the two-sided p of mean 0.

    Of unpaired samples the smaller n, and what paired differences with the same standard error would have for a spread.
    freedom: degrees of freedom, n - 1 where it is None.
    """

    n: int
    mean: float
    deviation: float
    p: float
    freedom: float | None = None

    def interval(self, level: float = 0.95) -> Interval:
        """The two-sided t interval of the mean that covers it with probability `level`."""
        half = critical_t(1 - level, self.freedom or self.n - 1) * self.deviation / math.sqrt(self.n)
        return self.mean - half, self.mean + half


def paired_t(differences: Sequence[float]) -> PairedT:
    """The paired t test of differences (n,), n at least 2, all finite; raises ValueError otherwise.

    Differences without any spread have p = 0, or p = 1 where they are all exactly 0: no NaN comes out.

    >>> paired_t([1.0, 2.0, 3.0]).mean
    2.0
    """
    x = np.asarray(differences, dtype=np.float64)
    if x.ndim != 1 or len(x) < 2 or not np.isfinite(x).all():
        raise ValueError(f"expected at least 2 finite differences, found {list(differences)!r}")
    if (x == x[0]).all():  # the rounding of a mean must not look like spread
        return PairedT(len(x), float(x[0]), 0.0, float(x[0] == 0))
    mean, deviation = float(x.mean()), float(x.std(ddof=1))
    error = deviation / math.sqrt(len(x))
    return PairedT(len(x), mean, deviation, two_sided_p(mean / error if error else math.inf, len(x) - 1))


def welch_t(own: Sequence[float], other: Sequence[float]) -> PairedT:
    """Welch's t test of own minus other, two unpaired samples of at least 2 (Welch 1947).

    >>> welch_t([1.0, 2.0, 3.0], [1.0, 2.0, 3.0, 4.0]).mean
    -0.5
    """
    x, y = np.asarray(own, dtype=np.float64), np.asarray(other, dtype=np.float64)
    a, b = float(x.var(ddof=1)) / len(x), float(y.var(ddof=1)) / len(y)
    freedom = (a + b) ** 2 / (a * a / (len(x) - 1) + b * b / (len(y) - 1)) if a + b else 1.0
    return _unpaired(float(x.mean() - y.mean()), math.sqrt(a + b), freedom, min(len(x), len(y)))


def _unpaired(mean: float, error: float, freedom: float, n: int) -> PairedT:
    p = two_sided_p(mean / error, freedom) if error else float(mean == 0)
    return PairedT(n, mean, error * math.sqrt(n), p, freedom)


CHOICE = 1.04
"""What the choice between two tests costs: by so much their standard errors are widened (benchmarks/rigor.py)."""


def more_baseline_t(own: Sequence[float], other: Sequence[float], extra: Sequence[float]) -> tuple[PairedT, bool]:
    """The test of n pairs where the baseline has further seeds, and whether those were used.

    They are, unpaired, where the correlation r of the pairs says that this has the smaller standard error: with N
    seeds of the baseline in all where 2(1 - r)/n > 1/n + 1/N, spreads being equal. Both have n - 1 degrees of freedom.
    """
    n, every = len(own), [*other, *extra]
    r = correlation(own, other)
    used = r is not None and r < (1 - n / len(every)) / 2
    test = welch_t(own, every) if used else paired_t([a - b for a, b in zip(own, other, strict=True)])
    return _unpaired(test.mean, CHOICE * test.deviation / math.sqrt(n), n - 1, n), used


EXACT_DIGITS, EXACT_STEPS = 8, 5
"""Significant digits of a figure, or validations on end, in which no two runs of different seeds agree."""


def repeated(runs: Mapping[Any, Sequence[float]]) -> tuple[Any, Any] | None:
    """The names of the first two runs that are one run: all their figures are equal, and enough of them.

    >>> repeated({1: [2.7182818], 2: [2.7182818], 3: [2.5]}), repeated({1: [2.5], 2: [2.5]})
    ((1, 2), None)
    """
    seen: dict[tuple[str, ...], Any] = {}
    for name, figures in runs.items():
        mark = tuple(f"{x:.10g}" for x in figures)
        digits = max((len(x.partition("e")[0].replace(".", "").lstrip("-0")) for x in mark), default=0)
        if digits < EXACT_DIGITS and len(set(mark)) < EXACT_STEPS:
            continue
        if mark in seen:
            return seen[mark], name
        seen[mark] = name
    return None


def two_sided_p(t: float, freedom: float) -> float:
    """P(|T| >= |t|) of Student's T with `freedom` degrees of freedom."""
    from scipy.special import stdtr

    return float(2 * stdtr(freedom, -abs(t)))


def critical_t(level: float, freedom: float) -> float:
    """The t whose two-sided p is `level`."""
    from scipy.special import stdtrit

    return float(-stdtrit(freedom, level / 2))


def wilcoxon_p(differences: Sequence[float]) -> float:
    """The two-sided p of Wilcoxon's signed-rank test. Shown next to the paired t, never used for a verdict.

    Differences of 0 are left out, as Wilcoxon did; where all are 0, p is 1. Exact up to 50 differences without ties.
    """
    from scipy.stats import wilcoxon

    x = np.asarray(differences, dtype=np.float64)
    x = x[x != 0]
    if not len(x):
        return 1.0
    ties = len(np.unique(np.abs(x))) < len(x)
    result: Any = wilcoxon(x, method="approx" if ties or len(x) > 50 else "exact")
    return float(result.pvalue)


def holm(p: Sequence[float]) -> list[float]:
    """Holm's adjusted p of every p, in their order (Holm 1979): rejecting those up to 0.05 keeps the family at 5%.

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    adjusted = [1.0] * len(p)
    worst = 0.0
    for rank, i in enumerate(by_size(p)):
        worst = max(worst, min(1.0, (len(p) - rank) * p[i]))
        adjusted[i] = worst
    return adjusted


def by_size(p: Sequence[float]) -> list[int]:
    """The indices of `p` from its smallest to its largest; equal ones in their order."""
    return sorted(range(len(p)), key=lambda i: p[i])


def equivalent(test: PairedT, delta: float, level: float = 0.10) -> bool:
    """Whether the interval of level 1 - `level` lies within ±delta.

    That is to pass two one-sided t tests of `level`/2 (Schuirmann 1987).
    """
    low, high = test.interval(1 - level)
    return -delta <= low and high <= delta


def jackknife(estimate: float, left_out: Sequence[float], level: float = 0.95) -> Interval:
    """The delete-one jackknife interval of `estimate`, with t of n - 1 degrees of freedom.

    left_out: the estimate without the first, the second, ... of n groups, (n,), n at least 2.

    >>> low, high = jackknife(2.0, [2.5, 2.0, 1.5])  # the mean of 1, 2, 3: the same as its t interval
    >>> round(low, 3), round(high, 3)
    (-0.484, 4.484)
    """
    x = np.asarray(left_out, dtype=np.float64)
    n = len(x)
    if n < 2:
        raise ValueError(f"a jackknife needs at least 2 groups, found {n}")
    error = math.sqrt((n - 1) / n * float(((x - x.mean()) ** 2).sum()))
    half = critical_t(1 - level, n - 1) * error
    return estimate - half, estimate + half


def failure_rate_bound(failures: int, n: int) -> float:
    """The highest failure rate that n seeds with so many failures do not exclude, one-sided 95% (Clopper-Pearson).

    >>> [round(failure_rate_bound(0, n), 2) for n in (5, 10, 20)]
    [0.45, 0.26, 0.14]
    """
    from scipy.special import betaincinv

    return 1.0 if failures == n else float(betaincinv(failures + 1, n - failures, 0.95))


def counts_p(failures: int, n: int, others: int, m: int) -> float:
    """Fisher's exact p, two-sided: whether failures of n and others of m tell two failure rates apart.

    >>> round(counts_p(5, 5, 0, 5), 4), round(counts_p(1, 5, 0, 5), 2)
    (0.0079, 1.0)
    """
    from scipy.stats import fisher_exact

    return float(tuple(fisher_exact([[failures, n - failures], [others, m - others]]))[1])


SEEDS_FOR_A_SHAPE = 8
"""Below this, nothing can be said of a distribution's shape."""


def looks_normal(differences: Sequence[float]) -> bool:
    """False where 8 differences or more are skewed or heavy-tailed (Shapiro and Wilk 1965, p below 0.05)."""
    if len(differences) < SEEDS_FOR_A_SHAPE or len(set(differences)) == 1:
        return True
    from scipy.stats import shapiro

    return bool(shapiro(differences).pvalue >= 0.05)


def sign_flip_p(differences: Sequence[float]) -> float:
    """Two-sided p of mean 0 from all 2^n flips of the signs; above n = 16 from 2^16 of them, drawn with a fixed key."""
    x = np.asarray(differences, dtype=np.float64)
    n = len(x)
    if n <= 16:
        signs = 1 - 2 * ((np.arange(2**n)[:, None] >> np.arange(n)) & 1)
    else:
        signs = 1 - 2 * np.random.Generator(np.random.Philox(key=n)).integers(0, 2, (2**16, n))
    extreme = np.abs(signs @ x) >= abs(x.sum()) * (1 - 1e-12)
    return float(extreme.mean()) if n <= 16 else (float(extreme.sum()) + 1) / (2**16 + 1)


def outlier(values: Sequence[float]) -> int | None:
    """The index of the one value that stands apart from the others (Grubbs 1969, p below 0.01); None below 5 values."""
    x = np.asarray(values, dtype=np.float64)
    n, deviation = len(x), float(x.std(ddof=1)) if len(x) >= 5 else 0.0
    if not deviation:
        return None
    distances = np.abs(x - x.mean()) / deviation
    t = critical_t(0.01 / n, n - 2)
    critical = (n - 1) / math.sqrt(n) * math.sqrt(t * t / (n - 2 + t * t))
    return int(distances.argmax()) if distances.max() > critical else None


def correlation(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Pearson's correlation of two arms over their seeds; None below 3 pairs or where one has no spread."""
    if len(x) < 3 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return None
    return float(np.corrcoef(x, y)[0, 1])


def spread(x: Sequence[float]) -> float | None:
    """The standard deviation (n - 1) of finite values; None below 2 of them."""
    return float(np.std(x, ddof=1)) if len(x) > 1 else None


ALPHA = 0.05
"""The rate of 'better' or 'worse', over all arms and looks of an experiment, where there is nothing to find."""

EQUIVALENCE = 0.10
"""Two one-sided tests of 5% each: at a difference of exactly delta, 'no difference' is said in 5%."""

PATHS = 2**21
"""Simulated experiments: levels are then known to about 2% of themselves for alpha = 0.05/4."""

MOST_ALPHA = 0.2
"""Levels never exceed alpha, so that experiments whose every p is above this need not be kept."""

_CHUNK = 2**18
_SEED = 20_000


def look_level(alpha: float, looks: Sequence[int] | None = None, n: int = 0) -> float:
    """The nominal two-sided level a_k(alpha) at the look of n seeds; without looks it is alpha itself."""
    if looks is None:
        return alpha
    return levels(alpha, tuple(looks))[tuple(looks).index(n)]


def last_look(looks: Sequence[int], n: int) -> int | None:
    """The last look that n seeds suffice for; None before the first."""
    return max((look for look in looks if look <= n), default=None)


def spent(alpha: float, fraction: float) -> float:
    """What may be spent of alpha once `fraction` of the seeds is in."""
    return alpha * math.log1p((math.e - 1) * fraction)


@lru_cache(maxsize=256)
def levels(alpha: float, looks: tuple[int, ...]) -> tuple[float, ...]:
    """The nominal two-sided level at each of `looks` (seeds, rising, at least 2); pure and deterministic.

    An experiment without any effect then reaches p < its level at some look with probability alpha. Raises
    ConfigError for looks that are none.
    """
    check_looks(looks)
    assert 0 < alpha <= MOST_ALPHA, alpha
    t = _extremes(looks)
    found = []
    before = 0.0
    for k, n in enumerate(looks):
        total = spent(alpha, n / looks[-1])
        if k == 0:
            found.append(total)  # the t of the first look is Student's: nothing to simulate
        else:
            wanted = max(1, round((total - before) * PATHS))
            size = np.abs(t[:, k])
            size.partition(len(size) - wanted)
            found.append(two_sided_p(float(size[len(size) - wanted]), n - 1))
        before = total
        t = t[np.abs(t[:, k]) < critical_t(found[-1], n - 1)]
    return tuple(found)


def check_looks(looks: Sequence[int]) -> None:
    """Raise ConfigError unless `looks` are rising whole numbers of seeds from 2 on."""
    whole = all(isinstance(n, int) and not isinstance(n, bool) for n in looks)
    if not looks or not whole or looks[0] < 2 or any(a >= b for a, b in itertools.pairwise(looks)):
        raise ConfigError(f"looks: expected rising numbers of seeds, at least 2, such as [5, 10, 20], found {looks!r}")


@lru_cache(maxsize=4)
def _extremes(looks: tuple[int, ...]) -> np.ndarray:
    """The t statistics (paths, looks), float32, of experiments without effect, where any p is below MOST_ALPHA.

    Only sums and sums of squares of the seeds between looks are drawn: a normal and a chi-square number.
    """
    generator = np.random.default_rng(_SEED)
    bounds = np.array([critical_t(MOST_ALPHA, n - 1) for n in looks])
    kept = []
    for _ in range(PATHS // _CHUNK):
        total, squares = np.zeros(_CHUNK), np.zeros(_CHUNK)
        t = np.empty((_CHUNK, len(looks)))
        for k, (before, n) in enumerate(zip((0, *looks), looks, strict=False)):
            more = n - before
            part = generator.standard_normal(_CHUNK) * math.sqrt(more)
            total += part
            squares += part**2 / more
            if more > 1:
                squares += generator.chisquare(more - 1, _CHUNK)
            t[:, k] = total / np.sqrt(n * (squares - total**2 / n) / (n - 1))
        kept.append(t[(np.abs(t) > bounds).any(1)].astype(np.float32))
    return np.concatenate(kept)
