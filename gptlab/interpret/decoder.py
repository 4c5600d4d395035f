"""A GPT-2 that reads on: keys and values of what it has read are kept, so that a new token costs one row of products.

At one row a product is as fast as its weights come from memory. So each weight is read once a token, in the dtype and
layout that measured fastest: bf16 as (out, in) with the bias added after it, fp32 on a CPU as (in, out) (15.7 ms for
the linear layers of 124M where (out, in) took 19.3, the head 5.4 where it took 9.1). The price is a copy of the
weights; a run's working copies (model/working.py) are used as they are.

What is written with it, and when a block is sure enough, is told in generate.py.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gptlab.errors import ConfigError
from gptlab.model.gpt import GPT, Block, Linear


class Product:
    """A linear layer as a decoder multiplies by it: x (N, K) -> (N, M), in the decoder's dtype."""

    def __init__(self, layer: Linear, dtype: torch.dtype) -> None:
        copy = layer.working
        source = layer if copy is None or copy.weight.dtype != dtype else copy
        weight = source.weight.detach().to(dtype)
        self.turned = dtype == torch.float32 and weight.device.type == "cpu"
        self.weight = weight.t().contiguous() if self.turned else weight
        self.bias = None if source.bias is None else source.bias.detach().to(dtype)

    def __call__(self, x: Tensor) -> Tensor:
        return self._times(x, self.weight, self.bias)

    def columns(self, x: Tensor, first: int) -> Tensor:
        """The results from column `first` on, for which only their own weights are read."""
        weight = self.weight[:, first:] if self.turned else self.weight[first:]
        return self._times(x, weight, None if self.bias is None else self.bias[first:])

    def _times(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if self.turned:
            return x @ weight if bias is None else torch.addmm(bias, x, weight)
        y = F.linear(x, weight)
        return y if bias is None else y.add_(bias)


class BlockWeights:
    """A block's products and norms."""

    def __init__(self, block: Block, dtype: torch.dtype) -> None:
        self.ln_1, self.ln_2 = block.ln_1, block.ln_2
        self.c_attn, self.attn_proj = Product(block.attn.c_attn, dtype), Product(block.attn.c_proj, dtype)
        self.c_fc, self.mlp_proj = Product(block.mlp.c_fc, dtype), Product(block.mlp.c_proj, dtype)


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
        self.head = Product(head, self.dtype)


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
        C = self.config.n_embd
        for above in range(number, self.config.n_layer):
            weights = self.weights.blocks[above]
            self._keep(above, weights.c_attn.columns(self._normalised(weights.ln_1, h), C), self.length - 1, 1)

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
