"""What the runs of an idea gave against the baseline's, what both cost, and at what level a gain on them counts.

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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from gptlab.analysis.statistics import critical_t, look_level, paired_t, sign_flip_p, spent, two_sided_p
from gptlab.judge.trial import Outcome, Subject
from gptlab.options import build
from gptlab.training.config import TrainingConfig, run_flops
from gptlab.training.presets import preset_options

WIDEST_GAP = 0.1
"""Of a run: validations further apart say too little of the loss between them."""

Curve = Mapping[int, float]
"""{step: validation loss} of a run."""


@dataclass
class Evidence:
    """What the runs of an idea and the baseline gave so far, in the order of `seeds`; how: "screening" or "fresh"."""

    how: str
    seeds: list[int]
    baseline: list[Outcome]
    idea: list[Outcome]

    def differences(self, second: bool = False) -> list[float]:
        """Idea minus baseline, a number a seed; second: on the second slice, of the seeds that have it."""
        name = "second" if second else "value"
        pairs = [(getattr(b, name), getattr(i, name)) for b, i in zip(self.baseline, self.idea, strict=True)]
        return [i - b for b, i in pairs if b is not None and i is not None]


def cost(evidence: Sequence[Evidence]) -> dict[str, Any]:
    """seconds: of its runs and the baseline's on fresh seeds; seconds of a run and bytes: idea and baseline."""
    screening, fresh = ([e for e in evidence if e.how == how][-1:] for how in ("screening", "fresh"))
    idea = [one for e in (*screening, *fresh) for one in e.idea]
    baseline = [one for e in (*screening, *fresh) for one in e.baseline]
    seconds = sum(one.seconds for one in idea) + sum(one.seconds for e in fresh for one in e.baseline)
    means = [float(np.mean([one.seconds for one in part])) if part else None for part in (idea, baseline)]
    peaks = [max((one.peak_bytes for one in part), default=None) for part in (idea, baseline)]
    return {"seconds": seconds, "seconds_a_run": means, "peak_bytes": peaks}


def flops(preset: str, idea: Subject, baseline: Subject) -> list[float] | None:
    """Of a run, idea and baseline; None where the idea changes code, or where it is no run of gptlab."""
    if not preset or idea.patch:
        return None
    return [
        run_flops(build(TrainingConfig, {**preset_options(preset, one.options), **one.options, "preset": preset}))
        for one in (idea, baseline)
    ]


def at_equal_flops(
    costs: Sequence[float], idea: Sequence[Curve], baseline: Sequence[Curve]
) -> tuple[dict[str, Any] | None, str]:
    """Idea minus baseline where both have cost the same, and why that is not known.

    costs: FLOPs of a run, idea and baseline. The dearer one is read at the step at which it had cost what the other
    costs as a whole, between its validations; its rate has not fallen there as at an end, which is to its disadvantage.

    >>> at_equal_flops([2.0, 1.0], [{90: 3.0, 100: 2.9, 110: 2.8, 200: 2.5}] * 2, [{100: 3.0}] * 2)[0]["read"]
    'idea'
    """
    read = "idea" if costs[0] > costs[1] else "baseline"
    curves = {"idea": idea, "baseline": baseline}
    last = max(curves[read][0])
    step, ends = last * min(costs) / max(costs), {name: [c[max(c)] for c in of] for name, of in curves.items()}
    steps = sorted(set.intersection(*map(set, curves[read])))
    low, high = (max((s for s in steps if s <= step), default=None), min((s for s in steps if s >= step), default=None))
    if low is None or high is None or high - low > WIDEST_GAP * last:
        return None, f"no validations of the {read} near step {step:.0f}, where costs are equal; lower eval_every"
    ends[read] = [float(np.interp(step, steps, [curve[s] for s in steps])) for curve in curves[read]]
    test = paired_t([i - b for i, b in zip(ends["idea"], ends["baseline"], strict=True)])
    return {"difference": test.mean, "interval": list(test.interval()), "read": read, "step": step}, ""


def runs_as_json(evidence: Sequence[Evidence]) -> dict[str, Any]:
    """{"screening" and "fresh": the seeds and what they gave, baseline and idea}, as far as they ran."""
    return {
        e.how: {"seeds": e.seeds, "baseline": [o.value for o in e.baseline], "idea": [o.value for o in e.idea]}
        for e in evidence
    }


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
    from gptlab.analysis.design import smallest_difference

    level = 2 * next_level(error_rate, 0)
    tired = 2 * next_level(error_rate, SLOWNESS)
    return {
        "sigma": sigma,
        "smallest_effect": smallest_difference(sigma, confirm[-1], level),
        "smallest_effect_later": smallest_difference(sigma, confirm[-1], tired),
        "runs_of_a_discarded_idea": [looks[0], looks[-1]],
        "runs_of_a_kept_idea": [looks[0] + 2 * confirm[0], looks[-1] + 2 * confirm[-1]],
    }
