"""Reading a hidden state: z = head(ln_f(h)), a value for every token, and the gradient back to h, chunk by chunk.

Logits are the largest tensors of a language model ((B,T,V): 824 MB in float32 at 4x1024 tokens), and here every block
is read. So no reading is kept: each chunk of positions takes its logits, their values and their gradient, and leaves
only the gradient at h, which is V/C times smaller. The true loss is read the same way, learning; a frozen judge is
read without learning, so that it passes gradient on and takes none.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from gptlab.model.gpt import GPT

Value = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""(logits (n, V), targets (n,), the other block's logits (n, V) or None) -> each token's value (n,)."""

CHUNK_ELEMENTS = 16 * 2**20
"""Logits of one chunk: 64 MiB in float32, enough rows for matmuls to run at full speed at V=50304."""


@dataclass(frozen=True)
class Reading:
    """values: sum over tokens, float64; gradient: of scale·values at the hidden state, as it was given."""

    values: Tensor
    gradient: Tensor


class Reader:
    """The readout of a model for one micro-batch: its head in the dtype of the matmuls, cast once for all readings."""

    def __init__(self, model: GPT, dtype: torch.dtype | None = None, chunk: int | None = None) -> None:
        self.ln_f = model.ln_f
        self.head = model.lm_head.weight
        self.working_head = self.head.detach().to(dtype or self.head.dtype)  # (V, C)
        self.chunk = chunk or max(1, CHUNK_ELEMENTS // self.head.shape[0])

    def _normalise(self, h: Tensor) -> Tensor:
        return F.layer_norm(h, self.ln_f.normalized_shape, self.ln_f.weight, self.ln_f.bias, self.ln_f.eps)

    def _logits(self, x: Tensor) -> Tensor:  # (n, C) -> (n, V), float32 or better
        z = x @ self.working_head.t()
        return z.float() if z.dtype.itemsize < 4 else z

    def read(
        self, h: Tensor, targets: Tensor, value: Value, scale: float, *, learn: bool, other: Tensor | None = None
    ) -> Reading:
        """Read hidden states h (N, C) with true tokens `targets` (N,).

        The gradient is that of scale · Σ values. With `learn` the head and ln_f take theirs too, added to `.grad`.
        other: hidden states (N, C) of the block whose logits the value also needs.
        """
        with torch.enable_grad():
            h = h.detach().requires_grad_()
            x = self._normalise(h)  # (N, C)
        with torch.no_grad():
            working = x.detach().to(self.working_head.dtype)
            others = None if other is None else self._normalise(other).to(self.working_head.dtype)
            total = torch.zeros((), dtype=torch.float64, device=h.device)
            down = torch.empty_like(x)
            for start in range(0, len(h), self.chunk):
                rows = slice(start, start + self.chunk)
                z = self._logits(working[rows])
                other_z = None if others is None else self._logits(others[rows])
                values, dz = _value_and_gradient(value, z, targets[rows], other_z)
                del z, other_z
                total += values.sum(dtype=torch.float64)
                dz = dz.mul_(scale).to(working.dtype)
                down[rows] = dz @ self.working_head
                if learn:
                    add_gradient(self.head, dz.t() @ working[rows])
        if learn:
            torch.autograd.backward(x, down, inputs=[h, self.ln_f.weight, self.ln_f.bias])
            assert h.grad is not None
            return Reading(total, h.grad)
        return Reading(total, torch.autograd.grad(x, h, down)[0])

    @torch.no_grad()
    def values(self, h: Tensor, targets: Tensor, value: Value, other: Tensor | None = None) -> Tensor:
        """Each token's value (N,) of hidden states h (N, C), without any gradient."""
        x = self._normalise(h).to(self.working_head.dtype)
        others = None if other is None else self._normalise(other).to(self.working_head.dtype)
        parts = []
        for start in range(0, len(h), self.chunk):
            rows = slice(start, start + self.chunk)
            other_z = None if others is None else self._logits(others[rows])
            parts.append(value(self._logits(x[rows]), targets[rows], other_z))
        return torch.cat(parts)


def true_loss(logits: Tensor, targets: Tensor, other: Tensor | None = None) -> Tensor:
    """CE(z, y) of every token, in nats."""
    return F.cross_entropy(logits, targets, reduction="none")


def _value_and_gradient(value: Value, z: Tensor, targets: Tensor, other: Tensor | None) -> tuple[Tensor, Tensor]:
    """Values (n,) and the gradient (n, V) of their sum; the cross-entropy's own is taken in place of its logits."""
    if value is true_loss:
        log_p = z.log_softmax(1)
        values = -log_p.gather(1, targets[:, None])[:, 0]
        dz = log_p.exp_()
        dz.scatter_add_(1, targets[:, None], dz.new_full((len(dz), 1), -1.0))
        return values, dz
    with torch.enable_grad():
        z.requires_grad_()
        values = value(z, targets, other)
        if not values.requires_grad:  # no token passed the signal's gate
            return values, torch.zeros_like(z)
        (dz,) = torch.autograd.grad(values.sum(), z)
    return values.detach(), dz


def add_gradient(parameter: Tensor, gradient: Tensor) -> None:
    """Add to a parameter's `.grad`, in the parameter's dtype."""
    if parameter.grad is None:
        parameter.grad = gradient.to(parameter.dtype)
    else:
        parameter.grad.add_(gradient)
