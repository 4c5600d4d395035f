"""How noisy a gradient is, and how it is aligned with the true loss's: gradients of groups and their inner products.

A *source* is a loss whose gradient is taken (the true loss, a signal), a *group* a fixed set of sequences by their
index in the run, whatever micro-batches and ranks are, a *part* a set of parameters that is looked at alone (a block,
the rest). Group i of a model after `step` updates is made of the sequences that the run reads next: sequence
step·sequences + i·size and the following, in the order of its seed. Every group's gradient is a mean over its tokens.

Inner products are all that measures of noise need, so no gradient is kept. Sums over pairs of different groups, which
make unbiased estimates, come from sums over all: Σ_{i≠k} <a_i, b_k> = <A, B> - Σ_i <a_i, b_i>. What is estimated from
them, with intervals, is in analysis/noise/estimators.py; `quick_noise` makes one pass while a run is trained.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gptlab.data.batches import TrainingWindows
from gptlab.device import ComputeConfig
from gptlab.distributed import World
from gptlab.model.gpt import GPT
from gptlab.training.block_graph import ActiveSignal, Batch
from gptlab.training.block_loss import accumulate
from gptlab.training.config import TrainingConfig
from gptlab.training.gradient_sources import Gradients, GradientSources, check_tokens
from gptlab.training.state import TrainingState
from gptlab.training.step import fill_inactive, signals_at

KEPT_BYTES = 2 * 2**30
"""Gradients that are kept between the passes over groups; those of further groups are made again."""
QUICK_GROUPS = 32
"""Sequences that `quick_noise` reads, each a group: from the first of the update on, and beyond it if it has fewer."""

Rows = Callable[[int, int], tuple[Tensor, Tensor, list[tuple[int, int]]]]
"""(first sequence of the run, count) -> tokens and targets (count, T), and the name of every window."""


def rows_of(windows: TrainingWindows) -> Rows:
    """The sequences of a run's training windows."""

    def rows(first: int, count: int) -> tuple[Tensor, Tensor, list[tuple[int, int]]]:
        return *windows.rows(first, count), windows.window_ids(first, count)

    return rows


@dataclass(frozen=True)
class Groups:
    """Groups of `size` sequences each, from sequence `first` of the run; batch_size: read at once, at most.

    step, seed: keys of the signals' draws, as in the update that would read these sequences.
    """

    first: int
    size: int = 1
    batch_size: int = 16
    step: int = 0
    seed: int = 0


@dataclass(frozen=True)
class GroupGradients:
    """Calling it with a group's number gives the gradients of its sources, as weighted.

    Sources are the true loss, every signal, and after them, for every placebo, its reference: a placebo's own gradient
    is not scaled within a group, since it has to have its reference's norm on the whole batch (`factors`).
    """

    model: GPT
    signals: Sequence[ActiveSignal]
    groups: Groups
    rows: Rows
    device: torch.device
    autocast: torch.dtype | None = None

    def __call__(self, i: int) -> list[Gradients]:
        groups = self.groups
        sources = GradientSources(self.model, self.signals, groups.seed)
        for start in range(0, groups.size, groups.batch_size):
            count = min(groups.batch_size, groups.size - start)
            offset = i * groups.size + start
            tokens, targets, names = self.rows(groups.first + offset, count)
            tokens, targets = tokens.to(self.device), targets.to(self.device)
            check_tokens(self.model, tokens, targets)
            share = count / groups.size
            batch = Batch(tokens, targets, groups.step, groups.seed, offset, share, names)
            accumulate(self.model, batch, self.signals, self.autocast, into=sources.into)
        parts = [sources.unscaled(k) for k in range(len(self.signals))]
        return [sources.true, *parts, *(sources.reference(k) for k in self.placebos)]

    def zeros(self) -> list[Gradients]:
        """Gradients of 0 for every source."""
        sources = 1 + len(self.signals) + len(self.placebos)
        return [[torch.zeros_like(p) for p in self.model.parameters()] for _ in range(sources)]

    @property
    def placebos(self) -> list[int]:
        """The signals that are placebos."""
        return [k for k, signal in enumerate(self.signals) if signal.config.control == "placebo"]

    def factors(self, of_sums: np.ndarray) -> list[float]:
        """What to multiply every source by, from <X, Y> (K, K) over all parameters: 1, but for placebos."""
        factors = [1.0] * (1 + len(self.signals))
        for reference, k in enumerate(self.placebos, 1 + len(self.signals)):
            found = of_sums[1 + k, 1 + k]
            factors[1 + k] = float(np.sqrt(of_sums[reference, reference] / found)) if found > 0 else 0.0
        return factors


