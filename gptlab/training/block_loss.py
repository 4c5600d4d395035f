"""The block loss: the gradient of CE(z_L, y) + Σ_signals weight · Σ_j mean signal(z_j, y), block by block.

Judge j reads h_j = f_j(h_{j-1}) as logits z_j = head(ln_f(h_j)), and its signal teaches h_{j-1}. A *frozen* judge only
passes the gradient on through f_j, one vector-Jacobian product through the graph that the forward pass left, without
weight gradients; a *live* one learns from it too. So a block is never run twice for a signal.

Gradients are added to `.grad`. Where that leads is the caller's affair: `into` may redirect it for each source
(gradient_sources.py), and nothing here loops over steps or knows of optimizers. Read this file from the bottom up.

Shapes: B batch, T time, C channels, L blocks, V vocabulary, N = B·T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from gptlab.data.batches import Window
from gptlab.model.fast_cpu import WorkingLinear
from gptlab.model.gpt import GPT, add_gradient
from gptlab.randomness import permutation
from gptlab.signals.config import SignalConfig
from gptlab.signals.readout import CLOSED_FORMS, Readout, ReadoutGradient, TokenLoss, true_loss
from gptlab.training.controls import UNFLIPPED, TargetFlip, flipped, named, rotated, shuffled
from gptlab.training.sharding import blocks_are_sharded


@dataclass(frozen=True)
class Batch:
    """One micro-batch: tokens and targets (B, T), and where it stands in the update.

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


class ActiveSignal(NamedTuple):
    """A signal and the weight it has in this update."""

    config: SignalConfig
    weight: float


def active_signals(configs: Sequence[SignalConfig], weights: Sequence[float]) -> list[ActiveSignal]:
    """The signals that take part in an update: weight 0 takes a signal out of the graph."""
    return [ActiveSignal(config, weight) for config, weight in zip(configs, weights, strict=True) if weight != 0.0]


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


class Source(NamedTuple):
    """What a gradient comes from: the true loss; what signal k teaches, its judges' own share, or its placebo."""

    kind: Literal["true loss", "signal", "judges", "placebo"]
    k: int = 0


TRUE_LOSS = Source("true loss")
Into = Callable[[Source], AbstractContextManager[object]]
"""Inside `into(source)` the gradient that is added to `.grad` is that source's."""


@dataclass(frozen=True)
class BlockGraph:
    """A forward pass that is cut at the block boundaries: a gradient can enter at any hidden state.

    inputs[j-1] is h_{j-1} (B, T, C) as a leaf, outputs[j-1] is f_j of it, without a graph if `recompute`.
    """

    tokens: Tensor
    autocast: torch.dtype | None
    recompute: bool
    inputs: list[Tensor]
    outputs: list[Tensor]

    def hidden(self, j: int) -> Tensor:
        """h_j (B, T, C), detached."""
        return self.outputs[j - 1].detach() if j else self.inputs[0].detach()


class HiddenGradient(NamedTuple):
    """A gradient (B, T, C) at h_block: it teaches that block's weights and continues below, unless it stops here."""

    block: int
    gradient: Tensor
    stop_here: bool = False


def build_graph(model: GPT, tokens: Tensor, autocast: torch.dtype | None, *, recompute: bool = False) -> BlockGraph:
    """Run the blocks on tokens (B, T), each with a graph of its own.

    recompute: keep no block's inner activations; each is run again when a gradient passes through it.
    """
    inputs, outputs = [], []
    with matmuls_in(autocast, model, tokens.device):
        with torch.no_grad():
            h = model.embed(tokens)  # its backward is _embedding_backward
        for block in model.blocks:
            inputs.append(h.detach().requires_grad_())
            with torch.set_grad_enabled(not recompute):
                outputs.append(block(inputs[-1]))
            h = outputs[-1]
    return BlockGraph(tokens, autocast, recompute, inputs, outputs)


