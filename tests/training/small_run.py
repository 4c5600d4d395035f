"""Updates alone, of a small model on a small text without a corpus: what the tests of controls and steps share.

Real models and real updates; only files and commands are left out. No tests here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gptlab.device import ComputeConfig
from gptlab.distributed import World
from gptlab.model import GPT, GPTConfig
from gptlab.training import TrainingConfig
from gptlab.training.block_graph import Batch
from gptlab.training.optimizer import build_optimizer
from gptlab.training.parallel import full_tensor, shard_blocks
from gptlab.training.state import TrainingState
from gptlab.training.step import Update, update

SEQUENCES, T, V, L = 12, 8, 31, 4
WINDOWS = 36
"""Windows of the text: every third update sees the same ones again."""


def text() -> Tensor:
    """Windows (WINDOWS, T+1) of a text in which the next token often follows from the last."""
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(V, (WINDOWS, T + 1), generator=generator)
    for t in range(T):
        follows = torch.rand(WINDOWS, generator=generator) < 0.7
        tokens[:, t + 1] = torch.where(follows, (5 * tokens[:, t] + 1) % V, tokens[:, t + 1])
    return tokens


def noise_rows(step: int, half: int) -> list[int]:
    """The windows of either batch whose gradients' difference is an update's noise."""
    return [(7 + (2 * step + half) * SEQUENCES + b) % WINDOWS for b in range(SEQUENCES)]


@dataclass
class Run:
    """A run in memory; `update` makes one of its updates from micro-batches of the sizes in `cut`."""

    state: TrainingState
    config: TrainingConfig
    compute: ComputeConfig
    text: Tensor

    def batches(self, cut: Sequence[int] = (SEQUENCES,), rank: int = 0) -> Iterator[Batch]:
        """Micro-batches of the coming update; `cut` are their sizes on one rank, of as many as make the update."""
        first, step = rank * sum(cut), self.state.step
        for size in cut:
            if self.config.reads_for_noise:
                for half in (0, 1):
                    yield self.batch(noise_rows(step, half)[first : first + size], first, 1 - 2 * half, "noise")
            yield self.batch([(step * SEQUENCES + first + b) % WINDOWS for b in range(size)], first)
            first += size

    def batch(self, rows: Sequence[int], first: int, sign: int = 1, part: Any = "all") -> Batch:
        tokens, names = self.text[list(rows)], [(0, row) for row in rows]
        share = sign * len(rows) / SEQUENCES
        return Batch(tokens[:, :-1], tokens[:, 1:], self.state.step, self.config.seed, first, share, names, part)

    def update(self, cut: Sequence[int] = (SEQUENCES,), world: World | None = None, **options: Any) -> Update:
        world = world or World()
        return update(self.state, self.config, self.batches(cut, world.rank), world, self.compute, **options)

    def gradient(self, *args: Any, **options: Any) -> dict[str, Tensor]:
        """What an update leaves in `.grad`: the gradient it made, after clipping."""
        self.update(*args, **options)
        return {name: p.grad.clone() for name, p in self.state.model.named_parameters() if p.grad is not None}

    @property
    def weights(self) -> dict[str, Tensor]:
        return {name: full_tensor(p.detach()).clone() for name, p in self.state.model.named_parameters()}


def make_run(
    *,
    dtype: torch.dtype = torch.float64,
    autocast: torch.dtype | None = None,
    sure: bool = True,
    world: World | None = None,
    **options: Any,
) -> Run:
    """A run of 4 blocks. world: cut the blocks over these processes.

    sure: weights so wide that blocks are sure of something, else GPT-2's own initial ones.
    """
    shape: dict[str, Any] = {"block_size": T, "n_layer": L, "n_head": 2, "n_embd": 16}
    recipe = {"learning_rate": 1e-3, "warmup_steps": 0, "schedule": "constant", "steps": 700, "grad_clip": 0.0}
    values = {**recipe, "dose_every": 10, **options}
    config = TrainingConfig(total_batch_tokens=SEQUENCES * T, **shape, **values)
    model = GPT(GPTConfig(**shape, vocab_size=V, share_blocks=config.share_blocks), seed=config.seed)
    if sure:
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for name, p in model.named_parameters():
                norm = "ln_" in name and name.endswith("weight")
                p.normal_(1.0 if norm else 0.0, 0.3, generator=generator)
    model.to(dtype)
    compute = ComputeConfig(torch.device("cpu"), autocast, 1, False, {})
    windows = text()
    if sure:  # the last token, which is a target only, is what block 2 expects: some signals ask for who is right
        with torch.no_grad():
            windows[:, -1] = model.read(model.hidden_states(windows[:, :-1])[2])[:, -1].argmax(1)
    if world:
        shard_blocks(model, world, compute)
    return Run(TrainingState(model, build_optimizer(model, config)), config, compute, windows)
