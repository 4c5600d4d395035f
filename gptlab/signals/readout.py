"""The readout: z = head(ln_f(h)) of a hidden state, a loss for every token, and the gradient back to h, in chunks.

Logits are the largest tensors of a language model ((B,T,V): 824 MB in float32 at 4x1024 tokens), and the block loss
reads every block. So no logits are kept: each chunk of positions makes its own, turns them into their gradient in
place, and leaves only the gradient at h, which is V/C times smaller. The true loss is read the same way, with `learn`;
a frozen judge reads without, so that head and ln_f pass the gradient on and take none.

A chunk has as many rows as a matmul likes. Its elementwise part goes over it in pieces that a processor's cache holds.

Shapes: N tokens, n of them in a chunk or piece, C channels, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from gptlab.model.fast_cpu import WorkingLinear, product
from gptlab.model.gpt import GPT, add_gradient
from gptlab.signals.functions import likeliest

LossFunction = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""(logits (n, V), targets (n,), the other block's logits (n, V) or None) -> each token's loss (n,)."""

ClosedForm = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""(logits (n, V), which it may overwrite, targets (n,)) -> losses (n,), gradient (n, V) of their sum."""

CHUNK_BYTES, GPU_CHUNK_BYTES = 128 * 2**20, 2**30
"""Logits of one chunk in the dtype of the matmuls: at V=50304 1,334 rows in bf16, and 10,624 on a GPU."""
GPU_ROWS = 128
"""Rows of a chunk on a GPU come in multiples of these, which its matmuls' tiles divide."""
PIECE_ELEMENTS = 2**21
"""Logits of one elementwise pass on a CPU: 8 MiB in float32."""
READINGS_WORTH_TRANSPOSING = 3
"""Readings of one model from which a transposed copy of the head pays."""


@dataclass(frozen=True)
class TokenLoss:
    """What is read of a token: a function of its logits and, where there is one, the closed form with its gradient."""

    function: LossFunction
    closed_form: ClosedForm | None = None

    def __call__(self, logits: Tensor, targets: Tensor, other: Tensor | None = None) -> Tensor:
        return self.function(logits, targets, other)


@dataclass(frozen=True)
class ReadoutGradient:
    """total: the sum of the tokens' losses, float64; gradient (N, C): of scale·total at the hidden state."""

    total: Tensor
    gradient: Tensor


