"""Signals made of a cross-entropy: against the truth (deep supervision), the block's own argmax, or turned round."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import cross_entropy

from gptlab.signals.confidence import likeliest, top


def deep_supervision(logits: Tensor, targets: Tensor) -> Tensor:
    """CE(z, y): every block predicts the next token (Lee 2015, 1409.5185; Al-Rfou 2018, 1808.04444)."""
    return cross_entropy(logits, targets, reduction="none")


def negative_deep_supervision(logits: Tensor, targets: Tensor) -> Tensor:
    """-CE(z, y): N5 read literally with the true token; climbs the true loss."""
    return -deep_supervision(logits, targets)


def negative_self_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """-CE(z, m) = log p_m: N5 read literally with the block's own argmax; lowers confidence. Gradient 2·(1-p_m)."""
    return -cross_entropy(logits, likeliest(logits), reduction="none")


def negated_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """-CE(-z, m): N5 as first coded. Gradient of L1 norm about 2 whatever the confidence; unbounded below."""
    return -cross_entropy(-logits, likeliest(logits), reduction="none")


def confidence_weighted_ce(logits: Tensor, targets: Tensor) -> Tensor:
    """sg(p_m)·CE(z, y): a token counts as much as the block is sure of itself (N2)."""
    _, _, p = top(logits)
    return p * deep_supervision(logits, targets)


def pseudo_label(logits: Tensor, targets: Tensor, *, threshold: float) -> Tensor:
    """[p_m>=τ]·(-log p_m): the own argmax as a label where it is sure (FixMatch, 2001.07685)."""
    m, _, p = top(logits)
    return cross_entropy(logits, m, reduction="none").where(p >= threshold, 0.0)


def information_gain(logits: Tensor, targets: Tensor, *, other: Tensor) -> Tensor:
    """CE(z_j, y)·sg[log p_j(y) - log p_{j-1}(y)]_+: learn where this block added information (RLP, 2510.01265)."""
    loss = deep_supervision(logits, targets)
    gain = deep_supervision(other, targets) - loss.detach()
    return loss * gain.clamp(min=0)
