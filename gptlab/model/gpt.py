"""GPT-2 (Radford et al. 2019): token and position embeddings, pre-norm blocks, a head tied to the token embedding.

The model gives its hidden states one block at a time, because every block may be judged by the next. How a loss is
read from them, and how gradients flow back, is not here but in signals/reader.py and training/gradients.py.

Shapes: B batch, T time, C channels (n_embd), H heads, L blocks (n_layer), V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gptlab.data.tokenizers import PADDING
from gptlab.errors import ConfigError
from gptlab.model.attention import causal_attention
from gptlab.model.flops import training_flops_per_token
from gptlab.parsing import MOST_BLOCKS
from gptlab.randomness import torch_generator

if TYPE_CHECKING:
    from gptlab.model.working import WorkingCopy, Workspace


@dataclass(frozen=True)
class GPTConfig:
    """The size of a GPT-2; the defaults are the 124M model's, with the vocabulary padded to a multiple of 128."""

    block_size: int = 1024
    vocab_size: int = 50304
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    share_blocks: bool = False
    """Use one block L times over, as the program behind the notes did (N5)."""
    exact_gelu: bool = False
    """GELU by the error function, as nanoGPT has it, in place of GPT-2's tanh form."""
    padding: int | None = field(default=None, compare=False)
    """Last rows of the vocabulary that are no tokens; None: by how many rows a tokenizer of ours is padded to it."""

    def __post_init__(self) -> None:
        for name in ("block_size", "vocab_size", "n_layer", "n_head", "n_embd"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, found {getattr(self, name)}")
        if not 0 <= (self.padding or 0) < self.vocab_size:
            raise ConfigError(
                f"padding must be at least 0 and below vocab_size {self.vocab_size}, found {self.padding}"
            )
        if self.n_layer > MOST_BLOCKS:
            raise ConfigError(f"n_layer must be at most {MOST_BLOCKS}, found {self.n_layer}")
        if self.n_embd % self.n_head:
            raise ConfigError(
                f"n_embd must be a multiple of n_head, found n_embd {self.n_embd} and n_head {self.n_head}; "
                f"try n_embd {self.n_embd // self.n_head * self.n_head or self.n_head}"
            )

    @property
    def tokens(self) -> int:
        """Rows of the vocabulary that are tokens: the first ones."""
        return self.vocab_size - (PADDING.get(self.vocab_size, 0) if self.padding is None else self.padding)

    @property
    def parameters(self) -> int:
        """Parameters of the model, the tied head counted once."""
        C = self.n_embd
        block = 12 * C * C + 13 * C
        blocks = 1 if self.share_blocks else self.n_layer
        return (self.vocab_size + self.block_size) * C + blocks * block + 2 * C

    @property
    def flops_per_token(self) -> int:
        """Arithmetic of one training token, forward and backward."""
        return training_flops_per_token(self.n_layer, self.n_embd, self.vocab_size, self.block_size)


class Embedding(nn.Embedding):
    """Rows that only `GPT` fills."""

    def reset_parameters(self) -> None:
        """Nothing: PyTorch would draw from the global generator here."""


class Linear(nn.Linear):
    """A linear layer that only `GPT` fills; it multiplies by its working copy where there is one (model/working.py)."""

    working: WorkingCopy | None = None

    def reset_parameters(self) -> None:
        """Nothing: PyTorch would draw from the global generator here."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) if self.working is None else self.working(input)


class CausalSelfAttention(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.n_head = config.n_head
        self.c_attn = Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = Linear(config.n_embd, config.n_embd)

    def forward(self, x: Tensor) -> Tensor:  # (B, T, C) -> (B, T, C)
        return self.c_proj(causal_attention(self.c_attn(x), self.n_head))


class MLP(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.gelu = "none" if config.exact_gelu else "tanh"
        self.c_fc = Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x: Tensor) -> Tensor:  # (B, T, C) -> (B, T, C)
        return self.c_proj(F.gelu(self.c_fc(x), approximate=self.gelu))


class Block(nn.Module):
    """f_j: h_{j-1} -> h_j."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = MLP(config)

    def forward(self, x: Tensor) -> Tensor:  # (B, T, C) -> (B, T, C)
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """GPT-2 with nanoGPT's parameter names. `seed` alone decides the initial weights, parameter by parameter.

    >>> model = GPT(GPTConfig(block_size=8, vocab_size=16, n_layer=2, n_head=2, n_embd=4))
    >>> [tuple(h.shape) for h in model.hidden_states(torch.zeros(1, 8, dtype=torch.long))]
    [(1, 8, 4), (1, 8, 4), (1, 8, 4)]
    """

    def __init__(self, config: GPTConfig, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        self.workspace: Workspace | None = None
        self.sharded = False  # training/sharding.py cut the blocks: a pass through them needs every process
        self.recompute = False  # keep no block's inner activations for the backward pass
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
