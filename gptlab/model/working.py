"""Working copies: the weights in the dtype of the matmuls, cast once an update instead of in every forward.

Under autocast a linear layer casts its weight in the forward, and in the backward casts the gradient back and adds it
in a third pass over memory. Here the layer multiplies by a copy that is refreshed after each optimizer step, and its
weight's gradient goes straight into `.grad`. Whether it goes there at all is asked at the time of the backward
(`Learning`): a frozen judge's descent takes the same graph and skips those products.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from gptlab.model.gpt import GPT, Linear


def add_gradient(parameter: Tensor, gradient: Tensor) -> None:
    """Add to a parameter's `.grad`, in the parameter's dtype."""
    if parameter.grad is None:
        parameter.grad = gradient.to(parameter.dtype)
    else:
        parameter.grad.add_(gradient)


NARROW = range(512, 1025)
"""Columns of a product at which blocks of rows are faster, where they are at all."""


def product(a: Tensor, b: Tensor, rows: int = 0, bias: Tensor | None = None) -> Tensor:
    """a (N, K) times b (K, M), plus a bias (M,); in blocks of `rows` rows where that is said and the result is narrow.

    On a processor with AMX, PyTorch's products with a result 768 wide took twice as long as the same in blocks of 512.
    """
    if not rows or len(a) <= rows or b.shape[1] not in NARROW:
        return a @ b if bias is None else torch.addmm(bias, a, b)
    out = a.new_empty(len(a), b.shape[1])
    for first in range(0, len(a), rows):
        block = slice(first, first + rows)
        if bias is None:
            torch.mm(a[block], b, out=out[block])
        else:
            torch.addmm(bias, a[block], b, out=out[block])
    return out


class Learning:
    """Whether weights take gradient in the backward pass that is under way."""

    def __init__(self) -> None:
        self.on = True


class WorkingCopy:
    """One linear layer's weight and bias in the working dtype, and how to multiply by them."""

    def __init__(self, layer: nn.Linear, dtype: torch.dtype, learning: Learning, rows: int) -> None:
        self.layer, self.learning, self.rows = layer, learning, rows
        self.weight = torch.empty_like(layer.weight, dtype=dtype, requires_grad=False)
        self.bias = None if layer.bias is None else torch.empty_like(layer.bias, dtype=dtype, requires_grad=False)
        self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        self.weight.copy_(self.layer.weight)
        if self.bias is not None:
            self.bias.copy_(self.layer.bias)

    def __call__(self, x: Tensor) -> Tensor:
        return _Multiply.apply(x, self)  # type: ignore[return-value]


class _Multiply(torch.autograd.Function):
    """y = x W^T + b in the working dtype; x (..., K), y (..., N)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, copy: WorkingCopy) -> Tensor:
        working = x.to(copy.weight.dtype)
        ctx.copy, ctx.dtype = copy, x.dtype
        ctx.save_for_backward(working)
        y = product(working.reshape(-1, x.shape[-1]), copy.weight.t(), copy.rows, copy.bias)
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (dy,) = gradients
        copy: WorkingCopy = ctx.copy
        flat = dy.reshape(-1, dy.shape[-1])
        if copy.learning.on:
            (x,) = ctx.saved_tensors
            add_gradient(copy.layer.weight, flat.t() @ x.reshape(-1, x.shape[-1]))
            if copy.layer.bias is not None:
                add_gradient(copy.layer.bias, flat.sum(0))
        return product(flat, copy.weight, copy.rows).view(*dy.shape[:-1], -1).to(ctx.dtype), None


class Workspace:
    """The working copies of a model's linear layers, put in place; the head's is read by signals/reader.py.

    rows: of a block of a product with a narrow result; 0 = whole
    """

    def __init__(self, model: GPT, dtype: torch.dtype, rows: int = 0) -> None:
        self.learning, self.rows = Learning(), rows
        self.copies: list[WorkingCopy] = []
        for layer in (module for module in model.modules() if isinstance(module, Linear)):
            layer.working = WorkingCopy(layer, dtype, self.learning, rows)
            self.copies.append(layer.working)
        model.workspace = self

    def refresh(self) -> None:
        """Take over the weights as they are now: after every optimizer step."""
        for copy in self.copies:
            copy.refresh()

    @contextmanager
    def weights(self, learn: bool) -> Iterator[None]:
        """Inside, a backward pass teaches the linear layers, or does not."""
        before, self.learning.on = self.learning.on, learn
        try:
            yield
        finally:
            self.learning.on = before
