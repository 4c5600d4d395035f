"""Validation on the pinned windows: the same figure for any batch size, rank count or shard layout.

Every window's loss is computed at one fixed batch shape and summed in float64 in the order of windows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate

import torch
from torch import Tensor
from torch.nn import functional as F

from gptlab.data.batches import ValidationWindows
from gptlab.device import ComputeConfig
from gptlab.distributed import World
from gptlab.model.gpt import GPT
from gptlab.model.weights import refuse_not_finite
from gptlab.signals.readout import Readout, true_loss
from gptlab.training.block_graph import matmuls_in
from gptlab.training.controls import clean_loss
from gptlab.training.parallel import blocks_are_sharded

SHAPE = 8
"""Windows of a validation batch, whatever the run's batch size is."""


TEMPERED_TOKENS = 131_072
"""The most tokens that a temperature is fitted on."""
NEWTON_STEPS = 12


@dataclass(frozen=True)
class Validation:
    """windows: mean loss of every window (n,), float64 nats; accuracy: share of tokens that were the likeliest;
    clean_loss: the loss once the flips of training are undone, nats, None where there are none to undo; block_loss and
    block_confidence: of z_1..z_L on the first batch, mean over its tokens, nats and probability; by_block: every
    block's mean loss over all windows, if asked; named: the figures that the corpus's source names, mean
    probabilities; kept: this process's batches of the first `kept_windows` windows, as (batch, final hidden states
    (n, C), targets (n,))."""

    windows: Tensor
    accuracy: float
    clean_loss: float | None
    block_loss: list[float]
    block_confidence: list[float]
    by_block: tuple[float, ...] = ()
    named: Mapping[str, float] = field(default_factory=dict)
    kept: Sequence[tuple[int, Tensor, Tensor]] = ()
    kept_windows: int = 0

    @property
    def loss(self) -> float:
        return float(self.windows.sum() / len(self.windows))


