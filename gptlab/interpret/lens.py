"""The lens: what every block would say next at every position of a text, read raw or through a tuned reader.

The raw reading is the logit lens, head(ln_f(h_j)), as everywhere in this project; the tuned one is told in
signals/tuned_lens.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gptlab.data.tokenizers import Tokenizer
from gptlab.model.gpt import GPT
from gptlab.signals.tuned_lens import TunedLens

CHUNK = 256
"""Positions whose logits are held at once."""


@dataclass(frozen=True)
class Lens:
    """What blocks 1..L say after each of `tokens` (T).

    best, probability: (L, T, K) the likeliest next tokens, the surest first; entropy: (L, T), nats; agrees: (L, T),
    whether a block's best token is the final block's.
    """

    tokens: list[int]
    best: Tensor
    probability: Tensor
    entropy: Tensor
    agrees: Tensor


@torch.no_grad()
def look(
    model: GPT,
    tokens: Sequence[int],
    *,
    top: int = 5,
    reader: TunedLens | None = None,
    vocab_size: int | None = None,
    autocast: torch.dtype | None = None,
) -> Lens:
    """Read every block at every position; raises ConfigError for more than block_size tokens.

    reader: None reads raw. vocab_size: ids the tokenizer knows; rows that only pad the vocabulary are left out.
    """
    device = model.lm_head.weight.device
    with torch.autocast(device.type, autocast) if autocast else nullcontext():
        states = model.hidden_states(torch.tensor([list(tokens)], device=device))[1:]
        found = [_read(model, number, h[0], top, reader, vocab_size) for number, h in enumerate(states, 1)]
    best, probability, entropy = (torch.stack(parts).cpu() for parts in zip(*found, strict=True))
    return Lens(list(tokens), best, probability, entropy, best[..., 0] == best[-1, :, 0])


def _read(
    model: GPT, number: int, h: Tensor, top: int, reader: TunedLens | None, vocab_size: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Top tokens (T, K), their probabilities (T, K) and the entropy (T,) of a block's reading of h (T, C)."""
    parts = []
    for rows in h.split(CHUNK):
        read = model.read(reader(number, rows) if reader else rows)[:, :vocab_size].float()
        log_p = read.log_softmax(1)
        probability, best = log_p.exp().topk(min(top, log_p.shape[1]))
        parts.append((best, probability, -(log_p.exp() * log_p).sum(1)))
    best, probability, entropy = (torch.cat(part) for part in zip(*parts, strict=True))
    return best, probability, entropy


def readings(
    model: GPT,
    tokenizer: Tokenizer,
    text: str,
    readers: Mapping[str, TunedLens | None],
    *,
    top: int = 5,
    autocast: torch.dtype | None = None,
) -> dict[str, dict[str, Any]]:
    """{name: {"blocks": `summary`, "positions": `as_json`}} of a text through each of `readers` (None reads raw).

    An empty text is the start of a document. Raises DataError for text that the tokenizer cannot hold, ConfigError for
    more than block_size tokens.
    """
    tokens = tokenizer.prompt(text)
    known = min(tokenizer.vocab_size, model.config.vocab_size)
    found = {}
    for name, reader in readers.items():
        lens = look(model, tokens, top=top, reader=reader, vocab_size=known, autocast=autocast)
        found[name] = {"blocks": summary(lens), "positions": as_json(lens, tokenizer)}
    return found


def as_json(lens: Lens, tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """An entry for each position: its token, and for every block top tokens, entropy in nats, and agreement."""

    def block(j: int, t: int) -> dict[str, Any]:
        pairs = zip(lens.best[j, t].tolist(), lens.probability[j, t].tolist(), strict=True)
        return {
            "top": [{"token": b, "text": tokenizer.decode([b]), "probability": round(p, 6)} for b, p in pairs],
            "entropy": round(float(lens.entropy[j, t]), 6),
            "agrees": bool(lens.agrees[j, t]),
        }

    return [
        {"token": token, "text": tokenizer.decode([token]), "blocks": [block(j, t) for j in range(len(lens.best))]}
        for t, token in enumerate(lens.tokens)
    ]


def summary(lens: Lens) -> list[dict[str, float]]:
    """Of every block, means over positions: probability of its best token, entropy, agreement with the final block."""
    figures = zip(lens.probability[..., 0].mean(1), lens.entropy.mean(1), lens.agrees.float().mean(1), strict=True)
    return [
        {"confidence": round(float(p), 6), "entropy": round(float(h), 6), "agreement": round(float(a), 6)}
        for p, h, a in figures
    ]
