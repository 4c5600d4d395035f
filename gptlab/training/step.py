"""One update: gradients of micro-batches are summed, and the optimizer takes a step. It changes the state it is given
and writes no file.

Read `update` first: it is the whole update, stage by stage. Three parts run only where an option asks for them: a
gradient for each source (gradient_sources.py), known noise (controls.py), sums over processes (parallel.py). Words such
as signal, judge, dose and placebo are in docs/glossary.md.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import isfinite
from typing import Any, TypeVar

import torch
from torch import Tensor

from gptlab.data.batches import TrainingWindows, UnreadWindows, Windows
from gptlab.device import ComputeConfig
from gptlab.distributed import World
from gptlab.errors import DivergedError
from gptlab.model.config import GPTConfig
from gptlab.model.gpt import GPT
from gptlab.signals.registry import CONVERSATION
from gptlab.training.block_graph import ActiveSignal, Batch, Into, Losses, active_signals
from gptlab.training.block_loss import accumulate
from gptlab.training.config import TrainingConfig
from gptlab.training.controls import TargetFlip, add_drawn, add_scaled
from gptlab.training.conversation import figure_count, named_figures
from gptlab.training.gradient_sources import Gradients, GradientSources, gradients_into
from gptlab.training.optimizer import AdamStep
from gptlab.training.parallel import Reducer, clip_factor, global_norm, local_shards
from gptlab.training.state import TrainingState, divergence

_T = TypeVar("_T")

WSD_DECAY = 0.2
"""Share of the steps over which the schedule wsd falls."""


@dataclass(frozen=True)
class Update:
    """Results of one update, over the total batch: losses in nats, the gradient norm before clipping.

    stop: whether any rank was asked to stop
    by_judge: for every signal of the config, the means of judges 1 to L-1 in order; None for one that did not read
    dose, doses: |weight·g_signal| / |g_CE| of all signals together and of each, where it was measured in this update
    signal_norm: |weight·g_signal| of all signals together, where the dose was measured
    step_change: the norm of what they change in Adam's step before its learning rate; None with another optimizer
    step_share: step_change over the norm of the step without them; None with another optimizer
    noise_step_share: the same share for gradient_noise and gradient_bias; batch_noise: the norm of the batch's own
    noise over |g_CE|, where two more batches show it
    weights: of every signal of the config, as used; 0 for a signal that is not active in this update
    conversation: its figures by name, where there is one
    """

    loss: float
    signal_loss: float
    grad_norm: float
    learning_rate: float
    clipped: bool
    stop: bool
    by_judge: list[list[float | None]]
    weights: list[float]
    dose: float | None = None
    doses: list[float] | None = None
    signal_norm: float | None = None
    step_change: float | None = None
    step_share: float | None = None
    noise_step_share: float | None = None
    batch_noise: float | None = None
    conversation: dict[str, float | None] | None = None


def update(
    state: TrainingState, config: TrainingConfig, batches: Iterable[Batch], world: World, compute: ComputeConfig,
    *, measure_dose: bool = False, replayed: float | None = None, stop: bool = False,
) -> Update:  # fmt: skip
    """Make update number `state.step` from this rank's micro-batches of it (see `MicroBatches`, and `Batch.part`).

    measure_dose: measure signals' gradient norms too, in a second pass. stop: whether this rank was asked to stop.
    replayed: the norm that run `signal.placebo_of` recorded for this update, for a placebo to take (`replayed_norms`).
    Raises DivergedError on every rank, before the weights change, if the loss or the gradient is not finite on any.
    """
    model, signals = state.model, signals_at(state, config)
    # Placebos, doses and noise scale one gradient against another, so each source's is kept out of `.grad`.
    by_source = any(s.config.control == "placebo" or s.config.dose is not None or config.injects_noise for s in signals)
    sources = GradientSources(model, signals, config.seed) if by_source or (measure_dose and signals) else None
    # The gradient difference of two batches that training never reads: noise shaped like a batch's own.
    difference = [torch.zeros_like(p) for p in model.parameters()] if config.reads_for_noise else []
    metrics = MetricSums(signals, model.config, compute.device, stop)

    # Accumulate: every micro-batch adds its share of the gradient, to `.grad` or to its source's.
    model.zero_grad(set_to_none=True)
    direct = [] if by_source else list(model.parameters())  # by source, `.grad` is written after the reduction
    reducer = _reducer(config, world, direct, sources, [*difference, metrics.all])
    options = _pass_options(config, compute)
    seen: list[tuple[Batch, Losses]] = []
    for batch in batches:
        into = _target(batch, model, sources, by_source, difference)
        losses = accumulate(model, batch, signals, into=into, **options)
        if batch.part == "noise":
            continue  # its training micro-batch follows (see `MicroBatches.of`) and closes the unit for both
        if sources and not by_source:  # a second pass, so that measuring a dose changes nothing of what is learnt
            accumulate(model, batch, signals, into=sources.into, **options)
        metrics.add(losses, batch.share)
        seen.append((batch, losses))
        if reducer:
            reducer.close(batch)  # deterministic: into a fixed tree of sums, for equal bits at any number of ranks

    # Reduce: gradients and metrics become those of the total batch, the same on every rank.
    if reducer:
        reducer.reduce(world)

    # Combine: scale placebos and held doses, and write their sum with the true loss's gradient to `.grad`.
    weights, measured = [signal.weight for signal in signals], dict[str, Any]()
    if sources:
        weights, factors, measured = _weigh(state, config, sources, metrics, replayed)
        if by_source:
            sources.write_total(factors)

    # Perturb: known noise, measured against the true loss's gradient.
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    if config.injects_noise:
        measured |= _inject_noise(gradients, state, config, sources, difference, measure_dose)

    # Check: every rank has the same sums, so all agree. No parameter or moment has changed yet; held weights have.
    norm = global_norm(gradients.values())
    if not (isfinite(norm) and metrics.all.isfinite().all()):
        raise DivergedError(divergence(state, signals, metrics.loss, metrics.judges, seen, world, compute))

    # Clip: by one factor for all parameters, which keeps the gradient's direction.
    factor = clip_factor(norm, config.grad_clip)
    if clipped := factor < 1.0:
        torch._foreach_mul_(local_shards(gradients.values()), factor)

    # Step, at the schedule's rate.
    rate = learning_rate_at(state.step, config)
    for group in state.optimizer.param_groups:
        group["lr"] = rate
    state.optimizer.step()
    torch.autograd.graph.increment_version(model.parameters())  # fused steps skip this; fast_cpu.py relies on it
    state.step, state.clipped = state.step + 1, state.clipped + clipped
    return _as_update(config, signals, metrics, weights, measured, norm, rate, clipped)


class MicroBatches:
    """This rank's micro-batches of any update. The global order of sequences does not depend on the number of ranks.

    Raises ConfigError if the sequences of an update cannot be divided equally among the ranks.
    """

    def __init__(self, config: TrainingConfig, windows: Windows, world: World, device: torch.device) -> None:
        self._size, self._sequences, self._seed = config.micro_batch(world.size), config.sequences, config.seed
        mine = self._sequences // world.size
        self._firsts = range(world.rank * mine, (world.rank + 1) * mine, self._size)
        self._windows, self._device = windows, device
        self._unread = None
        if config.reads_for_noise:
            assert isinstance(windows, TrainingWindows)
            read = config.steps * self._sequences
            self._unread = UnreadWindows(windows, read, 2 * read)

    def of(self, step: int) -> Iterator[Batch]:
        """The micro-batches of update `step`, counted from 0."""
        share = self._size / self._sequences
        for first in self._firsts:
            if unread := self._unread:
                for half, sign in ((0, 1), (1, -1)):
                    batch = self._batch(unread, 2 * step + half, first, step)
                    yield replace(batch, share=sign * share, part="noise")
            yield replace(self._batch(self._windows, step, first, step), share=share)

    def _batch(self, windows: Windows, place: int, first: int, step: int) -> Batch:
        """The micro-batch at `first` of the windows' update number `place`."""
        at = place * self._sequences + first
        tokens, targets = (t.to(self._device, non_blocking=True) for t in windows.rows(at, self._size))
        return Batch(tokens, targets, step, self._seed, first, windows=windows.window_ids(at, self._size))


