"""Muon's step by its singular values, AdamW's beside it bit for bit, and every parameter in one of them."""

from __future__ import annotations

import math

import pytest
import torch
from small_run import make_run

from gptlab.model.fast_cpu import WorkingLinear, replace_linears

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
