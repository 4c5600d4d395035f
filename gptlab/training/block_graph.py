"""A forward pass that is cut at its block boundaries, and what a source of gradients puts into it.

Every source (a block's reading, a sequence objective, a conversation) reads hidden states of one `BlockGraph` and gives
a `SourceOutput`: gradients at hidden states, which `backprop_blocks` takes down together. What a source learns itself,
in head, ln_f or a block that it runs again, it adds to `.grad`. docs/signals.md: 'Sources'.

Shapes: B batch, T time, C channels, L blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from gptlab.data.batches import Window
from gptlab.model.fast_cpu import WorkingLinear
from gptlab.model.gpt import GPT, Block, add_gradient
from gptlab.signals.config import SignalConfig
from gptlab.training.controls import dropout_masks
from gptlab.training.parallel import blocks_are_sharded


@dataclass(frozen=True)
class Batch:
    """One micro-batch: tokens and targets (B, T), and where it stands in the update.

    first_sequence: its first row's index in the update; share: of the update's tokens; windows: each row's name in the
    corpus, which flips are keyed by (without one, a row's index stands for it). part: what its gradient is taken of;
    an update may give its signals other sequences than its true loss, and then the shares of each add up to 1. Those of
    noise (`--gradient_noise_shape batch`) add up to 0: the true loss of some sequences less that of as many others.
    """

    tokens: Tensor
    targets: Tensor
    step: int
    seed: int
    first_sequence: int
    share: float = 1.0
    windows: Sequence[Window] | None = None
    part: Literal["all", "true loss", "signals", "noise"] = "all"

    @property
    def sequences(self) -> range:
        """Its rows by their index in the update."""
        return range(self.first_sequence, self.first_sequence + len(self.tokens))

    @property
    def names(self) -> Sequence[Window]:
        return self.windows or [(0, sequence) for sequence in self.sequences]


class ActiveSignal(NamedTuple):
    """A signal, the weight it has in this update, and the frozen model that replies to a conversation's utterances."""

    config: SignalConfig
    weight: float
    listener: GPT | None = None


def active_signals(
    configs: Sequence[SignalConfig], weights: Sequence[float], listener: GPT | None = None
) -> list[ActiveSignal]:
    """The signals that take part in an update: weight 0 takes a signal out of the graph."""
    both = zip(configs, weights, strict=True)
    return [ActiveSignal(config, weight, listener) for config, weight in both if weight != 0.0]


@dataclass(frozen=True)
class Losses:
    """What one batch gave, detached, float64 scalars.

    loss: the true loss, mean over tokens, nats
    signal_loss: the weighted sum of the signals' means, as it stands in the total loss
    by_judge: for every signal, judge -> unweighted mean of the signal over the tokens it read
    figures: for every signal, what its source measured (`SourceOutput.figures`)

    >>> losses = Losses(torch.tensor(2.5), torch.tensor(-0.2), by_judge=({1: torch.tensor(-0.4)},))
    >>> float(losses.loss), list(losses.by_judge[0])
    (2.5, [1])
    """

    loss: Tensor
    signal_loss: Tensor
    by_judge: tuple[dict[int, Tensor], ...] = ()
    figures: tuple[Tensor | None, ...] = ()


class Source(NamedTuple):
    """What a gradient comes from: the true loss; what signal k teaches, what its source learns itself; its placebo."""

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

    batch: Batch
    autocast: torch.dtype | None
    recompute: bool
    dropout: float
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


def build_graph(
    model: GPT, batch: Batch, autocast: torch.dtype | None, *, recompute: bool = False, dropout: float = 0.0
) -> BlockGraph:
    """Run the blocks on a batch, each with a graph of its own.

    recompute: keep no block's inner activations; each is run again when a gradient passes through it. dropout: the
    share of entries that embeddings, attention and MLP leave out of the residual stream.
    """
    inputs, outputs = [], []
    with matmuls_in(autocast, model, batch.tokens.device):
        with torch.no_grad():
            h = model.embed(batch.tokens)  # its backward is embedding_backward
            if dropout:
                h = h * _masks(model, batch, 0, dropout)[0]
        for j, block in enumerate(model.blocks, 1):
            inputs.append(h.detach().requires_grad_())
            with torch.set_grad_enabled(not recompute):
                outputs.append(_run_block(model, block, inputs[-1], batch, j, dropout))
            h = outputs[-1]
    return BlockGraph(batch, autocast, recompute, dropout, inputs, outputs)


def _run_block(model: GPT, block: Block, x: Tensor, batch: Batch, j: int, dropout: float) -> Tensor:
    """f_j(x), the same in every call: what dropout leaves out has a key."""
    return block(x, masks=_masks(model, batch, j, dropout)) if dropout else block(x)


def _masks(model: GPT, batch: Batch, j: int, dropout: float) -> Tensor:
    """The factors (1 or 2, B, T, C) of dropout in the embeddings (j = 0) or in block j."""
    shape = (1 if j == 0 else 2, batch.tokens.shape[1], model.config.n_embd)
    return dropout_masks(shape, dropout, batch.seed, batch.step, batch.sequences, j, batch.tokens.device)


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
            y, keep = _run_block(model, model.blocks[j - 1], x, graph.batch, j, graph.dropout), False
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
        gradient = passing[0] * _masks(model, graph.batch, 0, graph.dropout)[0] if graph.dropout else passing[0]
        embedding_backward(model, graph.batch.tokens, gradient)


def embedding_backward(model: GPT, tokens: Tensor, gradient: Tensor, positions: Tensor | None = None) -> None:
    """Add the gradient (B, T, C) at h_0 to both embeddings. positions (B, T): where they are not 0, 1, .."""
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
    if positions is None:
        wpe.grad[:T] += gradient.sum(0)
    else:
        wpe.grad += torch.ops.aten.embedding_dense_backward(flat, positions.flatten(), len(wpe), -1, False)


@dataclass(frozen=True)
class SourceOutput:
    """What one source found in a micro-batch.

    means: by the block it read (a judge, or block L), its mean over the tokens it read, unweighted, float64
    gradients: at hidden states, with the weight and the batch's share in them
    factor: by which the means' sum counts in the loss, in addition to the weight
    figures: (F,) float64 means over the batch's sequences, named by the source's kind
    """

    means: dict[int, Tensor]
    gradients: list[HiddenGradient]
    factor: int = 1
    figures: Tensor | None = None
