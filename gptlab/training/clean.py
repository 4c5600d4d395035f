"""A prediction without the corruption that it was taught: what a model trained on flipped targets knows of true ones.

With a share ρ of targets flipped uniformly over the other V-1 tokens, who knows the truth p predicts
q = (1-ρ)·p + ρ·(1-p)/(V-1), and pays for it at every true target of validation. Undoing that separates what a model has
not learnt from what it has learnt all too well. Targets that are flipped to the likeliest wrong token can not be undone
this way: there `accuracy` is compared.
"""

from __future__ import annotations

import torch
from torch import Tensor

LEAST = 1e-6
"""The least probability a token is left with: what is undone from a model's error may fall below 0."""


def undo_uniform_flips(q: Tensor, share: float) -> Tensor:
    """The probabilities (n, V) that a model holds of true tokens, from those, q, that it holds of flipped ones.

    p̂ = (q - ρ/(V-1)) / (1 - ρV/(V-1)), not below LEAST, made to sum to 1 again.
    """
    V = q.shape[1]
    assert 0 <= share < 1 - 1 / V, (share, V)  # TrainingConfig.undoable_flip
    p = (q - share / (V - 1)) / (1 - share * V / (V - 1))
    p = p.clamp_min(LEAST)
    return p / p.sum(1, keepdim=True)


def clean_loss(logits: Tensor, targets: Tensor, share: float) -> Tensor:
    """The loss (n,) in nats of logits (n, V) at true targets (n,), once a share of uniform flips is undone."""
    p = undo_uniform_flips(logits.softmax(1), share)
    return -torch.log(p.gather(1, targets[:, None])[:, 0])
