"""One rank of a state whose blocks are cut over processes, for test_checkpoint.py: checkpoints in, others out.

`python sharded_checkpoint.py FROM TO [FROM TO ...] [full]`; FROM is a checkpoint's folder, or - for a state after one
update. The state is restored over one that has moved on, compared with what was saved, bit for bit, and saved into the
folder TO. full: the last rank finds no room to write, and every rank says so.
"""

from __future__ import annotations

import resource
import signal
import sys
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path

import pytest
import torch

from gptlab.device import ComputeConfig
from gptlab.distributed import World
from gptlab.errors import CheckpointError
from gptlab.model import GPT, GPTConfig
from gptlab.runs import checkpoint
from gptlab.training import TrainingConfig
from gptlab.training.optimizer import build_optimizer
from gptlab.training.parallel import full_tensor, shard_blocks, shard_like
from gptlab.training.state import TrainingState

SHAPE = GPTConfig(block_size=8, vocab_size=31, n_layer=3, n_head=2, n_embd=10)  # 10 rows: 4 ranks hold 3, 3, 3 and 1
REST = {"cursor": {"sequence": 3}, "rng": {"seed": 1}, "records": {"metrics_bytes": 1, "log_bytes": 1}}


def moved_on(model: GPT, seed: int) -> TrainingState:
    """A state after one update with gradients drawn from a seed, the same on every rank."""
    state = TrainingState(model, build_optimizer(model, TrainingConfig()))
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.grad = shard_like(torch.randn(p.shape, generator=generator), p.detach())
    state.optimizer.step()
    state.step = seed
    return state


def main(world: World, source: str, out: Path, full: bool) -> None:
    model = GPT(SHAPE, seed=7)
    shard_blocks(model, world, ComputeConfig(torch.device("cpu"), None, 1, False, {}))
    state = moved_on(model, 5)
    if source != "-":
        state = moved_on(model, 6)
        checkpoint.load_sharded(Path(source), SHAPE, state, world)
        saved = checkpoint.load(Path(source))
        for mine, theirs in zip(state.tensors(), (saved.weights, saved.moments), strict=True):
            assert mine.keys() == theirs.keys()
            assert all(torch.equal(full_tensor(mine[name]), theirs[name]) for name in theirs)
        assert state.step == saved.step
        assert model.lm_head.weight is model.wte.weight, "tied"
    if full and world.rank == world.size - 1:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
    rest = {**REST, "scalars": state.scalars()}
    refusal = f"could not save {out.resolve()}/step_00000005"
    with pytest.raises(CheckpointError, match=refusal) if full else nullcontext():
        checkpoint.save_sharded(out if world.main else None, state, rest if world.main else {}, world)


if __name__ == "__main__":
    torch.set_num_threads(1)
    world = World.from_environment()
    world.connect(torch.device("cpu"), timeout=timedelta(seconds=120))
    try:
        words = [word for word in sys.argv[1:] if word != "full"]
        for source, out in zip(words[::2], words[1::2], strict=True):
            main(world, source, Path(out), "full" in sys.argv)
    finally:
        world.disconnect()
