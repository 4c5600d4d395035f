"""The branch test: is what a signal does to learning bias or noise? Pure functions of losses, but for `branch_test`.

From one checkpoint, K steps with the true loss alone and with a signal added, its gradient averaged over M independent
batches (runs/branching.py). d(M) is the held-out loss with the signal minus without, for each data seed. Averaging
leaves the signal's mean as it is and 1/M of its variance, so d is fitted as a quadratic in 1/M:

- its value at 1/M = 0 is *bias*: what the signal's mean alone does;
- its value at 1/M = 1 minus that is *noise*: what averaging would take away.

Positive figures are harm, negative ones help. docs/noise.md: 'The branch test'; N1 and N5 of the notes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from gptlab.analysis.statistics import Interval, paired_t

if TYPE_CHECKING:
    from gptlab.data.corpus import Corpus
    from gptlab.device import ComputeConfig
    from gptlab.distributed import World
    from gptlab.runs.branching import Arm, Branched, Plan, Progress

DELTA, DEGREE = 0.001, 2
"""Nats below which an effect of a branch counts as none; the degree of the fit in 1/M."""
MINOR = 0.1
"""A part smaller than this share of the other is not named: the fit is not exact to that."""
Differences = Mapping[int, Mapping[int, float | None]]
"""M -> data seed -> held-out loss minus the true loss's branch, nats; None where the branch diverged."""


@dataclass(frozen=True)
class Part:
    """Bias or noise: mean over the data seeds, nats, with its 95% t interval."""

    value: float
    interval: Interval

    @property
    def shown(self) -> bool:
        """Whether the interval excludes 0."""
        return self.interval[0] > 0 or self.interval[1] < 0

    @property
    def most(self) -> float:
        """The greatest size that the interval allows."""
        return max(abs(x) for x in self.interval)

    def __str__(self) -> str:
        return f"{self.value:+.4f} ({self.interval[0]:+.4f} to {self.interval[1]:+.4f})"


@dataclass(frozen=True)
class BranchTest:
    """fit: coefficients of 1, 1/M, (1/M)², mean over the data seeds, for the plot. No parts where a branch diverged."""

    verdict: Literal["bias", "noise", "bias and noise", "neither", "undecided"]
    reason: str
    bias: Part | None = None
    noise: Part | None = None
    fit: tuple[float, ...] | None = None


def judge(differences: Differences, delta: float = DELTA) -> BranchTest:
    """The verdict on one signal from its differences, at least two M and two data seeds.

    A part is *shown* where its 95% interval over the data seeds excludes 0; docs/noise.md has the rule.

    >>> flat = {seed: 0.05 + 0.001 * seed for seed in range(4)}
    >>> judge({1: flat, 4: flat, 16: flat}).verdict
    'bias'
    """
    seeds = list(next(iter(differences.values())))
    table = [[differences[M][seed] for M in differences] for seed in seeds]
    values = np.array(table, dtype=np.float64)  # None becomes NaN
    if lost := [M for k, M in enumerate(differences) if not np.isfinite(values[:, k]).all()]:
        return BranchTest("undecided", f"diverged at M = {', '.join(map(str, lost))}: lower the weight")
    powers = np.vander(1 / np.array(list(differences)), min(DEGREE + 1, len(differences)), increasing=True)
    coefficients = values @ np.linalg.pinv(powers).T  # (seeds, 1 + degree), of the polynomial in 1/M
    bias, noise = _part(coefficients[:, 0]), _part(coefficients[:, 1:].sum(1))
    verdict, why = _verdict(bias, noise, delta)
    fit = tuple(float(c) for c in coefficients.mean(0))
    return BranchTest(verdict, f"bias {bias}, noise {noise} nats: {why}", bias, noise, fit)


def _part(by_seed: np.ndarray) -> Part:
    test = paired_t(by_seed.tolist())
    return Part(test.mean, test.interval())


def _verdict(bias: Part, noise: Part, delta: float) -> tuple[Any, str]:
    parts = {"bias": bias, "noise": noise}
    if not (bias.shown or noise.shown):
        if max(bias.most, noise.most) <= delta:
            return "neither", f"both lie within {delta:g}"
        return "undecided", f"neither is shown to differ from 0, nor to lie within {delta:g}: take more seeds or steps"
    large, small = ("bias", "noise") if abs(bias.value) > abs(noise.value) else ("noise", "bias")
    if bias.shown and noise.shown:
        if abs(parts[small].value) < MINOR * abs(parts[large].value):
            return large, f"the {small} is less than a tenth of it; {_effect(large, parts[large])}"
        return "bias and noise", "; ".join(_effect(name, part) for name, part in parts.items())
    found, other = ("bias", "noise") if bias.shown else ("noise", "bias")
    if parts[other].most >= abs(parts[found].value):
        return "undecided", f"{found} is shown, but there may be as much {other}: take more seeds"
    return found, f"no {other} is shown; {_effect(found, parts[found])}"


def _effect(name: str, part: Part) -> str:
    effects = ("its mean harms", "its mean helps"), ("averaging would help", "averaging would harm")
    return effects[name == "noise"][part.value <= 0]


def as_json(plan: Plan, branched: Branched, delta: float = DELTA) -> dict[str, Any]:
    """One signal's branches and the verdict on them, JSON-ready: nats, seeds as the plan lists them."""
    differences = branched.differences
    test = judge({M: dict(zip(plan.seeds, row, strict=True)) for M, row in differences.items()}, delta)
    return {
        "steps": plan.steps, "averages": list(plan.averages), "seeds": list(plan.seeds),
        "weight": branched.weight, "dose": branched.dose, "start": branched.start, "true_loss": branched.true,
        "differences": {str(M): row for M, row in differences.items()},
        "delta": delta, **asdict(test), "diverged": branched.diverged,
    }  # fmt: skip


def branch_test(
    run: str | Path, signals: Mapping[str, Arm], corpus: Corpus, placement: ComputeConfig, plan: Plan | None = None, *,
    delta: float = DELTA, world: World | None = None, progress: Callable[[Progress], None] = lambda _: None,
) -> dict[str, dict[str, Any]]:  # fmt: skip
    """Run the branches of every signal from a checkpoint and judge them: name -> the object of `as_json`.

    run: a run (its newest checkpoint) or the folder of a checkpoint. See `runs.branching.branch` for what is raised
    and for `progress`, whose first call gives the cost.
    """
    from gptlab.runs.branching import Plan, branch

    plan = plan or Plan()
    found = branch(run, signals, corpus, placement, plan, world=world, progress=progress)
    return {name: as_json(plan, branched, delta) for name, branched in found.items()}
