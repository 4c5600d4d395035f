"""Scores against one row at a time in float64, whatever the batches; long texts in stretches."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from gptlab.device import ComputeConfig
from gptlab.distributed import World
from gptlab.evals.scoring import Request, Scorer
from gptlab.model.gpt import GPT
from gptlab.training.evaluate import hidden_states
from gptlab.training.parallel import compile_blocks

Naive = Callable[[list[int], list[int]], tuple[Tensor, Tensor]]


def requests(count: int = 23) -> list[Request]:
    generator = torch.Generator().manual_seed(7)

    def some(most: int) -> tuple[int, ...]:
        length = int(torch.randint(1, most, (1,), generator=generator))
        return tuple(torch.randint(256, (length,), generator=generator).tolist())

    return [Request(some(40), some(20)) for _ in range(count)]


@pytest.mark.parametrize("batch_size", [1, 5, 100])
def test_scores_are_those_of_one_row_at_a_time(batch_size: int, model: GPT, cpu: ComputeConfig, naive: Naive) -> None:
    asked = requests()
    asked.append(Request((3,), (int(model(torch.tensor([[3]]))[0, -1].argmax()),)))  # the last block's own guess
    found = Scorer(model, cpu, World(), batch_size=batch_size, every_block=True)(asked)
    expected = [naive(list(r.context), list(r.continuation)) for r in asked]
    torch.testing.assert_close(found.loss, torch.stack([loss for loss, _ in expected]), rtol=1e-5, atol=1e-5)
    assert torch.equal(found.greedy, torch.stack([greedy for _, greedy in expected]))
    assert found.greedy[-1, -1]
    assert not found.greedy[0].any()
    last = Scorer(model, cpu, World(), batch_size=batch_size)(asked)
    assert torch.equal(last.loss, found.loss[:, -1:])
    assert torch.equal(last.greedy, found.greedy[:, -1:])


def test_a_context_is_cut_at_its_beginning(model: GPT, cpu: ComputeConfig, naive: Naive) -> None:
    (long,) = (tuple(range(100, 200)),)
    found = Scorer(model, cpu, World(), every_block=True)([Request(long, (5, 6))])
    torch.testing.assert_close(found.loss[0], naive(list(long[-63:]), [5, 6])[0], rtol=1e-5, atol=1e-5)


def test_a_long_text_is_scored_in_stretches_each_with_all_that_fits_before_it(
    model: GPT, cpu: ComputeConfig, naive: Naive
) -> None:
    """0 | 1..64 | 65..128 | 129..150: the last stretch sees 64 tokens, of which it scores the last 22."""
    text = [n * 7 % 256 for n in range(151)]
    found = Scorer(model, cpu, World(), every_block=True)([Request((text[0],), tuple(text[1:]))])
    parts = [naive(text[:1], text[1:65]), naive(text[64:65], text[65:129]), naive(text[86:129], text[129:])]
    torch.testing.assert_close(found.loss[0], sum(loss for loss, _ in parts), rtol=1e-5, atol=1e-4)


def test_bfloat16_is_close_and_progress_is_told(model: GPT, naive: Naive) -> None:
    rough = ComputeConfig(torch.device("cpu"), torch.bfloat16, 1, False, {})
    told: list[int] = []
    asked = requests(8)
    found = Scorer(model, rough, World(), batch_size=3)(asked, told.append)
    exact = torch.stack([naive(list(r.context), list(r.continuation))[0][-1:] for r in asked])
    torch.testing.assert_close(found.loss, exact, rtol=0.03, atol=0.1)
    assert not torch.equal(found.loss.float(), exact.float())
    assert told == [1, 2, 3]


def test_a_compiled_model_scores_the_same(
    model: GPT, cpu: ComputeConfig, naive: Naive, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With torch.compile's own front, and the eager back end behind it, which needs no compiler."""
    twin = GPT(model.config)
    twin.load_state_dict(model.state_dict())
    for block in twin.blocks:
        compiled = block.compile
        monkeypatch.setattr(block, "compile", partial(compiled, backend="eager"))
    placement = ComputeConfig(cpu.device, None, 1, True, {"compile": "as asked"})
    rehearse = partial(hidden_states, twin, torch.zeros(2, 4, dtype=torch.int64), placement)
    assert compile_blocks(twin, placement, rehearse, dynamic=None) == "compiled: as asked"
    asked = requests(4)
    found = Scorer(twin, placement, World(), batch_size=2, every_block=True)(asked)
    torch.testing.assert_close(found.loss, Scorer(model, cpu, World(), batch_size=2, every_block=True)(asked).loss)
