"""One update: micro-batches to a gradient, dose, noise, clipping, a step. State goes in and out; nothing is written."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import TypeVar

import torch

from gptlab.data.batches import Windows
from gptlab.device import Placement
from gptlab.distributed import World
from gptlab.errors import DivergedError
from gptlab.training.config import TrainingConfig
from gptlab.training.controls import add_drawn
from gptlab.training.divergence import in_which_batch, where_not_finite
from gptlab.training.gradients import Ledger, Losses, TargetFlip, accumulate, needs_parts, voices_of
from gptlab.training.optimizer import learning_rate_at
from gptlab.training.sharding import held, length
from gptlab.training.state import TrainingState
from gptlab.training.summing import Summed, micro_batch
from gptlab.training.verdicts import Batch, Voice

_T = TypeVar("_T")


@dataclass(frozen=True)
class Update:
    """What one update gave, over the total batch: losses in nats, the gradient's length before clipping.

    stop: whether any rank was asked to stop
    by_judge: for every signal of the config, the mean of each judge, lowest first; None of one that did not speak
    dose, doses: |weight·g_signal| / |g_CE| of all signals together and of each, where it was measured in this update
    weights: of every signal of the config, as used; 0 of one that is out of the graph
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


def update(
    state: TrainingState,
    config: TrainingConfig,
    batches: Iterable[Batch],
    world: World,
    placement: Placement,
    *,
    measure_dose: bool = False,
    stop: bool = False,
) -> Update:
    """Make update number `state.step` from this rank's micro-batches of it (see `micro_batches`, and `Batch.part`).

    Raises DivergedError on every rank, before the weights change, if the loss or the gradient is not finite on any.
    """
    model, step, recompute = state.model, state.step, config.activation_checkpointing
    voices = speaking(state, config)
    flip = TargetFlip(config.target_flip, config.target_flip_to)
    disturbed = config.gradient_noise > 0 or config.gradient_bias > 0
    held = any(v.config.dose is not None for v in voices)
    apart = needs_parts(voices) or held or (disturbed and bool(voices))
    measure = bool(voices) and (measure_dose or held)
    ledger = Ledger(model, voices, config.seed) if apart or measure else None

    model.zero_grad(set_to_none=True)
    sums = _Sums(len(voices), config.n_layer, placement.device)
    sums.stop += stop
    summed = Summed(config, model, ledger, apart, sums.all)
    seen: list[tuple[Batch, Losses]] = []
    for batch in batches:
        losses = accumulate(
            model, batch, voices, placement.autocast, flip=flip, ledger=ledger if apart else None, recompute=recompute
        )
        seen.append((batch, losses))
        sums.add(losses, batch.share)
        if ledger and not apart:  # a second pass, so that measuring changes nothing of what is learnt
            accumulate(model, batch, voices, placement.autocast, flip=flip, ledger=ledger, recompute=recompute)
        summed.close(batch)
    summed.over(world)

    dose, doses, weights = None, None, [v.weight for v in voices]
    if ledger:
        ledger.settle()
        doses = ledger.doses()
        factors = _hold(state, config, voices, doses) if measure else [1.0] * len(voices)
        if apart:
            ledger.combine(factors)
        if held and measure:
            weights = [w * f for w, f in zip(weights, factors, strict=True)]
            doses = [d * f for d, f in zip(doses, factors, strict=True)]
            sums.signal.fill_(sum(w * s for w, s in zip(weights, _unweighted(voices, sums), strict=True)))
        dose = ledger.dose(factors)
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    if disturbed:
        true = length(ledger.true if ledger and voices else list(gradients.values()))
        if config.gradient_noise:
            add_drawn(gradients, config.gradient_noise * true, "gradient noise", config.seed, step)
        if config.gradient_bias:
            add_drawn(gradients, config.gradient_bias * true, "gradient bias", config.seed)
    norm = length(list(gradients.values()))
    if not (torch.isfinite(sums.all).all() and isfinite(norm)):
        where = where_not_finite(model, [batch for batch, _ in seen], world, placement)
        where += in_which_batch(seen, world, placement.device)
        raise DivergedError(_what_diverged(step, sums, voices, where))
    learning_rate, clipped = _take_step(state, config, list(gradients.values()), norm)
    by_judge = _by_judge(config, voices, sums)
    stopped = bool(sums.stop)
    loss, signal_loss = float(sums.loss), float(sums.signal)
    weights = of_all(config, voices, weights, 0.0)
    doses = None if doses is None else of_all(config, voices, doses, 0.0)
    return Update(loss, signal_loss, norm, learning_rate, clipped, stopped, by_judge, weights, dose, doses)


def _take_step(
    state: TrainingState, config: TrainingConfig, gradients: list[torch.Tensor], norm: float
) -> tuple[float, bool]:
    """Clip gradients of this length, and let the optimizer change the weights; (learning rate, whether clipped)."""
    clipped = bool(config.grad_clip) and norm > config.grad_clip
    if clipped:
        torch._foreach_mul_(held(gradients), config.grad_clip / norm)
    learning_rate = learning_rate_at(state.step, config)
    for group in state.optimizer.param_groups:
        group["lr"] = learning_rate
    state.optimizer.step()
    torch.autograd.graph.increment_version(state.model.parameters())  # a fused step leaves that out
    state.step += 1
    state.clipped += clipped
    return learning_rate, clipped


