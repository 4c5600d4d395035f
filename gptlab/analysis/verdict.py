"""Verdicts: what an experiment's losses say of each arm against its baseline, in words, with the reason.

Pure functions of numbers. docs/verdicts.md explains the rules to a researcher; load.py says where numbers come from.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

from gptlab.analysis import design as power
from gptlab.analysis.design import Design, Losses, Pairing, Seed, declare, finite, order
from gptlab.analysis.statistics import (
    ALPHA,
    EQUIVALENCE,
    by_size,
    correlation,
    equivalent,
    failure_rate_bound,
    holm,
    looks_normal,
    repeated,
    sign_flip_p,
    spread,
    wilcoxon_p,
)
from gptlab.runs.experiment_spec import Metric

LEAST_DOSE = 0.01
TWO_SEED_FACTOR = 3.0
"""With two seeds, better or worse must be this many times the seeds' own spread: two can agree by chance."""

SEEDS_FOR_A_SPREAD = 5
"""Seeds to ask for where there are too few to estimate their spread."""


def compare(
    losses_by_arm_and_seed: Losses,
    *,
    baseline: str | None = None,
    delta: float | None = None,
    looks: Sequence[int] | None = None,
    seeds: Collection[Seed] | None = None,
    planned: int | None = None,
    placebos: Mapping[str, str] | None = None,
    controls: Collection[str] = (),
    signals: Collection[str] | None = None,
    doses: Mapping[str, float | None] | None = None,
    groups: Mapping[str, Sequence[str]] | None = None,
    metric: str = "loss",
    better: str | None = None,
    baseline_seeds: Collection[Seed] = (),
    unpaired: bool = False,
) -> dict[str, Any]:
    """The verdict on every arm, in the shape of `gptlab compare --json`. Losses may be any metric.

    Args:
        losses_by_arm_and_seed: {arm: {seed: loss}}; equal seeds pair. None or NaN is a run without a finite loss.
        baseline: the arm the others are compared with; by default the one named "baseline", else the first.
        delta: the largest difference that does not matter; without one only a difference of exactly 0 is none.
        looks: numbers of seeds at which the declared looks fall, such as [5, 10, 20].
        seeds: the declared ones: an arm that lacks one gets no verdict. Without them arms pair by those that both have.
        planned: the declared number of seeds where there are no looks; fewer are no verdict yet.
        placebos: {arm: its placebo arm}. A placebo is a control.
        controls: further arms that are controls: judged by themselves, outside Holm's family.
        signals: arms that differ by a signal, so that 'better' takes a placebo; by default those of `doses` and
            `placebos`.
        doses: {arm: mean dose, None where it was not measured}.
        groups: {group: [its baseline, its other arms...]} for arms that pair only within a group.
        metric: what the losses are, a figure of val rows; delta and differences are in its unit.
        better: "lower" or "higher"; by default what is known of the metric.
        baseline_seeds: declared seeds of baselines beyond `seeds`, used unpaired where that has the smaller error.
        unpaired: equal seeds mean nothing. So it is, too, where arms have none in common and nobody declared them.

    Raises ConfigError for names or numbers that do not fit. Never gives NaN; None where a figure needs more seeds.

    >>> losses = {"baseline": {1: 3.00, 2: 3.10, 3: 3.05}, "wider": {1: 2.80, 2: 2.91, 3: 2.85}}
    >>> compare(losses)["arms"]["wider"]["verdict"]
    'better'
    """
    losses = losses_by_arm_and_seed
    design = declare(
        losses, baseline=baseline, delta=delta, looks=looks, seeds=seeds, planned=planned, placebos=placebos,
        controls=controls, signals=signals, doses=doses, groups=groups, metric=Metric.of(metric, better),
        baseline_seeds=baseline_seeds, unpaired=unpaired,
    )  # fmt: skip
    pairings = {arm: design.pair(losses, arm, design.baselines[arm]) for arm in design.baselines}
    tests = step_down(design, {arm: pairing for arm, pairing in pairings.items() if arm not in design.controls})
    for arm in sorted(design.controls):
        tests |= step_down(design, {arm: pairings[arm]})
    first = baseline or next(iter(design.baselines.values()))
    return {
        "baseline": first,
        "noise_floor": _floor(losses, first),
        "delta": design.delta,
        "looks": list(design.looks) if design.looks else None,
        "planned": planned,
        "metric": metric,
        "better": design.metric.better,
        "unit": design.metric.unit,
        "arms": {arm: _arm(losses, design, arm, pairings, tests[arm]) for arm in pairings},
    }


