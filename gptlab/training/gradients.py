"""The gradient of CE + weight·Σ_j signal: one micro-batch added to what is there, whole or in parts.

Whole is what trains: one descent for everything, added to `.grad`. In parts, a `Ledger` keeps the true loss's, each
signal's and each placebo's gradient apart, where a control, a dose or noise is measured against one of them. Nothing
here loops over steps or knows of optimizers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from gptlab.errors import DataError
from gptlab.model.gpt import GPT
from gptlab.signals.config import SignalConfig
from gptlab.signals.readout import Readout, ReadoutGradient, true_loss
from gptlab.training.controls import flipped, named, permuted
from gptlab.training.sharding import cut_like, held, length, whole
from gptlab.training.trace import Lesson, Trace, descend, trace
from gptlab.training.verdicts import Batch, Voice, hear, placebo


@dataclass(frozen=True)
class Losses:
    """What one batch gave, detached, float64 scalars.

    loss: the true loss, mean over tokens, nats
    signal_loss: the weighted sum of the signals' means, as it stands in the total loss
    by_judge: for every signal, judge -> unweighted mean of the signal over the tokens it read
    """

    loss: Tensor
    signal_loss: Tensor
    by_judge: tuple[dict[int, Tensor], ...] = ()


@dataclass(frozen=True)
class TargetFlip:
    """A known share of wrong targets in the true loss (`--target_flip`)."""

    share: float = 0.0
    to: Literal["uniform", "argmax"] = "uniform"


CLEAN = TargetFlip()


def backward(
    model: GPT,
    tokens: Tensor,
    targets: Tensor,
    signal_config: SignalConfig | Sequence[SignalConfig] | None = None,
    *,
    step: int = 0,
    seed: int = 0,
    first_sequence: int = 0,
    autocast: torch.dtype | None = None,
) -> Losses:
    """Fill `.grad` with the gradient of CE + weight·Σ_j signal, of tokens and targets (B, T), adding to what is there.

    step, seed, first_sequence: keys of the draws (rotate, positions, controls); first_sequence is the index of the
    first row in the update's total batch. autocast: dtype of the matmuls; without it, the parameters' own. A placebo
    is scaled to its signal's length on this batch. Raises DataError for a token the model has no row for.
    """
    check_tokens(model, tokens, targets)
    configs = [signal_config] if isinstance(signal_config, SignalConfig) else signal_config or []
    batch = Batch(tokens, targets, step, seed, first_sequence)
    voices = voices_of(configs, [c.weight_at(step, model.config.n_layer) for c in configs])
    if not needs_parts(voices):
        return accumulate(model, batch, voices, autocast)
    ledger = Ledger(model, voices, seed)
    losses = accumulate(model, batch, voices, autocast, ledger=ledger)
    ledger.settle()
    ledger.combine([1.0] * len(voices), add=True)
    return losses


def voices_of(configs: Sequence[SignalConfig], weights: Sequence[float]) -> list[Voice]:
    """The signals that speak: weight 0 takes a signal out of the graph."""
    return [Voice(config, weight) for config, weight in zip(configs, weights, strict=True) if weight != 0.0]


def needs_parts(voices: Sequence[Voice]) -> bool:
    """Whether the gradient must be kept in parts: a placebo is as long as what it stands for."""
    return any(voice.config.control == "placebo" for voice in voices)


def accumulate(
    model: GPT,
    batch: Batch,
    voices: Sequence[Voice] = (),
    autocast: torch.dtype | None = None,
    *,
    flip: TargetFlip = CLEAN,
    ledger: Ledger | None = None,
    recompute: bool = False,
) -> Losses:
    """Add one micro-batch's gradient, scaled by its share of the update's tokens, to `.grad` or to a ledger.

    What the batch is not for is not computed, and its losses are 0 or left out.
    """
    truth = batch.part != "signals"
    voices = () if batch.part == "true loss" else voices
    run = trace(model, batch.tokens, autocast, recompute=recompute)
    L = model.config.n_layer
    judges = (voice.config.judges_at(batch.step, L, batch.seed)[0] for voice in voices)
    reader = Readout(model, autocast, readings=truth + sum(map(len, judges)))
    loss = torch.zeros((), dtype=torch.float64, device=batch.tokens.device)
    if ledger is None:
        lessons, apart = [], []
        if truth:
            true = _read_true_loss(model, run, reader, batch, flip)
            loss, lessons = true.total, [Lesson(L, true.gradient)]
        said = [hear(model, run, reader, voice, batch) for voice in voices]
        for voice, what in zip(voices, said, strict=True):
            (lessons if voice.config.embeddings else apart).extend(what.lessons)
        descend(model, run, lessons, keep=bool(apart))
        if apart:
            descend(model, run, apart, embeddings=False, keep=False)
    else:
        if truth:
            with ledger.entry(ledger.true):
                true = _read_true_loss(model, run, reader, batch, flip)
                loss = true.total
                descend(model, run, [Lesson(L, true.gradient)], keep=bool(voices))
        said = []
        for k, voice in enumerate(voices):
            with ledger.entry(ledger.judges[k]):
                said.append(hear(model, run, reader, voice, batch))
            taught, embeddings = said[-1].lessons, voice.config.embeddings
            with ledger.entry(ledger.signals[k]):
                descend(model, run, taught, embeddings=embeddings, keep=True)
            if voice.config.control == "placebo":
                with ledger.entry(ledger.placebos[k]):
                    descend(model, run, placebo(taught, batch.seed), embeddings=embeddings, keep=True)
    signal_loss = torch.zeros_like(loss)
    for voice, what in zip(voices, said, strict=True):
        for mean in what.means.values():
            signal_loss += voice.weight * what.factor * mean
    return Losses(loss, signal_loss, tuple(what.means for what in said))


def _read_true_loss(model: GPT, run: Trace, reader: Readout, batch: Batch, flip: TargetFlip) -> ReadoutGradient:
    """The final block's cross-entropy, learning: mean over tokens, and its gradient (B, T, C) at h_L."""
    h, targets, value = run.hidden(len(run.outputs)), batch.targets, true_loss
    if flip.share:
        vocab = model.config.vocab_size
        targets = flipped(targets, flip.share, flip.to, vocab, batch.seed, batch.names, "target flip")
        value = _named_true_loss if flip.to == "argmax" else true_loss
    B, T, C = h.shape
    n = B * T
    reading = reader.read(h.view(n, C), targets.reshape(-1), value, batch.share / n, learn=True)
    return ReadoutGradient(reading.total / n, reading.gradient.view(B, T, C))


def _named_true_loss(logits: Tensor, targets: Tensor, other: Tensor | None = None) -> Tensor:
    return true_loss(logits, named(logits, targets))


Gradients = list[Tensor]
"""One gradient for each of the model's parameters, in their order."""


class Ledger:
    """An update's gradient in parts.

    true: of the true loss. For every voice: signals, of its lessons; judges, of live judges' own verdicts; placebos, of
    its lessons rotated (only with that control). After `settle`, parts[k] is what voice k puts into the update.
    """

    def __init__(self, model: GPT, voices: Sequence[Voice], seed: int) -> None:
        self.names = [name for name, _ in model.named_parameters()]
        self.parameters = list(model.parameters())
        self.voices, self.seed = voices, seed
        self.true = self._empty()
        self.signals = [self._empty() for _ in voices]
        self.judges = [
            self._empty() if v.config.control == "placebo" else s for v, s in zip(voices, self.signals, strict=True)
        ]
        self.placebos = [self._empty() if v.config.control == "placebo" else [] for v in voices]
        self.parts: list[Gradients] = []

    def _empty(self) -> Gradients:
        return [torch.zeros_like(p) for p in self.parameters]

    @contextmanager
    def entry(self, gradients: Gradients) -> Iterator[None]:
        """Inside, `.grad` is this entry's."""
        kept = [p.grad for p in self.parameters]
        for p, g in zip(self.parameters, gradients, strict=True):
            p.grad = g
        try:
            yield
        finally:
            for p, before in zip(self.parameters, kept, strict=True):
                p.grad = before

    def tensors(self) -> list[Tensor]:
        """All entries, for the sum over ranks."""
        apart = [own for own, taught in zip(self.judges, self.signals, strict=True) if own is not taught]
        return [g for gradients in [self.true, *self.signals, *apart, *self.placebos] for g in gradients]

    def unscaled(self, k: int) -> Gradients:
        """What voice k puts into the update, before a placebo is brought to its signal's length: sums over groups."""
        if self.voices[k].config.control != "placebo":
            return self.signals[k]
        both = zip(self.placebos[k], self.judges[k], self.names, strict=True)
        return [turned + cut_like(permuted(whole(own), self.seed, name), own) for turned, own, name in both]

    def measure(self, k: int) -> Gradients:
        """The gradient of voice k without its rotation: as long as this a placebo has to be."""
        if self.voices[k].config.control != "placebo":
            return self.signals[k]
        return [taught + own for taught, own in zip(self.signals[k], self.judges[k], strict=True)]

    def settle(self) -> None:
        """Make the parts, once the whole batch (and every rank) is in: a placebo is scaled to its signal's length."""
        for k, voice in enumerate(self.voices):
            part = self.unscaled(k)
            if voice.config.control == "placebo":
                signal, found = length(self.measure(k)), length(part)
                for g in part:
                    g.mul_(signal / found if found else 0.0)
            self.parts.append(part)

    def doses(self) -> list[float]:
        """|weight·g_signal| / |g_CE| of every voice, after `settle`."""
        true = length(self.true)
        return [length(part) / true for part in self.parts]

    def dose(self, factors: Sequence[float]) -> float:
        """The same of all voices together, each times its factor."""
        return length(self._sum(factors)) / length(self.true)

    def _sum(self, factors: Sequence[float]) -> Gradients:
        total = self._empty()
        for part, factor in zip(self.parts, factors, strict=True):
            torch._foreach_add_(held(total), held(part), alpha=factor)
        return total

    def combine(self, factors: Sequence[float], *, add: bool = False) -> None:
        """Set `.grad` to the true loss's gradient and every voice's, times its factor; or add that to it."""
        total = self._sum(factors)
        torch._foreach_add_(held(total), held(self.true))
        for p, g in zip(self.parameters, total, strict=True):
            p.grad = p.grad + g if add and p.grad is not None else g


def check_tokens(model: GPT, tokens: Tensor, targets: Tensor) -> None:
    """Refuse token ids that the model has no row for: an index error deep inside would not say which."""
    lowest = min(int(tokens.min()), int(targets.min()))
    highest = max(int(tokens.max()), int(targets.max()))
    if highest >= model.config.vocab_size or lowest < 0:
        raise DataError(
            f"token out of range: expected ids from 0 to {model.config.vocab_size - 1}, "
            f"found {lowest if lowest < 0 else highest}; was the corpus made with another tokenizer?"
        )
