"""Sequence objectives: a loss of whole sequences at the end of the model, next to the true loss.

An objective sees logits or all hidden states of a sequence with its tokens, and the model learns from it as it learns
from the true loss, head and ln_f included. Sequences go through it a few at a time, so that no micro-batch's logits are
there at once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gptlab.model.gpt import GPT
from gptlab.signals.readout import Readout, at_least_float32
from gptlab.signals.registry import Objective
from gptlab.training.block_graph import (
    ActiveSignal,
    Batch,
    BlockGraph,
    HiddenGradient,
    SourceOutput,
    matmuls_in,
)


def run_objective(model: GPT, graph: BlockGraph, readout: Readout, signal: ActiveSignal, batch: Batch) -> SourceOutput:
    """The objective's mean over the batch's tokens, its gradient at the hidden states, and the head's in `.grad`."""
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