def learning_rate_at(step: int, config: TrainingConfig) -> float:
    """The learning rate of update `step`, counted from 0.

    Warmup rises in equal steps to the peak. Then cosine falls to min_lr at the end, constant stays, and wsd
    (warmup, stable, decay; 2404.06395) stays and falls linearly over the last fifth.
    """
    peak, low = config.learning_rate, config.final_learning_rate
    if step < config.warmup_steps:
        return peak * (step + 1) / config.warmup_steps
    done = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    if config.schedule == "cosine":
        return low + 0.5 * (1 + math.cos(math.pi * min(1.0, done))) * (peak - low)
    if config.schedule == "wsd":
        falling = (step - config.steps * (1 - WSD_DECAY)) / (config.steps * WSD_DECAY)
        return peak + min(1.0, max(0.0, falling)) * (low - peak)
    return peak


def _pass_options(config: TrainingConfig, compute: ComputeConfig) -> dict[str, Any]:
    """The options of the run that every pass over a micro-batch takes."""
    flip = TargetFlip(config.target_flip, config.target_flip_to)
    recompute = config.activation_checkpointing
    return {"autocast": compute.autocast, "flip": flip, "dropout": config.dropout, "recompute": recompute}


def _target(
    batch: Batch, model: GPT, sources: GradientSources | None, by_source: bool, difference: Gradients
) -> Into | None:
    """Where to add a micro-batch's gradient: to the sums for known noise, to each source's, or to `.grad` (None)."""
    if batch.part == "noise":
        return lambda source: gradients_into(list(model.parameters()), difference)
    return sources.into if sources and by_source else None


