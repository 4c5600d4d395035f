"""The branch test: is what a signal does to learning bias or noise? Branches of one checkpoint, and what they say.

Some steps with the true loss alone, and the same steps with a signal added. The true loss reads the same batches in
every branch of a data seed. The signal's gradient is averaged over M batches of its own, drawn away from those of the
true loss, so that the M of a branch sets how much of the signal's noise is left and nothing else. Which batches these
are is decided by (seed, step): 4 are the first of 16. Everything is an ordinary `update`: Adam with the checkpoint's
moments, clipping, schedule.

d(M) is the held-out loss with the signal minus without, for each data seed. Averaging leaves the signal's mean as it is
and 1/M of its variance, so d is fitted as a quadratic in 1/M:

- its value at 1/M = 0 is *bias*: what the signal's mean alone does;
- its value at 1/M = 1 minus that is *noise*: what averaging would take away.

Positive figures are harm, negative ones help. docs/noise.md: 'The branch test'; N1 and N5 of the notes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from gptlab.analysis.noise.measure import Progress
from gptlab.analysis.statistics import Interval, paired_t
from gptlab.data.batches import RandomWindows, TrainingWindows, ValidationWindows
from gptlab.data.corpus import Corpus
from gptlab.device import ComputeConfig
from gptlab.distributed import World
from gptlab.errors import ConfigError, DivergedError
from gptlab.runs import checkpoint
from gptlab.runs.folder import newest
from gptlab.runs.init_weights import model_in
from gptlab.signals.config import SignalConfig
from gptlab.training.block_graph import Batch
from gptlab.training.config import TrainingConfig
from gptlab.training.evaluate import validate
from gptlab.training.optimizer import build_optimizer
from gptlab.training.state import TrainingState
from gptlab.training.step import MicroBatches, update

MOST_AVERAGED = 2**20
"""The M of a branch lies below it, so that (step, m) fits into one number: step·MOST_AVERAGED + m."""


@dataclass(frozen=True)
class GradientNoise:
    """What is noise by definition (`--gradient_noise`): Gaussian, `size` times |g_CE| long, fresh each step.

    An average of M such draws is one that is 1/√M as long, and so it is drawn.
    """

    size: float


@dataclass(frozen=True)
class GradientBias:
    """What is bias by definition (`--gradient_bias`): one direction for each data seed, `size` times |g_CE| long.

    It is the same in every step, and so its average over any number of batches is itself.
    """

    size: float


Arm = SignalConfig | GradientNoise | GradientBias


@dataclass(frozen=True)
class Plan:
    """What every arm goes through.

    steps: K, updates of a branch; averages: the M, lowest first; seeds: data seeds; eval_tokens: held-out tokens, None
    for the run's own. Raises ConfigError.
    """

    steps: int = 20
    averages: tuple[int, ...] = (1, 4, 16)
    seeds: tuple[int, ...] = (1, 2, 3, 4)
    eval_tokens: int | None = None

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ConfigError(f"a branch needs at least 1 step, found {self.steps}")
        ordered = tuple(sorted(set(self.averages)))
        if len(ordered) < 2 or ordered[0] != 1 or ordered[-1] >= MOST_AVERAGED:
            raise ConfigError(
                f"averages must hold 1 and at least one more number of batches, such as 1,4,16, found {self.averages}"
            )
        object.__setattr__(self, "averages", ordered)
        if len(set(self.seeds)) < max(2, len(self.seeds)):
            raise ConfigError(f"an interval needs at least 2 data seeds, each once, found {list(self.seeds)}")

    def cost(self, arms: Sequence[Arm]) -> int:
        """Gradients of an update's batch that the branches of all arms need, the true loss's branch included."""
        signals = sum(isinstance(arm, SignalConfig) for arm in arms)
        known = len(arms) - signals
        averages = len(self.averages)
        per_step = 1 + signals * (averages + sum(self.averages)) + known * averages
        return len(self.seeds) * (self.steps * per_step + signals)


@dataclass
class Branched:
    """The losses of one arm's branches, held-out nats in the order of the plan's seeds; None of one that diverged.

    start: at the checkpoint; true: after the steps with the true loss alone; losses: M -> with the arm. weight: the
    signal's, as used; dose: |weight·g_signal| / |g_CE| on a batch, mean over the seeds' first. diverged: in words.
    """

    start: float
    true: list[float]
    weight: float | None
    dose: float | None
    losses: dict[int, list[float | None]] = field(default_factory=dict)
    diverged: list[str] = field(default_factory=list)

    @property
    def differences(self) -> dict[int, list[float | None]]:
        """M -> loss minus that of the true loss's branch, nats, seed by seed."""
        return {
            M: [None if x is None else x - true for x, true in zip(row, self.true, strict=True)]
            for M, row in self.losses.items()
        }