def _arm(
    losses: Losses, design: Design, arm: str, pairings: Mapping[str, Pairing], in_family: FamilyTest
) -> dict[str, Any]:
    pairing = pairings[arm]
    test, differences = pairing.test, pairing.differences
    decision, outlier = decide(losses, design, arm, pairing, in_family), pairing.outlier
    equivalence = test.interval(1 - design.level(EQUIVALENCE, pairing.look)) if test else (None, None)
    return {
        "verdict": decision.verdict,
        "reason": pairing.how
        + decision.reason
        + (f"; seed {outlier} stands apart from the others" if outlier is not None else ""),
        **pairing.effect,
        "n_baseline": len(pairing.other) + len(pairing.extra),
        "paired": not pairing.how,
        "p_holm": in_family.p_holm,
        "more_seeds": decision.more_seeds,
        "dose": design.doses.get(arm),
        "p": in_family.p,
        "level": in_family.level,
        "wilcoxon_p": wilcoxon_p(differences) if test and differences else None,
        "equivalence_interval": list(equivalence),
        "baseline": design.baselines[arm],
        "group": design.groups.get(arm),
        "control": arm in design.controls,
        "placebo": _placebo(losses, design, arm),
        "loss": _mean(pairing.own),
        "baseline_loss": _mean(pairing.other),
        "seeds": list(pairing.seeds),
        "seeds_found": pairing.found,
        "seeds_missing": sorted({*pairing.missing[0], *pairing.missing[1]}, key=order),
        "differences": differences,
        "noise_floor": _floor(losses, design.baselines[arm]),
        "sigma": test.deviation if test else None,
        "seed_correlation": pairing.correlation,
        "arms_correlation": _shared(pairings, arm),
        "failures": list(pairing.failures),
        "failure_rate_bound": failure_rate_bound(pairing.failures[0], len(pairing.seeds)) if pairing.seeds else None,
        "outlier": outlier,
        "smallest_difference": power.smallest_difference(test.deviation, test.n, in_family.strictest) if test else None,
    }


def _placebo(losses: Losses, design: Design, arm: str) -> dict[str, Any] | None:
    """The arm minus its placebo, or None where it has none."""
    if arm not in design.placebos:
        return None
    pairing = design.pair(losses, arm, design.placebos[arm])
    return {
        "arm": design.placebos[arm],
        **pairing.effect,
        "p": pairing.test.p if pairing.test else None,
        "level": design.level(ALPHA, pairing.look),
    }


def _shared(pairings: Mapping[str, Pairing], arm: str) -> float | None:
    """The mean correlation of an arm's differences with those of other arms of its baseline: errors come together."""
    own = pairings[arm]
    found = [
        correlation(own.differences, other.differences)
        for name, other in pairings.items()
        if name != arm and own.seeds == other.seeds and own.other == other.other and own.paired
    ]
    return _mean([r for r in found if r is not None])


def _floor(losses: Losses, arm: str) -> float | None:
    """How far seeds alone move an arm's loss: its standard deviation over seeds."""
    return spread([float(x) for x in losses[arm].values() if x is not None and finite(x)])


def _mean(x: Sequence[float]) -> float | None:
    return sum(x) / len(x) if x else None


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


def step_down(design: Design, family: Mapping[str, Pairing]) -> dict[str, FamilyTest]:
    """Holm's step-down with the levels of the look that each arm has reached (Maurer and Bretz 2013).

    An arm that cannot be tested yet counts with p = 1 and keeps its place in the family.
    """
    arms, m = list(family), len(family)
    tested = {arm: p for arm in arms if family[arm].whole and (p := family[arm].p) is not None}
    p = [tested.get(arm, 1.0) for arm in arms]
    adjusted = holm(p)
    found: dict[str, FamilyTest] = {}
    going = True
    for rank, i in enumerate(by_size(p)):
        arm, look = arms[i], family[arms[i]].look
        level = design.level(ALPHA / (m - rank), look)
        going = going and arm in tested and p[i] <= level
        shown = adjusted[i] if arm in tested else None
        found[arm] = FamilyTest(tested.get(arm), shown, level, going, design.level(ALPHA / m, look))
    return found


