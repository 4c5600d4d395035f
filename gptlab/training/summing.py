"""What an update sums over its micro-batches and over the processes: gradients, whole or in parts, and figures.

As a rule micro-batches are added as they come and processes by an all-reduce. With `--deterministic` both happen in one
fixed tree (tree_sum.py).
"""

from __future__ import annotations

from torch import Tensor

from gptlab.distributed import World
from gptlab.errors import ConfigError
from gptlab.model.gpt import GPT
from gptlab.training.config import TrainingConfig
from gptlab.training.gradients import Ledger
from gptlab.training.sharding import is_sharded
from gptlab.training.tree_sum import Node, TreeSum
from gptlab.training.verdicts import Batch


def micro_batch(config: TrainingConfig, world: World) -> int:
    """Sequences of a micro-batch: at most batch_size; with `deterministic` the same for any number of processes.

    Raises ConfigError where the update cannot be shared equally.
    """
    if not config.deterministic:
        return world.share(config.sequences, config.batch_size)
    unit = World().share(config.sequences, config.batch_size)
    units = config.sequences // unit
    if units % world.size:
        fit = [n for n in range(1, units + 1) if units % n == 0]
        raise ConfigError(
            f"deterministic: an update of {config.sequences} sequences is {units} micro-batches of {unit} "
            f"(batch_size), which {world.size} processes cannot share; use "
            f"{', '.join(map(str, fit))} of them, or for a new run another --batch_size"
        )
    return unit


class Summed:
    """An update's sums: `.grad`, unless it is kept apart in a ledger; the ledger's entries; figures (one tensor)."""

    def __init__(self, config: TrainingConfig, model: GPT, ledger: Ledger | None, apart: bool, figures: Tensor) -> None:
        self._parameters = [] if apart else list(model.parameters())
        self._others = [*(ledger.tensors() if ledger else []), figures]
        self._tree = TreeSum() if config.deterministic else None
        self._unit = micro_batch(config, World()) if config.deterministic else 0
        self._units = config.sequences // self._unit if self._unit else 0

    def close(self, batch: Batch) -> None:
        """A micro-batch is in. Every unit of a tree begins with nothing, so that it does not depend on others."""
        if self._tree is None:
            return
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        assert len(gradients) == len(self._parameters), "the true loss reaches every parameter"
        self._tree.add(Node(0, batch.first_sequence // self._unit), [*gradients, *(t.clone() for t in self._others)])
        for p in self._parameters:
            p.grad = None
        for t in self._others:
            t.zero_()

    def over(self, world: World) -> None:
        """Replace everything by its sum over all ranks."""
        if self._tree is None:
            gradients = [p.grad for p in self._parameters if p.grad is not None]
            for tensors in (gradients, self._others):
                world.sum_([t for t in tensors if not is_sharded(t)])  # cut ones were summed as they came
            return
        total = self._tree.total_over(world, self._units)
        for p, gradient in zip(self._parameters, total, strict=False):
            p.grad = gradient
        for t, value in zip(self._others, total[len(self._parameters) :], strict=True):
            t.copy_(value)
