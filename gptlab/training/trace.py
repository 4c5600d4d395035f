"""A forward pass cut at the block boundaries, and the way down again.

Because every block's graph stands alone, a gradient can enter at any hidden state: the true loss's at the top, a
verdict's at the block it teaches. Nothing here knows where a gradient comes from.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from gptlab.model.fast_cpu import WorkingLinear
from gptlab.model.gpt import GPT, add_gradient
from gptlab.training.sharding import blocks_are_sharded


@dataclass
class Trace:
    """inputs[j-1] is h_{j-1} as a leaf, outputs[j-1] is f_j of it, without its graph if that is to be recomputed."""

    tokens: Tensor
    autocast: torch.dtype | None
    recompute: bool
    inputs: list[Tensor]
    outputs: list[Tensor]

    def hidden(self, j: int) -> Tensor:
        """h_j (B, T, C), detached."""
        return self.outputs[j - 1].detach() if j else self.inputs[0].detach()


def trace(model: GPT, tokens: Tensor, autocast: torch.dtype | None, *, recompute: bool = False) -> Trace:
    """Run the model's blocks on tokens (B, T), keeping each block's graph apart from the others'."""
    inputs, outputs = [], []
    with matmul_dtype(model, tokens.device, autocast):
        with torch.no_grad():
            h = model.embed(tokens)
        for block in model.blocks:
            inputs.append(h.detach().requires_grad_())
            with torch.set_grad_enabled(not recompute):
                outputs.append(block(inputs[-1]))
            h = outputs[-1]
    return Trace(tokens, autocast, recompute, inputs, outputs)


def matmul_dtype(model: GPT, device: torch.device, autocast: torch.dtype | None) -> AbstractContextManager[object]:
    """The dtype of the matmuls within. Weights that are gathered for one pass are not to outlive it in a cache."""
    if autocast is None or isinstance(model.lm_head, WorkingLinear):
        return nullcontext()
    return torch.autocast(device.type, autocast, cache_enabled=not blocks_are_sharded(model))


@dataclass(frozen=True)
class Lesson:
    """A gradient (B, T, C) at h_at: it teaches the weights of block `at` and goes on below, unless it stays."""

    at: int
    gradient: Tensor
    stays: bool = False


def descend(model: GPT, trace: Trace, lessons: Iterable[Lesson], *, embeddings: bool = True, keep: bool) -> None:
    """Send lessons down to the embeddings, adding to `.grad`.

    embeddings: whether they are taught too. keep: leave the trace's graphs for another descent.
    """
    arriving: dict[int, Tensor] = {}
    staying: dict[int, Tensor] = {}
    for lesson in lessons:
        at = staying if lesson.stays and lesson.at else arriving
        at[lesson.at] = at[lesson.at] + lesson.gradient if lesson.at in at else lesson.gradient
    for j in range(len(trace.outputs), 0, -1):
        if j in staying:
            pass_through(model, trace, j, staying[j], learn=True, keep=keep or j in arriving)
        if j in arriving:
            onward = pass_through(model, trace, j, arriving.pop(j), learn=True, keep=keep)
            arriving[j - 1] = onward + arriving[j - 1] if j - 1 in arriving else onward
    if embeddings and 0 in arriving:
        _teach_embeddings(model, trace.tokens, arriving[0])


def pass_through(model: GPT, trace: Trace, j: int, gradient: Tensor, *, learn: bool, keep: bool) -> Tensor:
    """The gradient at h_{j-1} of a gradient at h_j; block j's weights add theirs to `.grad` if they learn."""
    x, y = trace.inputs[j - 1], trace.outputs[j - 1]
    if trace.recompute:
        with matmul_dtype(model, x.device, trace.autocast):
            y, keep = model.blocks[j - 1](x), False
    if not learn:
        return torch.autograd.grad(y, x, gradient, retain_graph=keep)[0]
    torch.autograd.backward(y, gradient, retain_graph=keep)
    passed, x.grad = x.grad, None
    assert passed is not None
    return passed


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
