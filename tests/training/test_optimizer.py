"""The learning rate of every update by known values, and what decays."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from gptlab.model import GPT, GPTConfig
from gptlab.training import TrainingConfig
from gptlab.training.optimizer import AdamStep, build_optimizer
from gptlab.training.step import learning_rate_at


def rates(**options: Any) -> list[float]:
    config = TrainingConfig(**{"learning_rate": 1.0, "min_lr": 0.1, "warmup_steps": 4, "steps": 14, **options})
    return [learning_rate_at(step, config) for step in range(config.steps)]


@pytest.mark.parametrize("schedule", ["cosine", "wsd", "constant"])
def test_warmup_rises_in_equal_steps_to_the_peak(schedule: str) -> None:
    assert rates(schedule=schedule, steps=40)[:5] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])
    assert rates(schedule=schedule, warmup_steps=0, steps=40)[0] == 1.0
    assert rates(schedule=schedule, warmup_steps=50, steps=5) == pytest.approx([0.02, 0.04, 0.06, 0.08, 0.1])


def test_cosine_falls_to_the_lowest_at_the_end() -> None:
    falling = rates(schedule="cosine")[4:]
    assert falling == pytest.approx([0.1 + 0.45 * (1 + math.cos(math.pi * k / 10)) for k in range(10)])
    assert falling[5] == pytest.approx(0.55), "half way it is the mean of both"
    config = TrainingConfig(learning_rate=1.0, warmup_steps=4, steps=14)
    assert learning_rate_at(14, config) == pytest.approx(0.1), "a tenth of the peak, unless said"


def test_wsd_stays_and_falls_linearly_over_the_last_fifth() -> None:
    found = rates(schedule="wsd", steps=20)
    assert found[4:17] == [1.0] * 13
    assert found[16:] == pytest.approx([1.0, 0.775, 0.55, 0.325])


def test_constant_stays() -> None:
    assert rates(schedule="constant")[4:] == [1.0] * 10


def test_matrices_and_embeddings_decay_and_nothing_else() -> None:
    model = GPT(GPTConfig(block_size=4, vocab_size=8, n_layer=2, n_head=1, n_embd=4))
    optimizer = build_optimizer(model, TrainingConfig(weight_decay=0.3, beta1=0.8, beta2=0.99))
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert len(decay) == len(list(model.parameters()))
    for name, p in model.named_parameters():
        assert decay[id(p)] == (0.0 if name.endswith("bias") or ".ln_" in name else 0.3), name
    assert all(group["betas"] == (0.8, 0.99) for group in optimizer.param_groups)


@pytest.mark.parametrize("clip", [0.0, 1.0])
@pytest.mark.parametrize("share", [0.3, 0.9, 1.5, 100.0])
def test_a_change_beyond_reach_is_met_as_far_as_it_can_be_by_no_larger_norm_than_that_takes(
    clip: float, share: float
) -> None:
    """share: of the largest change that any factor makes. Beyond 1 the factor stays where 99% of it is reached."""
    model = GPT(GPTConfig(16, 16, 2, 2, 16))
    optimizer = build_optimizer(model, TrainingConfig())
    parameters = list(model.parameters())
    generator = torch.Generator().manual_seed(3)
    gradient, added = ([torch.randn(p.shape, generator=generator) for p in parameters] for _ in range(2))
    for p, g in zip(parameters, gradient, strict=True):
        p.grad = g.clone()
    optimizer.step()
    step = AdamStep(parameters, optimizer, clip)

    def change(factor: float) -> float:
        return step.effect(gradient, [factor * a for a in added])[0]

    largest = change(2.0**30)
    factor = step.factor_for(share * largest, gradient, added)
    assert change(factor) == pytest.approx(min(share, 0.99) * largest, rel=1e-3)
    assert factor < 1e4
