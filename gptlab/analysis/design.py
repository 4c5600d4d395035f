"""The design of an experiment: what was declared before its runs, which losses pair under it, how many seeds it needs.

No test is made here. The planner is behind `gptlab compare --plan` and behind `more_seeds`. It plans a paired t test
and an equivalence test for a known sigma, the standard deviation of the paired differences between seeds, and says
nothing of data that are there already; verdict.py does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np

from gptlab.analysis.statistics import (
    ALPHA,
    EQUIVALENCE,
    PairedT,
    check_looks,
    correlation,
    counts_p,
    critical_t,
    last_look,
    look_level,
    more_baseline_t,
    outlier,
    paired_t,
    welch_t,
)
from gptlab.errors import ConfigError, did_you_mean, shown
from gptlab.runs.experiment_spec import Metric

Seed = Hashable
Losses = Mapping[str, Mapping[Any, float | None]]
"""{arm: {seed: loss, or another metric}}; a run that ended without a finite one is None, NaN or infinite."""


@dataclass(frozen=True)
class Design:
    """baselines, groups: {arm: its baseline}, {arm: its group}, of arms that are no baseline; the rest is as given.

    delta: None where nobody declared one. seeds: those that every arm must have, in their order; None where any will
    do. planned: how many, where no more is known. controls: placebos too. signals: arms that must beat their placebo.
    further: seeds that the baseline has besides. unpaired: equal seeds mean nothing.
    """

    baselines: Mapping[str, str]
    groups: Mapping[str, str]
    delta: float | None
    looks: tuple[int, ...] | None
    seeds: tuple[Seed, ...] | None
    planned: int | None
    placebos: Mapping[str, str]
    controls: frozenset[str]
    signals: frozenset[str]
    doses: Mapping[str, float | None]
    metric: Metric
    further: tuple[Seed, ...]
    unpaired: bool

    def pair(self, losses: Losses, arm: str, other: str) -> Pairing:
        """The two arms under this design; unpaired too where nobody declared seeds and they have none in common."""
        further = self.further if other == self.baselines.get(arm) else ()
        disjoint = not (self.looks or self.planned) and losses[arm].keys().isdisjoint(losses[other])
        return pair(losses, arm, other, self.looks, self.seeds, further, paired=not (self.unpaired or disjoint))

    def level(self, alpha: float, look: int | None) -> float:
        """a_k(alpha) at a look; at the first one where none is reached yet."""
        return look_level(alpha, self.looks, look or (self.looks[0] if self.looks else 0))


def declare(
    losses: Losses,
    *,
    baseline: str | None,
    delta: float | None,
    looks: Sequence[int] | None,
    seeds: Collection[Seed] | None,
    planned: int | None,
    placebos: Mapping[str, str] | None,
    controls: Collection[str],
    signals: Collection[str] | None,
    doses: Mapping[str, float | None] | None,
    groups: Mapping[str, Sequence[str]] | None,
    metric: Metric,
    baseline_seeds: Collection[Seed],
    unpaired: bool,
) -> Design:
    """Check `compare`'s arguments against the arms that there are; raises ConfigError for what does not fit."""
    if not isinstance(losses, Mapping) or not all(isinstance(of_arm, Mapping) for of_arm in losses.values()):
        raise ConfigError("losses: expected {arm: {seed: loss}}, found something else")
    placebos, doses, groups = placebos or {}, doses or {}, groups or {}
    named = {
        "baseline": [baseline] if baseline else [],
        "placebos": [*placebos, *placebos.values()],
        "controls": controls,
        "signals": signals or (),
        "doses": doses,
        "groups": [arm for members in groups.values() for arm in members],
    }
    for what, names in named.items():
        _known(what, names, losses)
    if looks:
        check_looks(looks)
    if unpaired and (looks or planned or baseline_seeds):
        raise ConfigError(
            "unpaired: expected no looks and no planned seeds, whose levels are those of paired differences"
        )
    if delta is not None and not (isinstance(delta, int | float) and 0 <= delta < math.inf):
        raise ConfigError(f"delta: expected a number in the metric's unit, at least 0, found {shown(delta)}")
    baselines = _baselines(list(losses), baseline, groups)
    all_controls = frozenset(controls) | frozenset(placebos.values())
    carriers = frozenset([*doses, *placebos] if signals is None else signals)
    return Design(
        baselines=baselines,
        groups={arm: group for group, members in groups.items() for arm in members if arm in baselines},
        delta=None if delta is None else float(delta),
        looks=tuple(looks) if looks else None,
        seeds=None if seeds is None else tuple(sorted(seeds, key=order)),
        planned=planned,
        placebos=placebos,
        controls=all_controls & frozenset(baselines),
        signals=carriers - all_controls,
        doses=doses,
        metric=metric,
        further=tuple(sorted(baseline_seeds, key=order)),
        unpaired=unpaired,
    )


