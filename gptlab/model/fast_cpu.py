"""The fast path of a CPU in bf16, installed by replacing a model's modules: working copies, short attention, GELU.

Under autocast a linear layer casts its weight in every forward; its backward casts the gradient back and adds it in a
third pass over memory. A `WorkingLinear` multiplies by a copy that is cast once an update, and puts its weight's
gradient straight into `.grad`. PyTorch's fused attention is slow backwards there: `ShortAttention` keeps its scores.
GELU's tanh is slow in both directions: `SlopeGELU` takes one sigmoid for both.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from gptlab.device import ComputeConfig
from gptlab.model.gpt import GPT, CausalAttention, Linear, add_gradient

LONGEST_KEPT = 512
"""The longest sequence (tokens) whose scores are kept: their memory grows with T²."""
NARROW_PRODUCTS = range(512, 1025)
"""Columns of a product at which blocks of rows are faster, where they are at all."""


def install(model: GPT, compute: ComputeConfig, *, copies: bool = True) -> None:
    """Replace the model's modules by fast ones, where it computes eagerly in bf16 on a CPU; else do nothing.

    Parameters and their names stay. copies: off where weights are sharded, which have no whole copy.
    """
    if not compute.eager_bf16_on_cpu or compute.autocast is None:
        return
    _replace(model, CausalAttention, lambda attention: ShortAttention(attention.n_head))
    _replace(model, nn.GELU, lambda gelu: SlopeGELU(gelu.approximate))
    if copies:
        replace_linears(model, compute.autocast, compute.row_block)


def replace_linears(model: nn.Module, dtype: torch.dtype, row_block: int = 0) -> None:
    """Let linear layers multiply by working copies. row_block: of a product with a narrow result; 0 = whole."""
    _replace(model, Linear, lambda layer: WorkingLinear(layer, dtype, row_block))


def _replace(model: nn.Module, kind: type[nn.Module], by: Any) -> None:
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) is kind:
                setattr(module, name, by(child))


def product(a: Tensor, b: Tensor, row_block: int = 0, bias: Tensor | None = None) -> Tensor:
    """a (N, K) times b (K, M), plus a bias (M,); in blocks of rows where that is asked for and the result is narrow.

    On a processor with AMX, PyTorch's products with a result 768 wide took twice as long as the same in blocks of 512.
    """
    if not row_block or len(a) <= row_block or b.shape[1] not in NARROW_PRODUCTS:
        return a @ b if bias is None else torch.addmm(bias, a, b)
    out = a.new_empty(len(a), b.shape[1])
    for first in range(0, len(a), row_block):
        rows = slice(first, first + row_block)
        if bias is None:
            torch.mm(a[rows], b, out=out[rows])
        else:
            torch.addmm(bias, a[rows], b, out=out[rows])
    return out


class WorkingLinear(Linear):
    """A linear layer that multiplies by copies of its parameters in the dtype of the matmuls.

    The copies are renewed at the first use after the parameters were changed in place.
    """

    def __init__(self, layer: Linear, dtype: torch.dtype, row_block: int) -> None:
        nn.Module.__init__(self)  # nn.Linear's would allocate a weight
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.weight, self.bias, self.row_block = layer.weight, layer.bias, row_block
        self._copies = [torch.empty_like(p, dtype=dtype, requires_grad=False) for p in self._sources]
        self._copied_versions: list[int] = []

    @property
    def _sources(self) -> list[Tensor]:
        return [self.weight] if self.bias is None else [self.weight, self.bias]

    @property
    def matmul_dtype(self) -> torch.dtype:
        return self._copies[0].dtype

    def operands(self, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        if dtype != self.matmul_dtype:
            return super().operands(dtype)
        versions = [p._version for p in self._sources]
        if versions != self._copied_versions:
            with torch.no_grad():
                torch._foreach_copy_(self._copies, self._sources)
            self._copied_versions = versions
        return self._copies[0], None if self.bias is None else self._copies[1]

    def forward(self, input: Tensor) -> Tensor:  # (..., in) -> (..., out), in the dtype of the matmuls
        return _MultiplyByCopies.apply(input, self.weight, self)  # type: ignore[return-value]


class _MultiplyByCopies(torch.autograd.Function):
    """y = x W^T + b with a layer's copies; x (..., in), y (..., out).

    The parameter `weight` is an argument only so that autograd knows whether the backward under way wants its
    gradient: a frozen judge's does not, and takes the same graph without the products that make one.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, layer: WorkingLinear) -> Tensor:
        copy, bias = layer.operands(layer.matmul_dtype)
        flat = x.to(copy.dtype).reshape(-1, x.shape[-1])  # (N, in)
        ctx.layer, ctx.dtype = layer, x.dtype
        ctx.save_for_backward(flat)
        return product(flat, copy.t(), layer.row_block, bias).view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (dy,) = gradients
        layer: WorkingLinear = ctx.layer
        flat = dy.reshape(-1, dy.shape[-1])  # (N, out)
        weight_node = ctx.next_functions[1][0]
        if weight_node is not None and torch._C._will_engine_execute_node(weight_node):
            (x,) = ctx.saved_tensors
            add_gradient(layer.weight, flat.t() @ x)
            if layer.bias is not None:
                add_gradient(layer.bias, flat.sum(0))
        copy, _ = layer.operands(layer.matmul_dtype)
        return product(flat, copy, layer.row_block).view(*dy.shape[:-1], -1).to(ctx.dtype), None, None