def micro_batches(
    config: TrainingConfig, windows: Windows, world: World, step: int, device: torch.device
) -> Iterator[Batch]:
    """This rank's micro-batches of update `step`: consecutive sequences of the same global order for any ranks."""
    size = micro_batch(config, world)
    mine = config.sequences // world.size
    for first in range(world.rank * mine, (world.rank + 1) * mine, size):
        place = step * config.sequences + first
        tokens, targets = windows.rows(place, size)
        tokens, targets = tokens.to(device, non_blocking=True), targets.to(device, non_blocking=True)
        names = windows.window_ids(place, size)
        yield Batch(tokens, targets, step, config.seed, first, size / config.sequences, names)


class _Sums:
    """What is summed over the update and all ranks, in one tensor of float64; spoke: each signal's judges that did."""

    def __init__(self, voices: int, n_layer: int, device: torch.device) -> None:
        self.all = torch.zeros(3 + voices * (n_layer + 1), dtype=torch.float64, device=device)
        self.loss, self.signal, self.stop = self.all[0], self.all[1], self.all[2]
        self.judges = self.all[3:].view(voices, n_layer + 1)  # a signal's judge j in column j
        self.spoke: list[set[int]] = [set() for _ in range(voices)]

    def add(self, losses: Losses, share: float) -> None:
        """Add what a micro-batch gave."""
        self.loss += losses.loss * share
        self.signal += losses.signal_loss * share
        for k, means in enumerate(losses.by_judge):
            self.spoke[k] |= means.keys()
            for judge, mean in means.items():
                self.judges[k, judge] += mean * share


def speaking(state: TrainingState, config: TrainingConfig) -> list[Voice]:
    """The signals of this update with their weights, set by dose where one is held."""
    weights = []
    for k, signal in enumerate(config.signals):
        held = state.weights[k] if state.weights else None
        weight = signal.weight_at(state.step, config.n_layer)
        weights.append(weight if held is None else held * signal.schedule_at(state.step))
    return voices_of(config.signals, weights)


def _hold(state: TrainingState, config: TrainingConfig, voices: Sequence[Voice], doses: Sequence[float]) -> list[float]:
    """The factor of each voice that gives this update the dose asked for, to the digit.

    In every update: gradients change their lengths severalfold within tens of updates, and a weight that is set every
    fifty of them lets the dose drift tenfold. The state keeps the weights, for updates in which a gate lets nothing by.
    """
    factors = []
    held = dict(zip(config.signals, state.weights or [None] * len(config.signals), strict=True))
    for voice, dose in zip(voices, doses, strict=True):
        schedule = voice.config.schedule_at(state.step)
        wanted = voice.config.dose
        factors.append(1.0 if wanted is None or not 0 < dose < float("inf") else wanted * schedule / dose)
        if wanted is not None:
            held[voice.config] = voice.weight * factors[-1] / schedule
    if any(s.dose is not None for s in config.signals):
        state.weights = [held[signal] for signal in config.signals]
    return factors


def of_all(config: TrainingConfig, voices: Sequence[Voice], values: Sequence[_T], silent: _T) -> list[_T]:
    """One value for each signal of the config, where there is one for each voice."""
    of = dict(zip([voice.config for voice in voices], values, strict=True))
    return [of.get(signal, silent) for signal in config.signals]


def _by_judge(config: TrainingConfig, voices: Sequence[Voice], sums: _Sums) -> list[list[float | None]]:
    found: list[list[float | None]] = []
    for spoke, row in zip(sums.spoke, sums.judges.tolist(), strict=True):
        found.append([row[j] if j in spoke else None for j in range(1, config.n_layer)])
    return of_all(config, voices, found, [None] * (config.n_layer - 1))


def _unweighted(voices: Sequence[Voice], sums: _Sums) -> list[float]:
    """Each signal's sum over its judges as it stands in the loss, before its weight."""
    columns = sums.judges.shape[1] - 2
    factors = [columns if v.config.layers == "rotate" else 1 for v in voices]
    return [float(row.sum()) * f for row, f in zip(sums.judges, factors, strict=True)]


def _what_diverged(step: int, sums: _Sums, voices: Sequence[Voice], where: str) -> str:
    """One line that names what is not finite: a judge's signal, else the loss, else the gradient."""
    bad = [
        (voice.config.name, judge)
        for voice, row in zip(voices, sums.judges.tolist(), strict=True)
        for judge, value in enumerate(row)
        if not isfinite(value)
    ]
    if bad:
        what = f"the signal {bad[0][0]} of judge {bad[0][1]} (block {bad[0][1]})"
    elif not isfinite(float(sums.loss)):
        what = "the true loss"
    else:
        what = "the gradient"
    return (
        f"diverged at step {step}: {what} is not finite{where}; "
        "the weights were not changed; lower --learning_rate or --signal.weight and run again"
    )
