"""A tuned affine reader for every block: z_j = head(ln_f(h_j + h_j A_j + b_j)), fitted to the true next token.

What a block knows may stand in another basis than the head's, which only the last block has learnt to write for. An
affine map of its hidden state (the tuned lens, Belrose 2023, 2303.08112, there fitted to the final block's output)
takes that excuse away. The model itself is not changed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from gptlab.device import Placement
from gptlab.model.gpt import GPT
from gptlab.signals.reader import Reader, true_loss
from gptlab.training.evaluate import hidden_states

RATE = 0.5
"""Adam's step times the width: C entries that each move by RATE/C move a hidden state by at most half of itself."""


class AffineReaders:
    """One affine map for each of the blocks 1..L, at first the identity."""

    def __init__(self, model: GPT) -> None:
        L, C = model.config.n_layer, model.config.n_embd
        device = model.wte.weight.device
        self.matrices = torch.zeros(L, C, C, device=device)
        self.shifts = torch.zeros(L, C, device=device)

    def __call__(self, block: int, h: Tensor) -> Tensor:
        """The hidden state h (N, C) of block 1..L as the head can read it."""
        return h + h @ self.matrices[block - 1] + self.shifts[block - 1]


def fit(
    model: GPT,
    batches: Iterator[tuple[Tensor, Tensor]],
    steps: int,
    placement: Placement,
    progress: Callable[[int], None] = lambda done: None,
) -> AffineReaders:
    """Fit the readers of all blocks on `steps` batches of tokens and targets (B, T), by Adam with a falling rate."""
    readers = AffineReaders(model)
    parameters = [readers.matrices, readers.shifts]
    optimizer = torch.optim.Adam(parameters, lr=RATE / model.config.n_embd)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = RATE / model.config.n_embd * (1 - step / steps)
        tokens, targets = next(batches)
        hidden = hidden_states(model, tokens, placement)[1:]
        reader, y = Reader(model, placement.autocast, readings=len(hidden)), targets.flatten()
        for p in parameters:
            p.grad = torch.zeros_like(p)
        for j, h in enumerate(hidden, 1):
            flat = h.flatten(0, 1).float()
            gradient = reader.read(readers(j, flat), y, true_loss, 1 / len(y), learn=False).gradient.float()
            _of(readers.matrices)[j - 1] = flat.T @ gradient
            _of(readers.shifts)[j - 1] = gradient.sum(0)
        optimizer.step()
        progress(step + 1)
    return readers


def _of(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad
