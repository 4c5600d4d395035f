"""What turns a signal, or the true loss, into its own control, and noise that is known because it was injected.

Every draw is keyed by what it belongs to (a run's seed and a judge; a window; a step and a sequence), never by
micro-batch or rank, so that a control is the same however an update is cut up. docs/signals.md: 'Controls'.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from gptlab.data.batches import Window
from gptlab.randomness import key_bits, permutation, torch_generator
from gptlab.training.parallel import global_norm, local_shards, shard_like


@lru_cache(maxsize=64)
def rotation(width: int, seed: int, judge: int, which: int = 0) -> Tensor:
    """The placebo's orthogonal matrix (C, C) of a judge, float64: uniform over all of them, fixed for a seed.

    which: one of several that are independent of each other (`signal.rotation`).
    """
    key = ("placebo", seed, judge, *([which] if which else []))
    gaussian = torch.randn(width, width, dtype=torch.float64, generator=torch_generator(*key))
    q, r = torch.linalg.qr(gaussian)
    return q * r.diagonal().sign()  # the signs that QR chooses would make it less than uniform


def rotated(gradient: Tensor, seed: int, judge: int, which: int = 0) -> Tensor:
    """Every token's gradient (B, T, C), turned alike: as long and as coherent, but pointing nowhere in particular."""
    return gradient @ rotation(gradient.shape[-1], seed, judge, which).to(gradient.device, gradient.dtype)


def permuted(gradient: Tensor, seed: int, name: str, which: int = 0) -> Tensor:
    """The entries of a parameter's gradient in an order fixed for the run (the placebo of a live judge's own)."""
    key = ("placebo entries", seed, name, *([which] if which else []))
    order = torch.from_numpy(permutation(gradient.numel(), *key))
    return gradient.flatten()[order.to(gradient.device)].view_as(gradient)


def dropout_masks(
    shape: tuple[int, int, int],
    share: float,
    seed: int,
    step: int,
    sequences: Sequence[int],
    j: int,
    device: torch.device,
) -> Tensor:
    """Factors (n, B, T, C) of dropout (Srivastava et al. 2014) for n places of block j (0: the embeddings).

    shape: (n, T, C) of one sequence. A factor is 0 with probability `share`, else 1 / (1 - share).
    """
    rows = []
    for sequence in sequences:
        generator = torch_generator("dropout", seed, step, sequence, j, device=str(device))
        rows.append(torch.rand(shape, generator=generator, device=device) >= share)
    return torch.stack(rows, 1) / (1 - share)


def shuffled(gradient: Tensor, seed: int, step: int, first_sequence: int, judge: int) -> Tensor:
    """Gradients (B, T, C) permuted over the positions of their sequence, in another order in every step."""
    B, T, _ = gradient.shape
    orders = [torch.from_numpy(permutation(T, "shuffled", seed, step, first_sequence + b, judge)) for b in range(B)]
    return torch.stack([row[order.to(row.device)] for row, order in zip(gradient, orders, strict=True)])


@dataclass(frozen=True)
class TargetFlip:
    """A known share of wrong targets in the true loss (`--target_flip`)."""

    share: float = 0.0
    to: Literal["uniform", "shuffled", "argmax"] = "uniform"


UNFLIPPED = TargetFlip()


def flipped(
    targets: Tensor,
    share: float,
    to: Literal["uniform", "shuffled", "argmax"],
    vocab_size: int,
    seed: int,
    windows: Sequence[Window],
    purpose: str,
) -> Tensor:
    """Targets (B, T), each made wrong with probability `share`, the same for a window in every epoch.

    uniform: any of the other V-1 tokens. shuffled: the target of another place of the window, so that wrong ones are
    as frequent as true ones; some are right by chance. argmax: marked as -1 - y, for `named` to find the likeliest
    wrong token when the logits are there.
    """
    rows = []
    for window, true in zip(windows, targets.cpu().numpy(), strict=True):
        words = np.random.Philox(key=key_bits(purpose, seed, *window)).random_raw(2 * len(true)).reshape(2, -1)
        if to == "uniform":
            wrong = (words[1] % np.uint64(vocab_size - 1)).astype(np.int64)
            wrong += wrong >= true
        elif to == "shuffled":
            wrong = true[(words[1] % np.uint64(len(true))).astype(np.int64)]
        else:
            wrong = -1 - true
        rows.append(np.where(words[0] < share * 2.0**64, wrong, true))
    return torch.from_numpy(np.stack(rows)).to(targets.device)


def named(logits: Tensor, targets: Tensor) -> Tensor:
    """Targets (n,) in which a marked one, -1 - y, is the likeliest token of logits (n, V) that is not y."""
    true = torch.where(targets < 0, -1 - targets, targets)
    wrong = logits.detach().scatter(1, true[:, None], -torch.inf).argmax(1)
    return torch.where(targets < 0, wrong, true)


LEAST_PROBABILITY = 1e-6
"""What a token is left with at least: undoing flips of a model's error may fall below 0."""


def undo_uniform_flips(q: Tensor, share: float) -> Tensor:
    """The probabilities (n, V) that a model holds of true tokens, from those, q, that it holds of flipped ones.

    With a share ρ of targets flipped uniformly over the other V-1 tokens, a model that knows the truth p predicts
    q = (1-ρ)·p + ρ·(1-p)/(V-1), and pays for it at every true target of validation. Undoing that separates what it has
    not learnt from what it has learnt all too well: p̂ = (q - ρ/(V-1)) / (1 - ρV/(V-1)), not below LEAST_PROBABILITY,
    made to sum to 1 again. Flips to the likeliest wrong token cannot be undone so; there accuracy is compared.
    """
    V = q.shape[1]
    assert 0 <= share < 1 - 1 / V, (share, V)  # TrainingConfig.undoable_flip
    p = (q - share / (V - 1)) / (1 - share * V / (V - 1))
    p = p.clamp_min(LEAST_PROBABILITY)
    return p / p.sum(1, keepdim=True)


def clean_loss(logits: Tensor, targets: Tensor, share: float) -> Tensor:
    """The loss (n,) in nats of logits (n, V) at true targets (n,), once a share of uniform flips is undone."""
    p = undo_uniform_flips(logits.softmax(1), share)
    return -torch.log(p.gather(1, targets[:, None])[:, 0])


def add_drawn(gradients: dict[str, Tensor], norm: float, *key: str | int) -> None:
    """Add a Gaussian draw, in place, whose expected squared norm over all parameters is norm².

    key: what it depends on. With the step in it, it is noise, another in every update; without, a bias, one direction.
    Drawn where the gradients are: a GPU's generator gives other numbers than a CPU's.
    """
    deviation = norm / sum(g.numel() for g in gradients.values()) ** 0.5
    for name, g in gradients.items():
        generator = torch_generator(*key, name, device=str(g.device))
        noise = torch.randn(g.shape, dtype=g.dtype, device=g.device, generator=generator)
        g.add_(shard_like(noise, g), alpha=deviation)


def add_scaled(gradients: dict[str, Tensor], noise: Sequence[Tensor], norm: float) -> None:
    """Add `noise`, one for each gradient and in their order, in place and of this norm over all parameters."""
    if found := global_norm(noise):
        torch._foreach_add_(local_shards(gradients.values()), local_shards(noise), alpha=norm / found)
