"""What judges say of one micro-batch: judge j reads h_j, and its verdict becomes a lesson for block j-1.

The *verdict* is the gradient of judge j's reading at h_j. A frozen judge only passes it on: one input-gradient of f_j
through the graph that is already there, no second forward, no weight gradients. A live judge also learns from it.
docs/signals.md tells of judging and of controls.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from gptlab.data.batches import Window
from gptlab.model.gpt import GPT
from gptlab.randomness import permutation
from gptlab.signals.config import SignalConfig
from gptlab.signals.readout import CLOSED_FORMS, Readout, ReadoutGradient, TokenLoss
from gptlab.training.controls import flipped, named, rotated, shuffled
from gptlab.training.trace import Lesson, Trace, pass_through


@dataclass(frozen=True)
class Batch:
    """One micro-batch and where it stands in the update.

    first_sequence: its first row's index in the update; share: of the update's tokens; windows: each row's name in the
    corpus, which flips are keyed by (without one, a row's index stands for it). part: what its gradient is taken of;
    an update may give its signals other sequences than its true loss, and then the shares of each add up to 1.
    """

    tokens: Tensor
    targets: Tensor
    step: int
    seed: int
    first_sequence: int
    share: float = 1.0
    windows: Sequence[Window] | None = None
    part: Literal["all", "true loss", "signals"] = "all"

    @property
    def names(self) -> Sequence[Window]:
        return self.windows or [(0, self.first_sequence + b) for b in range(len(self.tokens))]


class Voice(NamedTuple):
    """A signal, and the weight it has in this update."""

    config: SignalConfig
    weight: float


@dataclass(frozen=True)
class Said:
    """judge -> mean value over the tokens it read; the lessons that come of it, as weighted; the weight's factor."""

    means: dict[int, Tensor]
    lessons: list[Lesson]
    factor: int


def hear(model: GPT, trace: Trace, reader: Readout, voice: Voice, batch: Batch) -> Said:
    """Let the judges of one signal speak. A live judge's own gradient goes to `.grad`."""
    config = voice.config
    judges, factor = config.judges_at(batch.step, model.config.n_layer, batch.seed)
    if config.control == "flipped":
        vocab = model.config.vocab_size
        wrong = flipped(batch.targets, config.flip, config.flip_to, vocab, batch.seed, batch.names, "flip")
        batch = replace(batch, targets=wrong)
    means, lessons = {}, []
    for j in judges:
        reading = _read(trace, reader, config, j, voice.weight * factor, batch)
        means[j] = reading.total
        lessons.append(_lesson(model, trace, config, j, reading.gradient, batch))
    return Said(means, lessons, factor)


def placebo(lessons: Sequence[Lesson], seed: int) -> list[Lesson]:
    """The same lessons, each turned by its judge's rotation; its length over all parameters is set elsewhere."""
    return [replace(lesson, gradient=rotated(lesson.gradient, seed, lesson.at + 1)) for lesson in lessons]


def _lesson(model: GPT, trace: Trace, config: SignalConfig, j: int, verdict: Tensor, batch: Batch) -> Lesson:
    live, full = config.evaluator == "live", config.reach == "full"
    if live and full and config.control in ("none", "flipped"):
        return Lesson(j, verdict)  # what a live judge learns and what it passes on are one descent
    passed = pass_through(model, trace, j, verdict, learn=live, keep=True)
    if config.control == "shuffled":
        passed = shuffled(passed, batch.seed, batch.step, batch.first_sequence, j)
    return Lesson(j - 1, passed, stays=not full)


def _read(trace: Trace, reader: Readout, config: SignalConfig, j: int, weight: float, batch: Batch) -> ReadoutGradient:
    """The mean value over the tokens that judge j reads, and the gradient (B, T, C) with weight and share."""
    h, targets = trace.hidden(j), batch.targets.reshape(-1)
    other = None if config.signal.needs is None else _other(trace, config, j)
    B, T, C = h.shape
    h = h.view(-1, C)
    rows = _rows(config, B, T, batch, j)
    if rows is not None:
        rows = rows.to(h.device)
        h, targets = h[rows], targets[rows]
        other = None if other is None else other[rows]
    n = len(h)
    signal, marked = config.signal, config.control == "flipped" and config.flip_to == "argmax"

    def function(z: Tensor, y: Tensor, other: Tensor | None) -> Tensor:
        return signal(z, named(z, y) if marked else y, other=other, threshold=config.threshold)

    value = TokenLoss(function, None if marked else CLOSED_FORMS.get(signal.name))
    scale = weight * batch.share / n
    reading = reader.read(h, targets, value, scale, learn=config.evaluator == "live", other=other)
    gradient = reading.gradient
    if rows is not None:
        gradient = torch.zeros(B * T, C, dtype=h.dtype, device=h.device).index_copy_(0, rows, gradient)
    return ReadoutGradient(reading.total / n, gradient.view(B, T, C))


def _other(trace: Trace, config: SignalConfig, j: int) -> Tensor:
    needs = config.signal.needs
    assert needs is not None
    return trace.hidden({"previous": j - 1, "next": j + 1, "final": len(trace.outputs)}[needs]).flatten(0, 1)


def _rows(config: SignalConfig, B: int, T: int, batch: Batch, j: int) -> Tensor | None:
    """The flat positions that are read: round(f·T) of every sequence, without replacement; None for all."""
    count = max(1, round(config.positions * T))
    if count == T:
        return None
    key = partial(permutation, T, "positions", batch.seed, batch.step)
    chosen = [torch.from_numpy(key(batch.first_sequence + b, j)[:count]) for b in range(B)]
    return torch.cat([rows.sort().values + b * T for b, rows in enumerate(chosen)])
