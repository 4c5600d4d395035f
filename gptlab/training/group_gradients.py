"""The gradients of groups: fixed sets of sequences by their index in the run, whatever micro-batches and ranks are.

Group i of a model after `step` updates is made of the sequences that the run reads next: sequence step·sequences +
i·size and on, in the order of its seed. Every group's gradient is a mean over its own tokens. What is made of them is
in inner_products.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gptlab.data.batches import TrainingWindows
from gptlab.model.gpt import GPT
from gptlab.training.gradients import Ledger, accumulate, check_tokens
from gptlab.training.inner_products import Gradients
from gptlab.training.verdicts import Batch, Voice

Rows = Callable[[int, int], tuple[Tensor, Tensor, list[tuple[int, int]]]]
"""(first sequence of the run, count) -> tokens and targets (count, T), and the name of every window."""


def rows_of(windows: TrainingWindows) -> Rows:
    """The sequences of a run's training windows."""

    def rows(first: int, count: int) -> tuple[Tensor, Tensor, list[tuple[int, int]]]:
        return *windows.rows(first, count), windows.window_ids(first, count)

    return rows


@dataclass(frozen=True)
class Groups:
    """`count` groups of `size` sequences each, from sequence `first` of the run; batch_size: read at once, at most.

    step, seed: keys of the signals' draws, as in the update that would read these sequences.
    """

    first: int
    count: int
    size: int = 1
    batch_size: int = 16
    step: int = 0
    seed: int = 0


@dataclass(frozen=True)
class GroupGradients:
    """Calling it with a group's number gives the gradients of its sources, as weighted.

    Sources are the true loss, every voice, and after them, for every placebo, its signal: a placebo's own gradient is
    not scaled within a group, since it has to be as long as its signal on the whole batch (`factors`).
    """

    model: GPT
    voices: Sequence[Voice]
    groups: Groups
    rows: Rows
    device: torch.device
    autocast: torch.dtype | None = None

    def __call__(self, i: int) -> list[Gradients]:
        groups = self.groups
        ledger = Ledger(self.model, self.voices, groups.seed)
        for start in range(0, groups.size, groups.batch_size):
            count = min(groups.batch_size, groups.size - start)
            offset = i * groups.size + start
            tokens, targets, names = self.rows(groups.first + offset, count)
            tokens, targets = tokens.to(self.device), targets.to(self.device)
            check_tokens(self.model, tokens, targets)
            share = count / groups.size
            batch = Batch(tokens, targets, groups.step, groups.seed, offset, share, names)
            accumulate(self.model, batch, self.voices, self.autocast, ledger=ledger)
        parts = [ledger.unscaled(k) for k in range(len(self.voices))]
        return [ledger.true, *parts, *(ledger.measure(k) for k in self.placebos)]

    def nothing(self) -> list[Gradients]:
        """Gradients of 0 for every source."""
        sources = 1 + len(self.voices) + len(self.placebos)
        return [[torch.zeros_like(p) for p in self.model.parameters()] for _ in range(sources)]

    @property
    def placebos(self) -> list[int]:
        """The voices that are placebos."""
        return [k for k, voice in enumerate(self.voices) if voice.config.control == "placebo"]

    def factors(self, of_sums: np.ndarray) -> list[float]:
        """What to multiply every source by, from <X, Y> (K, K) over all parameters: 1, or a placebo's length."""
        factors = [1.0] * (1 + len(self.voices))
        for reference, k in enumerate(self.placebos, 1 + len(self.voices)):
            found = of_sums[1 + k, 1 + k]
            factors[1 + k] = float(np.sqrt(of_sums[reference, reference] / found)) if found > 0 else 0.0
        return factors


def parts_of(model: GPT) -> tuple[list[int], list[int]]:
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