def parts_by_block(model: GPT) -> tuple[list[int], list[int]]:
    """(for each parameter its part, for each block its part): the blocks, and one more part for the rest.

    With share_blocks all blocks are the same part.
    """
    part_of: dict[int, int] = {}
    blocks: list[int] = []
    for block in model.blocks:
        mine = part_of.get(id(next(block.parameters())), len(set(blocks)))
        blocks.append(mine)
        part_of.update((id(p), mine) for p in block.parameters())
    rest = len(set(blocks))
    return [part_of.get(id(p), rest) for p in model.parameters()], blocks


Gather = Callable[[int], Sequence[Gradients]]
"""The gradients that a group gives, one for each source; equal for equal groups, as it may be asked twice."""


@dataclass(frozen=True)
class InnerProducts:
    """Between n groups' gradients of K sources, over some of the parameters; float64.

    own (n, K, K): <x_i, y_i> of sources x and y in group i. cross (n, K, K): <x_i, Σ_k y_k>, over all groups k.

    >>> x = np.array([[[1.0, 0.0]], [[2.0, 3.0]]])  # two groups, one source, two parameters
    >>> InnerProducts.of(x).cross.ravel().tolist()  # with their sum (3, 3)
    [3.0, 15.0]
    """

    own: np.ndarray
    cross: np.ndarray

    @staticmethod
    def of(gradients: np.ndarray) -> InnerProducts:
        """Of gradients (n, K, P) that are there as a whole."""
        return InnerProducts(
            np.einsum("ixp,iyp->ixy", gradients, gradients),
            np.einsum("ixp,yp->ixy", gradients, gradients.sum(0)),
        )

    def __add__(self, other: InnerProducts) -> InnerProducts:
        """Over the parameters of both."""
        return InnerProducts(self.own + other.own, self.cross + other.cross)

    def scaled(self, factors: Sequence[float]) -> InnerProducts:
        """With source x multiplied by factors[x]; sources after the last factor are left out."""
        kept, f = len(factors), np.asarray(factors)
        both = f[:, None] * f[None, :]
        return InnerProducts(self.own[:, :kept, :kept] * both, self.cross[:, :kept, :kept] * both)


class GrowingProducts:
    """The inner products of groups 0, 1, 2, ..., of which more can be added after a look.

    parts: for each parameter, the number (from 0) of the part that it belongs to. metrics: None is the plain inner
    product, otherwise Σ metric·a·b. kept_bytes: of gradients that are not made again for every look.
    """

    def __init__(
        self,
        gather: Gather,
        parts: Sequence[int],
        metrics: Sequence[Gradients | None] = (None,),
        *,
        kept_bytes: int = KEPT_BYTES,
    ) -> None:
        self._gather, self._parts, self._metrics, self._left = gather, parts, metrics, kept_bytes
        self._kept: list[Sequence[Gradients]] = []
        self._sums: list[Gradients] = []
        self.groups = 0

    def add(self) -> None:
        """Take the next group into the sums."""
        gradients = self._gather(self.groups)
        self._sums = _added(self._sums, gradients)
        self._left -= sum(g.numel() * g.element_size() for source in gradients for g in source)
        if self._left >= 0:
            self._kept.append(gradients)
        self.groups += 1

    def look(self, progress: Callable[[int], None] = lambda done: None) -> list[list[InnerProducts]]:
        """For every metric, the inner products over every part of all groups so far; progress: after each group."""
        shape = (len(self._metrics), max(self._parts) + 1, self.groups, len(self._sums), len(self._sums))
        own, cross = np.zeros(shape), np.zeros(shape)
        for i in range(self.groups):
            gradients = self._kept[i] if i < len(self._kept) else self._gather(i)
            for m, metric in enumerate(self._metrics):
                own[m, :, i] = products(gradients, gradients, self._parts, metric)
                cross[m, :, i] = products(gradients, self._sums, self._parts, metric)
            progress(i + 1)
        return [[InnerProducts(o, c) for o, c in zip(*both, strict=True)] for both in zip(own, cross, strict=True)]


