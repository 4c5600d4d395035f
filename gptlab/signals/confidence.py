"""Signals made of log(1 - p), the notes' own (N2-N4): how little probability is left for anything else.

log(1 - p_i) = -softplus(z_i - LSE_{k≠i} z_k) is finite for every finite logit, where log(1 - softmax(z)_i) is -inf
as soon as p_i rounds to 1. The margin z_i - LSE_{k≠i} z_k is the log-odds of token i.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import softplus

MANY = 4096
"""A vocabulary from which two levels pay."""


def likeliest(logits: Tensor) -> Tensor:
    """argmax (n,) of logits (n, V), the first of several; in two levels, since PyTorch's own is slow on a CPU."""
    n, V = logits.shape
    if logits.is_cuda or V < MANY or V % 64:
        return logits.max(1).indices
    parts = logits.detach().view(n, -1, 64)
    part = parts.amax(2).max(1).indices
    return part * 64 + parts[torch.arange(n), part].max(1).indices


def log_odds(logits: Tensor, index: Tensor) -> Tensor:
    """log(p_i / (1-p_i)) (n,) of token index (n,) under logits (n, V)."""
    index = index[:, None]
    rest = logits.scatter(1, index, -torch.inf).logsumexp(1)
    return logits.gather(1, index)[:, 0] - rest


def log_rest(logits: Tensor, index: Tensor) -> Tensor:
    """log(1 - p_i) (n,) of token index (n,) under logits (n, V); finite for finite logits."""
    return -softplus(log_odds(logits, index))


def top(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """m (n,), log(1-p_m) (n,) and p_m (n,), the last detached."""
    m = likeliest(logits)
    odds = log_odds(logits, m)
    return m, -softplus(odds), odds.detach().sigmoid()


def confidence(logits: Tensor, targets: Tensor) -> Tensor:
    """log(1-p_m): near 0 where unsure, ever lower when sure (N4). Gradient of L1 norm 2·p_m; value unbounded below."""
    return log_rest(logits, likeliest(logits))


def overconfidence_penalty(logits: Tensor, targets: Tensor) -> Tensor:
    """-log(1-p_m): N4's sign turned, so that being sure costs."""
    return -confidence(logits, targets)


def gated_confidence(logits: Tensor, targets: Tensor, *, threshold: float) -> Tensor:
    """[p_m>=τ]·log(1-p_m): where the judge does not know what to reply there is no feedback (N2, N3)."""
    _, value, p = top(logits)
    return value.where(p >= threshold, 0.0)


def verified_confidence(logits: Tensor, targets: Tensor, *, threshold: float) -> Tensor:
    """[p_m>=τ, m=y]·log(1-p_m): confidence counts only where it is right (N2)."""
    m, value, p = top(logits)
    return value.where((p >= threshold) & (m == targets), 0.0)


def confident_error(logits: Tensor, targets: Tensor, *, threshold: float) -> Tensor:
    """[p_m>=τ, m≠y]·(-log(1-p_m)): being sure and wrong costs (N2's penalty; unlikelihood, 1908.04319)."""
    m, value, p = top(logits)
    return (-value).where((p >= threshold) & (m != targets), 0.0)


def advantage(logits: Tensor, targets: Tensor, *, other: Tensor) -> Tensor:
    """log(1-p_m) less the previous block's, held constant, where that is negative: only growing surer counts (N3)."""
    gain = confidence(logits, targets) - confidence(other, targets)
    return gain.where(gain < 0, 0.0)


def target_confidence(logits: Tensor, targets: Tensor) -> Tensor:
    """log(1-p_y): confidence in the true token; unbounded below."""
    return log_rest(logits, targets)