class ShortAttention(CausalAttention):
    """Attention that keeps its probabilities for the backward pass, where a sequence is short enough.

    In bf16 on a CPU the backward of PyTorch's fused attention took 12 ms where these four products take 4 (12 heads of
    64, four sequences of 256 tokens): docs/performance.md.
    """

    def forward(self, qkv: Tensor) -> Tensor:  # (B, T, 3C) -> (B, T, C)
        if qkv.dtype != torch.bfloat16 or qkv.shape[1] > LONGEST_KEPT:
            return super().forward(qkv)
        return _KeptScores.apply(qkv, self.n_head)  # type: ignore[return-value]


@lru_cache(maxsize=4)
def _mask(T: int, dtype: torch.dtype) -> Tensor:
    """What is added to scores (T, T): -inf at positions after a query's own."""
    return torch.full((T, T), -torch.inf, dtype=dtype).triu(1)


class _KeptScores(torch.autograd.Function):
    """softmax(q k^T / sqrt(D) + mask) v, with the probabilities kept for the backward; D = C/H."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, n_head: int) -> Tensor:
        B, T, C = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3
        D = C // n_head
        q, k, v = qkv.view(B, T, 3, n_head, D).permute(2, 0, 3, 1, 4).reshape(3, B * n_head, T, D).unbind()
        scores = torch.baddbmm(_mask(T, qkv.dtype), q, k.transpose(1, 2), alpha=D**-0.5)  # (B·H, T, T)
        p = scores.softmax(2)
        ctx.save_for_backward(q, k, v, p)
        ctx.shape = (B, n_head, T, D)
        return torch.bmm(p, v).view(B, n_head, T, D).transpose(1, 2).reshape(B, T, C)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        q, k, v, p = ctx.saved_tensors
        B, H, T, D = ctx.shape
        dy = gradients[0].view(B, T, H, D).transpose(1, 2).reshape(B * H, T, D)
        d = torch.empty(3, B * H, T, D, dtype=dy.dtype)  # of q, k and v
        torch.bmm(p.transpose(1, 2), dy, out=d[2])
        dp = torch.bmm(dy, v.transpose(1, 2))
        ds = torch._softmax_backward_data(dp, p, 2, p.dtype)  # pyright: ignore[reportPrivateImportUsage]
        torch.bmm(ds, k, out=d[0])
        torch.bmm(ds.transpose(1, 2), q, out=d[1])
        d[:2].mul_(D**-0.5)
        return d.view(3, B, H, T, D).permute(1, 3, 0, 2, 4).reshape(B, T, 3 * H * D), None


class SlopeGELU(nn.GELU):
    """GPT-2's GELU, which keeps its slope for the backward pass in place of its input.

    On two cores of an AMD EPYC PyTorch's own, forward and backward, took 1.28 ms for 1,024 tokens of 512 channels in
    bf16, and this takes 0.74: docs/performance.md.
    """

    def forward(self, input: Tensor) -> Tensor:
        if input.dtype != torch.bfloat16 or self.approximate != "tanh":
            return super().forward(input)
        return _KeptSlope.apply(input, torch.is_grad_enabled())  # type: ignore[return-value]  # untyped, as every apply


LINEAR = 2 * math.sqrt(2 / math.pi)
CUBIC = 0.044715 * LINEAR
PIECE = 2**18
"""Entries whose fp32 copies stay in a core's cache."""


class _KeptSlope(torch.autograd.Function):
    """x σ(u) with u = LINEAR·x + CUBIC·x³, which is x (1 + tanh(u/2)) / 2, in fp32 and rounded once, piece by piece.

    Its slope is σ + x u' σ (1 - σ), and x u' = 3u - 2·LINEAR·x. It is kept in the input's dtype.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, learn: bool) -> Tensor:
        y = torch.empty_like(x, memory_format=torch.contiguous_format)
        slope = torch.empty_like(y) if learn else y[:0]
        scratch = torch.empty(3, min(PIECE, x.numel()))  # one for all pieces: what is fresh is in no cache
        for k, piece in enumerate(x.reshape(-1).split(PIECE)):
            here = slice(k * PIECE, k * PIECE + len(piece))
            wide, u, xu = scratch[:, : len(piece)]
            wide.copy_(piece)
            torch.mul(wide, wide, out=u).mul_(CUBIC).add_(LINEAR).mul_(wide)
            if learn:
                torch.mul(wide, -2 * LINEAR, out=xu).add_(u, alpha=3)
            u.sigmoid_()
            if learn:
                torch.ops.aten.sigmoid_backward(xu, u, grad_input=xu)
                slope.view(-1)[here] = xu.add_(u)
            y.view(-1)[here] = wide.mul_(u)
        ctx.save_for_backward(slope)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (slope,) = ctx.saved_tensors
        return gradients[0] * slope, None