def inner_products(
    gather: Gather, groups: int, parts: Sequence[int], metrics: Sequence[Gradients | None] = (None,)
) -> list[list[InnerProducts]]:
    """For every metric, the inner products over every part of so many groups (`GrowingProducts`)."""
    found = GrowingProducts(gather, parts, metrics)
    for _ in range(groups):
        found.add()
    return found.look()


def products(
    a: Sequence[Gradients], b: Sequence[Gradients], parts: Sequence[int], metric: Gradients | None = None
) -> np.ndarray:
    """<a_x, b_y> over every part, (parts, K, K) float64."""
    found = torch.zeros(max(parts) + 1, len(a), len(b), dtype=torch.float64, device=a[0][0].device)
    for p, part in enumerate(parts):
        left = torch.stack([source[p].flatten() for source in a]).double()
        right = torch.stack([source[p].flatten() for source in b]).double()
        if metric is not None:
            left *= metric[p].flatten()
        found[part] += left @ right.T
    return found.cpu().numpy()


def sums_over(
    gather: Gather, groups: Iterable[int], parts: Sequence[int], sums: list[Gradients]
) -> tuple[list[Gradients], np.ndarray]:
    """One pass: each source's sum over the groups, added to `sums`; and Σ_i <x_i, y_i> over every part, (parts, K, K).

    With them goes an estimate, but no interval: that takes what every group has in common with the sum.
    """
    own = np.zeros((max(parts) + 1, len(sums), len(sums)))
    for i in groups:
        gradients = gather(i)
        sums = _added(sums, gradients)
        own += products(gradients, gradients, parts)
    return sums, own


def over_pairs(of_sums: np.ndarray | float, own: np.ndarray | float, groups: int) -> np.ndarray:
    """The mean of <x_i, y_k> over pairs i≠k of groups, of <X, Y> and Σ_i <x_i, y_i>: unbiased for <E x, E y>."""
    return np.asarray((of_sums - own) / (groups * (groups - 1)))


def _added(sums: list[Gradients], gradients: Sequence[Gradients]) -> list[Gradients]:
    if not sums:
        return [[g.clone() for g in source] for source in gradients]
    for total, source in zip(sums, gradients, strict=True):
        torch._foreach_add_(total, source)
    return sums


def quick_noise(
    state: TrainingState, config: TrainingConfig, windows: TrainingWindows, world: World, compute: ComputeConfig
) -> dict[str, Any]:
    """The cheap measures of noise for the row of the coming update (`--noise_every`): one pass, without intervals.

    Nothing of the run changes: gradients go into sources of their own, and every draw is keyed. null stands where an
    estimate of a squared norm is not positive.

    noise_scale: tr Σ/|G|² of the true loss, in sequences. alignment: of every signal with the true loss, null for one
    that is inactive; alignment_by_block: the same within each block.
    """
    signals = signals_at(state, config)
    groups = Groups(state.step * config.sequences, step=state.step, seed=config.seed)
    gather = GroupGradients(state.model, signals, groups, rows_of(windows), compute.device, compute.autocast)
    parts, blocks = parts_by_block(state.model)
    sums, own = sums_over(gather, range(world.rank, QUICK_GROUPS, world.size), parts, gather.zeros())
    own_sum = torch.from_numpy(own).to(compute.device)
    world.sum_([g for source in sums for g in source] + [own_sum])
    own = own_sum.cpu().numpy()
    pairs = over_pairs(products(sums, sums, parts), own, QUICK_GROUPS)
    total = pairs.sum(0)
    trace = own.sum(0)[0, 0] / QUICK_GROUPS - total[0, 0]
    measured = range(1, 1 + len(signals))
    inactive: Sequence[None] = [None] * len(blocks)
    by_block = [[_cosine(pairs[part], k) for part in blocks] for k in measured]
    return {
        "noise_scale": float(trace / total[0, 0]) if total[0, 0] > 0 else None,
        "alignment": fill_inactive(config, signals, [_cosine(total, k) for k in measured], None),
        "alignment_by_block": fill_inactive(config, signals, by_block, list(inactive)),
    }


def _cosine(pairs: np.ndarray, k: int) -> float | None:
    """Of source k with the first, from means over pairs (K, K); a factor on a source does not change it."""
    if min(pairs[0, 0], pairs[k, k]) <= 0:
        return None
    return float(pairs[0, k] / np.sqrt(pairs[0, 0] * pairs[k, k]))
