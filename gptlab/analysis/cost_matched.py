"""Differences at equal cost, next to a verdict at an equal step: FLOPs, time, and after one fitted temperature.

A signal costs arithmetic and time, for which the baseline could have made more updates: so an arm is set against runs
of its baseline that really were longer, where there are any, and never against an extrapolated curve. And what a signal
did to calibration alone, one temperature mends: what is left is knowledge.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from gptlab.analysis.comparability import own_options
from gptlab.analysis.design import pair
from gptlab.analysis.run import Run
from gptlab.errors import ConfigError
from gptlab.options import build
from gptlab.runs.tuning import LENGTH
from gptlab.training.config import TrainingConfig, run_flops

COST_TOLERANCE = {"equal_flops": 0.05, "equal_time": 0.10}
"""How far costs may differ that are called equal, as a share; clocks are less exact than counts."""

Arms = Mapping[str, Sequence[Run]]
"""{arm: its finished runs}"""


def longer_runs_of(arms: Arms, baselines: Mapping[str, str]) -> dict[str, str]:
    """{arm: its baseline} of the arms that are nothing but a longer run of it; they are no arms to judge."""
    found = {}
    for arm, baseline in baselines.items():
        if not (arms[arm] and arms[baseline]):
            continue
        own, theirs = own_options(arms[arm][0]), own_options(arms[baseline][0])
        differ = {key for key in {**own, **theirs} if own.get(key) != theirs.get(key)}
        if "steps" in differ and differ <= LENGTH and own["steps"] > theirs["steps"]:
            found[arm] = baseline
    return found


def cost_matched(
    arm: str, baseline: str, longer: Sequence[str], runs: Arms, looks: Sequence[int] | None
) -> dict[str, dict[str, Any] | None]:
    """`tempered`, `equal_flops` and `equal_time` of an arm: arm minus baseline in nats, paired by seed.

    Each is None where there is nothing to compare; else its difference, 95% interval and n, for equal cost also
    `against`, the arm that cost as much, and `ratio`, its cost over this arm's.
    """
    found: dict[str, dict[str, Any] | None] = {
        "tempered": _paired(_tempered(runs.get(arm, ())), _tempered(runs.get(baseline, ())), looks)
    }
    costs: tuple[tuple[str, Callable[[Run], float | None]], ...] = (("equal_flops", _flops), ("equal_time", _seconds))
    for name, cost in costs:
        found[name] = None
        own = _mean_cost(runs.get(arm, ()), cost)
        ratios = {
            other: theirs / own for other in (baseline, *longer) if own and (theirs := _mean_cost(runs[other], cost))
        }
        nearest = min(ratios, key=lambda other: abs(ratios[other] - 1), default=None)
        if nearest is None or abs(ratios[nearest] - 1) > COST_TOLERANCE[name]:
            continue
        if paired := _paired(_last(runs[arm]), _last(runs[nearest]), looks):
            found[name] = {**paired, "against": nearest, "ratio": ratios[nearest]}
    return found


def _paired(
    own: Mapping[int, float | None], other: Mapping[int, float | None], looks: Sequence[int] | None
) -> dict[str, Any] | None:
    pairing = pair({"own": own, "other": other}, "own", "other", looks)
    if not pairing.n:
        return None
    test = pairing.test
    return {
        "difference": sum(pairing.differences) / pairing.n,
        "interval": list(test.interval()) if test else [None, None],
        "n": pairing.n,
    }


def _tempered(runs: Sequence[Run]) -> dict[int, float | None]:
    return {run.seed: run.tempered for run in runs if run.tempered is not None}


def _last(runs: Sequence[Run]) -> dict[int, float | None]:
    return {run.seed: run.losses[max(run.losses)] for run in runs if run.losses}


def _mean_cost(runs: Sequence[Run], cost: Callable[[Run], float | None]) -> float | None:
    costs = [cost(run) for run in runs]
    return sum(c for c in costs if c) / len(costs) if costs and all(costs) else None


def _seconds(run: Run) -> float | None:
    return run.seconds or None


def _flops(run: Run) -> float | None:
    """Of its updates; None for a run of patched code, which may do anything and know other options."""
    if run.config.get("patch"):
        return None
    try:
        return run_flops(build(TrainingConfig, dict(run.options)))
    except ConfigError:
        return None
