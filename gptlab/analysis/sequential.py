"""Levels for looks: how small p must be at look k so that looking again and again keeps the promised error.

The error is spent over the looks by the Pocock-type function of Lan and DeMets (1983): after a share f of the seeds,
alpha * log(1 + (e - 1) f) of it. How that becomes a level at each look is found by simulating the paired t statistics
of all looks together, since with few seeds they are far from the normal ones that published tables assume.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from gptlab.analysis.statistics import critical_t, two_sided_p
from gptlab.errors import ConfigError

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


def level(alpha: float, looks: Sequence[int] | None = None, n: int = 0) -> float:
    """The nominal two-sided level a_k(alpha) at the look of n seeds; without looks it is alpha itself."""
    if looks is None:
        return alpha
    return levels(alpha, tuple(looks))[tuple(looks).index(n)]


def reached(looks: Sequence[int], n: int) -> int | None:
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
    check(looks)
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


def check(looks: Sequence[int]) -> None:
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