def branch(
    run: str | Path,
    arms: Mapping[str, Arm],
    corpus: Corpus,
    placement: ComputeConfig,
    plan: Plan | None = None,
    progress: Progress = lambda what, done, of, words="": None,
) -> dict[str, Branched]:
    """The branches of every arm from a run's newest checkpoint, or from the folder of one.

    progress: called before the first gradient, so that the cost can be shown, and after every branch; it counts
    gradients of an update's batch. Raises
    CheckpointError, ConfigError for an arm that does not suit the model, DataError for a corpus that is too small, and
    DivergedError where the true loss alone diverges.
    """
    lab = _Lab(run, corpus, placement, plan or Plan(), progress, list(arms.values()))
    lab.say(0)
    lab.rewind()
    start = lab.held_out_loss()
    true = [lab.loss_after(seed, lab.config, 0) for seed in lab.plan.seeds]
    found: dict[str, Branched] = {}
    for name, arm in arms.items():
        weight, dose = lab.weigh(arm)
        result = found[name] = Branched(start, true, weight, dose)
        for M in lab.plan.averages:
            config, drawn = _branch_config(lab.config, arm, weight, M)
            result.losses[M] = []
            for seed in lab.plan.seeds:
                try:
                    loss = lab.loss_after(seed, config, drawn)
                except DivergedError as error:
                    loss = None
                    result.diverged.append(f"M = {M}, data seed {seed}: {error}")
                result.losses[M].append(loss)
    return found


def _branch_config(config: TrainingConfig, arm: Arm, weight: float | None, M: int) -> tuple[TrainingConfig, int]:
    """The config of an arm's branch, and over how many drawn batches its signal is averaged (0: it has none)."""
    if isinstance(arm, GradientNoise):
        return replace(config, gradient_noise=arm.size / M**0.5), 0
    if isinstance(arm, GradientBias):
        return replace(config, gradient_bias=arm.size), 0
    return replace(config, signal=replace(arm, weight=weight, dose=None)), M


