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


class Learning:
    """Whether weights take gradient in the backward pass that is under way."""

    def __init__(self) -> None:
        self.on = True


class WorkingCopy:
    """One linear layer's weight and bias in the working dtype, and how to multiply by them."""

    def __init__(self, layer: nn.Linear, dtype: torch.dtype, learning: Learning) -> None:
        self.layer, self.learning = layer, learning
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
        return torch.nn.functional.linear(working, copy.weight, copy.bias)

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
        return (flat @ copy.weight).view(*dy.shape[:-1], -1).to(ctx.dtype), None


class Workspace:
    """The working copies of a model's linear layers, put in place; the head's is read by signals/reader.py."""

    def __init__(self, model: GPT, dtype: torch.dtype) -> None:
        self.learning = Learning()
        self.copies: list[WorkingCopy] = []
        for layer in (module for module in model.modules() if isinstance(module, Linear)):
            layer.working = WorkingCopy(layer, dtype, self.learning)
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
