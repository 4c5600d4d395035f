"""The learning rate of every update, what decays, and Muon's step by its singular values."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from small_run import make_run

from gptlab.model import GPT, GPTConfig
from gptlab.model.fast_cpu import WorkingLinear, replace_linears
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


RATE = 0.01


def is_matrix_within(name: str) -> bool:
    return name.startswith("transformer.h.") and name.endswith("weight") and ".ln_" not in name


def test_a_matrix_moves_by_a_nearly_orthogonal_one_of_its_gradients_directions() -> None:
    """The first update of momentum is the gradient's: its singular values become about 1, times 0.2·sqrt(max(A, B))."""
    run = make_run(optimizer="muon", learning_rate=RATE, weight_decay=0.0)
    before = run.weights
    gradient = run.gradient()
    seen = 0
    for name in filter(is_matrix_within, before):
        U, S, Vh = torch.linalg.svd(gradient[name], full_matrices=False)
        strong = 0.02 * S.square().sum().sqrt() < S  # five steps multiply a small singular value by 480
        scale = RATE * 0.2 * math.sqrt(max(before[name].shape))
        turned = U.T @ (before[name] - run.weights[name]) @ Vh.T / scale
        values = turned.diagonal()
        assert values[strong].min() > 0.6, name
        assert values.max() < 1.3, name
        assert (turned - values.diag())[strong][:, strong].abs().max() < 0.05, name
        assert strong.sum() >= 4, name
        seen += 1
    assert seen == 4 * 4


@pytest.mark.parametrize("share_blocks", [False, True])
def test_everything_else_is_adamws_and_each_parameter_is_in_one_group(share_blocks: bool) -> None:
    runs = {name: make_run(optimizer=name, share_blocks=share_blocks, weight_decay=0.3) for name in ("muon", "adamw")}
    for run in runs.values():
        run.update()
    for name, p in runs["muon"].weights.items():
        assert torch.equal(p, runs["adamw"].weights[name]) != is_matrix_within(name), name
    state = runs["muon"].state
    groups = state.optimizer.param_groups
    decay = [(id(p), group["weight_decay"]) for group in groups for p in group["params"]]
    assert len(dict(decay)) == len(decay) == len(list(state.model.parameters()))
    for name, p in state.model.named_parameters():
        assert dict(decay)[id(p)] == (0.0 if name.endswith("bias") or ".ln_" in name else 0.3), name
        kept = {"momentum_buffer"} if is_matrix_within(name) else {"exp_avg", "exp_avg_sq", "step"}
        assert state.optimizer.state[p].keys() == kept, name
    assert {group["lr"] for group in groups} == {runs["adamw"].state.optimizer.param_groups[0]["lr"]}


def test_working_copies_follow_muons_step() -> None:
    run = make_run(optimizer="muon", dtype=torch.float32, autocast=torch.bfloat16, learning_rate=RATE)
    replace_linears(run.state.model, torch.bfloat16)
    layers = [module for module in run.state.model.modules() if isinstance(module, WorkingLinear)]
    before = [layer.operands(torch.bfloat16)[0].clone() for layer in layers]
    run.update()
    for layer, old in zip(layers, before, strict=True):
        copy, _ = layer.operands(torch.bfloat16)
        assert torch.equal(copy, layer.weight.bfloat16())
        assert not torch.equal(copy, old)
