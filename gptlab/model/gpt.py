"""GPT-2 (Radford et al. 2019): token and position embeddings, pre-norm blocks, a head tied to the token embedding.

The model gives its hidden states one block at a time, because the block loss reads every one of them. How a loss is
read from a hidden state is in signals/readout.py, how gradients flow back in training/block_loss.py, and what replaces
modules of this file on a CPU in model/fast_cpu.py.

Shapes: B batch, T time, C channels (n_embd), H heads, L blocks (n_layer), V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gptlab.errors import ConfigError
from gptlab.model.config import GPTConfig
from gptlab.randomness import torch_generator


class Embedding(nn.Embedding):
    """Rows that only `GPT` fills."""

    def reset_parameters(self) -> None:
        """Nothing: PyTorch would draw from the global generator here."""


class Linear(nn.Linear):
    """A linear layer that only `GPT` fills."""

    def reset_parameters(self) -> None:
        """Nothing: PyTorch would draw from the global generator here."""

    @property
    def matmul_dtype(self) -> torch.dtype:
        """The dtype that this layer multiplies in, outside autocast."""
        return self.weight.dtype

    def operands(self, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        """Weight (out, in) and bias (out,) in `dtype`, detached: for products outside of `forward`."""
        return self.weight.detach().to(dtype), None if self.bias is None else self.bias.detach().to(dtype)


class CausalAttention(nn.Module):
    """softmax(q k^T / sqrt(C/H) + mask) v: every position attends to itself and to those before it. No parameters."""

    def __init__(self, n_head: int) -> None:
        super().__init__()
        self.n_head = n_head

    def forward(self, qkv: Tensor) -> Tensor:  # (B, T, 3C) -> (B, T, C)
        B, T, C = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3
        heads = (B, T, self.n_head, C // self.n_head)
        q, k, v = (part.view(heads).transpose(1, 2) for part in qkv.split(C, dim=2))  # (B, H, T, C/H) each
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # (B, H, T, C/H)
        return y.transpose(1, 2).reshape(B, T, C)


Attend = Callable[[Tensor, Tensor | None], Tensor]
"""Another attention in place of a block's own: of q, k and v (B, Q, 3C) of states, and of others they may see."""


class CausalSelfAttention(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.c_attn = Linear(config.n_embd, 3 * config.n_embd)
        self.attend = CausalAttention(config.n_head)
        self.c_proj = Linear(config.n_embd, config.n_embd)

    def forward(self, x: Tensor, attend: Attend | None = None, context: Tensor | None = None) -> Tensor:
        if attend is None:
            return self.c_proj(self.attend(self.c_attn(x)))
        return self.c_proj(attend(self.c_attn(x), None if context is None else self.c_attn(context)))


class MLP(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.gelu = nn.GELU("none" if config.exact_gelu else "tanh")
        self.c_fc = Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x: Tensor) -> Tensor:  # (B, T, C) -> (B, T, C)
        return self.c_proj(self.gelu(self.c_fc(x)))


class Block(nn.Module):
    """f_j: h_{j-1} -> h_j."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = MLP(config)

    def forward(
        self, x: Tensor, attend: Attend | None = None, context: Tensor | None = None, masks: Tensor | None = None
    ) -> Tensor:
        """(B, T, C) -> (B, T, C). attend: in place of the block's own attention, to x and to `context` (B, T', C).

        masks (2, B, T, C): factors of what attention and MLP add to the residual stream, for dropout.
        """
        added = self.attn(self.ln_1(x), attend, None if context is None else self.ln_1(context))
        x = x + (added if masks is None else added * masks[0])
        added = self.mlp(self.ln_2(x))
        return x + (added if masks is None else added * masks[1])


class GPT(nn.Module):
    """GPT-2 with nanoGPT's parameter names. `seed` alone decides the initial weights, parameter by parameter.

    >>> model = GPT(GPTConfig(block_size=8, vocab_size=16, n_layer=2, n_head=2, n_embd=4))
    >>> [tuple(h.shape) for h in model.hidden_states(torch.zeros(1, 8, dtype=torch.long))]
    [(1, 8, 4), (1, 8, 4), (1, 8, 4)]
    """

    def __init__(self, config: GPTConfig, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        first = Block(config)
        rest = [first if config.share_blocks else Block(config) for _ in range(config.n_layer - 1)]
        self.transformer = nn.ModuleDict(
            {
                "wte": Embedding(config.vocab_size, config.n_embd),
                "wpe": Embedding(config.block_size, config.n_embd),
                "h": nn.ModuleList([first, *rest]),
                "ln_f": nn.LayerNorm(config.n_embd),
            }
        )
        self.lm_head = Linear(config.n_embd, config.vocab_size, bias=False)
        self.lm_head.weight = self.wte.weight
        self._initialise(seed)

    @property
    def wte(self) -> nn.Embedding:
        return self.transformer["wte"]  # type: ignore[return-value]

    @property
    def wpe(self) -> nn.Embedding:
        return self.transformer["wpe"]  # type: ignore[return-value]

    @property
    def blocks(self) -> list[Block]:
        """f_1..f_L, in order; with share_blocks the same object L times."""
        return list(self.transformer["h"])  # type: ignore[arg-type]

    @property
    def ln_f(self) -> nn.LayerNorm:
        return self.transformer["ln_f"]  # type: ignore[return-value]

    @torch.no_grad()
    def _initialise(self, seed: int) -> None:
        """GPT-2's: N(0, 0.02), projections into the residual stream scaled by 1/sqrt(2L), biases 0, norms 1."""
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
            elif ".ln_" in name:
                parameter.fill_(1.0)
            else:
                std = 0.02 * ((2 * self.config.n_layer) ** -0.5 if name.endswith("c_proj.weight") else 1.0)
                parameter.normal_(0.0, std, generator=torch_generator("init", seed, name))

    def embed(self, tokens: Tensor) -> Tensor:
        """h_0 (B, T, C) of tokens (B, T)."""
        T = tokens.shape[1]
        if T > self.config.block_size:
            raise ConfigError(
                f"the model reads at most block_size {self.config.block_size} tokens at once, found {T}; "
                "shorten the input or train with a larger --block_size"
            )
        return self.wte(tokens) + self.wpe.weight[:T]

    def hidden_states(self, tokens: Tensor) -> list[Tensor]:
        """h_0..h_L, L + 1 tensors (B, T, C), of tokens (B, T)."""
        states = [self.embed(tokens)]
        for block in self.blocks:
            states.append(block(states[-1]))
        return states

    def read(self, h: Tensor) -> Tensor:
        """z = head(ln_f(h)): logits (..., V) of a hidden state (..., C) of any block."""
        return self.lm_head(self.ln_f(h))

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits (B, T, V) of tokens (B, T)."""
        return self.read(self.hidden_states(tokens)[-1])


def add_gradient(parameter: Tensor, gradient: Tensor) -> None:
    """Add to a parameter's `.grad`, in the parameter's dtype: for gradients that are made outside of autograd."""
    if parameter.grad is None:
        parameter.grad = gradient.to(parameter.dtype)
    else:
        parameter.grad.add_(gradient)
