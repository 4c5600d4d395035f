"""The cheap measures of noise, while a run is trained (`--noise_every`): one pass over groups, without intervals.

They change nothing: gradients go into ledgers of their own, and every draw is keyed. Intervals, and all else that
`gptlab noise` says of a checkpoint, take a second pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from gptlab.data.batches import TrainingWindows
from gptlab.device import Placement
from gptlab.distributed import World
from gptlab.training.config import TrainingConfig
from gptlab.training.group_gradients import GroupGradients, Groups, parts_of, rows_of
from gptlab.training.inner_products import over_pairs, products, sums_over
from gptlab.training.state import TrainingState
from gptlab.training.step import of_all, speaking

GROUPS = 32
"""Sequences that are looked at, each a group: from the first of the update on, and beyond it where it has fewer."""


def quick_noise(
    state: TrainingState, config: TrainingConfig, windows: TrainingWindows, world: World, placement: Placement
) -> dict[str, Any]:
    """Figures for the row of the coming update; null where an estimate of a squared length is not positive.

    noise_scale: tr Σ/|G|² of the true loss, in sequences. alignment: of every signal with the true loss, null for one
    that is silent; alignment_by_block: the same within each block.
    """
    voices = speaking(state, config)
    groups = Groups(state.step * config.sequences, GROUPS, step=state.step, seed=config.seed)
    rows = rows_of(windows)
    gather = GroupGradients(state.model, voices, groups, rows, placement.device, placement.autocast)
    parts, blocks = parts_of(state.model)
    sums, own = sums_over(gather, range(world.rank, GROUPS, world.size), parts, gather.nothing())
    own_sum = torch.from_numpy(own).to(placement.device)
    world.sum_([g for source in sums for g in source] + [own_sum])
    own = own_sum.cpu().numpy()
    pairs = over_pairs(products(sums, sums, parts), own, GROUPS)
    total = pairs.sum(0)
    trace = own.sum(0)[0, 0] / GROUPS - total[0, 0]
    spoken = range(1, 1 + len(voices))
    silent: Sequence[None] = [None] * len(blocks)
    by_block = [[_cosine(pairs[part], k) for part in blocks] for k in spoken]
    return {
        "noise_scale": float(trace / total[0, 0]) if total[0, 0] > 0 else None,
        "alignment": of_all(config, voices, [_cosine(total, k) for k in spoken], None),
        "alignment_by_block": of_all(config, voices, by_block, list(silent)),
    }


def _cosine(pairs: np.ndarray, k: int) -> float | None:
    """Of source k with the first, from means over pairs (K, K); a factor on a source does not change it."""
    if min(pairs[0, 0], pairs[k, k]) <= 0:
        return None
    return float(pairs[0, k] / np.sqrt(pairs[0, 0] * pairs[k, k]))
