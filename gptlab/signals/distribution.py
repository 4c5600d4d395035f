"""Signals of the whole distribution: its entropy, its distance from the truth, the uniform or the final block's."""

from __future__ import annotations

import math

from torch import Tensor
from torch.nn.functional import one_hot


def entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """H(p) in nats; its gradient vanishes at one-hot and at uniform (Grandvalet & Bengio 2005)."""
    log_p = logits.log_softmax(1)
    return -(log_p.exp() * log_p).sum(1)


def confidence_penalty(logits: Tensor, targets: Tensor) -> Tensor:
    """-H(p): sure blocks pay (Pereyra 2017, 1701.06548)."""
    return -entropy(logits, targets)


def brier(logits: Tensor, targets: Tensor) -> Tensor:
    """Σ_k (p_k-[k=y])², in [0, 2], a proper score (Brier 1950; RLCR, 2507.16806)."""
    return (logits.softmax(1) - one_hot(targets, logits.shape[1])).square().sum(1)


def collision(logits: Tensor, targets: Tensor) -> Tensor:
    """1 - Σp², the chance that two draws differ, in [0, 1] (Rényi-2; RLSC, 2506.06395)."""
    return 1 - logits.softmax(1).square().sum(1)


def self_certainty(logits: Tensor, targets: Tensor) -> Tensor:
    """-KL(uniform ‖ p) = -(LSE(z) - mean z - log V); unbounded below (Intuitor, 2505.19590)."""
    return -(logits.logsumexp(1) - logits.mean(1) - math.log(logits.shape[1]))


def self_distillation(logits: Tensor, targets: Tensor, *, other: Tensor) -> Tensor:
    """KL(sg p_L ‖ p_j): follow the final block (Be Your Own Teacher, 1905.08094). Gradient of L1 norm at most 2."""
    teacher = other.log_softmax(1)
    return (teacher.exp() * (teacher - logits.log_softmax(1))).sum(1)
