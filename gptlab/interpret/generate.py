"""Writing on from a prompt, one token at a time, with what each block would have said next beside it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gptlab.data.tokenizers import Tokenizer
from gptlab.model.gpt import GPT


@dataclass(frozen=True)
class Step:
    """One written token; best and probability: of each block's reading z_1..z_L before it."""

    token: int
    best: list[int]
    probability: list[float]


@torch.no_grad()
def generate(
    model: GPT,
    prompt: list[int],
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    vocab_size: int | None = None,
    generator: torch.Generator | None = None,
) -> Iterator[Step]:
    """Yield tokens that go on from `prompt`; temperature 0 takes the likeliest.

    vocab_size: ids the tokenizer knows; rows that only pad the model's vocabulary are never written. top_k, top_p:
    keep the k likeliest, or the fewest that hold p of the probability (nucleus, 1904.09751). generator: on the CPU.
    """
    device = model.lm_head.weight.device
    tokens = torch.tensor([prompt], device=device)
    for _ in range(max_new_tokens):
        window = tokens[:, -model.config.block_size :]
        states = torch.stack([h[0, -1] for h in model.hidden_states(window)[1:]])  # (L, C)
        logits = model.read(states).float().cpu()[:, :vocab_size]  # (L, V)
        probability, best = logits.softmax(1).max(1)
        token = choose(logits[-1], temperature, top_k, top_p, generator)
        yield Step(token, best.tolist(), probability.tolist())
        tokens = torch.cat([tokens, torch.tensor([[token]], device=device)], dim=1)


def choose(
    logits: Tensor, temperature: float, top_k: int | None, top_p: float, generator: torch.Generator | None
) -> int:
    """One token drawn from logits (V,), as `generate` says."""
    if temperature == 0:
        return int(logits.argmax())
    ordered, index = (logits / temperature).sort(descending=True, stable=True)
    if top_k:
        ordered, index = ordered[:top_k], index[:top_k]
    p = ordered.softmax(0)
    p[p.cumsum(0) - p >= top_p] = 0  # the likeliest token always stays
    return int(index[torch.multinomial(p, 1, generator=generator)])


def as_row(prompt: list[int], steps: list[Step], tokenizer: Tokenizer) -> dict[str, Any]:
    """A sample as a row of metrics.jsonl: the text, and for every token each block's best next one with its p."""
    tokens = [s.token for s in steps]
    return {
        "prompt": tokenizer.decode(np.array(prompt)),
        "text": tokenizer.decode(np.array(tokens)),
        "tokens": tokens,
        "written": [tokenizer.decode(np.array([t])) for t in tokens],
        "blocks": [
            [[tokenizer.decode(np.array([b])), round(p, 4)] for b, p in zip(s.best, s.probability, strict=True)]
            for s in steps
        ],
    }
