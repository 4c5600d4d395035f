"""What turns a signal, or the true loss, into its own control, and what is known to be noise.

Every draw is keyed by what it belongs to (a run's seed and a judge; a window; a step and a sequence), never by
micro-batch or rank, so that a control is the same however an update is cut up. docs/signals.md: 'Controls'.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from gptlab.data.batches import Window
from gptlab.randomness import key_bits, permutation, torch_generator
from gptlab.training.sharding import cut_like


@lru_cache(maxsize=64)
def rotation(width: int, seed: int, judge: int) -> Tensor:
    """The placebo's orthogonal matrix (C, C) of a judge, float64: uniform over all of them, fixed for a seed."""
    gaussian = torch.randn(width, width, dtype=torch.float64, generator=torch_generator("placebo", seed, judge))
    q, r = torch.linalg.qr(gaussian)
    return q * r.diagonal().sign()


def rotated(gradient: Tensor, seed: int, judge: int) -> Tensor:
    """Every token's gradient (B, T, C), turned alike: as long and as coherent, but pointing nowhere in particular."""
    return gradient @ rotation(gradient.shape[-1], seed, judge).to(gradient.device, gradient.dtype)


def permuted(gradient: Tensor, seed: int, name: str) -> Tensor:
    """The entries of a parameter's gradient in an order fixed for the run (the placebo of a live judge's own)."""
    order = torch.from_numpy(permutation(gradient.numel(), "placebo entries", seed, name))
    return gradient.flatten()[order.to(gradient.device)].view_as(gradient)


def shuffled(gradient: Tensor, seed: int, step: int, first_sequence: int, judge: int) -> Tensor:
    """Gradients (B, T, C) permuted over the positions of their sequence, anew in every step."""
    B, T, _ = gradient.shape
    orders = [torch.from_numpy(permutation(T, "shuffled", seed, step, first_sequence + b, judge)) for b in range(B)]
    return torch.stack([row[order.to(row.device)] for row, order in zip(gradient, orders, strict=True)])


def flipped(
    targets: Tensor,
    share: float,
    to: Literal["uniform", "argmax"],
    vocab_size: int,
    seed: int,
    windows: Sequence[Window],
    purpose: str,
) -> Tensor:
    """Targets (B, T), each made wrong with probability `share`, the same for a window in every epoch.

    uniform: any of the other V-1 tokens. argmax: marked as -1 - y, for `named` to find the likeliest wrong token when
    the logits are there.
    """
    rows = []
    for window, true in zip(windows, targets.cpu().numpy(), strict=True):
        words = np.random.Philox(key=key_bits(purpose, seed, *window)).random_raw(2 * len(true)).reshape(2, -1)
        wrong = (words[1] % np.uint64(vocab_size - 1)).astype(np.int64)
        wrong = -1 - true if to == "argmax" else wrong + (wrong >= true)
        rows.append(np.where(words[0] < share * 2.0**64, wrong, true))
    return torch.from_numpy(np.stack(rows)).to(targets.device)


def named(logits: Tensor, targets: Tensor) -> Tensor:
    """Targets (n,) in which a marked one, -1 - y, is the likeliest token of logits (n, V) that is not y."""
    true = torch.where(targets < 0, -1 - targets, targets)
    wrong = logits.detach().scatter(1, true[:, None], -torch.inf).argmax(1)
    return torch.where(targets < 0, wrong, true)


def add_drawn(gradients: dict[str, Tensor], length: float, *key: str | int) -> None:
    """Add a Gaussian draw, in place, whose expected squared length over all parameters is length².

    key: what it hangs on: with the step among it noise, fresh in each; without a bias, the same direction in all.
    """
    deviation = length / sum(g.numel() for g in gradients.values()) ** 0.5
    for name, g in gradients.items():
        noise = torch.randn(g.shape, dtype=g.dtype, generator=torch_generator(*key, name))
        g.add_(cut_like(noise.to(g.device), g), alpha=deviation)
