"""The gradient of an update by source: the true loss's, every signal's, every placebo's.

An update needs it where a gradient is measured or scaled against another: a placebo is brought to its signal's norm, a
dose is held or measured, noise is a share of the true loss's gradient. Elsewhere everything is added straight to
`.grad` (block_loss.py), which is cheaper.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor

from gptlab.errors import DataError
from gptlab.model.gpt import GPT
from gptlab.signals.config import SignalConfig
from gptlab.training.block_graph import ActiveSignal, Batch, Losses, Source, active_signals
from gptlab.training.block_loss import accumulate
from gptlab.training.controls import permuted
from gptlab.training.optimizer import AdamStep
from gptlab.training.parallel import full_tensor, global_norm, local_shards, shard_like

Gradients = list[Tensor]
"""One gradient for each of the model's parameters, in their order."""


@contextmanager
def gradients_into(parameters: Sequence[Tensor], gradients: Gradients) -> Iterator[None]:
    """Inside, what is added to the parameters' `.grad` is added to these instead."""
    before = [p.grad for p in parameters]
    for p, g in zip(parameters, gradients, strict=True):
        p.grad = g
    try:
        yield
    finally:
        for p, g in zip(parameters, before, strict=True):
            p.grad = g


class GradientSources:
    """An update's gradient by source.

    true: of the true loss. For every signal: taught, of what it teaches; judges, of what its source learns itself (live
    judges, the head), which is a gradient of its own only where a placebo permutes it; placebos, of what it teaches,
    rotated (only with that control). After `scale_placebos`, parts[k] is what signal k puts into the update.
    """

    def __init__(self, model: GPT, signals: Sequence[ActiveSignal], seed: int) -> None:
        self.names = [name for name, _ in model.named_parameters()]
        self.parameters = list(model.parameters())
        self.signals, self.seed = signals, seed
        self.true = self._zeros()
        self.taught = [self._zeros() for _ in signals]
        self.judges = [self._zeros() if self._is_permuted(k) else taught for k, taught in enumerate(self.taught)]
        self.placebos = [self._zeros() if self._is_placebo(k) else [] for k in range(len(signals))]
        self.parts: list[Gradients] = []

    def _zeros(self) -> Gradients:
        return [torch.zeros_like(p) for p in self.parameters]

    def _is_placebo(self, k: int) -> bool:
        return self.signals[k].config.control == "placebo"

    def _is_permuted(self, k: int) -> bool:
        """Whether the control also permutes what the source itself learns; a frozen judge learns nothing."""
        return self._is_placebo(k) and self.signals[k].config.learns

    def into(self, source: Source) -> AbstractContextManager[None]:
        """Inside, `.grad` is this source's gradient."""
        kind, k = source
        lists = {"true loss": [self.true], "signal": self.taught, "judges": self.judges, "placebo": self.placebos}
        return gradients_into(self.parameters, lists[kind][k])

    def tensors(self) -> list[Tensor]:
        """All gradients, for the sum over ranks."""
        judges = [own for own, taught in zip(self.judges, self.taught, strict=True) if own is not taught]
        return [g for gradients in [self.true, *self.taught, *judges, *self.placebos] for g in gradients]

    def unscaled(self, k: int) -> Gradients:
        """What signal k puts into the update, before a placebo is brought to its signal's norm: sums over groups."""
        if not self._is_permuted(k):
            return self.placebos[k] if self._is_placebo(k) else self.taught[k]
        both, which = zip(self.placebos[k], self.judges[k], self.names, strict=True), self.signals[k].config.rotation
        return [
            turned + shard_like(permuted(full_tensor(own), self.seed, name, which), own) for turned, own, name in both
        ]

    def reference(self, k: int) -> Gradients:
        """The gradient of signal k without its rotation: a placebo has to have its norm."""
        if not self._is_permuted(k):
            return self.taught[k]
        return [taught + own for taught, own in zip(self.taught[k], self.judges[k], strict=True)]

    def scale_placebos(self, replayed: float | None = None, step: AdamStep | None = None) -> None:
        """Make the parts, once the whole batch (and every rank) is in.

        replayed: the norm that a placebo takes from another run's signal instead of its own; with `step`, of what it
        changes there.
        """
        for k in range(len(self.signals)):
            part = self.unscaled(k)
            if self._is_placebo(k):
                wanted, found = global_norm(self.reference(k)) if replayed is None else replayed, global_norm(part)
                factor = step.factor_for(wanted, self.true, part) if step else wanted / found if found else 0.0
                for g in part:
                    g.mul_(factor)
            self.parts.append(part)

    def doses(self) -> list[float]:
        """|weight·g_signal| / |g_CE| of every signal, after `scale_placebos`."""
        true = global_norm(self.true)
        return [global_norm(part) / true for part in self.parts]

    def sum(self, factors: Sequence[float]) -> Gradients:
        """weight·g_signal of all signals together, each times its factor."""
        total = self._zeros()
        for part, factor in zip(self.parts, factors, strict=True):
            torch._foreach_add_(local_shards(total), local_shards(part), alpha=factor)
        return total

    def write_total(self, factors: Sequence[float], *, add: bool = False) -> None:
        """Set `.grad` to the true loss's gradient and every signal's, times its factor; or add that to it."""
        total = self.sum(factors)
        torch._foreach_add_(local_shards(total), local_shards(self.true))
        for p, g in zip(self.parameters, total, strict=True):
            p.grad = p.grad + g if add and p.grad is not None else g


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
    is scaled to its signal's norm on this batch. Raises DataError for a token the model has no row for.

    >>> from gptlab.model import GPT, GPTConfig
    >>> from gptlab.signals import SignalConfig
    >>> model = GPT(GPTConfig(block_size=8, vocab_size=16, n_layer=2, n_head=2, n_embd=4))
    >>> tokens = torch.arange(8).view(1, 8)
    >>> losses = backward(model, tokens, tokens + 1, SignalConfig("confidence", weight=0.5))
    >>> round(float(losses.loss), 1), model.transformer.wte.weight.grad.shape
    (2.8, torch.Size([16, 4]))
    """
    check_tokens(model, tokens, targets)
    configs = [signal_config] if isinstance(signal_config, SignalConfig) else signal_config or []
    batch = Batch(tokens, targets, step, seed, first_sequence)
    signals = active_signals(configs, [c.weight_at(step, model.config.n_layer) for c in configs])
    if not any(signal.config.control == "placebo" for signal in signals):
        return accumulate(model, batch, signals, autocast)
    sources = GradientSources(model, signals, seed)
    losses = accumulate(model, batch, signals, autocast, into=sources.into)
    sources.scale_placebos()
    sources.write_total([1.0] * len(signals), add=True)
    return losses


def check_tokens(model: GPT, tokens: Tensor, targets: Tensor) -> None:
    """Refuse token ids that the model has no row for: an index error deep inside would not say which."""
    lowest = min(int(tokens.min()), int(targets.min()))
    highest = max(int(tokens.max()), int(targets.max()))
    if highest >= model.config.vocab_size or lowest < 0:
        raise DataError(
            f"token out of range: expected ids from 0 to {model.config.vocab_size - 1}, "
            f"found {lowest if lowest < 0 else highest}; was the corpus made with another tokenizer?"
        )
