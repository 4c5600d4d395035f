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
    """

    model: GPT
    optimizer: Optimizer
    step: int = 0
    clipped: int = 0
    weights: list[float | None] = field(default_factory=list)
    validated: int = 0
    sampled: int = 0

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
        for name, p in self.model.named_parameters():
            mine = {
                key: value
                for key, _, of in (k.partition(".") for k in moments)
                if of == name
                for value in [moments[f"{key}.{name}"]]
            }
            if mine:
                self.optimizer.state[p] = {
                    key: value.clone() if key == "step" else value.to(p.device, copy=True)
                    for key, value in mine.items()
                }
        for name, value in scalars.items():
            setattr(self, name, value)
