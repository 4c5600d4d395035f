"""Values and gradients at the logits in closed form, for the readings that are made most.

Each gives what autograd gives (the tests compare them), in a few passes over the logits instead of a dozen. A signal
needs none: it is one pure function, and this file is only speed.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import softplus

from gptlab.signals.confidence import likeliest

ClosedForm = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""(logits (n, V), which it may overwrite, targets (n,)) -> values (n,), gradient (n, V) of their sum."""


def cross_entropy(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """CE(z, y), and p - [k=y]."""
    index = targets[:, None]
    log_p = logits.log_softmax(1)
    values = -log_p.gather(1, index)[:, 0]
    gradient = log_p.exp_()
    return values, gradient.scatter_add_(1, index, gradient.new_full((1, 1), -1.0).expand_as(index))


def log_rest(logits: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """log(1-p_i), and p_i·q_k for k≠i, -p_i for i, with q the distribution over the others."""
    index = index[:, None]
    chosen = logits.gather(1, index)
    rest = logits.scatter_(1, index, -torch.inf)
    some = (index + 1) % logits.shape[1]  # any of the others tells the sum over all of them
    held = rest.gather(1, some)
    log_q = rest.log_softmax(1)
    odds = chosen - (held - log_q.gather(1, some))  # log p_i/(1-p_i)
    p = odds.sigmoid()
    gradient = log_q.exp_().mul_(p)
    return -softplus(odds)[:, 0], gradient.scatter_(1, index, -p)


def confidence(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """log(1-p_m), as `log_rest` of the argmax."""
    return log_rest(logits, likeliest(logits))


def negative(form: ClosedForm) -> ClosedForm:
    """The closed form of the opposite signal."""

    def opposite(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        values, gradient = form(logits, targets)
        return -values, gradient.neg_()

    return opposite


CLOSED_FORMS: dict[str, ClosedForm] = {
    "confidence": confidence,
    "overconfidence_penalty": negative(confidence),
    "target_confidence": log_rest,
    "deep_supervision": cross_entropy,
    "negative_deep_supervision": negative(cross_entropy),
}
"""By the name of the signal."""
