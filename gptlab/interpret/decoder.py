"""A GPT-2 that reads on: keys and values of what it has read are kept, so that a new token costs one row of products.

At one row a product is as fast as its weights come from memory. So on a CPU they are packed once, in the order in
which oneDNN reads them: the products of a token of 124M then took 11 ms in fp32 where (in, out) had taken 21 and
PyTorch's own (out, in) 27, and 6 ms in bf16 where it had taken 11; at eight rows 13 ms in fp32 where both took 45. The
price is a copy of the weights. Where oneDNN is not there, products are PyTorch's own.

What is written with it, and when a block is sure enough, is told in generate.py.
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

    weight (M, K), bias (M): of any dtype. Results are sums in fp32, rounded once.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> None:
        self._source, self._dtype = (weight, bias), dtype
        self.bias = None if bias is None else bias.detach().to(dtype)
        self.weight = weight.detach().to(dtype)
        self.is_packed = _packs(self.weight)
        if self.is_packed:
            self.weight = torch.ops.mkldnn._reorder_linear_weight(self.weight, PACKED_FOR)

    def __call__(self, x: Tensor) -> Tensor:
        if self.is_packed:
            return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        return F.linear(x, self.weight, self.bias)

    def from_column(self, first: int) -> Product:
        """The product that gives the results from column `first` on, for which only their own weights are read."""
        weight, bias = self._source
        return Product(weight[first:], None if bias is None else bias[first:], self._dtype)


def product(layer: Linear, dtype: torch.dtype) -> Product:
    """A layer's product, made of its working copy if that is of the dtype."""
    copy = layer.working
    source = layer if copy is None or copy.weight.dtype != dtype else copy
    return Product(source.weight, source.bias, dtype)


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


class BlockWeights:
    """A block's products and norms."""

    def __init__(self, block: Block, dtype: torch.dtype) -> None:
        self.ln_1, self.ln_2 = block.ln_1, block.ln_2
        self.c_attn, self.attn_proj = product(block.attn.c_attn, dtype), product(block.attn.c_proj, dtype)
        self.c_fc, self.mlp_proj = product(block.mlp.c_fc, dtype), product(block.mlp.c_proj, dtype)

    @cached_property
    def keys_values(self) -> Product:
        """The last two thirds of c_attn alone: what a block that is left out still needs (N, C) -> (N, 2C)."""
        return self.c_attn.from_column(len(self.ln_1.weight))


class Weights:
    """A model's weights as decoders multiply by them, made once for any number of texts; they do not follow training.

    dtype: of the products; None = the model's working copies', else its parameters'.
    """

    def __init__(self, model: GPT, dtype: torch.dtype | None = None) -> None:
        head = model.lm_head
        self.config, self.device = model.config, head.weight.device
        self.dtype = dtype or (head.working.weight.dtype if head.working else head.weight.dtype)
        slow = self.dtype == torch.bfloat16 and self.device.type == "cpu"
        self.attention_dtype = torch.float32 if slow else self.dtype  # one bf16 query took 6 times as long as in fp32
        self.wte, self.wpe, self.ln_f = model.wte.weight, model.wpe.weight, model.ln_f
        made = {id(block): BlockWeights(block, self.dtype) for block in model.blocks}  # with share_blocks there is one
        self.blocks = [made[id(block)] for block in model.blocks]
        self.head = product(head, self.dtype)


class Decoder:
    """B rows of text that a model reads on together, all equally long; `length` tokens of each have been read.

    Norms, sums and hidden states stay in the parameters' dtype.
    """

    def __init__(self, weights: Weights, rows: int = 1, capacity: int | None = None) -> None:
        """capacity: the most tokens a row will hold; None = block_size. Raises ConfigError beyond block_size."""
        c = weights.config
        if (capacity or 0) > c.block_size:
            raise ConfigError(f"the model reads at most block_size {c.block_size} tokens at once, found {capacity}")
        self.weights, self.config = weights, c
        shape = (2, rows, c.n_head, capacity or c.block_size, c.n_embd // c.n_head)
        self.kept = [torch.empty(shape, dtype=weights.attention_dtype, device=weights.device) for _ in weights.blocks]
        self.length = 0

    def forget(self) -> None:
        """Begin anew with empty rows."""
        self.length = 0

    @torch.no_grad()
    def states(self, tokens: Tensor) -> Iterator[Tensor]:
        """Read tokens (B, T) on and yield h_1..h_L of the last of them, (B, C) each.

        A single row may be given for all. More than one token at a time only when nothing has been read yet. Who stops
        before h_L calls `skip` with the last state.
        """
        T, first = tokens.shape[1], self.length
        assert T == 1 or first == 0, "several tokens are read into empty rows only"
        self.length += T
        x = self.weights.wte[tokens] + self.weights.wpe[first : self.length]  # (B, T, C)
        for number in range(self.config.n_layer):
            x = self._block(number, x)
            yield x[:, -1]

    @torch.no_grad()
    def skip(self, number: int, h: Tensor) -> None:
        """Take state h (B, C), after block `number` of 1..L, for what the blocks above it would have been given.

        Their keys and values are made of it, as CALM does (2207.07061): later tokens attend to every position in every
        block, so something must stand there, and that state is what is there at no more than their own cost.
        """
        for above in range(number, self.config.n_layer):
            weights = self.weights.blocks[above]
            self._keep(above, weights.keys_values(self._normalised(weights.ln_1, h)), self.length - 1, 1)

    @torch.no_grad()
    def read(self, h: Tensor) -> Tensor:
        """Logits (..., V) of hidden states (..., C), at least float32."""
        logits = self.weights.head(self._normalised(self.weights.ln_f, h).flatten(0, -2)).view(*h.shape[:-1], -1)
        return logits.float() if logits.dtype.itemsize < 4 else logits

    def _normalised(self, norm: nn.LayerNorm, x: Tensor) -> Tensor:
        return F.layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, norm.eps).to(self.weights.dtype)

    def _keep(self, number: int, kv: Tensor, first: int, T: int) -> Tensor:
        """Put keys and values (B·T, 2C), side by side, in their place; they come back as (2, B, H, T, C/H)."""
        c = self.config
        kv = kv.view(-1, T, 2, c.n_head, c.n_embd // c.n_head).permute(2, 0, 3, 1, 4)
        self.kept[number][:, :, :, first : first + T] = kv
        return kv

    def _block(self, number: int, x: Tensor) -> Tensor:  # (B, T, C) -> (B, T, C)
        weights = self.weights.blocks[number]
        B, T, C = x.shape
        flat = x.view(B * T, C)
        qkv = weights.c_attn(self._normalised(weights.ln_1, flat)).to(self.weights.attention_dtype)  # (B·T, 3C)
        q = qkv[:, :C].view(B, T, self.config.n_head, -1).transpose(1, 2)  # (B, H, T, C/H)
        k, v = self._keep(number, qkv[:, C:], self.length - T, T)
        if self.length > T:  # else what has just come is all there is, of a single row where that stands for all
            k, v = self.kept[number][:, :, :, : self.length]
        y = F.scaled_dot_product_attention(q, k, v, is_causal=T > 1).transpose(1, 2).reshape(B * T, C)
        flat = flat + weights.attn_proj(y.to(self.weights.dtype))
        hidden = F.gelu(weights.c_fc(self._normalised(weights.ln_2, flat)), approximate="tanh")
        return (flat + weights.mlp_proj(hidden)).view(B, T, C)