class _Lab:
    """One model that is set back to the checkpoint before every branch."""

    def __init__(
        self, run: str | Path, corpus: Corpus, placement: ComputeConfig, plan: Plan, progress: Progress,
        arms: Sequence[Arm],
    ) -> None:  # fmt: skip
        self.checkpoint = checkpoint.load(newest(run))
        model, config = model_in(self.checkpoint)
        config = replace(
            config, signal=SignalConfig(), also=(), gradient_noise=0.0, gradient_noise_shape="isotropic",
            gradient_bias=0.0, deterministic=False,
        )  # fmt: skip
        for arm in arms:  # refused here, before an hour's work
            _branch_config(config, arm, None, 1)
        self.config, self.placement, self.plan, self.world = config, placement, plan, World()
        self.state = TrainingState(model.to(placement.device), build_optimizer(model, config))
        self.windows = {
            seed: TrainingWindows(corpus, config.block_size, config.vocab_size, seed) for seed in plan.seeds
        }
        S, first = config.sequences, self.checkpoint.step
        self.drawn = {
            seed: RandomWindows(windows, windows.window_ids(first * S, plan.steps * S), "signal", seed)
            for seed, windows in self.windows.items()
        }
        tokens = plan.eval_tokens or config.eval_tokens
        self.validation = ValidationWindows(corpus, config.block_size, config.vocab_size, tokens)
        self._progress, self._done, self._total = progress, 0, plan.cost(arms)

    def say(self, done: int) -> None:
        self._done += done
        self._progress("branches", self._done, self._total)

    def rewind(self) -> None:
        """Be at the checkpoint, weights and moments and all. Weights that a dose had set belong to the run's signal."""
        found = self.checkpoint
        self.state.restore(found.weights, found.moments, {**found.state["scalars"], "weights": []})

    def held_out_loss(self) -> float:
        """Raises DivergedError where it is not finite."""
        result = validate(self.state.model, self.validation, self.world, self.placement)
        assert result is not None
        if not result.loss < float("inf"):
            raise DivergedError(f"diverged by step {self.state.step}: the held-out loss is not finite")
        return result.loss

    def loss_after(self, seed: int, config: TrainingConfig, averaged: int) -> float:
        """Held-out loss after a branch of the data seed; its signals read `averaged` drawn batches a step."""
        config = replace(config, seed=seed)
        self.rewind()
        try:
            for _ in range(self.plan.steps):
                update(self.state, config, self._batches(config, averaged), self.world, self.placement)
            return self.held_out_loss()
        finally:
            self.say(self.plan.steps * (1 + averaged))

    def _batches(self, config: TrainingConfig, averaged: int) -> Iterator[Batch]:
        step, device = self.state.step, self.placement.device
        part = "true loss" if averaged else "all"
        for batch in MicroBatches(config, self.windows[config.seed], self.world, device).of(step):
            yield replace(batch, part=part)
        # The M batches are read as one of M times the tokens. Only the judge that `rotate` draws by step would then be
        # the same in all of them, so there each batch has a step of its own.
        alone = averaged if any(signal.layers == "rotate" for signal in config.signals) else min(averaged, 1)
        for m in range(alone):
            own = step * MOST_AVERAGED + m
            drawn = self.drawn[config.seed].keyed(own)
            joined = replace(config, total_batch_tokens=config.total_batch_tokens * averaged // alone)
            for batch in MicroBatches(joined, drawn, self.world, device).of(0):
                yield replace(batch, part="signals", step=own, share=batch.share / alone)

    def weigh(self, arm: Arm) -> tuple[float | None, float | None]:
        """An arm's weight and dose: the weight asked for or 1/L; or the one that has the dose asked for, held fixed.

        Held fixed, because a dose held in every update would raise the weight as averaging shortens the gradient. A
        signal that is silent at the checkpoint keeps its weight and has dose 0; None where it diverges at once.
        """
        if not isinstance(arm, SignalConfig):
            return None, arm.size
        weight = 1 / self.config.n_layer if arm.weight is None else arm.weight
        doses = []
        for seed in self.plan.seeds:
            config, _ = _branch_config(replace(self.config, seed=seed), arm, weight, 1)
            self.rewind()
            try:
                batches = self._batches(config, 0)
                done = update(self.state, config, batches, self.world, self.placement, measure_dose=True)
            except DivergedError:  # the branches will say so, each for itself
                return weight, None
            doses.append(done.dose or 0.0)
            self.say(1)
        dose = sum(doses) / len(doses)
        if arm.dose is None or dose == 0:
            return weight, dose
        return weight * arm.dose / dose, arm.dose


DELTA, DEGREE = 0.001, 2
"""Nats below which an effect of a branch counts as none; the degree of the fit in 1/M."""
MINOR = 0.1
"""A part smaller than this share of the other is not named: the fit is not exact to that."""
Differences = Mapping[int, Sequence[float | None]]
"""M -> by data seed, held-out loss minus the true loss's branch, nats; None where the branch diverged."""


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


def judge(differences: Differences) -> BranchTest:
    """The verdict on one signal from its differences, at least two M and two data seeds.

    A part is *shown* where its 95% interval over the data seeds excludes 0; docs/noise.md has the rule.

    >>> flat = [0.05 + 0.001 * seed for seed in range(4)]
    >>> judge({1: flat, 4: flat, 16: flat}).verdict
    'bias'
    """
    values = np.array(list(zip(*differences.values(), strict=True)), dtype=np.float64)  # (seeds, M); None becomes NaN
    if lost := [M for k, M in enumerate(differences) if not np.isfinite(values[:, k]).all()]:
        return BranchTest("undecided", f"diverged at M = {', '.join(map(str, lost))}: lower the weight")
    powers = np.vander(1 / np.array(list(differences)), min(DEGREE + 1, len(differences)), increasing=True)
    coefficients = values @ np.linalg.pinv(powers).T  # (seeds, 1 + degree), of the polynomial in 1/M
    bias, noise = _part(coefficients[:, 0]), _part(coefficients[:, 1:].sum(1))
    verdict, why = _verdict(bias, noise)
    fit = tuple(float(c) for c in coefficients.mean(0))
    return BranchTest(verdict, f"bias {bias}, noise {noise} nats: {why}", bias, noise, fit)


def _part(by_seed: np.ndarray) -> Part:
    test = paired_t(by_seed.tolist())
    return Part(test.mean, test.interval())


def _verdict(bias: Part, noise: Part) -> tuple[Any, str]:
    parts = {"bias": bias, "noise": noise}
    if not (bias.shown or noise.shown):
        if max(bias.most, noise.most) <= DELTA:
            return "neither", f"both lie within {DELTA:g}"
        return "undecided", f"neither is shown to differ from 0, nor to lie within {DELTA:g}: take more seeds or steps"
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


def as_json(plan: Plan, branched: Branched) -> dict[str, Any]:
    """One signal's branches and the verdict on them, JSON-ready: nats, seeds as the plan lists them."""
    differences = branched.differences
    test = judge(differences)
    return {
        "steps": plan.steps, "averages": list(plan.averages), "seeds": list(plan.seeds),
        "weight": branched.weight, "dose": branched.dose, "start": branched.start, "true_loss": branched.true,
        "differences": {str(M): row for M, row in differences.items()},
        "delta": DELTA, **asdict(test), "diverged": branched.diverged,
    }  # fmt: skip


def branch_test(
    run: str | Path, signals: Mapping[str, Arm], corpus: Corpus, placement: ComputeConfig, plan: Plan | None = None,
    progress: Progress = lambda what, done, of, words="": None,
) -> dict[str, dict[str, Any]]:  # fmt: skip
    """Run the branches of every signal from a checkpoint and judge them: name -> the object of `as_json`.

    run: a run (its newest checkpoint) or the folder of a checkpoint. See `branch` for what is raised
    and for `progress`, whose first call gives the cost.
    """
    plan = plan or Plan()
    found = branch(run, signals, corpus, placement, plan, progress)
    return {name: as_json(plan, branched) for name, branched in found.items()}
