"""Everything that an update changes: what a checkpoint holds, an exact resume restores, and may stop being finite."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import isfinite
from typing import Any

import torch

from gptlab.device import ComputeConfig
from gptlab.distributed import World
from gptlab.model.gpt import GPT
from gptlab.training.block_graph import ActiveSignal, Batch, Losses
from gptlab.training.evaluate import hidden_states
from gptlab.training.optimizer import Optimizer
from gptlab.training.parallel import global_norm


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


def divergence(
    state: TrainingState,
    signals: Sequence[ActiveSignal],
    loss: torch.Tensor,
    judges: torch.Tensor,
    seen: Sequence[tuple[Batch, Losses]],
    world: World,
    compute: ComputeConfig,
) -> str:
    """One line that names what is not finite (a judge's signal, else the loss, else the gradient) and where.

    Called only when an update stopped being finite, so it may look at everything again.

    loss, judges: of the update over all ranks, (1 + L) judges for each signal. seen: this rank's micro-batches.
    Every rank must call it, and all get the same answer.
    """
    bad = (~judges.isfinite()).nonzero().tolist()  # pairs of a signal and a judge
    if bad:
        k, judge = bad[0]
        what = f"the signal {signals[k].config.name} of judge {judge} (block {judge})"
    else:
        what = "the gradient" if loss.isfinite() else "the true loss"
    where = _in_which_block(state.model, [batch for batch, _ in seen], world, compute)
    where += _in_which_sequences(seen, world, compute.device)
    return (
        f"diverged at step {state.step}: {what} is not finite{where}; "
        "the weights were not changed; lower --learning_rate or --signal.weight and run again"
    )


@torch.no_grad()
def _in_which_block(model: GPT, batches: Sequence[Batch], world: World, compute: ComputeConfig) -> str:
    """ ", first in the output of block j", for the first block whose output is not finite in any rank's micro-batches.

    Where all outputs are finite it is the parameter whose gradient the backward pass met first, and "" where none is
    bad.
    """
    bad = torch.zeros(model.config.n_layer + 1, device=compute.device)
    for batch in batches:
        states = hidden_states(model, batch.tokens, compute)
        bad += torch.stack([~h.isfinite().all() for h in states])
    world.sum_([bad])
    for j, count in enumerate(bad.tolist()):
        if count:
            return f", first in the output of block {j} (transformer.h.{j - 1})" if j else ", first in the embeddings"
    gradients = [(name, p.grad) for name, p in model.named_parameters() if p.grad is not None]
    return next((f", first in {name}" for name, g in reversed(gradients) if not isfinite(global_norm([g]))), "")


def _in_which_sequences(seen: Sequence[tuple[Batch, Losses]], world: World, device: torch.device) -> str:
    """ ", in sequences a to b of the update", of the first micro-batch on any rank that gave a figure not finite.

    "" where all figures are finite. Sequences are counted from 0.
    """
    found = torch.full((2,), torch.iinfo(torch.int64).max, device=device)
    for batch, losses in seen:
        figures = [losses.loss, losses.signal_loss, *(mean for means in losses.by_judge for mean in means.values())]
        if not torch.stack(figures).isfinite().all():
            found = torch.tensor([batch.sequences[0], batch.sequences[-1]], device=device)
            break
    first, last = min(pair.tolist() for pair in world.gather(found))
    return "" if first == torch.iinfo(torch.int64).max else f", in sequences {first} to {last} of the update"