def decide(losses: Losses, design: Design, arm: str, pairing: Pairing, in_family: FamilyTest) -> Decision:
    """Inactive, no difference, better or worse, undecided: the first that holds. See docs/verdicts.md."""
    dose, test, n = design.doses.get(arm), pairing.test, pairing.n
    if dose is not None and dose < LEAST_DOSE and not in_family.rejected:
        return Decision("inactive", f"its mean dose is {dose:.2g}, under 1% of the true loss's gradient")
    if early := _too_early(design, pairing):
        return early
    if pairing.diverged:
        return _by_counts(losses, design, arm, pairing, in_family)
    if n and pairing.paired and not any(pairing.differences):
        return Decision("no difference", f"the difference is exactly 0 on {'all ' * (n > 1)}{_seeds(n)}")
    for whose, x, seeds in (("its", pairing.own, pairing.seeds), ("its baseline's", pairing.other, pairing.others)):
        if len(x) > 1 and len(set(x)) == 1:
            return _undecided(
                f"{whose} losses are equal on all {_seeds(len(x))}: one run more than once, it seems", None
            )
        named = [seed for seed in seeds if seed not in pairing.diverged]
        if twice := repeated({seed: (value,) for seed, value in zip(named, x, strict=False)}):
            return _undecided(
                f"{whose} losses of {_listed(twice)} are equal to many digits: one run twice, it seems", None
            )
    if test is None:
        return _undecided(
            f"{_seeds(n)}: a spread takes at least 2, a verdict about {SEEDS_FOR_A_SPREAD}", SEEDS_FOR_A_SPREAD - n
        )
    level = design.level(EQUIVALENCE, pairing.look)
    low, high = test.interval(1 - level)
    interval = f"{100 * (1 - level):.3g}% interval [{low:.3g}, {high:.3g}]"
    if design.delta is not None and equivalent(test, design.delta, level):
        return Decision("no difference", f"the {interval} lies within ±{design.delta:g}")
    compared = f"p = {test.p:.2g}, threshold {in_family.level:.2g}"
    if not in_family.rejected:
        near = "no delta was declared" if design.delta is None else f"the {interval} is not within ±{design.delta:g}"
        return _undecided(f"{compared}, and {near}", _more(design, pairing, in_family))
    floor = max(spread(pairing.own) or 0.0, spread(pairing.other) or 0.0)
    if n == 2 and abs(test.mean) <= TWO_SEED_FACTOR * floor:
        chance = f"{abs(test.mean):.3g} is not above {TWO_SEED_FACTOR:g} times their own spread {floor:.3g}"
        return _undecided(f"two seeds can agree by chance: {chance}", _until(design, n, SEEDS_FOR_A_SPREAD))
    side = "above" if test.mean > 0 else "below"
    if test.mean * design.metric.sign > 0:
        return Decision("worse", f"{abs(test.mean):.3g} {side} its baseline ({compared})")
    if not looks_normal(pairing.differences):
        flips = sign_flip_p(pairing.differences)
        compared += f"; its differences are skewed or heavy-tailed: p = {flips:.2g} over flips of their signs"
        if flips > in_family.level:
            return _undecided(compared, _more(design, pairing, in_family))
    open_rate = f"{n} clean seeds leave failure rates up to {failure_rate_bound(0, n):.0%} open"
    better = Decision("better", f"{abs(test.mean):.3g} {side} its baseline ({compared}); {open_rate}")
    return _against_placebo(losses, design, arm, n, better) if arm in design.signals else better


def _by_counts(losses: Losses, design: Design, arm: str, pairing: Pairing, in_family: FamilyTest) -> Decision:
    """The verdict where runs diverged: on how many did, as leaving them out of a mean would be a choice of seeds."""
    (failed, others), n = pairing.failures, len(pairing.seeds)
    compared = (
        f"it diverged on {failed} of {_seeds(n)}, its baseline on {others} "
        f"(p = {in_family.p:.2g}, threshold {in_family.level:.2g})"
    )
    if not in_family.rejected:
        return _undecided(f"{compared}, on {_listed(pairing.diverged)}; leaving seeds out is bias", None)
    if failed > others:
        return Decision("worse", compared)
    placebo = design.placebos.get(arm)
    if arm not in design.signals:
        return Decision("better", f"better at not diverging: {compared}")
    if placebo is None:
        return _undecided(f"no placebo arm: {compared}, but so might a signal be that knows nothing", None)
    against, level = design.pair(losses, arm, placebo), design.level(ALPHA, pairing.look)
    counts = f"its placebo {placebo} on {against.failures[1]}"
    if against.p is not None and against.failures[1] > against.failures[0] and against.p < level:
        return Decision("better", f"better at not diverging: {compared}, {counts} (p = {against.p:.2g})")
    return _undecided(f"no better at not diverging than its placebo: {compared}, {counts}", None)


