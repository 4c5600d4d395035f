"""The optimizer and its schedule: AdamW or Muon with decay on matrices only, and three shapes of learning rate."""

from __future__ import annotations

import math
from collections.abc import MutableMapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from gptlab.model.gpt import GPT
from gptlab.training.config import TrainingConfig
from gptlab.training.muon import build_muon
from gptlab.training.sharding import is_sharded

WSD_DECAY = 0.2
"""Share of the steps over which wsd falls."""


class Optimizer(Protocol):
    """What an update and a checkpoint need of an optimizer."""

    @property
    def state(self) -> MutableMapping[Any, Any]: ...
    @property
    def param_groups(self) -> list[dict[str, Any]]: ...
    def step(self) -> Any: ...


def build_optimizer(model: GPT, config: TrainingConfig) -> Optimizer:
    """AdamW (0.9, 0.95), fused, or Muon for the blocks' matrices beside it; biases and norms do not decay."""
    parameters = list(model.parameters())
    within = [p for block in dict.fromkeys(model.blocks) for p in block.parameters() if p.dim() == 2]
    matrices = within if config.optimizer == "muon" else []
    taken = set(map(id, matrices))
    rest = [p for p in parameters if id(p) not in taken]
    groups = []
    for cut in (False, True):  # a fused step takes tensors that are cut over processes or ones that are not, unmixed
        mine = [p for p in rest if is_sharded(p) is cut]
        decays = {"params": [p for p in mine if p.dim() >= 2], "weight_decay": config.weight_decay}
        rests = {"params": [p for p in mine if p.dim() < 2], "weight_decay": 0.0}
        groups += [group for group in (decays, rests) if group["params"]]
    fused = parameters[0].device.type in ("cpu", "cuda")
    adamw = torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.95), eps=1e-8, fused=fused)
    if not matrices:
        return adamw
    return build_muon(matrices, adamw, config.learning_rate, config.weight_decay)


def learning_rate_at(step: int, config: TrainingConfig) -> float:
    """The learning rate of update `step`, counted from 0.

    Warmup rises in equal steps to the peak. Then cosine falls to min_lr at the end, constant stays, and wsd
    (warmup, stable, decay; 2404.06395) stays and falls linearly over the last fifth.
    """
    peak, low = config.learning_rate, config.final_learning_rate
    if step < config.warmup_steps:
        return peak * (step + 1) / config.warmup_steps
    done = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    if config.schedule == "cosine":
        return low + 0.5 * (1 + math.cos(math.pi * min(1.0, done))) * (peak - low)
    if config.schedule == "wsd":
        falling = (step - config.steps * (1 - WSD_DECAY)) / (config.steps * WSD_DECAY)
        return peak + min(1.0, max(0.0, falling)) * (low - peak)
    return peak


def adam_metric(parameters: Sequence[Tensor], optimizer: Optimizer) -> list[Tensor] | None:
    """1/(sqrt(v̂) + ε) for each parameter: what Adam multiplies a gradient by, of its second moment v as it stands.

    <a, metric·b> is how far a step along Adam's version of b changes a loss of gradient a, to first order. None where
    the optimizer keeps no second moment for one of the parameters: it is no Adam, or has made no step.
    """
    options = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    metric = []
    for p in parameters:
        state = optimizer.state.get(p, {})
        if "exp_avg_sq" not in state or id(p) not in options:
            return None
        group = options[id(p)]
        corrected = state["exp_avg_sq"] / (1 - group["betas"][1] ** float(state["step"]))
        metric.append(1 / (corrected.sqrt() + group["eps"]))
    return metric
