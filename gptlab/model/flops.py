"""The arithmetic of a GPT-2, without torch: comparing runs needs it where no model is built."""

from __future__ import annotations


def training_flops_per_token(n_layer: int, n_embd: int, vocab_size: int, block_size: int) -> int:
    """Of one training token, forward and backward: 6 per weight used in a matmul, 12·C·T a block of attention scores
    (PaLM, 2204.02311, appendix B)."""
    C, T = n_embd, block_size
    return 6 * (12 * C * C * n_layer + vocab_size * C) + 12 * C * T * n_layer
