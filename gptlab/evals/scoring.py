"""How likely a model, or each of its blocks, finds given tokens after given others: what every test here is made of.

Requests are read in batches of like length, and only the positions that count are read out. The batches are shared by
all ranks and do not depend on how many there are, so that any number of them gives the same figures.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from gptlab.device import ComputeConfig
from gptlab.distributed import World
from gptlab.model.gpt import GPT
from gptlab.model.weights import refuse_not_finite
from gptlab.signals.readout import Readout
from gptlab.training.evaluate import hidden_states


@dataclass(frozen=True)
class Request:
    """What is given, at least one token, and what is scored after it."""

    context: tuple[int, ...]
    continuation: tuple[int, ...]


@dataclass(frozen=True)
class Scores:
    """Of n requests and J blocks, the last one last. loss: Σ -log p of the continuation, nats (n, J) float64;
    greedy: whether each of its tokens was the likeliest (n, J) bool."""

    loss: Tensor
    greedy: Tensor


@dataclass(frozen=True)
class _Window:
    """A stretch of a request that the model can read at once: tokens in, the last `count` of `targets` scored."""

    request: int
    tokens: tuple[int, ...]
    targets: tuple[int, ...]


class Scorer:
    """A model set up for scoring. every_block: score all blocks, else the last alone; batch_size: rows at once."""

    def __init__(
        self, model: GPT, placement: ComputeConfig, world: World, *, batch_size: int = 16, every_block: bool = False
    ) -> None:
        self.model, self.placement, self.world, self.batch_size = model, placement, world, batch_size
        self.blocks = model.config.n_layer if every_block else 1
        self._reader = Readout(model, placement.autocast)

    @torch.no_grad()
    def __call__(self, requests: Sequence[Request], progress: Callable[[int], None] = lambda done: None) -> Scores:
        """The scores of requests, in their order; every rank calls it with the same ones and gets all of them.

        A continuation that is longer than the model reads at once is scored in stretches, as a text is in validation;
        a context is cut at its beginning. progress: called with how many batches this rank has finished.
        """
        block_size = self.model.config.block_size
        windows = [w for n, request in enumerate(requests) for w in _windows(n, request, block_size)]
        windows.sort(key=lambda w: (-len(w.tokens), w.request))
        batches = [windows[at : at + self.batch_size] for at in range(0, len(windows), self.batch_size)]
        device = self.placement.device
        loss = torch.zeros(len(requests), self.blocks, dtype=torch.float64, device=device)
        wrong = torch.zeros_like(loss)
        for done, batch in enumerate(batches[self.world.rank :: self.world.size], 1):
            self._score(batch, loss, wrong)
            progress(done)
        self.world.sum_([loss, wrong])
        refuse_not_finite(loss)
        return Scores(loss.cpu(), (wrong == 0).cpu())

    def _score(self, batch: list[_Window], loss: Tensor, wrong: Tensor) -> None:
        """Add the batch's losses and wrong guesses to the rows of its requests."""
        device, longest = self.placement.device, max(len(w.tokens) for w in batch)
        # What stands behind a row's end cannot be seen from within it: the model is causal.
        tokens = torch.tensor([w.tokens + (0,) * (longest - len(w.tokens)) for w in batch], device=device)
        row = torch.tensor([r for r, w in enumerate(batch) for _ in w.targets], device=device)
        ends = [range(len(w.tokens) - len(w.targets), len(w.tokens)) for w in batch]
        place = torch.tensor([t for positions in ends for t in positions], device=device)
        request = torch.tensor([w.request for w in batch for _ in w.targets], device=device)
        targets = torch.tensor([y for w in batch for y in w.targets], device=device)
        for j, h in enumerate(hidden_states(self.model, tokens, self.placement)[-self.blocks :]):
            found = self._reader.values(h[row, place], targets, _loss_and_miss).double()  # (N, 2)
            loss[:, j].index_add_(0, request, found[:, 0])
            wrong[:, j].index_add_(0, request, found[:, 1])


def _windows(number: int, request: Request, block_size: int) -> list[_Window]:
    """The stretches of a request: disjoint targets, each with as much before it as the model can read."""
    sequence, found = request.context + request.continuation, []
    for start in range(len(request.context), len(sequence), block_size):
        stop = min(start + block_size, len(sequence))
        tokens = sequence[max(0, stop - 1 - block_size) : stop - 1]
        found.append(_Window(number, tokens, sequence[start:stop]))
    return found


def _loss_and_miss(logits: Tensor, targets: Tensor, other: Tensor | None = None) -> Tensor:
    """(n, 2): the cross-entropy of every token, and 1 where another token was likelier."""
    return torch.stack([F.cross_entropy(logits, targets, reduction="none"), (logits.argmax(1) != targets).float()], 1)
