"""Everything that an update changes: what a checkpoint holds and an exact resume restores."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from gptlab.model.gpt import GPT
from gptlab.training.optimizer import Optimizer


@dataclass
class TrainingState:
    """The state after `step` updates. Draws are keyed by (seed, step, ...), so no generator is part of it.

    weights: the weight (before start and anneal) of every signal, where `signal.dose` sets it; else None
    validated, sampled: the last step that was validated or sampled, so that a stop in between redoes it
    listener: the frozen model that replies in a conversation; it never changes, and no checkpoint holds it
    """

    model: GPT
    optimizer: Optimizer
    step: int = 0
    clipped: int = 0
    weights: list[float | None] = field(default_factory=list)
    validated: int = 0
    sampled: int = 0
    listener: GPT | None = None

    def tensors(self) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """(weights, moments) by name; a tied or shared tensor once."""
        weights = {name: p.detach() for name, p in self.model.named_parameters()}
        moments: dict[str, torch.Tensor] = {}
        for name, p in self.model.named_parameters():
            for key, value in self.optimizer.state.get(p, {}).items():
                moments[f"{key}.{name}"] = value.detach()
        return weights, moments

    def scalars(self) -> dict[str, Any]:
        """The rest, as JSON values."""
        names = ("step", "clipped", "weights", "validated", "sampled")
        return {name: getattr(self, name) for name in names}

    def restore(
        self, weights: dict[str, torch.Tensor], moments: dict[str, torch.Tensor], scalars: dict[str, Any]
    ) -> None:
        """Take over a checkpoint's content, exactly; the optimizer's own bookkeeping (groups, lr) stays as built."""
        self.optimizer.state.clear()  # moments that the checkpoint does not have are not to stay
        with torch.no_grad():
            for name, p in self.model.named_parameters():
                p.copy_(weights[name])
        parameters = dict(self.model.named_parameters())
        on_device = {p for group in self.optimizer.param_groups if _counts_on_device(group) for p in group["params"]}
        for full_name, value in moments.items():
            key, _, name = full_name.partition(".")
            p = parameters[name]
            place = p.device if key != "step" or p in on_device else torch.device("cpu")
            self.optimizer.state.setdefault(p, {})[key] = value.to(place, copy=True)
        for name, value in scalars.items():
            setattr(self, name, value)


def _counts_on_device(group: dict[str, Any]) -> bool:
    """Whether a group's optimizer keeps `step` where its parameters are: a fused kernel refuses one on the host."""
    return bool(group.get("fused") or group.get("capturable"))
