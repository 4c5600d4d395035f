"""What the tests of this folder share: a small model that has opinions, and how it is scored naively."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from gptlab.device import ComputeConfig
from gptlab.model.gpt import GPT, GPTConfig

Naive = Callable[[list[int], list[int]], tuple[Tensor, Tensor]]


@pytest.fixture(scope="session")
def cpu() -> ComputeConfig:
    return ComputeConfig(torch.device("cpu"), None, 1, False, {"compile": "as asked"})


@pytest.fixture(scope="session")
def model() -> GPT:
    """Over bytes, reading 64 at once; sure of itself by place and token, so that scores differ."""
    model = GPT(GPTConfig(block_size=64, vocab_size=256, n_layer=3, n_head=2, n_embd=16))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator), alpha=0.2)
    return model


@pytest.fixture(scope="session")
def naive(model: GPT) -> Naive:
    """(context, continuation) -> (each block's summed loss (L,), whether all of it was the likeliest (L,)).

    One row at a time, in float64; the row must be no longer than the model reads.
    """
    twin = GPT(model.config)
    twin.load_state_dict(model.state_dict())
    twin.double()

    @torch.no_grad()
    def score(context: list[int], continuation: list[int]) -> tuple[Tensor, Tensor]:
        row = torch.tensor([context + continuation])
        losses, greedy = [], []
        for h in twin.hidden_states(row[:, :-1])[1:]:
            log_p = twin.read(h)[0, len(context) - 1 :].log_softmax(1)
            targets = torch.tensor(continuation)
            losses.append(-log_p.gather(1, targets[:, None]).sum())
            greedy.append((log_p.argmax(1) == targets).all())
        return torch.stack(losses), torch.stack(greedy)

    return score