def _known(what: str, names: Iterable[str], losses: Losses) -> None:
    for name in names:
        if name not in losses:
            raise ConfigError(f"{what}: no arm {name!r}{did_you_mean(name, losses)}; there are {', '.join(losses)}")


def _baselines(arms: list[str], baseline: str | None, groups: Mapping[str, Sequence[str]]) -> dict[str, str]:
    """{arm: its baseline} in the order of arms: the first of its group, or the one baseline of all."""
    if len(arms) < 2:
        raise ConfigError(f"expected a baseline and at least one other arm, found {', '.join(arms) or 'none'}")
    if not groups:
        of_all = baseline or ("baseline" if "baseline" in arms else arms[0])
        return {arm: of_all for arm in arms if arm != of_all}
    members = [arm for group in groups.values() for arm in group]
    for arm in arms:
        if members.count(arm) != 1:
            raise ConfigError(f"groups: expected every arm in one group, found {arm!r} in {members.count(arm)}")
    firsts = {arm: group[0] for group in groups.values() for arm in group}
    if baseline and firsts[baseline] != baseline:
        raise ConfigError(f"groups: expected the baseline {baseline!r} first in its group, found {firsts[baseline]!r}")
    return {arm: firsts[arm] for arm in arms if firsts[arm] != arm}


@dataclass(frozen=True)
class Pairing:
    """What a verdict may use of two arms, in the order of seeds.

    found: seeds that both arms have, used or not; look: how many of them count now (None before the first look);
    missing: of the declared seeds up to the look, those that the arm lacks and those that the other one lacks;
    seeds, others: of each arm those in use, the same ones where they pair, but for further ones of a baseline;
    diverged: those where a run has no finite loss, and failures: how many of the arm and of the other one; own, other:
    the finite losses left, of equal seeds where `paired`; extra: those of the baseline's further seeds.
    """

    found: int
    look: int | None
    seeds: tuple[Seed, ...]
    others: tuple[Seed, ...]
    missing: tuple[tuple[Seed, ...], tuple[Seed, ...]]
    diverged: tuple[Seed, ...]
    failures: tuple[int, int]
    own: tuple[float, ...]
    other: tuple[float, ...]
    extra: tuple[float, ...] = ()
    paired: bool = True

    @property
    def n(self) -> int:
        """Of the smaller sample, where they are unpaired."""
        return min(len(self.own), len(self.other))

    @property
    def outlier(self) -> Seed | None:
        """The seed whose difference stands apart from the others'."""
        index = outlier(self.differences)
        return None if index is None else [seed for seed in self.seeds if seed not in self.diverged][index]

    @property
    def whole(self) -> bool:
        """Whether no declared seed is missing."""
        return not any(self.missing)

    @cached_property
    def differences(self) -> list[float]:
        """Own minus other, (n,); none of unpaired ones."""
        return [a - b for a, b in zip(self.own, self.other, strict=True)] if self.paired else []

    @cached_property
    def _tested(self) -> tuple[PairedT | None, bool]:
        """The test, and whether all of the baseline's seeds are in it; None below 2 seeds."""
        if self.n < 2:
            return None, False
        if not self.paired:
            return welch_t(self.own, self.other), False
        return more_baseline_t(self.own, self.other, self.extra) if self.extra else (paired_t(self.differences), False)

    @property
    def test(self) -> PairedT | None:
        return self._tested[0]

    @property
    def how(self) -> str:
        """How it is tested where that is not by pairs, as the beginning of a reason."""
        if self.paired and not self._tested[1]:
            return ""
        others = len(self.other) + len(self.extra)
        why = "equal seeds mean nothing" if {*self.seeds} & {*self.others} else "no common seeds"
        why = f"its seeds go with the baseline's at r = {self.correlation:.2f}" if self.paired else why
        return f"unpaired, {len(self.own)} runs against {others} ({why}; Welch's t): "

    @property
    def p(self) -> float | None:
        """Of the counts of runs that diverged, where one did, else of the t test; None below 2 seeds."""
        if self.diverged:
            return counts_p(self.failures[0], len(self.seeds), self.failures[1], len(self.others))
        return self.test.p if self.test else None

    @property
    def mean(self) -> float | None:
        """Own minus other; None where one has no loss."""
        if self.test:
            return self.test.mean
        return sum(self.own) / len(self.own) - sum(self.other) / len(self.other) if self.n else None

    @property
    def effect(self) -> dict[str, Any]:
        """JSON-ready: the mean difference, its 95% interval and n, None where there are too few seeds."""
        interval = list(self.test.interval()) if self.test else [None, None]
        return {"difference": self.mean, "interval": interval, "n": self.n}

    @property
    def correlation(self) -> float | None:
        return correlation(self.own, self.other) if self.paired else None


