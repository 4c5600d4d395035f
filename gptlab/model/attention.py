"""Causal attention, PyTorch's own, and one that keeps its scores where that is faster.

On a CPU in bf16 the backward of PyTorch's fused attention took 12 ms where these four products take 4 (12 heads of 64,
four sequences of 256 tokens): docs/performance.md. Its memory grows with T², so longer sequences stay with PyTorch's.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

SHORT = 512
"""The longest sequence whose scores are kept."""


def causal_attention(qkv: Tensor, n_head: int) -> Tensor:
    """y (B, T, C) of queries, keys and values side by side (B, T, 3C); every position sees itself and those before."""
    B, T, C = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3
    if qkv.dtype == torch.bfloat16 and qkv.device.type == "cpu" and T <= SHORT:
        return _KeptScores.apply(qkv, n_head)  # type: ignore[return-value]
    heads = (B, T, n_head, C // n_head)
    q, k, v = (part.view(heads).transpose(1, 2) for part in qkv.split(C, dim=2))  # (B, H, T, C/H)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(B, T, C)


@lru_cache(maxsize=4)
def _hidden(T: int, dtype: torch.dtype) -> Tensor:
    """What is added to scores (T, T): -inf at positions after a query's own."""
    return torch.full((T, T), -torch.inf, dtype=dtype).triu(1)


class _KeptScores(torch.autograd.Function):
    """softmax(q k^T / sqrt(D) + mask) v, with the probabilities kept for the backward."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, n_head: int) -> Tensor:
        B, T, C = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3
        D = C // n_head
        q, k, v = qkv.view(B, T, 3, n_head, D).permute(2, 0, 3, 1, 4).reshape(3, B * n_head, T, D).unbind()
        scores = torch.baddbmm(_hidden(T, qkv.dtype), q, k.transpose(1, 2), alpha=D**-0.5)
        p = scores.softmax(2)
        ctx.save_for_backward(q, k, v, p)
        ctx.shape = (B, n_head, T, D)
        return torch.bmm(p, v).view(B, n_head, T, D).transpose(1, 2).reshape(B, T, C)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        q, k, v, p = ctx.saved_tensors
        B, H, T, D = ctx.shape
        dy = gradients[0].view(B, T, H, D).transpose(1, 2).reshape(B * H, T, D)
        d = torch.empty(3, B * H, T, D, dtype=dy.dtype)
        torch.bmm(p.transpose(1, 2), dy, out=d[2])
        dp = torch.bmm(dy, v.transpose(1, 2))
        ds = torch._softmax_backward_data(dp, p, 2, p.dtype).mul_(D**-0.5)  # pyright: ignore[reportPrivateImportUsage]
        torch.bmm(ds, k, out=d[0])
        torch.bmm(ds.transpose(1, 2), q, out=d[1])
        return d.view(3, B, H, T, D).permute(1, 3, 0, 2, 4).reshape(B, T, 3 * H * D), None
