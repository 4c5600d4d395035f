"""The loss of a micro-batch: CE(z_L, y) + Σ_signals weight · signal, and its gradient, block by block.

A signal is a second source of gradients, next to the true loss. There are three kinds (`SOURCES`):

- Block readings: judge j, which is block f_j, reads h_j = f_j(h_{j-1}) as logits z_j = head(ln_f(h_j)), and its signal
  trains the blocks below, through h_{j-1}. A *frozen* judge passes the gradient down by one vector-Jacobian product
  through the graph of the forward pass and learns nothing itself; a *live* judge learns from it too. Without
  activation checkpointing no block is run again for a judge.
- Sequence objectives: losses of whole sequences at the end of the model, which learns from them as from the true loss,
  head and ln_f included.
- Conversations (conversation.py).

Gradients are added to `.grad`, or to where `into` redirects each source (gradient_sources.py). Nothing here loops over
steps or knows of optimizers. Read this file from the bottom up: `accumulate` comes last.

Shapes: B batch, T time, C channels, L blocks, V vocabulary, N = B·T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from gptlab.model.gpt import GPT
from gptlab.randomness import permutation
from gptlab.signals.config import SignalConfig
from gptlab.signals.readout import CLOSED_FORMS, Readout, TokenLoss, at_least_float32, true_loss
from gptlab.signals.registry import Objective, Signal
from gptlab.training.block_graph import (
    TRUE_LOSS,
    ActiveSignal,
    Batch,
    BlockGraph,
    HiddenGradient,
    Into,
    Losses,
    Source,
    SourceOutput,
    backprop_blocks,
    block_vjp,
    build_graph,
    matmuls_in,
)
from gptlab.training.controls import UNFLIPPED, TargetFlip, flipped, named, rotated, shuffled
from gptlab.training.conversation import run_conversation


def run_judges(model: GPT, graph: BlockGraph, readout: Readout, signal: ActiveSignal, batch: Batch) -> SourceOutput:
    """Let one signal's judges read their own outputs. What live judges learn is added to `.grad`: head and ln_f here,
    their blocks in `_teach` or on the way down."""
    config = signal.config
    judges, factor = config.judges_at(batch.step, model.config.n_layer, batch.seed)
    means, gradients = {}, []
    for j in judges:
        means[j], gradient = _read_signal(graph, readout, config, j, signal.weight * factor, batch)
        gradients.append(_teach(model, graph, config, j, gradient))
    return SourceOutput(means, gradients, factor)


def _teach(model: GPT, graph: BlockGraph, config: SignalConfig, j: int, gradient: Tensor) -> HiddenGradient:
    """Turn judge j's gradient (B, T, C) at h_j into the one that enters the backward pass, at h_j or at h_{j-1}."""
    live, full = config.evaluator == "live", config.reach == "full"
    if live and full and config.control in ("none", "flipped"):
        return HiddenGradient(j, gradient)  # the common backward pass trains the judge on its way down
    # Placebo and shuffled change the gradient at h_{j-1}, so the judge's own pass must come first.
    passed = block_vjp(model, graph, j, gradient, learn=live, keep=True)
    return HiddenGradient(j - 1, passed, stop_here=not full)


def _read_signal(
    graph: BlockGraph, readout: Readout, config: SignalConfig, j: int, weight: float, batch: Batch
) -> tuple[Tensor, Tensor]:
    """The mean signal over the tokens that judge j reads, and its gradient (B, T, C) times weight and share."""
    B, T, C = graph.inputs[0].shape
    signal = config.signal
    assert isinstance(signal, Signal)
    h, targets = graph.hidden(j).view(-1, C), batch.targets.reshape(-1)  # (N, C), (N,)
    needs = {None: None, "previous": j - 1, "next": j + 1, "final": len(graph.outputs)}[signal.needs]
    other = None if needs is None else graph.hidden(needs).flatten(0, 1)
    rows = _rows_read(config, T, batch, j)
    if rows is not None:
        rows = rows.to(h.device)
        h, targets = h[rows], targets[rows]
        other = None if other is None else other[rows]
    n = len(h)
    # flip_to = argmax: `flipped` only marked these targets. Once there are logits, `named` replaces each marked one
    # with the judge's likeliest wrong token. A closed form would see the marks, so none is used.
    to_argmax = config.control == "flipped" and config.flip_to == "argmax"

    def function(z: Tensor, y: Tensor, other: Tensor | None) -> Tensor:
        return signal(z, named(z, y) if to_argmax else y, other=other, threshold=config.threshold)

    token_loss = TokenLoss(function, None if to_argmax else CLOSED_FORMS.get(signal.name))
    scale = weight * batch.share / n
    read = readout.read(h, targets, token_loss, scale, learn=config.evaluator == "live", other=other)
    gradient = read.gradient
    if rows is not None:
        gradient = torch.zeros(B * T, C, dtype=h.dtype, device=h.device).index_copy_(0, rows, gradient)
    return read.total / n, gradient.view(B, T, C)


