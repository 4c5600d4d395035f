"""One update: micro-batches to a gradient, dose, clipping, AdamW. State goes in and out; nothing is written."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from gptlab.data.batches import TrainingWindows
from gptlab.device import Placement
from gptlab.distributed import World
from gptlab.errors import DivergedError
from gptlab.signals.config import SignalConfig
from gptlab.training.config import TrainingConfig
from gptlab.training.gradients import Batch, accumulate
from gptlab.training.optimizer import learning_rate_at
from gptlab.training.state import TrainingState

NO_SIGNAL = SignalConfig()


@dataclass(frozen=True)
class Update:
    """What one update gave, over the total batch: losses in nats, the gradient's length before clipping.

    dose: |weight·g_signal| / |g_CE|, where it was measured in this update
    stop: whether any rank was asked to stop
    """

    loss: float
    signal_loss: float
    grad_norm: float
    learning_rate: float
    clipped: bool
    stop: bool
    dose: float | None = None
    by_judge: dict[int, float] = field(default_factory=dict)


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
    """Make update number `state.step` from this rank's micro-batches of it (see `micro_batches`).

    Raises DivergedError on every rank, before the weights change, if the loss or the gradient is not finite on any.
    """
    model, step = state.model, state.step
    parameters = list(model.parameters())
    weight = config.signal.weight_at(step, config.n_layer) if state.weight is None else state.weight
    measure_dose = measure_dose and weight > 0

    model.zero_grad(set_to_none=True)
    L = config.n_layer
    sums = torch.zeros(3 + L, dtype=torch.float64, device=placement.device)  # loss, signal loss, stop, judges
    sums[2] = float(stop)
    alone: list[Tensor] = []
    for batch in batches:
        losses = accumulate(model, batch, config.signal, weight, placement.autocast)
        sums[0] += losses.loss * batch.share
        sums[1] += losses.signal_loss * batch.share
        for judge, value in losses.by_judge.items():
            sums[2 + judge] += value * batch.share
        if measure_dose:
            alone = _true_gradient(state, batch, placement, alone)
    gradients = [p.grad for p in parameters if p.grad is not None]
    world.sum_([*gradients, *alone])
    world.sum_([sums])

    dose = None
    if measure_dose:
        dose = _dose(gradients, alone)
        if config.signal.dose is not None and dose > 0:
            state.weight = weight * config.signal.dose / dose
            _rescale_signal(gradients, alone, config.signal.dose / dose)
            sums[1] *= config.signal.dose / dose
            dose = config.signal.dose
    norm = float(torch.nn.utils.get_total_norm(gradients))
    if not (torch.isfinite(sums).all() and norm < float("inf")):
        raise DivergedError(_what_diverged(state, sums.tolist()))
    clipped = bool(config.grad_clip) and norm > config.grad_clip
    if clipped:
        torch._foreach_mul_(gradients, config.grad_clip / norm)
    learning_rate = learning_rate_at(step, config)
    for group in state.optimizer.param_groups:
        group["lr"] = learning_rate
    state.optimizer.step()
    state.step += 1
    state.clipped += clipped
    values = sums.tolist()
    by_judge = {j: values[2 + j] for j in range(1, L)} if weight > 0 else {}
    return Update(values[0], values[1], norm, learning_rate, clipped, values[2] > 0, dose, by_judge)


def micro_batches(
    config: TrainingConfig, windows: TrainingWindows, world: World, step: int, device: torch.device
) -> Iterator[Batch]:
    """This rank's micro-batches of update `step`: consecutive sequences of the same global order for any ranks."""
    size = world.share(config.sequences, config.batch_size)
    mine = config.sequences // world.size
    for first in range(world.rank * mine, (world.rank + 1) * mine, size):
        tokens, targets = windows.rows(step * config.sequences + first, size)
        tokens, targets = tokens.to(device, non_blocking=True), targets.to(device, non_blocking=True)
        yield Batch(tokens, targets, step, config.seed, first, size / config.sequences)


def _true_gradient(state: TrainingState, batch: Batch, placement: Placement, before: list[Tensor]) -> list[Tensor]:
    """Add the true loss's own gradient of a micro-batch to `before`, leaving `.grad` as it is.

    A second pass, in dose_every-th updates only: so measuring changes nothing of what is learnt.
    """
    parameters = list(state.model.parameters())
    kept = [p.grad for p in parameters]
    for i, p in enumerate(parameters):
        p.grad = before[i] if before else None
    accumulate(state.model, batch, NO_SIGNAL, 0.0, placement.autocast)
    alone = [p.grad for p in parameters if p.grad is not None]
    for p, gradient in zip(parameters, kept, strict=True):
        p.grad = gradient
    return alone


def _dose(gradients: list[Tensor], alone: list[Tensor]) -> float:
    """|g - g_CE| / |g_CE|."""
    signal = torch._foreach_sub(gradients, alone)
    return float(torch.nn.utils.get_total_norm(signal) / torch.nn.utils.get_total_norm(alone))


def _rescale_signal(gradients: list[Tensor], alone: list[Tensor], factor: float) -> None:
    """gradients := g_CE + factor·(g - g_CE), in place."""
    torch._foreach_sub_(gradients, alone)
    torch._foreach_mul_(gradients, factor)
    torch._foreach_add_(gradients, alone)


def _what_diverged(state: TrainingState, sums: list[float]) -> str:
    """One line that names what is not finite: a judge's signal, else the first block with a bad gradient."""

    def finite(x: float) -> bool:
        return x == x and abs(x) != float("inf")

    judges = [j for j, value in enumerate(sums[3:], start=1) if not finite(value)]
    if judges:
        what = f"the signal of judge {judges[0]} (block {judges[0]})"
    elif not finite(sums[0]):
        what = "the true loss"
    else:
        what = "the gradient"
    bad = [n for n, p in state.model.named_parameters() if p.grad is not None and not p.grad.isfinite().all()]
    where = f", first in {bad[0]}" if bad else ""
    return (
        f"diverged at step {state.step}: {what} is not finite{where}; the weights were not changed; "
        "lower --learning_rate or --signal.weight and run again"
    )