def _too_early(design: Design, pairing: Pairing) -> Decision | None:
    """Undecided, where the declared seeds are not there yet."""
    if design.looks and pairing.look is None:
        wait = design.looks[0] - pairing.found
        missing = f"; {_missing(pairing)}" * (not pairing.whole)
        reason = f"{_seeds(pairing.found)}, and the first declared look is at {design.looks[0]}{missing}"
        return _undecided(reason, max(wait, 1))
    if not pairing.whole:
        finished = f"{pairing.found} of the {len(design.seeds or ())} declared seeds are there, {_missing(pairing)}"
        more = len({*pairing.missing[0], *pairing.missing[1]})
        return _undecided(f"{finished}; a verdict on the others would be a choice of seeds", more)
    if design.planned and pairing.found < design.planned:
        finished = f"{pairing.found} of the {design.planned} declared seeds are there"
        return _undecided(f"{finished}; a verdict now would be an undeclared look", design.planned - pairing.found)
    return None


def _missing(pairing: Pairing) -> str:
    """Which declared seeds the arm and its baseline lack."""
    lacking = zip(pairing.missing, ("it", "its baseline"), strict=True)
    return " and ".join(f"{_listed(seeds)} of {whose} missing" for seeds, whose in lacking if seeds)


def _listed(seeds: Sequence[Seed], most: int = 8) -> str:
    shown = ", ".join(map(str, seeds[:most])) + f" and {len(seeds) - most} more" * (len(seeds) > most)
    return f"seed{'s' * (len(seeds) > 1)} {shown}"


def _against_placebo(losses: Losses, design: Design, arm: str, n: int, better: Decision) -> Decision:
    """The last condition of 'better', for a signal that beats its baseline."""
    placebo = design.placebos.get(arm)
    if placebo is None:
        return _undecided(f"no placebo arm: {better.reason}, but so might a signal be that knows nothing", None)
    pairing = design.pair(losses, arm, placebo)
    test = pairing.test
    if test is None or pairing.n < n:
        missing = f"{_seeds(pairing.n)} of {n} pair with it"
        return _undecided(f"not better than its placebo {placebo} yet: {missing}", n - pairing.n)
    level = design.level(ALPHA, pairing.look)
    compared = f"difference {test.mean:.3g}, p = {test.p:.2g}, threshold {level:.2g}"
    beaten = test.mean * design.metric.sign < 0
    if beaten and test.p < level:
        side = "below" if test.mean < 0 else "above"
        return Decision("better", f"{better.reason}, and {side} its placebo {placebo} ({compared})")
    needed = power.seeds_for_difference(test.mean, test.deviation, level) if beaten else None
    return _undecided(f"not better than its placebo {placebo} ({compared})", _until(design, n, needed))


def _more(design: Design, pairing: Pairing, in_family: FamilyTest) -> int | None:
    """Seeds still needed if difference and spread stay as they are: for better or worse, or for no difference."""
    test, level = pairing.test, design.level(EQUIVALENCE, pairing.look)
    assert test is not None
    ways = (
        power.seeds_for_difference(test.mean, test.deviation, in_family.strictest),
        power.seeds_for_equivalence(design.delta or 0.0, test.deviation, test.mean, level),
    )
    return _until(design, test.n, min((way for way in ways if way), default=None))


def _until(design: Design, n: int, needed: int | None) -> int | None:
    """From n seeds to `needed`, or to the declared look that has them; None where no number will do."""
    if needed is None:
        return None
    needed = max(needed, n + 1)
    return next((look for look in design.looks or () if look >= needed), needed) - n


def _undecided(reason: str, more_seeds: int | None) -> Decision:
    return Decision("undecided", reason, more_seeds)


def _seeds(n: int) -> str:
    return f"{n} seed{'s' * (n != 1)}"
