"""Drawing tokens: temperature, top-k and top-p against closed forms, and each block's own guess beside the text."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from gptlab.data.tokenizers import get_tokenizer
from gptlab.interpret.generate import Step, as_row, choose, generate
from gptlab.model.gpt import GPT, GPTConfig

LOGITS = torch.tensor([0.0, 2.0, 1.0, -1.0])
P = LOGITS.double().softmax(0)


@pytest.fixture(scope="module")
def model() -> GPT:
    return GPT(GPTConfig(block_size=8, vocab_size=50, n_layer=3, n_head=2, n_embd=16), seed=1)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@torch.no_grad()
def test_each_step_reads_every_block_and_takes_the_last_ones_choice(model: GPT) -> None:
    prompt = [3, 1, 4]
    steps = list(generate(model, prompt, 12, temperature=0))
    tokens = list(prompt)
    for step in steps:
        window = torch.tensor([tokens[-8:]])  # the context is cut to block_size
        states = model.hidden_states(window)[1:]
        read = [model.read(h[0, -1]).softmax(-1) for h in states]
        assert step.best == [int(p.argmax()) for p in read]
        assert step.probability == pytest.approx([float(p.max()) for p in read], abs=1e-6)
        assert step.token == step.best[-1]
        tokens.append(step.token)


def test_the_same_generator_draws_the_same_text(model: GPT) -> None:
    def drawn(seed: int) -> list[int]:
        return [step.token for step in generate(model, [1], 8, generator=generator(seed))]

    assert drawn(1) == drawn(1)
    assert drawn(1) != drawn(2)


def test_padding_rows_are_never_written(model: GPT) -> None:
    steps = list(generate(model, [1], 40, temperature=10.0, vocab_size=5, generator=generator(1)))
    assert {step.token for step in steps} == set(range(5))
    assert max(best for step in steps for best in step.best) < 5


def test_nothing_is_learnt_while_writing(model: GPT) -> None:
    assert all(p.grad is None for p in model.parameters())
    assert not any(step.token < 0 for step in generate(model, [1], 1, generator=generator(1)))
    assert torch.is_grad_enabled()


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p", "expected"),
    [
        (1.0, None, 1.0, P),
        (0.5, None, 1.0, (2 * LOGITS.double()).softmax(0)),
        (1.0, 2, 1.0, torch.tensor([0, P[1], P[2], 0]) / (P[1] + P[2])),
        (1.0, 99, 1.0, P),
        (1.0, None, float(P[1]) + 0.01, torch.tensor([0, P[1], P[2], 0]) / (P[1] + P[2])),
        (1.0, None, float(P[1]) - 0.01, torch.tensor([0, 1.0, 0, 0])),
        (1.0, None, 1e-9, torch.tensor([0, 1.0, 0, 0])),
        (0.0, None, 1.0, torch.tensor([0, 1.0, 0, 0])),
        (1e-4, None, 1.0, torch.tensor([0, 1.0, 0, 0])),
    ],
)
def test_draws_follow_the_distribution_that_was_asked_for(
    temperature: float, top_k: int | None, top_p: float, expected: torch.Tensor
) -> None:
    n, source = 3000, generator(7)
    drawn = [choose(LOGITS, temperature, top_k, top_p, source) for _ in range(n)]
    found = np.bincount(drawn, minlength=4) / n
    tolerance = 5 * (expected * (1 - expected) / n).sqrt().numpy()  # five standard deviations
    assert (np.abs(found - expected.numpy()) <= tolerance).all(), found


def test_a_sample_becomes_a_row_of_json_values() -> None:
    steps = [Step(104, [97, 98], [0.123456, 0.5]), Step(105, [0, 255], [1.0, 0.25])]
    assert as_row([72], steps, get_tokenizer("bytes")) == {
        "prompt": "H",
        "text": "hi",
        "tokens": [104, 105],
        "written": ["h", "i"],
        "blocks": [[["a", 0.1235], ["b", 0.5]], [["\0", 1.0], ["�", 0.25]]],
    }
