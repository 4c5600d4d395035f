"""The lens: what every block would say next at every position of a text; and what early exit loses and saves by that.

The raw reading is the logit lens, head(ln_f(h_j)), as everywhere in this project; the tuned one is described in
signals/tuned_lens.py.

Early exit: the text is given, and a whole window is read block by block. A position that has left keeps its state, of
which the blocks above make its keys and values. Since a position sees only those before it, that is what a text
generated token by token would meet (generate.py), at the speed of a forward pass.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from gptlab.data.tokenizers import Tokenizer
from gptlab.model.gpt import GPT, GPTConfig
from gptlab.model.weights import refuse_not_finite
from gptlab.signals.tuned_lens import TunedLens

CHUNK, EXIT_CHUNK = 256, 512
"""Positions whose logits are held at once, by the lens and by early exit."""
CONFIDENCES = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 1.0)
"""At which early exit is measured."""


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
        refuse_not_finite(read)
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


@dataclass(frozen=True)
class Exits:
    """For every position of tokens (B, T): the block it left at, 1..L, the best token there, and its loss in nats."""

    block: Tensor
    best: Tensor
    loss: Tensor


@dataclass(frozen=True)
class Point:
    """One confidence, as means over tokens. loss: nats; agreement: share whose best token is the full model's; blocks:
    share of the blocks computed; compute: multiplications over the full model's, readings and fill-ins included;
    exits: share of the tokens that left at each of blocks 1..L."""

    confidence: float
    loss: float
    agreement: float
    blocks: float
    compute: float
    exits: list[float]


@torch.no_grad()
def leave(
    model: GPT,
    tokens: Tensor,
    targets: Tensor,
    confidence: float,
    *,
    reader: TunedLens | None = None,
    vocab_size: int | None = None,
    autocast: torch.dtype | None = None,
) -> Exits:
    """Read tokens and targets (B, T), each position as far as the first block that is sure enough; 1 never leaves."""
    L = model.config.n_layer
    found = Exits(torch.full_like(tokens, L), torch.zeros_like(tokens), torch.zeros(tokens.shape, device=tokens.device))
    with torch.autocast(tokens.device.type, autocast) if autocast else nullcontext():
        h = model.embed(tokens)
        inside = torch.ones_like(tokens, dtype=torch.bool)
        for number, block in enumerate(model.blocks, 1):
            h = torch.where(inside[..., None], block(h), h)
            if number < L and confidence >= 1:
                continue
            at = inside.nonzero()  # (n, 2)
            for rows in at.split(EXIT_CHUNK):
                where = (rows[:, 0], rows[:, 1])
                x = h[where] if reader is None else reader(number, h[where])
                logits = model.read(x)[:, :vocab_size].float()
                refuse_not_finite(logits)
                p, best = logits.softmax(1).max(1)
                loss = F.cross_entropy(logits, targets[where], reduction="none")
                sure = p >= confidence if number < L else torch.ones_like(p, dtype=torch.bool)
                gone = (where[0][sure], where[1][sure])
                found.block[gone], found.best[gone], found.loss[gone] = number, best[sure], loss[sure]
                inside[gone] = False
    return found


def curve(
    model: GPT,
    batches: Iterable[tuple[Tensor, Tensor]],
    confidences: Sequence[float] = CONFIDENCES,
    *,
    reader: TunedLens | None = None,
    vocab_size: int | None = None,
    autocast: torch.dtype | None = None,
) -> Iterator[Point]:
    """A point for each confidence over batches of tokens and targets (B, T)."""
    batches = list(batches)
    at = partial(leave, model, vocab_size=vocab_size, autocast=autocast)
    full = [at(tokens, targets, confidence=1.0) for tokens, targets in batches]
    reference = torch.cat([exits.best.flatten() for exits in full])
    for confidence in confidences:
        found = full
        if confidence < 1:
            found = [at(tokens, targets, confidence=confidence, reader=reader) for tokens, targets in batches]
        block = torch.cat([exits.block.flatten() for exits in found])
        loss = torch.cat([exits.loss.flatten() for exits in found]).double().mean()
        agreement = (torch.cat([exits.best.flatten() for exits in found]) == reference).double().mean()
        L = model.config.n_layer
        cost = torch.tensor([_cost(model.config, j, confidence, tuned=reader is not None) for j in range(L + 1)])
        shares = torch.bincount(block.cpu(), minlength=L + 1).double() / len(block)
        yield Point(
            confidence,
            float(loss),
            float(agreement),
            float(block.double().mean() / L),
            float((shares * cost.double()).sum()),
            shares[1:].tolist(),
        )


def _cost(config: GPTConfig, number: int, confidence: float, *, tuned: bool) -> float:
    """Multiplications of a token that leaves at block `number`, over the full model's; attention's own left out.

    Blocks take 12·C² each, a reading V·C (and C² if tuned), the keys and values of a skipped block 2·C².
    """
    C, V, L = config.n_embd, config.vocab_size, config.n_layer
    full = 12 * C * C * L + V * C
    if confidence >= 1:
        return 1.0
    affine = C * C * min(number, L - 1) if tuned else 0
    return (12 * C * C * number + V * C * number + affine + 2 * C * C * (L - number)) / full
