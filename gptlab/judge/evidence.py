"""What the runs of an idea and of its baseline gave, and what both cost: seconds, memory, FLOPs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gptlab.analysis.statistics import paired_t
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
