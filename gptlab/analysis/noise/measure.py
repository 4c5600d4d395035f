"""Everything that is measured on one model as it stands: gradients of groups, labels, collapse; as JSON values.

A figure that means nothing is null, never NaN. What each means is in docs/noise.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from gptlab.analysis.noise.estimators import figures
from gptlab.analysis.noise.labels import Readings, collapse, quality, token_figures
from gptlab.analysis.noise.options import TRUE_LOSS, NoiseConfig
from gptlab.data.batches import TrainingWindows, ValidationWindows
from gptlab.device import ComputeConfig
from gptlab.errors import ConfigError, DivergedError
from gptlab.signals import tuned_lens
from gptlab.signals.config import SignalConfig
from gptlab.signals.readout import Readout
from gptlab.training.block_loss import ActiveSignal
from gptlab.training.config import TrainingConfig
from gptlab.training.evaluate import SHAPE, hidden_states
from gptlab.training.gradient_noise import (
    GroupGradients,
    Groups,
    InnerProducts,
    inner_products,
    parts_by_block,
    rows_of,
)
from gptlab.training.optimizer import adam_metric
from gptlab.training.state import TrainingState

Progress = Callable[[str, int, int], None]
"""(what, done, of): told while something long is under way."""

READER_BATCH = 512
"""Tokens of a batch that the tuned lens is fitted on, or one window where that is longer."""


@dataclass(frozen=True)
class Subject:
    """A model to be measured, with the config it was trained with (or one made up for another's model) and its data."""

    state: TrainingState
    config: TrainingConfig
    windows: TrainingWindows
    validation: ValidationWindows
    placement: ComputeConfig

    @property
    def next_sequence(self) -> int:
        """The first sequence that the run has not been trained on yet."""
        return self.state.step * self.config.sequences


def measure(
    subject: Subject,
    options: NoiseConfig,
    signals: Mapping[str, SignalConfig],
    branches: Mapping[str, dict[str, Any]] | None = None,
    progress: Progress = lambda what, done, of: None,
) -> dict[str, Any]:
    """All figures of the model, its true loss and the signals asked for.

    branches: what the branch test says of a signal; it stands beside the signal's other figures, under "branch".
    """
    seed, step = subject.windows.seed, subject.state.step
    groups = Groups(subject.next_sequence, options.groups, options.group, options.batch_size, step, seed)
    active = {name: _at_full_weight(subject, config) for name, config in signals.items()}
    found = gradient_figures(subject, groups, active, progress)
    for name, branch in (branches or {}).items():
        found["signals"][name]["branch"] = branch
    return {
        "step": step,
        "seed": seed,
        "groups": groups.count,
        "group": groups.size,
        "sequences": [groups.first, groups.first + groups.count * groups.size],
        "block_size": subject.windows.block_size,
        "n_layer": subject.state.model.config.n_layer,
        "dtype": subject.placement.dtype_name,
        **found,
        **reading_figures(subject, options, groups.first + groups.count * groups.size, progress),
    }


def _at_full_weight(subject: Subject, config: SignalConfig) -> ActiveSignal:
    """The signal with its whole weight, whatever its schedule says of this step; of the run's own, the one it holds."""
    n_layer = subject.state.model.config.n_layer
    if n_layer < 2:
        raise ConfigError("a signal needs a block that judges another: expected a model of at least 2 blocks, found 1")
    config.judges_at(subject.state.step, n_layer, subject.windows.seed)
    for own, held in zip(subject.config.signals, subject.state.weights, strict=False):
        if (own.name, own.weight) == (config.name, config.weight) and held is not None:
            return ActiveSignal(config, held)
    return ActiveSignal(config, 1 / n_layer if config.weight is None else config.weight)


def gradient_figures(
    subject: Subject, groups: Groups, active: Mapping[str, ActiveSignal], progress: Progress
) -> dict[str, Any]:
    """{"signals": {name: {"total", "blocks"}}} of the true loss and every signal, and whether Adam's moments are there.

    Raises DivergedError where a gradient is not finite.
    """
    model, placement = subject.state.model, subject.placement
    rows = rows_of(subject.windows)
    gather = GroupGradients(model, list(active.values()), groups, rows, placement.device, placement.autocast)
    parts, blocks = parts_by_block(model)
    metric = adam_metric(list(model.parameters()), subject.state.optimizer)
    metrics = [None] if metric is None else [None, metric]

    def told(done: int) -> None:
        progress("gradients", done, 2 * groups.count)

    measured = inner_products(gather, groups.count, parts, metrics, progress=told)
    factors = gather.factors(over_all(measured[0]).cross.sum(0))
    scaled = [[part.scaled(factors) for part in of_metric] for of_metric in measured]
    tokens = groups.size * subject.windows.block_size
    signals = {}
    for source, name in enumerate((TRUE_LOSS, *active)):
        signals[name] = entry(scaled, blocks, source, name)
        for one in (signals[name]["total"], *signals[name]["blocks"]):
            scale = one["noise_scale"]
            one["noise_scale_tokens"] = None if scale is None else scale * tokens
        if name in active:
            signals[name]["weight"] = active[name].weight
    return {"preconditioned": metric is not None, "signals": signals}


def entry(measured: list[list[InnerProducts]], blocks: list[int], source: int, name: str) -> dict[str, Any]:
    """One source's figures in total and for every block, of inner products by metric (plain, Adam's) and part."""
    for of_metric in measured:
        if not all(np.isfinite(part.cross[:, source, source]).all() for part in of_metric):
            raise DivergedError(f"the gradient of {name} is not finite: there is nothing to measure")

    def both(sections: list[InnerProducts]) -> dict[str, Any]:
        adam = figures(sections[1], source)["alignment"] if len(sections) > 1 else None
        return {**figures(sections[0], source), "preconditioned_alignment": adam}

    total = [over_all(of_metric) for of_metric in measured]
    return {
        "total": both(total),
        "blocks": [both([of_metric[part] for of_metric in measured]) for part in blocks],
    }


def over_all(parts: list[InnerProducts]) -> InnerProducts:
    """Over the parameters of all parts."""
    return sum(parts[1:], parts[0])


def reading_figures(subject: Subject, options: NoiseConfig, unread: int, progress: Progress) -> dict[str, Any]:
    """Label quality (raw, and through a tuned lens) and collapse of every block, on validation tokens.

    unread: the first sequence that the lens is fitted on, so that it sees none that another figure used.
    """
    model, windows, placement = subject.state.model, subject.validation, subject.placement
    batches = _reader_batches(subject, unread)
    rows = max(1, READER_BATCH // subject.windows.block_size)
    steps = options.reader_tokens // (rows * subject.windows.block_size)
    lens = None
    if steps:
        lens = tuned_lens.fit(
            tuned_lens.TunedLens.untuned(model, blocks=model.config.n_layer), model, batches, steps,
            tuned_lens.TRUE_TOKEN, autocast=placement.autocast,
            progress=lambda done, _: progress("readers", done, steps),
        )  # fmt: skip
    L, readout = model.config.n_layer, Readout(model, placement.autocast, readings=2 * model.config.n_layer)
    raw: list[list[Tensor]] = [[] for _ in range(L)]
    tuned: list[list[Tensor]] = [[] for _ in range(L)]
    for first in range(0, len(windows), SHAPE):
        count = min(SHAPE, len(windows) - first)
        tokens, targets = (t[:count].to(placement.device) for t in windows.rows(first, SHAPE))
        y = targets.flatten()
        for j, h in enumerate(hidden_states(model, tokens, placement)[1:], 1):
            flat = h.flatten(0, 1).float()
            raw[j - 1].append(readout.values(flat, y, token_figures))
            if lens:
                tuned[j - 1].append(readout.values(lens(j, flat), y, token_figures))
        progress("labels", first + count, len(windows))
    blocks = [Readings.of(rows) for rows in raw]
    if not all(np.isfinite(one.loss).all() for one in blocks):
        raise DivergedError("the loss of a block's reading is not finite: there is nothing to measure")
    by_block = [
        {"raw": quality(one), "tuned": quality(Readings.of(better)) if better else None}
        for one, better in zip(blocks, tuned, strict=True)
    ]
    return {
        "label_quality": {
            "tokens": len(windows) * windows.block_size,
            "reader_tokens": steps * rows * subject.windows.block_size,
            "blocks": by_block,
        },
        "collapse": [collapse(one) for one in blocks],
    }


def _reader_batches(subject: Subject, first: int) -> Iterator[tuple[Tensor, Tensor]]:
    device, count = subject.placement.device, max(1, READER_BATCH // subject.windows.block_size)
    while True:
        tokens, targets = subject.windows.rows(first, count)
        yield tokens.to(device), targets.to(device)
        first += count