class Readout:
    """The readout of a model for one micro-batch: its head in the dtype of the matmuls, cast once for all readings.

    chunk: rows of logits that are held at once; readings: how many will be made of this model.
    """

    def __init__(
        self,
        model: GPT,
        dtype: torch.dtype | None = None,
        chunk: int | None = None,
        readings: int = 1,
    ) -> None:
        self.ln_f = model.ln_f
        self.head = model.lm_head.weight  # (V, C), whose `.grad` is added to
        dtype = dtype or self.head.dtype
        self.working_head, _ = model.lm_head.operands(dtype)  # (V, C)
        self.row_block = model.lm_head.row_block if isinstance(model.lm_head, WorkingLinear) else 0
        transpose = self.row_block and readings >= READINGS_WORTH_TRANSPOSING
        self.head_t = self.working_head.t().contiguous() if transpose else self.working_head.t()  # (C, V)
        V = len(self.head)
        self.chunk = chunk or chunk_rows(V * dtype.itemsize, on_gpu=self.head.is_cuda)
        self.piece = self.chunk if self.head.is_cuda else max(1, PIECE_ELEMENTS // V)

    def read(
        self,
        h: Tensor,
        targets: Tensor,
        token_loss: LossFunction,
        scale: float,
        *,
        learn: bool,
        other: Tensor | None = None,
    ) -> ReadoutGradient:
        """Read hidden states h (N, C) with true tokens `targets` (N,).

        The gradient is that of scale · Σ losses. With `learn` head and ln_f take theirs too, added to `.grad`.
        other: hidden states (N, C) of the block whose logits the loss also needs.
        """
        with torch.enable_grad():
            h = h.detach().requires_grad_()
            x = self._normalise(h)  # (N, C), the only graph: everything behind it is in closed form
        with torch.no_grad():
            working = x.detach().to(self.working_head.dtype)  # (N, C)
            # The scale goes into the smaller factors of both products, so that no pass over logits is made for it.
            scaled = working * scale if learn else working  # (N, C)
            others = None if other is None else self._normalise(other).to(self.working_head.dtype)
            total = torch.zeros((), dtype=torch.float64, device=h.device)
            dx = torch.empty_like(x)  # (N, C)
            for start in range(0, len(h), self.chunk):
                rows = slice(start, start + self.chunk)
                z = self._logits(working[rows])  # (n, V)
                other_z = None if others is None else self._logits(others[rows])
                total += self._loss_and_gradient_(z, targets[rows], other_z, token_loss)  # z is its gradient now
                torch.mul(product(z, self.working_head, self.row_block), scale, out=dx[rows])
                if learn:
                    add_gradient(self.head, z.t() @ scaled[rows])
        if learn:
            torch.autograd.backward(x, dx, inputs=[h, self.ln_f.weight, self.ln_f.bias])
            assert h.grad is not None
            return ReadoutGradient(total, h.grad)
        return ReadoutGradient(total, torch.autograd.grad(x, h, dx)[0])

    @torch.no_grad()
    def values(self, h: Tensor, targets: Tensor, token_loss: LossFunction, other: Tensor | None = None) -> Tensor:
        """Each token's loss (N, ...) of hidden states h (N, C), without any gradient."""
        x = self._normalise(h).to(self.working_head.dtype)
        others = None if other is None else self._normalise(other).to(self.working_head.dtype)
        parts = []
        for start in range(0, len(h), self.chunk):
            chunk = slice(start, start + self.chunk)
            z, y = self._logits(x[chunk]), targets[chunk]
            other_z = None if others is None else self._logits(others[chunk])
            for first in range(0, len(z), self.piece):
                rows = slice(first, first + self.piece)
                other_piece = None if other_z is None else at_least_float32(other_z[rows])
                parts.append(token_loss(at_least_float32(z[rows]), y[rows], other_piece))
        return torch.cat(parts)

    def _normalise(self, h: Tensor) -> Tensor:
        return F.layer_norm(h, self.ln_f.normalized_shape, self.ln_f.weight, self.ln_f.bias, self.ln_f.eps)

    def _logits(self, x: Tensor) -> Tensor:  # (n, C) -> (n, V), in the dtype of the matmuls
        return x @ self.head_t

    def _loss_and_gradient_(self, z: Tensor, targets: Tensor, other: Tensor | None, token_loss: LossFunction) -> Tensor:
        """Turn logits z (n, V) in place into the gradient of the sum of their losses; give that sum, float64."""
        total = torch.zeros((), dtype=torch.float64, device=z.device)
        closed_form = getattr(token_loss, "closed_form", None)
        for start in range(0, len(z), self.piece):
            rows = slice(start, start + self.piece)
            logits, y = at_least_float32(z[rows]), targets[rows]
            if closed_form:
                losses, gradient = closed_form(logits, y)
            else:
                losses, gradient = _by_autograd(
                    token_loss, logits, y, None if other is None else at_least_float32(other[rows])
                )
            total += losses.sum(dtype=torch.float64)
            z[rows] = gradient
        return total


def chunk_rows(row_bytes: int, *, on_gpu: bool) -> int:
    """Rows of logits that are held at once, each of so many bytes."""
    if on_gpu:
        return max(1, GPU_CHUNK_BYTES // row_bytes // GPU_ROWS) * GPU_ROWS
    return max(1, CHUNK_BYTES // row_bytes)


def at_least_float32(z: Tensor) -> Tensor:
    """z, in float32 where its dtype is narrower."""
    return z.float() if z.dtype.itemsize < 4 else z


def _by_autograd(token_loss: LossFunction, z: Tensor, targets: Tensor, other: Tensor | None) -> tuple[Tensor, Tensor]:
    """Losses (n,) and the gradient (n, V) of their sum."""
    with torch.enable_grad():
        leaf = z.detach().requires_grad_()
        losses = token_loss(leaf, targets, other)
        if not losses.requires_grad:  # no token passed the signal's gate
            return losses, torch.zeros_like(z)
        (dz,) = torch.autograd.grad(losses.sum(), leaf)
    return losses.detach(), dz


# Closed forms: what autograd gives (the tests compare them), in a few passes over the logits instead of a dozen, for
# the losses that are read most. They are only speed: a signal needs none.


def softmax_and_gap(logits: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """softmax(z) (n, V), and LSE(z) less the `chosen` logits (n, 1), from one pass of exponentials.

    log max p is max z - LSE(z). As precise as log_softmax, near 0 too.
    """
    p = logits.softmax(1)
    return p, (logits.amax(1, keepdim=True) - chosen) - p.amax(1, keepdim=True).log()


def cross_entropy_form(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """CE(z, y), and p - [k=y]."""
    index = targets[:, None]
    gradient, losses = softmax_and_gap(logits, logits.gather(1, index))
    losses = losses[:, 0]
    return losses, gradient.scatter_add_(1, index, gradient.new_full((1, 1), -1.0).expand_as(index))


def log_rest_form(logits: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """log(1-p_i), and p_i·q_k for k≠i, -p_i for i, with q the distribution over the others."""
    index = index[:, None]
    chosen = logits.gather(1, index)
    q, against = softmax_and_gap(logits.scatter_(1, index, -torch.inf), chosen)
    odds = -against  # log p_i/(1-p_i)
    p = odds.sigmoid()
    gradient = q.mul_(p)
    return -F.softplus(odds)[:, 0], gradient.scatter_(1, index, -p)


def confidence_form(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """log(1-p_m), as `log_rest_form` of the argmax."""
    return log_rest_form(logits, likeliest(logits))


def negative(form: ClosedForm) -> ClosedForm:
    """The closed form of the opposite loss."""

    def opposite(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        losses, gradient = form(logits, targets)
        return -losses, gradient.neg_()

    return opposite


CLOSED_FORMS: dict[str, ClosedForm] = {
    "confidence": confidence_form,
    "overconfidence_penalty": negative(confidence_form),
    "target_confidence": log_rest_form,
    "deep_supervision": cross_entropy_form,
    "negative_deep_supervision": negative(cross_entropy_form),
}
"""By the name of the signal."""


def _cross_entropy(logits: Tensor, targets: Tensor, other: Tensor | None = None) -> Tensor:
    return F.cross_entropy(logits, targets, reduction="none")


true_loss = TokenLoss(_cross_entropy, cross_entropy_form)
"""CE(z, y) of every token, in nats."""