def _reducer(
    config: TrainingConfig,
    world: World,
    parameters: Sequence[Tensor],
    sources: GradientSources | None,
    others: Sequence[Tensor],
) -> Reducer | None:
    """What sums gradients and metrics over ranks; None if a single process can add them up as they come."""
    if world.size == 1 and not config.deterministic:
        return None
    return Reducer(config, parameters, [*(sources.tensors() if sources else []), *others])


def signals_at(state: TrainingState, config: TrainingConfig) -> list[ActiveSignal]:
    """The signals of the coming update with their weights: the state's where a dose is held."""
    weights = []
    for k, signal in enumerate(config.signals):
        set_by_dose = state.weights[k] if state.weights else None
        weight = signal.weight_at(state.step, config.n_layer)
        weights.append(weight if set_by_dose is None else set_by_dose * signal.schedule_at(state.step))
    return active_signals(config.signals, weights, state.listener)


def _weigh(
    state: TrainingState,
    config: TrainingConfig,
    sources: GradientSources,
    metrics: MetricSums,
    replayed: float | None,
) -> tuple[list[float], list[float], dict[str, Any]]:
    """Scale placebos, measure doses, and find the factors of signals whose dose is held.

    Returns each active signal's weight in this update, the factor that a held dose multiplied its gradient by, and the
    fields of `Update` that were measured.
    """
    step = AdamStep(sources.parameters, state.optimizer, config.grad_clip)
    sources.scale_placebos(replayed, step if config.signal.placebo_match == "update" else None)
    doses = sources.doses()
    holds_doses = replayed is None  # a replayed norm already fixes the dose
    factors = _hold_doses(state, config, sources.signals, doses) if holds_doses else [1.0] * len(doses)
    used = [signal.weight * factor for signal, factor in zip(sources.signals, factors, strict=True)]
    # The signal loss was summed with the weights from before the dose was held: restate it with those used.
    if any(signal.config.dose is not None for signal in sources.signals):
        metrics.signal.fill_(sum(w * s for w, s in zip(used, metrics.unweighted(sources.signals), strict=True)))
    scaled = [d * f for d, f in zip(doses, factors, strict=True)]
    added = sources.sum(factors)
    norm = global_norm(added)
    change, share = step.effect(sources.true, added) if step.is_adam else (None, None)
    measured = {
        "dose": norm / global_norm(sources.true),
        "doses": fill_inactive(config, sources.signals, scaled, 0.0),
        "signal_norm": norm,
        "step_change": change,
        "step_share": share,
    }
    return used, factors, measured


def _hold_doses(
    state: TrainingState, config: TrainingConfig, signals: Sequence[ActiveSignal], doses: Sequence[float]
) -> list[float]:
    """The factor that gives each signal exactly the dose asked for in this update; 1 for a signal without one.

    The factor is found in every update: gradient norms change severalfold within tens of updates, and with a weight set
    every fifty the dose drifted tenfold. The state keeps the weights for updates in which no token passes a signal's
    threshold, so that there is no gradient to measure.
    """
    factors = []
    weights = dict(zip(config.signals, state.weights or [None] * len(config.signals), strict=True))
    for signal, dose in zip(signals, doses, strict=True):
        schedule, wanted = signal.config.schedule_at(state.step), signal.config.dose
        factors.append(1.0 if wanted is None or not 0 < dose < float("inf") else wanted * schedule / dose)
        if wanted is not None:  # kept without the schedule, which `signals_at` multiplies in again
            weights[signal.config] = signal.weight * factors[-1] / schedule
    if any(signal.dose is not None for signal in config.signals):
        state.weights = [weights[signal] for signal in config.signals]
    return factors


