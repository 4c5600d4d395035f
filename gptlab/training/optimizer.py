"""The optimizer: AdamW, or Muon for the blocks' matrices with AdamW for the rest (`--optimizer muon`).

Muon (Jordan 2024) makes of a matrix's momentum, by Newton-Schulz steps, a nearly orthogonal matrix of the same
directions. That is meant for matrices within the network; embeddings with the head, vectors and biases stay with AdamW.
Gradients are summed over processes before the step, so that every process sees whole matrices. docs/options.md.
"""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from gptlab.model.gpt import GPT
from gptlab.training.config import TrainingConfig
from gptlab.training.parallel import clip_factor, global_norm, is_sharded


class Optimizer(Protocol):
    """What an update and a checkpoint need of an optimizer."""

    @property
    def state(self) -> MutableMapping[Any, Any]: ...
    @property
    def param_groups(self) -> list[dict[str, Any]]: ...
    def step(self) -> Any: ...


class MuonWithAdamW:
    """torch.optim.Muon and AdamW as one: the groups of both, and one state for all parameters."""

    def __init__(self, muon: torch.optim.Muon, adamw: torch.optim.AdamW) -> None:
        self._optimizers = (muon, adamw)
        muon.state = adamw.state  # keyed by parameter, and no parameter is in both
        self.state = adamw.state

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return [group for optimizer in self._optimizers for group in optimizer.param_groups]

    def step(self) -> None:
        for optimizer in self._optimizers:
            optimizer.step()


def build_optimizer(model: GPT, config: TrainingConfig) -> Optimizer:
    """AdamW, fused, with or without Muon for the blocks' matrices; biases and norms do not decay."""
    parameters = list(model.parameters())
    within = [p for block in dict.fromkeys(model.blocks) for p in block.parameters() if p.dim() == 2]
    matrices = within if config.optimizer == "muon" else []
    taken = set(map(id, matrices))
    rest = [p for p in parameters if id(p) not in taken]
    groups = []
    for sharded in (False, True):  # a fused step takes tensors that are sharded or ones that are not, unmixed
        mine = [p for p in rest if is_sharded(p) is sharded]
        decaying = {"params": [p for p in mine if p.dim() >= 2], "weight_decay": config.weight_decay}
        others = {"params": [p for p in mine if p.dim() < 2], "weight_decay": 0.0}
        groups += [group for group in (decaying, others) if group["params"]]
    fused = parameters[0].device.type in ("cpu", "cuda")
    betas = config.beta1, config.beta2
    adamw = torch.optim.AdamW(groups, lr=config.learning_rate, betas=betas, eps=1e-8, fused=fused)
    if not matrices:
        return adamw
    # An orthogonal (A, B) matrix is longer the larger it is, so its entries are scaled by 0.2·sqrt(max(A, B)), which
    # makes them as large as AdamW's usual updates: learning rates and decay found for AdamW serve (Liu et al. 2025,
    # 2502.16982; `match_rms_adamw`).
    muon = torch.optim.Muon(
        matrices, lr=config.learning_rate, weight_decay=config.weight_decay, momentum=0.95, nesterov=True,
        adjust_lr_fn="match_rms_adamw",
    )  # fmt: skip
    return MuonWithAdamW(muon, adamw)


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


class AdamStep:
    """Adam's next step, without its learning rate, from a gradient: what another gradient would change in it.

    The moments are read as they stand and not changed. clip: the largest norm of a gradient, as in `clip_factor`.
    """

    def __init__(self, parameters: Sequence[Tensor], optimizer: Optimizer, clip: float) -> None:
        self._options = {id(p): group for group in optimizer.param_groups for p in group["params"]}
        self._parameters, self._state, self._clip = list(parameters), optimizer.state, clip

    @property
    def is_adam(self) -> bool:
        """Whether every parameter's step is Adam's; Muon's matrices take another."""
        return all("betas" in self._options[id(p)] for p in self._parameters)

    def effect(self, gradient: Sequence[Tensor], added: Sequence[Tensor]) -> tuple[float, float | None]:
        """The norm, over all parameters, of what `added` changes in the step from `gradient`, and that over the norm of
        this step; None where there is none."""
        before = self._direction(gradient)
        changed, norm = self._change(before, gradient, added, 1.0), global_norm(before)
        return changed, changed / norm if norm else None

    def _change(
        self, before: Sequence[Tensor], gradient: Sequence[Tensor], added: Sequence[Tensor], factor: float
    ) -> float:
        after = self._direction([g + factor * a for g, a in zip(gradient, added, strict=True)])
        return global_norm([a - b for a, b in zip(after, before, strict=True)])

    def _direction(self, gradient: Sequence[Tensor]) -> list[Tensor]:
        factor = clip_factor(global_norm(gradient), self._clip)
        return [self._step(p, factor * g) for p, g in zip(self._parameters, gradient, strict=True)]

    def _step(self, p: Tensor, g: Tensor) -> Tensor:
        group, state = self._options[id(p)], self._state.get(p, {})
        (b1, b2), made = group["betas"], float(state.get("step", 0)) + 1
        mean = (1 - b1) * g + (b1 * state["exp_avg"] if state else 0)
        square = (1 - b2) * g * g + (b2 * state["exp_avg_sq"] if state else 0)
        return mean / (1 - b1**made) / ((square / (1 - b2**made)).sqrt() + group["eps"])

    def factor_for(self, wanted: float, gradient: Sequence[Tensor], added: Sequence[Tensor]) -> float:
        """The factor at which `added` changes the step from `gradient` by `wanted`, to 0.02%, by halving an interval.

        The change grows with the factor until the added gradient drowns the other. Where it never is so large, the
        factor at which it is within 1% of the largest it can be: a larger one would change nothing but the norm.
        """
        if not wanted or not any(bool(a.any()) for a in added):
            return 0.0
        before, low, high = self._direction(gradient), 0.0, 1.0
        while high < 2.0**30 and self._change(before, gradient, added, high) < wanted:
            low, high = high, 2 * high
        if (largest := self._change(before, gradient, added, high)) < wanted:
            low, wanted = 0.0, 0.99 * largest
        while high - low > 2e-4 * high:
            middle = (low + high) / 2
            low, high = (middle, high) if self._change(before, gradient, added, middle) < wanted else (low, middle)
        return high
