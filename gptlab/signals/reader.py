"""Reading a hidden state: z = head(ln_f(h)), a value for every token, and the gradient back to h, chunk by chunk.

Logits are the largest tensors of a language model ((B,T,V): 824 MB in float32 at 4x1024 tokens), and here every block
is read. So no reading is kept: each chunk of positions takes its logits, their values and their gradient, and leaves
only the gradient at h, which is V/C times smaller. The true loss is read the same way, learning; a frozen judge is
read without learning, so that it passes gradient on and takes none.

A chunk is as many rows as a matmul likes; its elementwise part goes over it in pieces that a processor's cache holds,
and leaves the gradient where the logits were.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from gptlab.model.fast_cpu import WorkingLinear, product
from gptlab.model.gpt import GPT, add_gradient
from gptlab.signals import closed_form
from gptlab.signals.closed_form import ClosedForm

ValueFunction = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""(logits (n, V), targets (n,), the other block's logits (n, V) or None) -> each token's value (n,)."""


@dataclass(frozen=True)
class Value:
    """What a reading is worth: a function, and where there is one the closed form of it and its gradient."""

    function: ValueFunction
    closed_form: ClosedForm | None = None

    def __call__(self, logits: Tensor, targets: Tensor, other: Tensor | None = None) -> Tensor:
        return self.function(logits, targets, other)


def _cross_entropy(logits: Tensor, targets: Tensor, other: Tensor | None = None) -> Tensor:
    return F.cross_entropy(logits, targets, reduction="none")


true_loss = Value(_cross_entropy, closed_form.cross_entropy)
"""CE(z, y) of every token, in nats."""

CHUNK_BYTES = 128 * 2**20
"""Logits of one chunk in the dtype of the matmuls: at V=50304 1,333 rows in bf16."""
FEW = 3
"""Readings from which the head is turned round."""
PIECE_ELEMENTS = 2**21
"""Logits of one elementwise pass on a CPU: 8 MiB in float32."""


@dataclass(frozen=True)
class Reading:
    """values: sum over tokens, float64; gradient: of scale·values at the hidden state, as it was given."""

    values: Tensor
    gradient: Tensor


class Reader:
    """The readout of a model for one micro-batch: its head in the dtype of the matmuls, cast once for all readings.

    chunk: rows of logits that are held at once; piece: rows that the elementwise part takes at once; readings: how
    many will be made, since from a few on it pays to turn the head round for the first of their products.
    """

    def __init__(
        self,
        model: GPT,
        dtype: torch.dtype | None = None,
        chunk: int | None = None,
        piece: int | None = None,
        readings: int = 1,
    ) -> None:
        self.ln_f = model.ln_f
        self.head = model.lm_head.weight  # (V, C)
        dtype = dtype or self.head.dtype
        self.working_head, _ = model.lm_head.operands(dtype)
        self.rows = model.lm_head.row_block if isinstance(model.lm_head, WorkingLinear) else 0
        turn = self.rows and readings >= FEW
        self.turned_head = self.working_head.t().contiguous() if turn else self.working_head.t()  # (C, V)
        V = len(self.head)
        self.chunk = chunk or max(1, CHUNK_BYTES // (V * dtype.itemsize))
        self.piece = piece or (self.chunk if self.head.is_cuda else max(1, PIECE_ELEMENTS // V))

    def _normalise(self, h: Tensor) -> Tensor:
        return F.layer_norm(h, self.ln_f.normalized_shape, self.ln_f.weight, self.ln_f.bias, self.ln_f.eps)

    def _logits(self, x: Tensor) -> Tensor:  # (n, C) -> (n, V), in the dtype of the matmuls
        return x @ self.turned_head

    def read(
        self,
        h: Tensor,
        targets: Tensor,
        value: ValueFunction,
        scale: float,
        *,
        learn: bool,
        other: Tensor | None = None,
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
            scaled = working * scale if learn else working  # (N, C), so that no pass over logits is for the scale
            others = None if other is None else self._normalise(other).to(self.working_head.dtype)
            total = torch.zeros((), dtype=torch.float64, device=h.device)
            down = torch.empty_like(x)
            for start in range(0, len(h), self.chunk):
                rows = slice(start, start + self.chunk)
                z = self._logits(working[rows])
                other_z = None if others is None else self._logits(others[rows])
                total += self._into_gradient(z, targets[rows], other_z, value)
                torch.mul(product(z, self.working_head, self.rows), scale, out=down[rows])
                if learn:
                    add_gradient(self.head, z.t() @ scaled[rows])
        if learn:
            torch.autograd.backward(x, down, inputs=[h, self.ln_f.weight, self.ln_f.bias])
            assert h.grad is not None
            return Reading(total, h.grad)
        return Reading(total, torch.autograd.grad(x, h, down)[0])

    def _into_gradient(self, z: Tensor, targets: Tensor, other: Tensor | None, value: ValueFunction) -> Tensor:
        """Turn logits z (n, V) into the gradient of the sum of their values, in place; give that sum, float64."""
        total = torch.zeros((), dtype=torch.float64, device=z.device)
        form = getattr(value, "closed_form", None)
        for start in range(0, len(z), self.piece):
            rows = slice(start, start + self.piece)
            logits, y = _at_least_float32(z[rows]), targets[rows]
            if form:
                values, gradient = form(logits, y)
            else:
                beside = None if other is None else _at_least_float32(other[rows])
                values, gradient = _by_autograd(value, logits, y, beside)
            total += values.sum(dtype=torch.float64)
            z[rows] = gradient
        return total

    @torch.no_grad()
    def values(self, h: Tensor, targets: Tensor, value: ValueFunction, other: Tensor | None = None) -> Tensor:
        """Each token's value (N,) of hidden states h (N, C), without any gradient."""
        x = self._normalise(h).to(self.working_head.dtype)
        others = None if other is None else self._normalise(other).to(self.working_head.dtype)
        parts = []
        for start in range(0, len(h), self.chunk):
            chunk = slice(start, start + self.chunk)
            z, y = self._logits(x[chunk]), targets[chunk]
            other_z = None if others is None else self._logits(others[chunk])
            for first in range(0, len(z), self.piece):
                rows = slice(first, first + self.piece)
                beside = None if other_z is None else _at_least_float32(other_z[rows])
                parts.append(value(_at_least_float32(z[rows]), y[rows], beside))
        return torch.cat(parts)


def _at_least_float32(z: Tensor) -> Tensor:
    return z.float() if z.dtype.itemsize < 4 else z


def _by_autograd(value: ValueFunction, z: Tensor, targets: Tensor, other: Tensor | None) -> tuple[Tensor, Tensor]:
    """Values (n,) and the gradient (n, V) of their sum."""
    with torch.enable_grad():
        leaf = z.detach().requires_grad_()
        values = value(leaf, targets, other)
        if not values.requires_grad:  # no token passed the signal's gate
            return values, torch.zeros_like(z)
        (dz,) = torch.autograd.grad(values.sum(), leaf)
    return values.detach(), dz
