"""The verdict on one arm: the rules in their order, and the reason in words. Figures to show are verdicts.py's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from gptlab.analysis import plan
from gptlab.analysis.declared import Declared
from gptlab.analysis.pairing import Losses, Pairing, pair
from gptlab.analysis.sequential import ALPHA, EQUIVALENCE
from gptlab.analysis.statistics import by_size, equivalent, holm, spread

LEAST_DOSE = 0.01
FAR = 3.0
"""With two seeds, better or worse must be this many times the seeds' own spread: two can agree by chance."""

ENOUGH = 5
"""Seeds to ask for where there are too few to tell their spread."""


class Decision(NamedTuple):
    """more_seeds: how many more would probably decide, 0 where it is decided, None where seeds alone will not do."""

    verdict: str
    reason: str
    more_seeds: int | None = 0


class FamilyTest(NamedTuple):
    """An arm's p among the m arms of its family.

    level: what p had to reach in its turn; strictest: the level of the first turn, with which seeds are planned.
    """

    p: float | None
    p_holm: float | None
    level: float
    rejected: bool
    strictest: float


def step_down(e: Declared, family: Mapping[str, Pairing]) -> dict[str, FamilyTest]:
    """Holm's step-down with the levels of the look that each arm has reached (Maurer and Bretz 2013).

    An arm that cannot be tested yet counts with p = 1 and keeps its place in the family.
    """
    arms, m = list(family), len(family)
    tested = {arm: test.p for arm in arms if (test := family[arm].test)}
    p = [tested.get(arm, 1.0) for arm in arms]
    adjusted = holm(p)
    found: dict[str, FamilyTest] = {}
    going = True
    for rank, i in enumerate(by_size(p)):
        arm, look = arms[i], family[arms[i]].look
        level = e.level(ALPHA / (m - rank), look)
        going = going and arm in tested and p[i] <= level
        shown = adjusted[i] if arm in tested else None
        found[arm] = FamilyTest(tested.get(arm), shown, level, going, e.level(ALPHA / m, look))
    return found


def decide(losses: Losses, e: Declared, arm: str, pairing: Pairing, in_family: FamilyTest) -> Decision:
    """Inactive, no difference, better or worse, undecided: the first that holds. See docs/verdicts.md."""
    dose, test, n = e.doses.get(arm), pairing.test, pairing.n
    if dose is not None and dose < LEAST_DOSE:
        return Decision("inactive", f"its mean dose is {dose:.2g}, under 1% of the true loss's gradient")
    if early := _too_early(e, pairing):
        return early
    if n and not any(pairing.differences):
        return Decision("no difference", f"the difference is exactly 0 on {'all ' * (n > 1)}{_seeds(n)}")
    if test is None:
        return _undecided(f"{_seeds(n)}: a spread takes at least 2, a verdict about {ENOUGH}", ENOUGH - n)
    level = e.level(EQUIVALENCE, pairing.look)
    low, high = test.interval(1 - level)
    interval = f"{100 * (1 - level):.3g}% interval [{low:.3g}, {high:.3g}]"
    if equivalent(test, e.delta, level):
        return Decision("no difference", f"the {interval} lies within ±{e.delta:g}")
    compared = f"p {test.p:.2g} against {in_family.level:.2g}"
    if not in_family.rejected:
        return _undecided(f"{compared}, and the {interval} is not within ±{e.delta:g}", _more(e, pairing, in_family))
    floor = max(spread(pairing.own) or 0.0, spread(pairing.other) or 0.0)
    if n == 2 and abs(test.mean) <= FAR * floor:
        chance = f"{abs(test.mean):.3g} is not above {FAR:g} times their own spread {floor:.3g}"
        return _undecided(f"two seeds can agree by chance: {chance}", _until(e, n, ENOUGH))
    if test.mean > 0:
        return Decision("worse", f"{test.mean:.3g} above its baseline ({compared})")
    better = Decision("better", f"{-test.mean:.3g} below its baseline ({compared})")
    return _against_placebo(losses, e, arm, n, better) if arm in e.signals else better


def _too_early(e: Declared, pairing: Pairing) -> Decision | None:
    """Undecided, where a seed was lost or the declared number of seeds is not there yet."""
    if pairing.diverged:
        listed = ", ".join(map(str, pairing.diverged))
        return _undecided(f"no finite loss of it or of its baseline on seed {listed}: leaving seeds out is bias", None)
    if e.looks and pairing.look is None:
        wait = e.looks[0] - pairing.found
        return _undecided(f"{_seeds(pairing.found)}, and the first declared look is at {e.looks[0]}", wait)
    if e.planned and not e.looks and pairing.n < e.planned:
        finished = f"{pairing.n} of the {e.planned} declared seeds are there"
        return _undecided(f"{finished}; a verdict now would be an undeclared look", e.planned - pairing.n)
    return None


def _against_placebo(losses: Losses, e: Declared, arm: str, n: int, better: Decision) -> Decision:
    """The last condition of 'better', for a signal that lies below its baseline."""
    placebo = e.placebos.get(arm)
    if placebo is None:
        return _undecided(f"no placebo arm: {better.reason}, but so might a signal be that knows nothing", None)
    pairing = pair(losses, arm, placebo, e.looks)
    test = pairing.test
    if test is None or pairing.n < n:
        missing = f"{_seeds(pairing.n)} of {n} pair with it"
        return _undecided(f"not better than its placebo {placebo} yet: {missing}", n - pairing.n)
    level = e.level(ALPHA, pairing.look)
    compared = f"difference {test.mean:.3g}, p {test.p:.2g} against {level:.2g}"
    if test.mean < 0 and test.p < level:
        return Decision("better", f"{better.reason}, and below its placebo {placebo} ({compared})")
    needed = plan.seeds_for_difference(test.mean, test.deviation, level) if test.mean < 0 else None
    return _undecided(f"not better than its placebo {placebo} ({compared})", _until(e, n, needed))


def _more(e: Declared, pairing: Pairing, in_family: FamilyTest) -> int | None:
    """Seeds still needed if difference and spread stay as they are: for better or worse, or for no difference."""
    test = pairing.test
    assert test is not None
    ways = (
        plan.seeds_for_difference(test.mean, test.deviation, in_family.strictest),
        plan.seeds_for_equivalence(e.delta, test.deviation, test.mean, e.level(EQUIVALENCE, pairing.look)),
    )
    return _until(e, test.n, min((way for way in ways if way), default=None))


def _until(e: Declared, n: int, needed: int | None) -> int | None:
    """From n seeds to `needed`, or to the declared look that has them; None where no number will do."""
    if needed is None:
        return None
    needed = max(needed, n + 1)
    return next((look for look in e.looks or () if look >= needed), needed) - n


def _undecided(reason: str, more_seeds: int | None) -> Decision:
    return Decision("undecided", reason, more_seeds)


def _seeds(n: int) -> str:
    return f"{n} seed{'s' * (n != 1)}"