def matmuls_in(dtype: torch.dtype | None, model: GPT, device: torch.device) -> AbstractContextManager[object]:
    """Inside, the model's matmuls are in this dtype. A working copy is in it already."""
    if dtype is None or isinstance(model.lm_head, WorkingLinear):
        return nullcontext()
    # Sharded weights are gathered for one pass: they must not outlive it in autocast's cache.
    return torch.autocast(device.type, dtype, cache_enabled=not blocks_are_sharded(model))


def block_vjp(model: GPT, graph: BlockGraph, j: int, gradient: Tensor, *, learn: bool, keep: bool) -> Tensor:
    """The gradient at h_{j-1} of a gradient at h_j; block j's weights add theirs to `.grad` if they learn.

    keep: leave the block's graph for another gradient.
    """
    x, y = graph.inputs[j - 1], graph.outputs[j - 1]
    if graph.recompute:
        with matmuls_in(graph.autocast, model, x.device):
            y, keep = model.blocks[j - 1](x), False
    if not learn:
        return torch.autograd.grad(y, x, gradient, retain_graph=keep)[0]
    torch.autograd.backward(y, gradient, retain_graph=keep)
    passed, x.grad = x.grad, None
    assert passed is not None
    return passed


def backprop_blocks(
    model: GPT, graph: BlockGraph, gradients: Iterable[HiddenGradient], *, embeddings: bool = True, keep: bool
) -> None:
    """Send gradients at hidden states down to the embeddings, adding to `.grad`.

    embeddings: whether those learn too. keep: leave the graphs for another call.
    """
    passing: dict[int, Tensor] = {}
    stopping: dict[int, Tensor] = {}
    for block, gradient, stop_here in gradients:
        at = stopping if stop_here and block else passing  # below block 1 there is nothing to stop before
        at[block] = at[block] + gradient if block in at else gradient
    for j in range(len(graph.outputs), 0, -1):
        if j in stopping:
            block_vjp(model, graph, j, stopping[j], learn=True, keep=keep or j in passing)
        if j in passing:
            below = block_vjp(model, graph, j, passing.pop(j), learn=True, keep=keep)
            passing[j - 1] = below + passing[j - 1] if j - 1 in passing else below
    if embeddings and 0 in passing:
        _embedding_backward(model, graph.tokens, passing[0])


def _embedding_backward(model: GPT, tokens: Tensor, gradient: Tensor) -> None:
    """Add the gradient (B, T, C) at h_0 to both embeddings."""
    wte, wpe = model.wte.weight, model.wpe.weight
    T = tokens.shape[1]
    flat = gradient.flatten(0, 1)  # (N, C)
    if wte.grad is not None and not wte.is_cuda:
        # The token embedding is the head, which has its gradient already: rows are added to it, and no (V, C) tensor
        # of zeros is made for them. On a GPU index_add_ has no fixed order, so PyTorch's own kernel is used there.
        wte.grad.index_add_(0, tokens.flatten(), flat.to(wte.dtype))
    else:
        add_gradient(wte, torch.ops.aten.embedding_dense_backward(flat, tokens.flatten(), len(wte), -1, False))
    if wpe.grad is None:
        wpe.grad = torch.zeros_like(wpe)
    wpe.grad[:T] += gradient.sum(0)


class JudgeOutput(NamedTuple):
    """means: judge -> mean signal over the tokens it read; gradients, with the weight in them; the weight's factor."""

    means: dict[int, Tensor]
    gradients: list[HiddenGradient]
    factor: int