def pair(
    losses: Losses,
    arm: str,
    other: str,
    looks: Sequence[int] | None,
    seeds: Sequence[Seed] | None = None,
    further: Sequence[Seed] = (),
    *,
    paired: bool = True,
) -> Pairing:
    """Pair `arm` with `other`; with looks, only the first seeds count that make a whole look.

    seeds: the declared ones, in their order; a look is reached once all of its first seeds are there. Without them
    those that both arms have are taken. further: declared ones that the other arm, a baseline, has besides.
    paired: False where equal seeds mean nothing: all losses that each arm has are taken.
    """
    mine, theirs = losses[arm], losses[other]
    if not paired:
        used, used_theirs = (sorted((s for s in of if seeds is None or s in seeds), key=order) for of in (mine, theirs))
        kept, kept_theirs = _finite_of(mine, used), _finite_of(theirs, used_theirs)
        found, look, missing = min(len(used), len(used_theirs)), None, ((), ())
        extra = []
    else:
        wanted = sorted((s for s in mine if s in theirs), key=order) if seeds is None else list(seeds)
        shared = [seed for seed in wanted if seed in mine and seed in theirs]
        leading = next((k for k, seed in enumerate(wanted) if seed not in shared), len(wanted))
        look, found = last_look(looks, leading) if looks else len(shared), len(shared)
        used = shared[: look or (0 if looks else None)]
        next_look = wanted if not looks else wanted[:look] if look else wanted[: looks[0]]
        missing = (
            tuple(s for s in next_look if s not in mine),
            tuple(s for s in (*next_look, *further) if s not in theirs),
        )
        used_theirs = [*used, *(seed for seed in further if seed in theirs)]
        kept = kept_theirs = [seed for seed in used if finite(mine[seed]) and finite(theirs[seed])]
        extra = _finite_of(theirs, used_theirs[len(used) :])
    failed = [[seed for seed in names if not finite(of[seed])] for of, names in ((mine, used), (theirs, used_theirs))]
    return Pairing(
        found=found,
        look=look,
        seeds=tuple(used),
        others=tuple(used_theirs),
        missing=missing,
        diverged=tuple(sorted({*failed[0], *failed[1]}, key=order)),
        failures=(len(failed[0]), len(failed[1])),
        own=_values(mine, kept),
        other=_values(theirs, kept_theirs),
        extra=_values(theirs, extra),
        paired=paired,
    )


def _finite_of(losses: Mapping[Any, float | None], seeds: Iterable[Seed]) -> list[Seed]:
    return [seed for seed in seeds if finite(losses[seed])]


def _values(losses: Mapping[Any, float | None], seeds: Iterable[Seed]) -> tuple[float, ...]:
    return tuple(float(loss) for seed in seeds if (loss := losses[seed]) is not None)


def finite(loss: float | None) -> bool:
    return loss is not None and math.isfinite(loss)


def order(seed: Seed) -> tuple[float, str]:
    """Sorts 2 before 10, as numbers or as text."""
    text = str(seed)
    return (float(text) if text.lstrip("-").isdecimal() else math.inf, text)


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
