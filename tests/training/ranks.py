"""One rank of small runs over gloo, for test_step.py and test_parallel.py: `python ranks.py OUT [signals|kinds]`.

RANK and WORLD_SIZE say which. Without a second word it makes three updates of every run of COPIED, each rank with the
whole model; with one, two updates of those of `runs_of`, whose blocks are cut over the ranks. It writes to OUT, as
torch saves it, what rank 0 has then, for cut blocks with the bytes that it holds of weights and moments.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
from small_run import SEQUENCES, Run, make_run
from torch import Tensor

from gptlab.distributed import World
from gptlab.model.gpt import Block
from gptlab.signals import SIGNALS, SignalConfig
from gptlab.training.parallel import is_sharded, local_shards

PLACEBO = SignalConfig("advantage", control="placebo", evaluator="live", positions=0.5)
BOTH: dict[str, dict[str, Any]] = {
    "baseline": {},
    "rotate": {"signal": SignalConfig("self_distillation", layers="rotate", positions=0.5)},
    "placebo": {"signal": PLACEBO},
    "shuffled and flipped": {
        "signal": SignalConfig("confidence", control="shuffled", dose=0.3),
        "also": (SignalConfig("brier", control="flipped", flip=0.5),),
    },
    "conversation": {"signal": SignalConfig("conversation", say=2, reply=2, turns=2, threshold=0.1, dose=0.2)},
    "objectives": {
        "signal": SignalConfig("multi_token_prediction", control="placebo", dose=0.2),
        "also": (SignalConfig("z_loss", control="shuffled"), SignalConfig("label_smoothing", control="flipped")),
    },
    "batch noise": {"signal": PLACEBO, "gradient_noise": 0.5, "gradient_noise_shape": "batch", "target_flip": 0.3},
    "noise": {
        "signal": PLACEBO,
        "gradient_noise": 0.5,
        "gradient_bias": 0.2,
        "target_flip": 0.3,
        "target_flip_to": "argmax",
    },
}
DETERMINISTIC: dict[str, Any] = {"deterministic": True, "threads": 1, "batch_size": 2, "dtype": torch.float32}
COPIED: dict[str, dict[str, Any]] = {
    **BOTH,
    "confidence": {"signal": SignalConfig("confidence"), "grad_clip": 0.5},
    "muon": {"optimizer": "muon", "learning_rate": 0.01},
    "deterministic": {"signal": PLACEBO, **DETERMINISTIC},
    "deterministic noise": {"gradient_noise": 0.5, "gradient_noise_shape": "batch", **DETERMINISTIC},
}
CUT: dict[str, dict[str, Any]] = {
    **BOTH,
    **{name: {"signal": SignalConfig(name)} for name in SIGNALS},
    "live": {"signal": SignalConfig("brier", evaluator="live"), "grad_clip": 0.5},
    "local": {"signal": SignalConfig("entropy", reach="local", embeddings=False)},
    "recomputed": {"signal": SignalConfig("confidence"), "activation_checkpointing": True},
    "one block shared": {"signal": SignalConfig("confidence"), "share_blocks": True},
}


def runs_of(which: str) -> dict[str, dict[str, Any]]:
    """Of CUT those that are no more than a signal's name ("signals"), or the others ("kinds")."""
    return {name: options for name, options in CUT.items() if (name in SIGNALS) == (which == "signals")}


def outcome(run: Run, cut: tuple[int, ...], world: World, steps: int = 2) -> dict[str, Tensor]:
    """The weights of a run after a few updates, the second of which measures, and what the updates said."""
    said = [run.update(cut, world=world, measure_dose=step == 1) for step in range(steps)]
    figures = [[u.loss, u.signal_loss, u.grad_norm, u.dose or 0.0, *u.weights, float(u.clipped)] for u in said]
    return {**run.weights, "said": torch.tensor(figures, dtype=torch.float64)}


def outcomes(world: World, cut: tuple[int, ...]) -> dict[str, dict[str, Tensor]]:
    """What every run of COPIED has after three updates; a deterministic one cuts its batch into its own pieces."""
    found = {}
    for name, options in COPIED.items():
        run = make_run(**options)
        unit = run.config.batch_size
        pieces = (unit,) * (sum(cut) // unit) if run.config.deterministic else cut
        found[name] = outcome(run, pieces, world, steps=3)
    return found


def bytes_held(run: Run) -> Tensor:
    """Of weights and of both moments, in this process."""
    weights = local_shards(list(run.state.model.parameters()))
    moments = [s[key] for s in run.state.optimizer.state.values() for key in ("exp_avg", "exp_avg_sq")]
    return torch.tensor([sum(t.nbytes for t in tensors) for tensors in (weights, local_shards(moments))])


@contextmanager
def counting_whole_blocks(run: Run) -> Iterator[list[int]]:
    """How many blocks were whole while a pass went through one, up or down; every time."""
    counts: list[int] = []
    blocks = dict.fromkeys(run.state.model.blocks)
    forward = Block.forward

    def count(*_: object) -> None:
        counts.append(sum(not is_sharded(block.mlp.c_fc.weight) for block in blocks))

    def counted(self: Block, *given: Any) -> Tensor:
        count()
        y = forward(self, *given)
        if y.requires_grad:
            y.register_hook(count)  # called on the way down, within the block's unit
        return y

    Block.forward = counted
    try:
        yield counts
    finally:
        Block.forward = forward


def outcomes_of_cut(world: World, which: str) -> dict[str, dict[str, Tensor]]:
    """What every run of `runs_of` has after two updates, and how many blocks were whole at a time."""
    cut = {2: (2, 4), 4: (1, 2)}[world.size]
    assert sum(cut) * world.size == SEQUENCES
    found = {}
    for name, options in runs_of(which).items():
        run = make_run(world=world, parallel="fsdp", **options)
        with counting_whole_blocks(run) as counts:
            found[name] = outcome(run, cut, world)
        found[name]["bytes"] = bytes_held(run)
        found[name]["whole blocks"] = torch.tensor([max(counts), len(counts)])
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    world = World.from_environment()
    world.connect(torch.device("cpu"), timeout=timedelta(seconds=200))
    try:
        found = outcomes_of_cut(world, *sys.argv[2:]) if sys.argv[2:] else outcomes(world, (2, 4))
        if world.main:
            torch.save(found, sys.argv[1])
    finally:
        world.disconnect()