def run_judges(model: GPT, graph: BlockGraph, readout: Readout, signal: ActiveSignal, batch: Batch) -> JudgeOutput:
    """Let one signal's judges read their blocks. What a live judge learns from its own reading goes to `.grad`."""
    config = signal.config
    judges, factor = config.judges_at(batch.step, model.config.n_layer, batch.seed)
    if config.control == "flipped":
        V = model.config.vocab_size
        wrong = flipped(batch.targets, config.flip, config.flip_to, V, batch.seed, batch.names, "flip")
        batch = replace(batch, targets=wrong)
    means, gradients = {}, []
    for j in judges:
        reading = _read_signal(graph, readout, config, j, signal.weight * factor, batch)
        means[j] = reading.total
        gradients.append(_teach(model, graph, config, j, reading.gradient, batch))
    return JudgeOutput(means, gradients, factor)


def _teach(
    model: GPT, graph: BlockGraph, config: SignalConfig, j: int, gradient: Tensor, batch: Batch
) -> HiddenGradient:
    """What judge j's gradient (B, T, C) at h_j becomes for the block below it."""
    live, full = config.evaluator == "live", config.reach == "full"
    if live and full and config.control in ("none", "flipped"):
        return HiddenGradient(j, gradient)  # what it learns and what it passes on are one and the same backward pass
    passed = block_vjp(model, graph, j, gradient, learn=live, keep=True)
    if config.control == "shuffled":
        passed = shuffled(passed, batch.seed, batch.step, batch.first_sequence, j)
    return HiddenGradient(j - 1, passed, stop_here=not full)


def _read_signal(
    graph: BlockGraph, readout: Readout, config: SignalConfig, j: int, weight: float, batch: Batch
) -> ReadoutGradient:
    """The mean signal over the tokens that judge j reads, and its gradient (B, T, C) times weight and share."""
    B, T, C = graph.inputs[0].shape
    h, targets = graph.hidden(j).view(-1, C), batch.targets.reshape(-1)  # (N, C), (N,)
    needs = {None: None, "previous": j - 1, "next": j + 1, "final": len(graph.outputs)}[config.signal.needs]
    other = None if needs is None else graph.hidden(needs).flatten(0, 1)
    rows = _rows_read(config, B, T, batch, j)
    if rows is not None:
        rows = rows.to(h.device)
        h, targets = h[rows], targets[rows]
        other = None if other is None else other[rows]
    signal, n = config.signal, len(h)
    to_argmax = config.control == "flipped" and config.flip_to == "argmax"

    def function(z: Tensor, y: Tensor, other: Tensor | None) -> Tensor:
        return signal(z, named(z, y) if to_argmax else y, other=other, threshold=config.threshold)

    token_loss = TokenLoss(function, None if to_argmax else CLOSED_FORMS.get(signal.name))
    scale = weight * batch.share / n
    read = readout.read(h, targets, token_loss, scale, learn=config.evaluator == "live", other=other)
    gradient = read.gradient
    if rows is not None:
        gradient = torch.zeros(B * T, C, dtype=h.dtype, device=h.device).index_copy_(0, rows, gradient)
    return ReadoutGradient(read.total / n, gradient.view(B, T, C))


def _rows_read(config: SignalConfig, B: int, T: int, batch: Batch, j: int) -> Tensor | None:
    """The flat positions that judge j reads: round(f·T) of every sequence, without replacement; None for all."""
    count = max(1, round(config.positions * T))
    if count == T:
        return None
    drawn = partial(permutation, T, "positions", batch.seed, batch.step)
    chosen = [torch.from_numpy(drawn(batch.first_sequence + b, j)[:count]) for b in range(B)]
    return torch.cat([rows.sort().values + b * T for b, rows in enumerate(chosen)])


def _read_true_loss(model: GPT, graph: BlockGraph, readout: Readout, batch: Batch, flip: TargetFlip) -> ReadoutGradient:
    """The final block's cross-entropy, learning: mean over tokens, and its gradient (B, T, C) at h_L by the share."""
    h, targets, token_loss = graph.hidden(len(graph.outputs)), batch.targets, true_loss
    if flip.share:
        V = model.config.vocab_size
        targets = flipped(targets, flip.share, flip.to, V, batch.seed, batch.names, "target flip")
        token_loss = _argmax_flipped_loss if flip.to == "argmax" else true_loss
    B, T, C = h.shape
    N = B * T
    read = readout.read(h.view(N, C), targets.reshape(-1), token_loss, batch.share / N, learn=True)
    return ReadoutGradient(read.total / N, read.gradient.view(B, T, C))