def _inject_noise(
    gradients: dict[str, Tensor],
    state: TrainingState,
    config: TrainingConfig,
    sources: GradientSources | None,
    difference: Sequence[Tensor],
    measure: bool,
) -> dict[str, float | None]:
    """Add noise and bias whose norms are shares of |g_CE|, which is the gradient's norm if there are no sources.

    Returns the fields of `Update` that were measured.

    difference: of two batches' gradients, if noise is to have its shape. The difference of two independent
    batches has √2 times the noise of one.
    """
    true_norm = global_norm(sources.true if sources else gradients.values())
    step = AdamStep(list(state.model.parameters()), state.optimizer, config.grad_clip)
    before = [g.clone() for g in gradients.values()] if measure and step.is_adam else []
    if difference:
        add_scaled(gradients, difference, config.gradient_noise * true_norm)
    elif config.gradient_noise:
        add_drawn(gradients, config.gradient_noise * true_norm, "gradient noise", config.seed, state.step)
    if config.gradient_bias:
        add_drawn(gradients, config.gradient_bias * true_norm, "gradient bias", config.seed)
    if not measure:
        return {}
    added = [after - g for after, g in zip(gradients.values(), before, strict=False)]  # none if not Adam
    share = step.effect(before, added)[1] if before else None
    batch_noise = global_norm(difference) / 2**0.5 / true_norm if difference and true_norm else None
    return {"noise_step_share": share, "batch_noise": batch_noise}


class MetricSums:
    """Sums over micro-batches and ranks in one float64 tensor, so that one reduction serves them all.

    The two losses, requests to stop, every judge's mean, and the figures of a conversation (`figure_count`).
    """

    def __init__(self, signals: Sequence[ActiveSignal], model: GPTConfig, device: torch.device, stop: bool) -> None:
        cells = len(signals) * (model.n_layer + 1)
        self.talk = next((k for k, signal in enumerate(signals) if signal.config.name == CONVERSATION), None)
        figures = 0 if self.talk is None else figure_count(model.vocab_size)
        self.all = torch.zeros(3 + cells + figures, dtype=torch.float64, device=device)
        self.loss, self.signal, self.stop = self.all[0], self.all[1], self.all[2]
        self.stop += stop
        # A row for each signal. Column j: its judge j; column L: a sequence objective.
        self.judges = self.all[3 : 3 + cells].view(len(signals), model.n_layer + 1)
        self.figures = self.all[3 + cells :]
        self.read: list[set[int]] = [set() for _ in signals]
        """The judges of each signal that read in this update."""

    def add(self, losses: Losses, share: float) -> None:
        """Add a micro-batch's losses and figures, weighted by its share of the update."""
        self.loss += losses.loss * share
        self.signal += losses.signal_loss * share
        if losses.figures and self.talk is not None:
            figures = losses.figures[self.talk]
            assert figures is not None
            self.figures += figures * share
        for k, means in enumerate(losses.by_judge):
            self.read[k] |= means.keys()
            for judge, mean in means.items():
                self.judges[k, judge] += mean * share

    def conversation(self, signals: Sequence[ActiveSignal]) -> dict[str, float | None] | None:
        """The figures of the conversation by name; None where there is none."""
        return None if self.talk is None else named_figures(signals[self.talk].config, self.figures.tolist())

    def unweighted(self, signals: Sequence[ActiveSignal]) -> list[float]:
        """Each signal's sum over its judges as it stands in the loss, before its weight."""
        n_judges = self.judges.shape[1] - 2  # judges are blocks 1 to L-1
        factors = [n_judges if signal.config.layers == "rotate" else 1 for signal in signals]
        return [float(row.sum()) * factor for row, factor in zip(self.judges, factors, strict=True)]


def fill_inactive(
    config: TrainingConfig, signals: Sequence[ActiveSignal], values: Sequence[_T], inactive: _T
) -> list[_T]:
    """One value for each signal of the config, from one for each that is active."""
    of = dict(zip([signal.config for signal in signals], values, strict=True))
    return [of.get(signal, inactive) for signal in config.signals]


def _as_update(
    config: TrainingConfig,
    signals: Sequence[ActiveSignal],
    metrics: MetricSums,
    weights: Sequence[float],
    measured: Mapping[str, Any],
    norm: float,
    rate: float,
    clipped: bool,
) -> Update:
    by_judge: list[list[float | None]] = [
        [row[j] if j in read else None for j in range(1, config.n_layer)]
        for read, row in zip(metrics.read, metrics.judges.tolist(), strict=True)
    ]
    return Update(
        loss=float(metrics.loss),
        signal_loss=float(metrics.signal),
        grad_norm=norm,
        learning_rate=rate,
        clipped=clipped,
        stop=bool(metrics.stop),
        by_judge=fill_inactive(config, signals, by_judge, [None] * (config.n_layer - 1)),
        weights=fill_inactive(config, signals, weights, 0.0),
        conversation=metrics.conversation(signals),
        **measured,
    )
