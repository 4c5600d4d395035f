"""A GPT-2 with a cache of keys and values, so that a new token costs one row of products.

At one row a product is as fast as its weights come from memory. So on a CPU they are packed once, in the order in
which oneDNN reads them: the products of a token of 124M then took 11 ms in fp32 where (in, out) had taken 21 and
PyTorch's own (out, in) 27, and 6 ms in bf16 where it had taken 11; at eight rows 13 ms in fp32 where both took 45. The
price is a copy of the weights. Where oneDNN is not there, products are PyTorch's own. Every other operation of a token
costs ten microseconds whatever it does, its code and its numbers being pushed out of the caches by the weights that
pass: so there are as few as can be.

interpret/generate.py draws tokens with it, and decides when a block is sure enough.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gptlab.errors import ConfigError
from gptlab.model.gpt import GPT, Block, Linear

PACKED_FOR = 16
"""Rows that weights are packed for: at 1 to 512 rows this packing was no slower than one made for the number itself."""


class Product:
    """A linear layer as a decoder multiplies by it, in its dtype: x (N, K) -> (N, M).

    weight (M, K), bias (M): of any dtype. Results are sums in fp32, rounded once; with `gelu` ("tanh" or "none", its
    form) what GELU makes of them.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype, *, gelu: str = "") -> None:
        self._source, self._dtype = (weight, bias), dtype
        self._gelu = gelu
        self._after = ("gelu", [], gelu) if gelu else ("none", [], "")
        self.bias = None if bias is None else bias.detach().to(dtype)
        self.weight = weight.detach().to(dtype)
        self.is_packed = _packs(self.weight)
        if self.is_packed:
            self.weight = torch.ops.mkldnn._reorder_linear_weight(self.weight, PACKED_FOR)

    def __call__(self, x: Tensor) -> Tensor:
        if self.is_packed:
            return torch.ops.mkldnn._linear_pointwise.default(x, self.weight, self.bias, *self._after)
        y = F.linear(x, self.weight, self.bias)
        return F.gelu(y, approximate=self._gelu) if self._gelu else y

    def added_to(self, residual: Tensor, x: Tensor) -> Tensor:
        """residual (N, M) + the product, in the residual's dtype; without `gelu`."""
        if self.is_packed and residual.dtype == self._dtype:
            return torch.ops.mkldnn._linear_pointwise.binary(x, residual, self.weight, self.bias, "add")
        return residual + self(x)

    def from_column(self, first: int) -> Product:
        """The product that gives the results from column `first` on, for which only their own weights are read."""
        weight, bias = self._source
        return Product(weight[first:], None if bias is None else bias[first:], self._dtype)


def product(layer: Linear, dtype: torch.dtype, *, gelu: str = "") -> Product:
    """A layer's product, made of its working copy if that is of the dtype."""
    return Product(*layer.operands(dtype), dtype, gelu=gelu)


def _packs(weight: Tensor) -> bool:
    """Whether oneDNN multiplies by a weight on this machine.

    The operators are those that PyTorch's own compiler freezes linear layers into; they stand in no manual.
    """
    ops = torch.ops.mkldnn
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if not (hasattr(ops, "_reorder_linear_weight") and hasattr(ops, "_linear_pointwise")):
        return False
    return weight.dtype == torch.float32 or (weight.dtype == torch.bfloat16 and ops._is_mkldnn_bf16_supported())


class Norm:
    """A layer norm as a decoder takes it: x (N, C) -> (N, C) in its dtype, computed in the norm's own."""

    def __init__(self, norm: nn.LayerNorm, dtype: torch.dtype) -> None:
        weight, bias = (None if p is None else p.detach() for p in (norm.weight, norm.bias))
        self._arguments = norm.normalized_shape, weight, bias, norm.eps
        self._dtype = dtype

    def __call__(self, x: Tensor) -> Tensor:
        return torch.layer_norm(x, *self._arguments).to(self._dtype)


class BlockWeights:
    """A block's products and norms."""

    def __init__(self, block: Block, dtype: torch.dtype) -> None:
        self.ln_1, self.ln_2 = Norm(block.ln_1, dtype), Norm(block.ln_2, dtype)
        self.width = len(block.ln_1.weight)
        self.c_attn, self.attn_proj = product(block.attn.c_attn, dtype), product(block.attn.c_proj, dtype)
        self.c_fc, self.mlp_proj = (
            product(block.mlp.c_fc, dtype, gelu=block.mlp.gelu.approximate),
            product(block.mlp.c_proj, dtype),
        )

    @cached_property
    def keys_values(self) -> Product:
        """The last two thirds of c_attn alone: what a block that is left out still needs (N, C) -> (N, 2C)."""
        return self.c_attn.from_column(self.width)