def _rows_read(config: SignalConfig, T: int, batch: Batch, j: int) -> Tensor | None:
    """The flat positions that judge j reads: max(1, round(positions·T)) of every sequence; None for all."""
    count = max(1, round(config.positions * T))
    if count == T:
        return None
    shuffled_positions = partial(permutation, T, "positions", batch.seed, batch.step)
    chosen = [torch.from_numpy(shuffled_positions(sequence, j)[:count]) for sequence in batch.sequences]
    return torch.cat([rows.sort().values + b * T for b, rows in enumerate(chosen)])


def _read_true_loss(
    model: GPT, graph: BlockGraph, readout: Readout, batch: Batch, flip: TargetFlip
) -> tuple[Tensor, Tensor]:
    """The final block's mean cross-entropy, and its gradient (B, T, C) at h_L times the share; head and ln_f learn."""
    h, targets, token_loss = graph.hidden(len(graph.outputs)), batch.targets, true_loss
    if flip.share:
        V = model.config.vocab_size
        targets = flipped(targets, flip.share, flip.to, V, batch.seed, batch.names, "target flip")
        token_loss = _argmax_flipped_loss if flip.to == "argmax" else true_loss
    B, T, C = h.shape
    N = B * T
    read = readout.read(h.view(N, C), targets.reshape(-1), token_loss, batch.share / N, learn=True)
    return read.total / N, read.gradient.view(B, T, C)


def _argmax_flipped_loss(logits: Tensor, targets: Tensor, other: Tensor | None = None) -> Tensor:
    return true_loss(logits, named(logits, targets))


