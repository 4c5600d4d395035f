"""The gradient of one micro-batch: the true loss from the top, and every judge's verdict on the block below it.

The forward is cut at the block boundaries. Going down again, block j carries two things. The *flow* is the gradient at
h_j from everything above; it teaches the weights of f_j and passes on to h_{j-1}. The *verdict* is the gradient of
judge j's own reading at h_j; a frozen judge only passes it on, which is one input-gradient of f_j through the graph
that is already there: no second forward, no weight gradients. A live judge's verdict simply joins the flow.

DESIGN: 'Judging'. Nothing here loops over steps or knows of optimizers.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from gptlab.errors import DataError
from gptlab.model.gpt import GPT
from gptlab.randomness import permutation
from gptlab.signals.config import SignalConfig
from gptlab.signals.reader import Reader, Reading, add_gradient, true_loss


@dataclass
class Losses:
    """What one batch gave, detached, float64 scalars.

    loss: the true loss, mean over tokens, nats
    signal_loss: the weighted sum of the signals' means, as it stands in the total loss
    by_judge: judge -> unweighted mean of its signal over the tokens it read
    """

    loss: Tensor
    signal_loss: Tensor
    by_judge: dict[int, Tensor] = field(default_factory=dict)


@dataclass
class Trace:
    """A forward pass cut at the block boundaries: inputs[j-1] is h_{j-1} as a leaf, outputs[j-1] is f_j of it."""

    tokens: Tensor
    inputs: list[Tensor]
    outputs: list[Tensor]

    @property
    def final(self) -> Tensor:
        return self.outputs[-1].detach()

    def hidden(self, j: int) -> Tensor:
        """h_j (B, T, C), detached."""
        return self.outputs[j - 1].detach() if j else self.inputs[0].detach()


def trace(model: GPT, tokens: Tensor, autocast: torch.dtype | None) -> Trace:
    """Run the model's blocks on tokens (B, T), keeping each block's graph apart from the others'."""
    cast = torch.autocast(tokens.device.type, autocast) if autocast else nullcontext()
    inputs, outputs = [], []
    with cast:
        with torch.no_grad():
            h = model.embed(tokens)
        for block in model.blocks:
            inputs.append(h.detach().requires_grad_())
            outputs.append(block(inputs[-1]))
            h = outputs[-1]
    return Trace(tokens, inputs, outputs)


@dataclass(frozen=True)
class Batch:
    """One micro-batch and where it stands in the update: its first sequence's index, its share of the tokens."""

    tokens: Tensor
    targets: Tensor
    step: int
    seed: int
    first_sequence: int
    share: float = 1.0


class Verdict:
    """Judge j's reading of h_j under one signal, for one micro-batch."""

    def __init__(self, config: SignalConfig, judge: int, weight: float, batch: Batch) -> None:
        self.config, self.judge, self.weight, self.batch = config, judge, weight, batch

    def read(self, trace: Trace, reader: Reader) -> Reading:
        """The mean value over the tokens read, and the gradient (B, T, C) with the weight and the batch's share."""
        h, other = trace.hidden(self.judge), self._other(trace)
        B, T, C = h.shape
        rows = self._rows(B, T, h.device)
        n = B * T if rows is None else len(rows)
        h, targets = h.view(-1, C), self.batch.targets.reshape(-1)
        if rows is not None:
            h, targets = h[rows], targets[rows]
            other = None if other is None else other[rows]
        signal = self.config.signal
        options = {"threshold": self.config.threshold}

        def value(z: Tensor, y: Tensor, other: Tensor | None) -> Tensor:
            return signal(z, y, other=other, **options)

        scale = self.weight * self.batch.share / n
        reading = reader.read(h, targets, value, scale, learn=self.config.evaluator == "live", other=other)
        gradient = reading.gradient
        if rows is not None:
            gradient = torch.zeros(B * T, C, dtype=h.dtype, device=h.device).index_copy_(0, rows, gradient)
        return Reading(reading.values / n, gradient.view(B, T, C))

    def _other(self, trace: Trace) -> Tensor | None:
        needs = self.config.signal.needs
        if needs is None:
            return None
        j = {"previous": self.judge - 1, "next": self.judge + 1, "final": len(trace.outputs)}[needs]
        return trace.hidden(j).flatten(0, 1)

    def _rows(self, B: int, T: int, device: torch.device) -> Tensor | None:
        """The flat positions that are read: round(f·T) of every sequence, without replacement; None for all."""
        count = max(1, round(self.config.positions * T))
        if count == T:
            return None
        key = partial(permutation, T, "positions", self.batch.seed, self.batch.step)
        chosen = [key(self.batch.first_sequence + b, self.judge)[:count] for b in range(B)]
        return torch.cat([torch.from_numpy(rows).sort().values + b * T for b, rows in enumerate(chosen)]).to(device)


def verdicts(config: SignalConfig, weight: float, n_layer: int, batch: Batch) -> list[Verdict]:
    """The verdicts that `config` asks for in this update; none where the weight is 0."""
    if weight == 0.0:
        return []
    judges, factor = config.judges_at(batch.step, n_layer, batch.seed)
    return [Verdict(config, judge, weight * factor, batch) for judge in judges]


def read_true_loss(trace: Trace, reader: Reader, batch: Batch) -> Reading:
    """The final block's cross-entropy, learning: mean over tokens, and its gradient (B, T, C) at h_L."""
    B, T, C = trace.final.shape
    n = B * T
    reading = reader.read(trace.final.view(n, C), batch.targets.reshape(-1), true_loss, batch.share / n, learn=True)
    return Reading(reading.values / n, reading.gradient.view(B, T, C))


