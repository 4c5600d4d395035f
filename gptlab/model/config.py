"""The size of a GPT-2 and what follows from it. No torch here: runs are compared where no model is built."""

from __future__ import annotations

from dataclasses import dataclass, field

from gptlab.data.tokenizers import PADDING
from gptlab.errors import ConfigError
from gptlab.options import check_sizes


@dataclass(frozen=True)
class GPTConfig:
    """The size of a GPT-2; the defaults are the 124M model's, with the vocabulary padded to a multiple of 128.

    >>> GPTConfig().parameters, GPTConfig(block_size=64, vocab_size=256, n_layer=2, n_head=2, n_embd=32).parameters
    (124475904, 35712)
    """

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
        check_sizes(self, "block_size", "vocab_size", "n_layer", "n_head", "n_embd")
        if not 0 <= (self.padding or 0) < self.vocab_size:
            raise ConfigError(f"padding must be from 0 to below vocab_size {self.vocab_size}, found {self.padding}")
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
        """Arithmetic of one training token, forward and backward: 6 per weight used in a matmul, and 12·C·T a block
        for attention scores (PaLM, 2204.02311, appendix B)."""
        C, T, L = self.n_embd, self.block_size, self.n_layer
        return 6 * (12 * C * C * L + self.vocab_size * C) + 12 * C * T * L