class Weights:
    """A model's weights as decoders multiply by them, made once for any number of texts; they do not follow training.

    dtype: of the products; None = the model's working copies', else its parameters'.
    """

    def __init__(self, model: GPT, dtype: torch.dtype | None = None) -> None:
        head = model.lm_head
        self.config, self.device = model.config, head.weight.device
        self.dtype = dtype or head.matmul_dtype
        slow = self.dtype == torch.bfloat16 and self.device.type == "cpu"
        self.attention_dtype = torch.float32 if slow else self.dtype  # one bf16 query took 6 times as long as in fp32
        self.wte, self.wpe = model.wte.weight.detach(), model.wpe.weight.detach()
        self.ln_f = Norm(model.ln_f, self.dtype)
        made = {id(block): BlockWeights(block, self.dtype) for block in model.blocks}  # with share_blocks there is one
        self.blocks = [made[id(block)] for block in model.blocks]
        self.head = product(head, self.dtype)


class Decoder:
    """B rows of text that a model reads together, all equally long; `length` tokens of each have been read.

    Norms, sums and hidden states stay in the parameters' dtype. kept: of every block (B, capacity, 2, H, C/H), keys and
    values as they come side by side.
    """

    def __init__(self, weights: Weights, rows: int = 1, capacity: int | None = None) -> None:
        """capacity: the most tokens a row will hold; None = block_size. Raises ConfigError beyond block_size."""
        c = weights.config
        if (capacity or 0) > c.block_size:
            raise ConfigError(f"the model reads at most block_size {c.block_size} tokens at once, found {capacity}")
        self.weights, self.config = weights, c
        self._heads = (c.n_head, c.n_embd // c.n_head)
        shape = (rows, capacity or c.block_size, 2, *self._heads)
        self.kept = [torch.empty(shape, dtype=weights.attention_dtype, device=weights.device) for _ in weights.blocks]
        self._keys_values = [kept.permute(2, 0, 3, 1, 4).unbind() for kept in self.kept]  # (B, H, capacity, C/H) each
        self.length = 0

    def forget(self, kept: int = 0) -> None:
        """Empty all rows but for their first `kept` tokens, after which others may be read."""
        assert 0 <= kept <= self.length
        self.length = kept

    @torch.no_grad()
    def states(self, tokens: Tensor) -> Iterator[Tensor]:
        """Read tokens (B, T) and yield h_1..h_L of the last of them, (B, C) each.

        A single row may be given for all. More than one token at a time only when nothing has been read yet. Who stops
        before h_L calls `skip` with the last state.
        """
        T, first = tokens.shape[1], self.length
        assert T == 1 or first == 0, "several tokens are read into empty rows only"
        self.length += T
        x = (self.weights.wte[tokens] + self.weights.wpe[first : self.length]).flatten(0, 1)
        for number in range(self.config.n_layer):
            x = self._block(number, x, T)
            yield x[T - 1 :: T]

    @torch.no_grad()
    def skip(self, number: int, h: Tensor) -> None:
        """Take state h (B, C), after block `number` of 1..L, for what the blocks above it would have been given.

        Their keys and values are made of it, as CALM does (2207.07061): later tokens attend to every position in every
        block, so something must stand there, and that state is what is there at no more than their own cost.
        """
        for above in range(number, self.config.n_layer):
            weights = self.weights.blocks[above]
            kv = weights.keys_values(weights.ln_1(h)).view(-1, 2, *self._heads)
            self.kept[above].select(1, self.length - 1).copy_(kv)

    @torch.no_grad()
    def read(self, h: Tensor) -> Tensor:
        """Logits (..., V) of hidden states (..., C), at least float32."""
        logits = self.weights.head(self.weights.ln_f(h).flatten(0, -2)).view(*h.shape[:-1], -1)
        return logits.float() if logits.dtype.itemsize < 4 else logits

    def _block(self, number: int, x: Tensor, T: int) -> Tensor:  # (B·T, C) -> (B·T, C)
        weights, kept = self.weights.blocks[number], self.kept[number]
        qkv = weights.c_attn(weights.ln_1(x)).view(-1, T, 3, *self._heads).to(kept.dtype)
        kept.narrow(1, self.length - T, T).copy_(qkv.narrow(2, 1, 2))
        if self.length > T:
            q, (k, v) = qkv.select(2, 0), self._keys_values[number]
            y = F.scaled_dot_product_attention(q.transpose(1, 2), k[:, :, : self.length], v[:, :, : self.length])
        else:  # what has just come is all there is, of a single row where that stands for all
            q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind()
            y = F.scaled_dot_product_attention(q, k, v, is_causal=T > 1)
        x = weights.attn_proj.added_to(x, y.transpose(1, 2).reshape(x.shape).to(self.weights.dtype))
        return weights.mlp_proj.added_to(x, weights.c_fc(weights.ln_2(x)))