def descend(
    model: GPT, trace: Trace, reader: Reader, flow: Tensor | None, spoken: Sequence[Verdict], *, keep: bool
) -> dict[int, Tensor]:
    """Send the flow and the verdicts from h_L down to the embeddings, adding to `.grad`; give each judge's mean value.

    flow: gradient at h_L, or None for the verdicts alone
    keep: leave the trace's graphs for another descent
    """
    stays: Tensor | None = None  # gradient that teaches the block it arrives at and goes no further (reach local)
    means: dict[int, Tensor] = {}
    for j in range(len(trace.outputs), 0, -1):
        x, y = trace.inputs[j - 1], trace.outputs[j - 1]
        weights = list(model.blocks[j - 1].parameters())
        onward: Tensor | None = None
        halting: Tensor | None = None
        for verdict in (v for v in spoken if v.judge == j):
            reading = verdict.read(trace, reader)
            means[j] = means.get(j, 0) + reading.values
            live, full = verdict.config.evaluator == "live", verdict.config.reach == "full"
            if live and full:
                flow = _sum(flow, reading.gradient)
                continue
            passed = _backward(x, y, reading.gradient, weights if live else [], keep=True)
            if full:
                onward = _sum(onward, passed)
            else:
                halting = _sum(halting, passed)
        if stays is not None:
            torch.autograd.backward(y, stays, inputs=weights, retain_graph=keep or flow is not None)
        flow = None if flow is None else _backward(x, y, flow, weights, keep=keep)
        flow, stays = _sum(flow, onward), halting
    flow = _sum(flow, stays)
    if flow is not None and all(v.config.embeddings for v in spoken):
        _teach_embeddings(model, trace.tokens, flow)
    return means


def _backward(x: Tensor, y: Tensor, gradient: Tensor, weights: list[Tensor], *, keep: bool) -> Tensor:
    """Gradient at x of y's gradient; the weights, where there are any, add theirs to `.grad`."""
    if not weights:
        return torch.autograd.grad(y, x, gradient, retain_graph=keep)[0]
    torch.autograd.backward(y, gradient, inputs=[x, *weights], retain_graph=keep)
    passed, x.grad = x.grad, None
    assert passed is not None
    return passed


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a + b


def _teach_embeddings(model: GPT, tokens: Tensor, gradient: Tensor) -> None:
    """Add the gradient (B, T, C) at h_0 to both embeddings.

    The token embedding is the head: on a CPU its rows are added into the head's gradient, which is there already,
    instead of into a (V, C) tensor of zeros. On a GPU that addition has no fixed order, so PyTorch's own is used.
    """
    table, places = model.wte.weight, model.wpe.weight
    T = tokens.shape[1]
    flat = gradient.flatten(0, 1)
    if table.grad is not None and not table.is_cuda:
        table.grad.index_add_(0, tokens.flatten(), flat.to(table.dtype))
    else:
        dense = torch.ops.aten.embedding_dense_backward(flat, tokens.flatten(), len(table), -1, False)
        add_gradient(table, dense)
    if places.grad is None:
        places.grad = torch.zeros_like(places)
    places.grad[:T] += gradient.sum(0)


def check_tokens(model: GPT, tokens: Tensor, targets: Tensor) -> None:
    """Refuse token ids that the model has no row for: an index error deep inside would not say which."""
    highest = max(int(tokens.max()), int(targets.max()))
    if highest >= model.config.vocab_size or min(int(tokens.min()), int(targets.min())) < 0:
        raise DataError(
            f"token out of range: expected ids from 0 to {model.config.vocab_size - 1}, found {highest}; "
            "was the corpus made with another tokenizer?"
        )


def backward(
    model: GPT,
    tokens: Tensor,
    targets: Tensor,
    signal_config: SignalConfig | None = None,
    *,
    step: int = 0,
    seed: int = 0,
    first_sequence: int = 0,
    autocast: torch.dtype | None = None,
) -> Losses:
    """Fill `.grad` with the gradient of CE + weight·Σ_j signal, of tokens and targets (B, T), adding to what is there.

    step, seed, first_sequence: keys of the draws (rotate, positions); first_sequence is the index of the first row in
    the update's total batch. autocast: dtype of the matmuls; without it, the parameters' own. Raises DataError for a
    token the model has no row for.
    """
    check_tokens(model, tokens, targets)
    config = signal_config or SignalConfig()
    batch = Batch(tokens, targets, step, seed, first_sequence)
    weight = config.weight_at(step, model.config.n_layer)
    return accumulate(model, batch, config, weight, autocast)


def accumulate(
    model: GPT, batch: Batch, config: SignalConfig, weight: float, autocast: torch.dtype | None = None
) -> Losses:
    """Add one micro-batch's gradient to `.grad`, scaled by its share of the update's tokens."""
    run = trace(model, batch.tokens, autocast)
    reader = Reader(model, autocast)
    spoken = verdicts(config, weight, model.config.n_layer, batch)
    true = read_true_loss(run, reader, batch)
    apart = bool(spoken) and not config.embeddings
    if apart:  # the signal must not reach the embeddings, so it cannot share the true loss's descent
        descend(model, run, reader, true.gradient, [], keep=True)
        means = descend(model, run, reader, None, spoken, keep=False)
    else:
        means = descend(model, run, reader, true.gradient, spoken, keep=False)
    factor = spoken[0].weight if spoken else 0.0
    signal_loss = sum((m * factor for m in means.values()), torch.zeros_like(true.values))
    return Losses(true.values, signal_loss, means)