def _argmax_flipped_loss(logits: Tensor, targets: Tensor, other: Tensor | None = None) -> Tensor:
    return true_loss(logits, named(logits, targets))


class _Descent(NamedTuple):
    source: Source
    gradients: list[HiddenGradient]
    embeddings: bool


def _descents(
    signals: Sequence[ActiveSignal],
    outputs: Sequence[JudgeOutput],
    from_truth: list[HiddenGradient],
    seed: int,
    *,
    by_source: bool,
) -> list[_Descent]:
    """Which gradients go down together: all that may be added up, or each source's alone, and placebos with them."""
    if not by_source:
        trained, withheld = list(from_truth), []
        for signal, output in zip(signals, outputs, strict=True):
            (trained if signal.config.embeddings else withheld).extend(output.gradients)
        return [_Descent(TRUE_LOSS, trained, True), *([_Descent(TRUE_LOSS, withheld, False)] if withheld else [])]
    descents = [_Descent(TRUE_LOSS, from_truth, True)]
    for k, (signal, output) in enumerate(zip(signals, outputs, strict=True)):
        embeddings = signal.config.embeddings
        descents.append(_Descent(Source("signal", k), output.gradients, embeddings))
        if signal.config.control == "placebo":
            turned = [g._replace(gradient=rotated(g.gradient, seed, g.block + 1)) for g in output.gradients]
            descents.append(_Descent(Source("placebo", k), turned, embeddings))
    return descents


def accumulate(
    model: GPT,
    batch: Batch,
    signals: Sequence[ActiveSignal] = (),
    autocast: torch.dtype | None = None,
    *,
    flip: TargetFlip = UNFLIPPED,
    into: Into | None = None,
    recompute: bool = False,
) -> Losses:
    """Add one micro-batch's gradient, scaled by its share of the update's tokens, to `.grad`.

    What `batch.part` leaves out is not computed, and its losses are 0 or left out. into: with it, every source's
    gradient is made by itself, inside `into(source)`, and placebos with them; without, all are sent down at once.
    """
    signals = () if batch.part == "true loss" else signals
    truth = batch.part != "signals"
    L = model.config.n_layer
    enter: Into = into or (lambda source: nullcontext())
    graph = build_graph(model, batch.tokens, autocast, recompute=recompute)
    judges = sum(len(signal.config.judges_at(batch.step, L, batch.seed)[0]) for signal in signals)
    readout = Readout(model, autocast, readings=truth + judges)

    # Read: every reading leaves a gradient at a hidden state.
    loss = torch.zeros((), dtype=torch.float64, device=batch.tokens.device)
    from_truth, outputs = [], []
    if truth:
        with enter(TRUE_LOSS):
            read = _read_true_loss(model, graph, readout, batch, flip)
        loss, from_truth = read.total, [HiddenGradient(L, read.gradient)]
    for k, signal in enumerate(signals):
        with enter(Source("judges", k)):
            outputs.append(run_judges(model, graph, readout, signal, batch))

    # Send them down, block by block.
    descents = _descents(signals, outputs, from_truth, batch.seed, by_source=into is not None)
    for i, (source, gradients, embeddings) in enumerate(descents, 1):
        with enter(source):
            backprop_blocks(model, graph, gradients, embeddings=embeddings, keep=i < len(descents))

    signal_loss = torch.zeros_like(loss)
    for signal, output in zip(signals, outputs, strict=True):
        for mean in output.means.values():
            signal_loss += signal.weight * output.factor * mean
    return Losses(loss, signal_loss, tuple(output.means for output in outputs))
