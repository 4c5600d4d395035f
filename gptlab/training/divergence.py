"""Where an update stopped being finite, in words. Called only when it did, so it may look at everything again."""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite

import torch

from gptlab.device import Placement
from gptlab.distributed import World
from gptlab.model.gpt import GPT
from gptlab.training.evaluate import hidden_states
from gptlab.training.gradients import Losses
from gptlab.training.sharding import length
from gptlab.training.verdicts import Batch


@torch.no_grad()
def where_not_finite(model: GPT, batches: Sequence[Batch], world: World, placement: Placement) -> str:
    """ ", first in the output of block j", for the first block whose output is not finite in any rank's micro-batches.

    Where all outputs are finite it is the parameter whose gradient the backward pass met first, and "" where none is
    bad. Every rank must call it with its own micro-batches; all get the same answer.
    """
    bad = torch.zeros(model.config.n_layer + 1, device=placement.device)
    for batch in batches:
        states = hidden_states(model, batch.tokens, placement)
        bad += torch.stack([~h.isfinite().all() for h in states])
    world.sum_([bad])
    for j, count in enumerate(bad.tolist()):
        if count:
            return f", first in the output of block {j} (transformer.h.{j - 1})" if j else ", first in the embeddings"
    gradients = [(name, p.grad) for name, p in model.named_parameters() if p.grad is not None]
    return next((f", first in {name}" for name, g in reversed(gradients) if not isfinite(length([g]))), "")


def in_which_batch(seen: Sequence[tuple[Batch, Losses]], world: World, device: torch.device) -> str:
    """ ", in sequences a to b of the update", of the first micro-batch on any rank that gave a figure not finite.

    "" where all figures are finite. Sequences are counted from 0. Every rank must call it with its own micro-batches.
    """
    found = torch.full((2,), torch.iinfo(torch.int64).max, device=device)
    for batch, losses in seen:
        figures = [losses.loss, losses.signal_loss, *(mean for means in losses.by_judge for mean in means.values())]
        if not torch.stack(figures).isfinite().all():
            found = torch.tensor([batch.first_sequence, batch.first_sequence + len(batch.tokens) - 1], device=device)
            break
    first, last = min(pair.tolist() for pair in world.gather(found))
    return "" if first == torch.iinfo(torch.int64).max else f", in sequences {first} to {last} of the update"