def run_objective(model: GPT, graph: BlockGraph, readout: Readout, signal: ActiveSignal, batch: Batch) -> SourceOutput:
    """The objective's mean over the batch's tokens, its gradient at the hidden states, and the head's in `.grad`.

    It takes a few sequences at a time, so that a micro-batch's logits never exist all at once.
    """
    objective, (B, T), L = signal.config.signal, batch.tokens.shape, model.config.n_layer
    assert isinstance(objective, Objective)

    def read(h: Tensor) -> Tensor:
        return at_least_float32(model.read(h))

    used = range(L, L + 1) if objective.reads == "logits" else range(L + 1)
    states = [graph.hidden(j).requires_grad_() for j in used]
    total = torch.zeros((), dtype=torch.float64, device=batch.tokens.device)
    size = max(1, readout.chunk // T)
    for first in range(0, B, size):
        rows = slice(first, first + size)
        with torch.enable_grad(), matmuls_in(graph.autocast, model, batch.tokens.device):
            values = objective([h[rows] for h in states], batch.tokens[rows], batch.targets[rows], read)
        total += values.detach().sum(dtype=torch.float64)
        if values.requires_grad:
            (values.sum() * (signal.weight * batch.share / (B * T))).backward()
    gradients = [HiddenGradient(j, h.grad) for j, h in zip(used, states, strict=True) if h.grad is not None]
    return SourceOutput({L: total / (B * T)}, gradients)


SOURCES: Mapping[str, Callable[[GPT, BlockGraph, Readout, ActiveSignal, Batch], SourceOutput]] = {
    "reading": run_judges,
    "objective": run_objective,
    "conversation": run_conversation,
}
"""By `SignalConfig.kind`: what a signal's gradient comes from."""


def _run_source(model: GPT, graph: BlockGraph, readout: Readout, signal: ActiveSignal, batch: Batch) -> SourceOutput:
    """Run one signal's source under the controls that any source can have: wrong targets, gradients of other tokens."""
    config = signal.config
    if config.control == "flipped":
        V = model.config.vocab_size
        wrong = flipped(batch.targets, config.flip, config.flip_to, V, batch.seed, batch.names, "flip")
        batch = replace(batch, targets=wrong)
    output = SOURCES[config.kind](model, graph, readout, signal, batch)
    if not config.shuffles_gradients:
        return output
    key = (batch.seed, batch.step, batch.first_sequence)  # and judge j: a gradient at h_{j-1} comes from block + 1
    moved = [g._replace(gradient=shuffled(g.gradient, *key, g.block + 1)) for g in output.gradients]
    return replace(output, gradients=moved)


class _BackwardPass(NamedTuple):
    source: Source
    gradients: list[HiddenGradient]
    embeddings: bool


def _backward_passes(
    signals: Sequence[ActiveSignal],
    outputs: Sequence[SourceOutput],
    from_truth: list[HiddenGradient],
    seed: int,
    *,
    by_source: bool,
) -> list[_BackwardPass]:
    """The backward passes to make: as few as possible, or with `by_source` one for each source and each placebo."""
    if not by_source:
        to_embeddings, withheld = list(from_truth), []
        for signal, output in zip(signals, outputs, strict=True):
            # `withheld` goes down by itself, since it must not reach the embeddings (signal.embeddings = false).
            (to_embeddings if signal.config.embeddings else withheld).extend(output.gradients)
        # Without `into` the label is unused: both passes add to `.grad`.
        return [
            _BackwardPass(TRUE_LOSS, to_embeddings, True),
            *([_BackwardPass(TRUE_LOSS, withheld, False)] if withheld else []),
        ]
    passes = [_BackwardPass(TRUE_LOSS, from_truth, True)]
    for k, (signal, output) in enumerate(zip(signals, outputs, strict=True)):
        embeddings = signal.config.embeddings
        passes.append(_BackwardPass(Source("signal", k), output.gradients, embeddings))
        if signal.config.control == "placebo":
            which = signal.config.rotation
            turned = [g._replace(gradient=rotated(g.gradient, seed, g.block + 1, which)) for g in output.gradients]
            passes.append(_BackwardPass(Source("placebo", k), turned, embeddings))
    return passes


def accumulate(
    model: GPT,
    batch: Batch,
    signals: Sequence[ActiveSignal] = (),
    autocast: torch.dtype | None = None,
    *,
    flip: TargetFlip = UNFLIPPED,
    into: Into | None = None,
    recompute: bool = False,
    dropout: float = 0.0,
) -> Losses:
    """Add one micro-batch's gradient, scaled by its share of the update's tokens, to `.grad`.

    What `batch.part` excludes is not computed, and its losses are 0 or missing. into: if given, each source's gradient
    has a backward pass of its own, inside `into(source)`, and so have placebos; otherwise one pass serves all sources.
    """
    signals = () if batch.part in ("true loss", "noise") else signals
    truth = batch.part != "signals"
    L = model.config.n_layer
    enter: Into = into or (lambda source: nullcontext())
    graph = build_graph(model, batch, autocast, recompute=recompute, dropout=dropout)
    n_judges = sum(len(signal.config.judges_at(batch.step, L, batch.seed)[0]) for signal in signals)
    readout = Readout(model, autocast, readings=int(truth) + n_judges)

    # Read: every reading leaves a gradient at a hidden state.
    loss = torch.zeros((), dtype=torch.float64, device=batch.tokens.device)
    from_truth, outputs = [], []
    if truth:
        with enter(TRUE_LOSS):
            loss, gradient = _read_true_loss(model, graph, readout, batch, flip)
        from_truth = [HiddenGradient(L, gradient)]
    for k, signal in enumerate(signals):  # "judges" is what any source itself learns while it reads: head and ln_f too
        with enter(Source("judges", k)):
            outputs.append(_run_source(model, graph, readout, signal, batch))

    # Backward: send these gradients down, block by block.
    passes = _backward_passes(signals, outputs, from_truth, batch.seed, by_source=into is not None)
    for i, (source, gradients, embeddings) in enumerate(passes, 1):
        with enter(source):
            backprop_blocks(model, graph, gradients, embeddings=embeddings, keep=i < len(passes))

    signal_loss = torch.zeros_like(loss)
    for signal, output in zip(signals, outputs, strict=True):
        for mean in output.means.values():
            signal_loss += signal.weight * output.factor * mean
    return Losses(loss, signal_loss, tuple(o.means for o in outputs), tuple(o.figures for o in outputs))
