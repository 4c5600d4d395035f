"""Verdicts: what an experiment's losses say of each arm against its baseline, in words, with the reason.

A pure function of numbers. The rules stand in decision.py and are told to a researcher in docs/verdicts.md;
where the numbers come from is in outcomes.py.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from gptlab.analysis import plan
from gptlab.analysis.decision import FamilyTest, decide, step_down
from gptlab.analysis.declared import Declared, declare
from gptlab.analysis.pairing import Losses, Pairing, finite, pair
from gptlab.analysis.sequential import ALPHA, EQUIVALENCE
from gptlab.analysis.statistics import spread, wilcoxon_p


def compare(
    losses_by_arm_and_seed: Losses,
    *,
    baseline: str | None = None,
    delta: float = 0.01,
    looks: Sequence[int] | None = None,
    planned: int | None = None,
    placebos: Mapping[str, str] | None = None,
    controls: Collection[str] = (),
    signals: Collection[str] | None = None,
    doses: Mapping[str, float | None] | None = None,
    groups: Mapping[str, Sequence[str]] | None = None,
) -> dict[str, Any]:
    """The verdict on every arm, in the shape of `gptlab compare --json`. Losses and differences are in nats.

    Args:
        losses_by_arm_and_seed: {arm: {seed: loss}}; equal seeds pair. None or NaN is a run without a finite loss.
        baseline: the arm the others are compared with; by default the one named "baseline", else the first.
        delta: the largest difference that does not matter.
        looks: numbers of seeds at which the declared looks fall, such as [5, 10, 20].
        planned: the declared number of seeds where there are no looks; fewer are no verdict yet.
        placebos: {arm: its placebo arm}. A placebo is a control.
        controls: further arms that are controls: judged by themselves, outside Holm's family.
        signals: arms that differ by a signal, so that 'better' takes a placebo; by default those of `doses` and
            `placebos`.
        doses: {arm: mean dose, None where it was not measured}.
        groups: {group: [its baseline, its other arms...]} for arms that pair only within a group.

    Raises ConfigError for names or numbers that do not fit. Never gives NaN; None where a figure needs more seeds.

    >>> losses = {"baseline": {1: 3.00, 2: 3.10, 3: 3.05}, "wider": {1: 2.80, 2: 2.91, 3: 2.85}}
    >>> compare(losses)["arms"]["wider"]["verdict"]
    'better'
    """
    losses = losses_by_arm_and_seed
    e = declare(
        losses,
        baseline=baseline,
        delta=delta,
        looks=looks,
        planned=planned,
        placebos=placebos,
        controls=controls,
        signals=signals,
        doses=doses,
        groups=groups,
    )
    pairings = {arm: pair(losses, arm, e.baselines[arm], e.looks) for arm in e.baselines}
    tests = step_down(e, {arm: pairing for arm, pairing in pairings.items() if arm not in e.controls})
    for arm in sorted(e.controls):
        tests |= step_down(e, {arm: pairings[arm]})
    first = baseline or next(iter(e.baselines.values()))
    return {
        "baseline": first,
        "noise_floor": _floor(losses, first),
        "delta": e.delta,
        "looks": list(e.looks) if e.looks else None,
        "planned": planned,
        "arms": {arm: _arm(losses, e, arm, pairings[arm], tests[arm]) for arm in pairings},
    }


def _arm(losses: Losses, e: Declared, arm: str, pairing: Pairing, in_family: FamilyTest) -> dict[str, Any]:
    test, differences = pairing.test, pairing.differences
    decision = decide(losses, e, arm, pairing, in_family)
    equivalence = test.interval(1 - e.level(EQUIVALENCE, pairing.look)) if test else (None, None)
    return {
        "verdict": decision.verdict,
        "reason": decision.reason,
        "difference": _mean(differences),
        "interval": list(test.interval()) if test else [None, None],
        "n": pairing.n,
        "p_holm": in_family.p_holm,
        "more_seeds": decision.more_seeds,
        "dose": e.doses.get(arm),
        "p": in_family.p,
        "level": in_family.level,
        "wilcoxon_p": wilcoxon_p(differences) if test else None,
        "equivalence_interval": list(equivalence),
        "baseline": e.baselines[arm],
        "group": e.groups.get(arm),
        "control": arm in e.controls,
        "placebo": _placebo(losses, e, arm),
        "loss": _mean(pairing.own),
        "baseline_loss": _mean(pairing.other),
        "seeds": list(pairing.seeds),
        "seeds_found": pairing.found,
        "differences": differences,
        "noise_floor": _floor(losses, e.baselines[arm]),
        "sigma": test.deviation if test else None,
        "seed_correlation": pairing.correlation,
        "smallest_difference": plan.smallest_difference(test.deviation, test.n, in_family.strictest) if test else None,
    }


def _placebo(losses: Losses, e: Declared, arm: str) -> dict[str, Any] | None:
    """The arm minus its placebo, or None where it has none."""
    if arm not in e.placebos:
        return None
    pairing = pair(losses, arm, e.placebos[arm], e.looks)
    test = pairing.test
    return {
        "arm": e.placebos[arm],
        "n": pairing.n,
        "difference": _mean(pairing.differences),
        "interval": list(test.interval()) if test else [None, None],
        "p": test.p if test else None,
        "level": e.level(ALPHA, pairing.look),
    }


def _floor(losses: Losses, arm: str) -> float | None:
    """How far seeds alone move an arm's loss: its standard deviation over seeds, nats."""
    return spread([float(x) for x in losses[arm].values() if x is not None and finite(x)])


def _mean(x: Sequence[float]) -> float | None:
    return sum(x) / len(x) if x else None
