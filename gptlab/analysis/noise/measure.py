"""Everything that is measured on one model as it stands: gradients of groups, labels, collapse; as JSON values.

`probe` does so for anybody's torch model and losses; `alignment_history` reads what a run logged while it was trained.
A figure that means nothing is null, never NaN. What each means is in docs/noise.md.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from gptlab.analysis.noise import LEAST_GROUPS, TRUE_LOSS, NoiseConfig, looks
from gptlab.analysis.noise.estimators import Readings, collapse, figures, half_width, quality, token_figures
from gptlab.data.batches import TrainingWindows, ValidationWindows
from gptlab.data.tokenizers import Tokenizer
from gptlab.device import ComputeConfig
from gptlab.errors import ConfigError, DivergedError
from gptlab.runs.folder import RunFolder
from gptlab.signals import tuned_lens
from gptlab.signals.config import SignalConfig
from gptlab.signals.readout import Readout
from gptlab.training.block_graph import ActiveSignal
from gptlab.training.config import TrainingConfig
from gptlab.training.evaluate import SHAPE, hidden_states
from gptlab.training.gradient_noise import (
    Gradients,
    GroupGradients,
    Groups,
    GrowingProducts,
    InnerProducts,
    inner_products,
    parts_by_block,
    rows_of,
)
from gptlab.training.optimizer import adam_metric
from gptlab.training.state import TrainingState


class Progress(Protocol):
    """Called while something long is under way: what it is, how much is done of how much, and words on it."""

    def __call__(self, what: str, done: int, of: int | None, words: str = "", /) -> None: ...


READER_BATCH = 512
"""Tokens of a batch that the tuned lens is fitted on, or one window where that is longer."""


@dataclass(frozen=True)
class Subject:
    """A model to be measured, with the config it was trained with (or one made up for another's model) and its data.

    tokenizer: what its tokens stand for, where that is known.
    """

    state: TrainingState
    config: TrainingConfig
    windows: TrainingWindows
    validation: ValidationWindows
    placement: ComputeConfig
    tokenizer: Tokenizer | None = None


def measure(
    subject: Subject,
    options: NoiseConfig,
    signals: Mapping[str, SignalConfig],
    branches: Mapping[str, dict[str, Any]] | None = None,
    progress: Progress = lambda what, done, of, words="": None,
) -> dict[str, Any]:
    """All figures of the model, its true loss and the signals asked for.

    branches: what the branch test says of a signal, which goes under "branch".
    """
    seed, step = subject.windows.seed, subject.state.step
    first = step * subject.config.sequences  # that the run has not been trained on yet
    groups = Groups(first, options.group, options.batch_size, step, seed)
    active = {name: _at_full_weight(subject, config) for name, config in signals.items()}
    found = _gradient_figures(subject, options, groups, active, progress)
    unread = first + found["groups"] * groups.size
    for name, branch in (branches or {}).items():
        found["signals"][name]["branch"] = branch
    return {
        **about(subject),
        "group": groups.size,
        "sequences": [first, unread],
        **found,
        **_reading_figures(subject, options, unread, progress),
    }


def about(subject: Subject) -> dict[str, Any]:
    """What was measured, for every measure."""
    return {
        "step": subject.state.step,
        "seed": subject.windows.seed,
        "block_size": subject.windows.block_size,
        "n_layer": subject.state.model.config.n_layer,
        "dtype": subject.placement.dtype_name,
    }


def _at_full_weight(subject: Subject, config: SignalConfig) -> ActiveSignal:
    """The signal with its whole weight, whatever its schedule says of this step; of the run's own, the one it holds."""
    n_layer = subject.state.model.config.n_layer
    if n_layer < 2 and config.kind == "reading":
        raise ConfigError("a signal needs a block that judges another: expected a model of at least 2 blocks, found 1")
    config.judges_at(subject.state.step, n_layer, subject.windows.seed)
    for own, held in zip(subject.config.signals, subject.state.weights, strict=False):
        if (own.name, own.weight) == (config.name, config.weight) and held is not None:
            return ActiveSignal(config, held)
    return ActiveSignal(config, 1 / n_layer if config.weight is None else config.weight)


def _gradient_figures(
    subject: Subject, options: NoiseConfig, groups: Groups, active: Mapping[str, ActiveSignal], progress: Progress
) -> dict[str, Any]:
    """Figures of the true loss and every signal, of as many groups as the options ask for, and why of no more.

    {"groups", "stopped": {"by", "half_width", "narrow", "budget"}, "preconditioned", "signals": {name: {"total",
    "blocks"}}}; preconditioned: whether Adam's moments are there. Raises DivergedError where a gradient is not finite.
    """
    model, placement, rows = subject.state.model, subject.placement, rows_of(subject.windows)
    gather = GroupGradients(model, list(active.values()), groups, rows, placement.device, placement.autocast)
    parts, _ = parts_by_block(model)
    metric = adam_metric(list(model.parameters()), subject.state.optimizer)
    growing = GrowingProducts(gather, parts, [None] if metric is None else [None, metric])
    end = time.monotonic() + options.budget if options.budget else math.inf
    most = _most_groups(subject, options)
    words, found, stopped = "", {}, {}
    for look in looks(most):
        while growing.groups < look and (growing.groups < LEAST_GROUPS or time.monotonic() < end):
            growing.add()
            progress("gradients", growing.groups, None, words)
        found = _signal_figures(subject, groups, gather, growing, active, progress)
        widest = _widest(found)
        words = "" if widest is None or widest == math.inf else f"alignment ±{widest:.2g}"
        if by := _stopped(widest, growing.groups, most, end, options):
            stopped = {"by": by, "half_width": None if widest == math.inf else widest}
            stopped |= {"narrow": options.narrow, "budget": options.budget}
            break
    return {"groups": growing.groups, "stopped": stopped, "preconditioned": metric is not None, "signals": found}


def _most_groups(subject: Subject, options: NoiseConfig) -> int:
    """As many as the options allow, and as an epoch has, so that none is measured twice; but never below the least."""
    windows = subject.windows
    if not windows.corpus.complete:
        return options.groups
    return min(options.groups, max(LEAST_GROUPS, windows.epoch // options.group))


def _widest(signals: Mapping[str, Any]) -> float | None:
    """Half the width of the widest interval of an alignment; None where there is none that more groups would narrow.

    A signal without any gradient, a gate that lets nothing through, has none.
    """
    widths = [
        half_width(signal["total"]["alignment"])
        for name, signal in signals.items()
        if name != TRUE_LOSS and signal["total"]["dose"] != 0
    ]
    return max(widths, default=None)


def _stopped(widest: float | None, groups: int, most: int, end: float, options: NoiseConfig) -> str:
    """Why no more groups are measured; "" where more are. What an interval's middle is does not count."""
    if widest is None:
        return "nothing to narrow"
    if widest < options.narrow:
        return "interval"
    if groups >= most:
        return "groups" if most == options.groups else "corpus"
    return "budget" if time.monotonic() >= end else ""


def _signal_figures(
    subject: Subject,
    groups: Groups,
    gather: GroupGradients,
    growing: GrowingProducts,
    active: Mapping[str, ActiveSignal],
    progress: Progress,
) -> dict[str, dict[str, Any]]:
    """{name: {"total", "blocks"}} of the true loss and every signal, of the groups so far."""
    n, (_, blocks) = growing.groups, parts_by_block(subject.state.model)
    measured = growing.look(lambda done: progress("gradients", n, None, f"{done}/{n} compared"))
    plain = measured[0]
    factors = gather.factors(sum(plain[1:], plain[0]).cross.sum(0))
    scaled = [[part.scaled(factors) for part in of_metric] for of_metric in measured]
    tokens = groups.size * subject.windows.block_size
    signals: dict[str, dict[str, Any]] = {}
    for source, name in enumerate((TRUE_LOSS, *active)):
        signals[name] = entry(scaled, blocks, source, name)
        for one in (signals[name]["total"], *signals[name]["blocks"]):
            scale = one["noise_scale"]
            one["noise_scale_tokens"] = None if scale is None else scale * tokens
        if name in active:
            signals[name]["weight"] = active[name].weight
    return signals


def entry(measured: list[list[InnerProducts]], blocks: list[int], source: int, name: str) -> dict[str, Any]:
    """One source's figures in total and for every block, of inner products by metric (plain, Adam's) and part."""
    for of_metric in measured:
        if not all(np.isfinite(part.cross[:, source, source]).all() for part in of_metric):
            raise DivergedError(f"the gradient of {name} is not finite: there is nothing to measure")

    def both(sections: list[InnerProducts]) -> dict[str, Any]:
        adam = figures(sections[1], source)["alignment"] if len(sections) > 1 else None
        return {**figures(sections[0], source), "preconditioned_alignment": adam}

    total = [sum(of_metric[1:], of_metric[0]) for of_metric in measured]
    return {"total": both(total), "blocks": [both([of_metric[part] for of_metric in measured]) for part in blocks]}


def _reading_figures(subject: Subject, options: NoiseConfig, unread: int, progress: Progress) -> dict[str, Any]:
    """Label quality (raw, and through a tuned lens) and collapse of every block, on validation tokens.

    unread: the first sequence that the lens is fitted on, so that it sees none that another figure used.
    """
    model, windows, placement = subject.state.model, subject.validation, subject.placement
    L, rows = model.config.n_layer, max(1, READER_BATCH // subject.windows.block_size)
    steps = options.reader_tokens // (rows * subject.windows.block_size)
    lens = tuned_lens.fit(
        tuned_lens.TunedLens.untuned(model, blocks=L), model, _reader_batches(subject, unread, rows), steps,
        tuned_lens.TRUE_TOKEN, autocast=placement.autocast, progress=lambda done, _: progress("readers", done, steps),
    ) if steps else None  # fmt: skip
    readout = Readout(model, placement.autocast, readings=2 * L)
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
    by_tuned = [quality(Readings.of(one)) if one else None for one in tuned]
    return {
        "label_quality": {
            "tokens": len(windows) * windows.block_size,
            "reader_tokens": steps * rows * subject.windows.block_size,
            "blocks": [{"raw": quality(one), "tuned": better} for one, better in zip(blocks, by_tuned, strict=True)],
        },
        "collapse": [collapse(one) for one in blocks],
    }


def _reader_batches(subject: Subject, first: int, count: int) -> Iterator[tuple[Tensor, Tensor]]:
    while True:
        tokens, targets = subject.windows.rows(first, count)
        yield tokens.to(subject.placement.device), targets.to(subject.placement.device)
        first += count


_BLOCK = re.compile(r"(?:.*\.)?(?:h|layers|blocks|layer)\.(\d+)\.")
"""Names of parameters that belong to a numbered block, as GPT-2, Llama, BERT and most others write them."""


def probe(
    model: nn.Module,
    losses: Mapping[str, Callable[[Any, Any], Tensor]],
    batches: Iterable[Any],
    *,
    optimizer: torch.optim.Optimizer | None = None,
) -> dict[str, Any]:
    """How each loss's gradient stands to the first one's, the true loss: noise, alignment, progress, variance.

    losses: name -> function of (model, batch) that gives a scalar, auxiliary ones times their weight. batches: groups,
    each a batch of what the functions take; at least 3, and 32 or more for intervals to be trusted. optimizer: an Adam
    after some steps, for the preconditioned alignment. Gives {"signals": {name: {"total", "blocks"}}} as `gptlab noise
    --json` does (docs/noise.md); blocks are the model's numbered ones by its parameters' names. The model is put into
    evaluation mode meanwhile; weights and `.grad` stay as they are. Raises ConfigError for what cannot be measured.

    >>> point = nn.Linear(2, 1, bias=False)
    >>> data = [torch.tensor([[1.0, 0.1 * k]]) for k in range(32)]
    >>> def true(model, x):
    ...     return model(x).mean()
    >>> def against(model, x):
    ...     return -0.5 * model(x).mean()
    >>> found = probe(point, {"true": true, "against": against}, data)["signals"]["against"]["total"]
    >>> round(found["alignment"]["value"], 6), round(found["progress"], 6), round(found["variance"], 6)
    (-1.0, 0.5, 0.25)
    """
    groups = list(batches)
    if len(groups) < 3 or not losses:
        found = f"found {len(losses)} and {len(groups)}; cut the batch into smaller ones"
        raise ConfigError(f"probe needs a loss and at least 3 groups, better 32; {found}")
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    parameters = [p for _, p in named]
    if not parameters:
        raise ConfigError("probe needs a model with parameters that take gradient, found none; see requires_grad_")
    parts, blocks = _parts([name for name, _ in named])
    metric = None if optimizer is None else adam_metric(parameters, optimizer)

    def gather(i: int) -> list[Gradients]:
        return [_gradient(name, loss, model, groups[i], parameters) for name, loss in losses.items()]

    with _evaluating(model):
        measured = inner_products(gather, len(groups), parts, [None] if metric is None else [None, metric])
    return {
        "groups": len(groups),
        "preconditioned": metric is not None,
        "signals": {name: entry(measured, blocks, source, name) for source, name in enumerate(losses)},
    }


def _gradient(
    name: str, loss: Callable[[Any, Any], Tensor], model: nn.Module, batch: Any, parameters: Sequence[Tensor]
) -> Gradients:
    with torch.enable_grad():
        value = loss(model, batch)
        if not isinstance(value, Tensor) or value.numel() != 1:
            found = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ConfigError(f"the loss {name!r} must give a scalar tensor, found {found}; take its mean")
        if not value.requires_grad:  # a gate that let nothing by
            return [torch.zeros_like(p) for p in parameters]
        return list(torch.autograd.grad(value.sum(), parameters, materialize_grads=True, allow_unused=True))


def _parts(names: Sequence[str]) -> tuple[list[int], list[int]]:
    """(for each parameter its part, for each block its part): the numbered blocks, and one more part for the rest."""
    numbers = [int(match[1]) if (match := _BLOCK.match(name)) else None for name in names]
    known = sorted({number for number in numbers if number is not None})
    return [len(known) if n is None else known.index(n) for n in numbers], list(range(len(known)))


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Inside, no module draws (dropout) or counts: a group's gradient is the same whenever it is asked for."""
    before = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in before.items():
            module.training = training


def alignment_history(source: Path) -> dict[str, Any] | None:
    """{"steps", "noise_scale", "signals": [{"total", "blocks"}]} over training; None where nothing was logged.

    source: a run's folder, or one of its checkpoints. Each list has one value a step; blocks[j] is of block j + 1.
    """
    folders = (RunFolder(path) for path in (source, source.resolve().parent.parent))
    folder = next((folder for folder in folders if folder.exists() and folder.path.is_dir()), None)
    rows = [row for row in (folder.rows() if folder else ()) if row["kind"] == "train" and "noise_scale" in row]
    if not rows:
        return None
    signals = range(len(rows[0]["alignment"]))
    by_block = [[list(v) for v in zip(*(row["alignment_by_block"][k] for row in rows), strict=True)] for k in signals]
    return {
        "steps": [row["step"] for row in rows],
        "noise_scale": [row["noise_scale"] for row in rows],
        "signals": [{"total": [row["alignment"][k] for row in rows], "blocks": by_block[k]} for k in signals],
    }
