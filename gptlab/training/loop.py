"""The loop: updates, and what is due between them. It yields records and touches no disk.

At the end of a step come, in this order, its train row, validation, a sample, a checkpoint. The caller writes rows,
draws samples and saves checkpoints as they are yielded; the state is whole at every yield.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

import torch

from gptlab.data.batches import TrainingWindows, ValidationWindows
from gptlab.device import ComputeConfig, deterministic_or_refused
from gptlab.distributed import World
from gptlab.errors import Stopped
from gptlab.model.gpt import GPT
from gptlab.training.block_graph import Batch, active_signals
from gptlab.training.block_loss import accumulate
from gptlab.training.config import TrainingConfig
from gptlab.training.evaluate import SHAPE, TEMPERED_TOKENS, Validation, hidden_states, tempered, validate
from gptlab.training.gradient_noise import quick_noise
from gptlab.training.state import TrainingState
from gptlab.training.step import MicroBatches, Update, update


@dataclass(frozen=True)
class Record:
    """What happened, or (sample, checkpoint) what the caller is to do now, after `step` finished updates."""

    kind: Literal["train", "val", "sample", "checkpoint"]
    step: int
    values: dict[str, Any] = field(default_factory=dict)


def train(
    state: TrainingState,
    config: TrainingConfig,
    windows: TrainingWindows,
    validation: ValidationWindows,
    world: World,
    compute: ComputeConfig,
    *,
    peak: float,
    bytes_per_token: float,
    replayed: Mapping[int, float] = MappingProxyType({}),
    stop: Callable[[], bool] = lambda: False,
) -> Iterator[Record]:
    """Train from `state.step` to `config.steps`.

    peak: the process's matmul rate in FLOP/s, for MFU. replayed: by finished updates, what another run recorded of its
    signal, for a placebo to have too (`signal.placebo_of`). stop: asked between updates and validation batches; when it
    says yes on any rank, a checkpoint is due on all and Stopped is raised after it.
    """

    def checkpoint_and_stop() -> Iterator[Record]:
        yield Record("checkpoint", state.step, {"cursor": windows.cursor(state.step, config.sequences)})
        raise Stopped(
            f"stopped at step {state.step} of {config.steps} with a checkpoint saved; "
            "run the same command again to resume"
        )

    batches = MicroBatches(config, windows, world, compute.device)
    flops_per_token = state.model.config.flops_per_token
    while True:
        step, last = state.step, state.step == config.steps
        if due(config.eval_every, step, last) and state.validated != step:
            keep = TEMPERED_TOKENS if last else 0
            result = validate(state.model, validation, world, compute, stop, config.undoable_flip, keep=keep)
            if result is None:
                yield from checkpoint_and_stop()
                return
            state.validated = step
            fitted = tempered(state.model, result, world, compute) if last else None
            yield Record("val", step, _validation_row(result, fitted, validation.floor, bytes_per_token))
        if due(config.sample_every, step, last) and state.sampled != step:
            state.sampled = step
            yield Record("sample", step)
        if due(config.checkpoint_every, step, last):
            yield Record("checkpoint", step, {"cursor": windows.cursor(step, config.sequences)})
        if last:
            return
        start = time.perf_counter()
        noise = None
        if due(config.noise_every, step, False, first=True):
            noise = quick_noise(state, config, windows, world, compute)
        measure = measures_dose(config, step)
        with deterministic_or_refused():
            done = update(
                state, config, batches.of(step), world, compute,
                measure_dose=measure, replayed=replayed.get(step + 1), stop=stop(),
            )  # fmt: skip
        row = _train_row(state, config, done, time.perf_counter() - start, flops_per_token / (peak * world.size))
        yield Record("train", state.step, row | (noise or {}))
        if done.stop:
            yield from checkpoint_and_stop()


def rehearse(
    model: GPT, config: TrainingConfig, world: World, compute: ComputeConfig, listener: GPT | None = None
) -> None:
    """The passes of an update's micro-batch, all signals among them, and of a validation batch, on tokens 0.

    They leave gradients, and change nothing else.
    """
    T, device = config.block_size, compute.device
    tokens = torch.zeros(config.micro_batch(world.size), T, dtype=torch.int64, device=device)
    signals = active_signals(config.signals, [1.0] * len(config.signals), listener)
    batch = Batch(tokens, tokens, 0, config.seed, 0)
    how: dict[str, Any] = {"recompute": config.activation_checkpointing, "dropout": config.dropout}
    accumulate(model, batch, signals, compute.autocast, **how)
    hidden_states(model, torch.zeros(SHAPE, T, dtype=torch.int64, device=device), compute)


def due(every: int, step: int, last: bool, first: bool = False) -> bool:
    """Whether an interval falls on `step`; 0 is never, the last step always, step 0 only where `first`."""
    return every > 0 and (last or (step % every == 0 and (step > 0 or first)))


def measures_dose(config: TrainingConfig, step: int) -> bool:
    """Whether update `step` measures doses: all do at first, where they change most, and later every dose_every-th."""
    starts = (0, *(signal.start for signal in config.signals))
    early = any(0 <= step - start < config.dose_first for start in starts)
    return config.dose_every > 0 and (early or step % config.dose_every == 0)


def _validation_row(
    result: Validation, fitted: tuple[float, float] | None, floor: float | None, bytes_per_token: float
) -> dict[str, Any]:
    """fitted: the temperature that suits the validation loss best, and that loss."""
    row: dict[str, Any] = {"loss": result.loss}
    if floor is not None:
        row["excess_loss"] = result.loss - floor
    if result.clean_loss is not None:
        row["clean_loss"] = result.clean_loss
    row |= {"accuracy": result.accuracy, **result.named}
    if fitted:
        row["temperature"], row["tempered_loss"] = fitted
    row["bits_per_byte"] = result.loss / math.log(2) / bytes_per_token
    return row | {"block_loss": result.block_loss, "block_confidence": result.block_confidence}


def _train_row(
    state: TrainingState, config: TrainingConfig, done: Update, seconds: float, mfu_per_speed: float
) -> dict[str, Any]:
    speed = config.total_batch_tokens / seconds
    row: dict[str, Any] = {
        "loss": done.loss,
        "signal_loss": done.signal_loss,
        "grad_norm": done.grad_norm,
        "clipped": done.clipped,
        "lr": done.learning_rate,
        "tokens": state.step * config.total_batch_tokens,
        "tokens_per_second": speed,
        "mfu": speed * mfu_per_speed,
    }
    of_noise = {"noise_step_share": done.noise_step_share, "batch_noise": done.batch_noise}
    row |= {name: value for name, value in of_noise.items() if value is not None}
    if done.dose is not None:
        row |= done.conversation or {}
        row |= {"dose": done.dose, "signal_norm": done.signal_norm}
        row |= {"step_change": done.step_change, "step_share": done.step_share}
        if len(done.weights) == 1:
            row |= {"weight": done.weights[0], "signal_by_judge": done.by_judge[0]}
        else:
            row |= {"doses": done.doses, "weights": done.weights, "signals_by_judge": done.by_judge}
    return row