@torch.no_grad()
def validate(
    model: GPT,
    windows: ValidationWindows,
    world: World,
    compute: ComputeConfig,
    interrupted: Callable[[], bool] = lambda: False,
    flip: float = 0.0,
    *,
    every_block: bool = False,
    keep: int = 0,
) -> Validation | None:
    """The validation of a model, on true targets; None where any rank was interrupted.

    flip: the share of its training targets that were flipped uniformly, for the clean loss. every_block: read each of
    them everywhere, not on the first batch alone. keep: the final hidden states of the first so many tokens, for
    `tempered`.
    """
    readout = Readout(model, compute.autocast)
    batches = range(0, len(windows), SHAPE)
    wanted = torch.stack([*windows.wanted.values()], 2) if windows.wanted else None  # (n, T, figures)
    columns = 3 + len(windows.wanted)
    figures = torch.zeros(len(batches) * SHAPE, columns, dtype=torch.float64, device=compute.device)
    lower = model.config.n_layer - 1 if every_block else 0
    losses_below = torch.zeros(lower, len(batches) * SHAPE, dtype=torch.float64, device=compute.device)
    by_block = torch.zeros(2, model.config.n_layer, dtype=torch.float64, device=compute.device)
    kept: list[tuple[int, Tensor, Tensor]] = []
    kept_windows = min(len(windows), max(1, keep // windows.block_size)) if keep else 0
    stop, sharded = False, blocks_are_sharded(model)
    for first, mine in share_of(batches, model, world):
        stop = stop or interrupted()
        if stop and not sharded:  # sharded blocks need this process in the others' passes
            break
        tokens, targets = (t.to(compute.device) for t in windows.rows(first, SHAPE))
        states = hidden_states(model, tokens, compute)
        if not mine:
            continue
        named = None if wanted is None else _rows(wanted, first).to(compute.device)
        figures[first : first + SHAPE] = window_figures(readout, states[-1], targets, flip, named)
        for row, h in zip(losses_below, states[1 : 1 + lower], strict=True):
            row[first : first + SHAPE] = window_figures(readout, h, targets, 0.0)[:, 0]
        if first < kept_windows:
            rows = min(SHAPE, kept_windows - first)
            kept.append((first // SHAPE, states[-1][:rows].flatten(0, 1).clone(), targets[:rows].flatten()))
        if first == 0:
            rows = min(SHAPE, len(windows))
            for j, h in enumerate(states[1:]):
                flat, y = h[:rows].flatten(0, 1), targets[:rows].flatten()
                by_block[0, j] = readout.values(flat, y, true_loss).double().mean()
                by_block[1, j] = readout.values(flat, y, lambda z, y, other: F.softmax(z, 1).amax(1)).double().mean()
    world.sum_([figures, losses_below, by_block])
    stopped = torch.full((1,), float(stop), device=compute.device)
    world.sum_([stopped])
    if stopped.item():
        return None
    for found in (figures, losses_below, by_block):
        refuse_not_finite(found)
    losses, correct, clean, *probabilities = figures[: len(windows)].cpu().unbind(1)
    clean_mean = float(clean.sum() / len(windows)) if flip else None
    every = [*losses_below[:, : len(windows)].cpu(), losses] if every_block else []
    by_all = tuple(float(of_block.sum() / len(windows)) for of_block in every)
    named = {
        name: float(of_name.sum() * windows.block_size / (tokens >= 0).sum())
        for (name, tokens), of_name in zip(windows.wanted.items(), probabilities, strict=True)
    }
    accuracy = float(correct.sum() / len(windows))
    return Validation(
        losses, accuracy, clean_mean, *by_block.tolist(),
        by_block=by_all, named=named, kept=kept, kept_windows=kept_windows,
    )  # fmt: skip


@torch.no_grad()
def tempered(model: GPT, validation: Validation, world: World, compute: ComputeConfig) -> tuple[float, float]:
    """The one temperature that suits the final logits best, and the loss in nats at it.

    One division undoes what a signal did to calibration alone; what is left was knowledge. Newton's method in 1/T,
    where the loss is convex, over the tokens whose hidden states the validation kept.
    """
    readout = Readout(model, compute.autocast)
    inverse, loss = 1.0, float("inf")
    for _ in range(NEWTON_STEPS):
        sums = torch.zeros(-(-validation.kept_windows // SHAPE), 4, dtype=torch.float64, device=compute.device)
        for batch, h, y in validation.kept:
            sums[batch, :3] = readout.values(h, y, partial(_at_inverse_temperature, inverse)).double().sum(0)
            sums[batch, 3] = len(y)
        world.sum_([sums])
        total = list(accumulate(sums))[-1]  # in the order of batches, whichever rank read them
        loss, slope, curvature = (total[:3] / total[3]).tolist()
        step = slope / max(curvature, 1e-12)
        if abs(step) < 1e-4 * inverse:
            break
        inverse = min(max(inverse - step, inverse / 4), inverse * 4)
    return 1 / inverse, loss


def share_of(batches: Sequence[int], model: GPT, world: World) -> Iterator[tuple[int, bool]]:
    """This process's batches, every world.size-th, and whether each counts.

    A pass through sharded blocks needs every process: the ones that have fewer batches repeat the last.
    """
    sharded = blocks_are_sharded(model)
    for start in range(0, len(batches), world.size):
        mine = start + world.rank < len(batches)
        if mine or sharded:
            yield batches[min(start + world.rank, len(batches) - 1)], mine


def _at_inverse_temperature(inverse: float, logits: Tensor, targets: Tensor, other: Tensor | None) -> Tensor:
    """(n, 3): CE of inverse·logits and its first two derivatives in `inverse`."""
    log_p = (logits * inverse).log_softmax(1)
    p = log_p.exp()
    mean = (p * logits).sum(1)
    variance = (p * (logits - mean[:, None]).square()).sum(1)
    index = targets[:, None]
    return torch.stack([-log_p.gather(1, index)[:, 0], mean - logits.gather(1, index)[:, 0], variance], 1)


def window_figures(readout: Readout, h: Tensor, targets: Tensor, flip: float, wanted: Tensor | None = None) -> Tensor:
    """(B, 3 + k): mean loss, accuracy, clean loss, and k probabilities of every sequence h (B, T, C).

    float64, nats; the clean loss is 0 where there is no flip to undo. wanted (B, T, k): tokens whose probability is
    taken at each position, -1 for none, which counts as 0.
    """
    read = targets[..., None] if wanted is None else torch.cat([targets[..., None], wanted], 2)  # (B, T, 1 + k)
    values = readout.values(h.flatten(0, 1), read.flatten(0, 1), partial(_figures, flip)).double().T.contiguous()
    return values.view(-1, *targets.shape).mean(2).T


def _figures(flip: float, logits: Tensor, read: Tensor, other: Tensor | None) -> Tensor:
    """(n, 3 + k) of logits (n, V), read once; read (n, 1 + k): the target, and the tokens that are wanted."""
    targets, wanted = read[:, 0], read[:, 1:]
    loss = true_loss(logits, targets)
    correct = (logits.argmax(1) == targets).to(loss.dtype)
    clean = clean_loss(logits, targets, flip) if flip else torch.zeros_like(loss)
    known = [loss, correct, clean]
    if wanted.shape[1]:
        p = (logits.gather(1, wanted.clamp(min=0)) - logits.logsumexp(1, keepdim=True)).exp()
        known += p.where(wanted >= 0, 0.0).unbind(1)
    return torch.stack(known, 1)


def _rows(rows: Tensor, first: int) -> Tensor:
    """SHAPE rows from `first` on; what is missing at the end names nothing."""
    found = rows[first : first + SHAPE]
    return torch.cat([found, found.new_full((SHAPE - len(found), *found.shape[1:]), -1)])


@torch.no_grad()
def hidden_states(model: GPT, tokens: Tensor, compute: ComputeConfig) -> list[Tensor]:
    """h_0..h_L of tokens (B, T), without any gradient, with the matmuls in the dtype of `compute`."""
    with matmuls_in(compute.autocast, model, tokens.device):
        return model.hidden_states(tokens)
