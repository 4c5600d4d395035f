"""What early exit loses and saves: loss and agreement with the full model against compute, for any confidence asked.

The text is given, and a whole window is read block by block: a position that has left keeps its state, of which the
blocks above make its keys and values. Since a position sees only those before it, that is what a text written token by
token would meet (generate.py), at the speed of a forward pass.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from gptlab.model.gpt import GPT, GPTConfig
from gptlab.signals.tuned_lens import TunedLens

CONFIDENCES = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 1.0)
CHUNK = 512
"""Positions whose logits are held at once."""


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
            for rows in at.split(CHUNK):
                where = (rows[:, 0], rows[:, 1])
                x = h[where] if reader is None else reader(number, h[where])
                logits = model.read(x)[:, :vocab_size].float()
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
