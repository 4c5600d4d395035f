"""What a checkpoint gives back, before the first step and after it: every weight and every moment, bit for bit."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gptlab.cli.main import main
from gptlab.device import ComputeConfig
from gptlab.distributed import World
from gptlab.model import GPT, GPTConfig
from gptlab.runs import checkpoint
from gptlab.runs.folder import RunFolder, newest
from gptlab.training import TrainingConfig
from gptlab.training.optimizer import build_optimizer
from gptlab.training.parallel import shard_blocks
from gptlab.training.state import TrainingState

KEPT = {"adamw": {"exp_avg", "exp_avg_sq", "step"}, "muon": {"exp_avg", "exp_avg_sq", "step", "momentum_buffer"}}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Names, dtypes and bits."""
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


@pytest.mark.fault(number=18)
@pytest.mark.parametrize(("optimizer", "share_blocks"), [("adamw", False), ("muon", False), ("muon", True)])
def test_weights_and_moments_are_the_ones_that_were_saved(
    optimizer: str, share_blocks: bool, tiny: Callable[..., list[str]], tmp_path: Path
) -> None:
    changes: dict[str, Any] = {
        "optimizer": optimizer,
        "share_blocks": share_blocks,
        "schedule": "constant",
        "threads": 1,
    }
    changes |= {"signal_name": "confidence", "checkpoint_every": 100, "eval_every": 0}
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert main(tiny(whole, **changes)) == main(tiny(stopped, **changes, steps=3)) == 0

    saved, config = checkpoint.load(newest(stopped)), RunFolder(stopped).config()
    model = GPT(GPTConfig(16, 256, 2, 2, 32, share_blocks=share_blocks), seed=99)
    state = TrainingState(model, build_optimizer(model, config))
    for p in model.parameters():  # a state that has moved on already
        p.grad = torch.ones_like(p)
    state.optimizer.step()
    state.restore(saved.weights, saved.moments, saved.state["scalars"])
    weights, moments = state.tensors()
    assert same(weights, saved.weights)
    assert same(moments, saved.moments)
    assert {name.partition(".")[0] for name in moments} == KEPT[optimizer]
    assert model.lm_head.weight is model.wte.weight, "tied"
    assert "lm_head.weight" not in weights
    assert state.step == 3

    assert main(tiny(stopped, **changes)) == 0
    assert checkpoint.digest(newest(stopped)) == checkpoint.digest(newest(whole))


@pytest.fixture
def one_of_two_ranks() -> Iterator[World]:
    """A rank whose process group answers at once and sends nothing."""
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    yield World(rank=0, size=2)
    dist.destroy_process_group()


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("case", ["adamw", "muon", "sharded"])
def test_every_tensor_is_restored_to_the_device_where_the_optimizer_keeps_it(
    case: str, fused: bool, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """On an accelerator a fused kernel refuses a `step` on the host. The meta device stands for the accelerator."""
    optimizers = importlib.import_module("torch.optim.optimizer")  # torch.optim hides the name
    monkeypatch.setattr(optimizers, "_get_fused_kernels_supported_devices", lambda: ["meta"])
    config = TrainingConfig(optimizer="muon" if case == "muon" else "adamw")
    model = GPT(GPTConfig(16, 256, 2, 2, 32)).to("meta")
    if case == "sharded":
        world = request.getfixturevalue("one_of_two_ranks")
        shard_blocks(model, world, ComputeConfig(torch.device("cpu"), None, 1, False, {}))

    def fresh() -> TrainingState:
        state = TrainingState(model, build_optimizer(model, config))
        for group in state.optimizer.param_groups:
            if "betas" in group:  # AdamW's
                group["fused"] = fused
        return state

    stepped = fresh()
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    stepped.optimizer.step()
    weights, moments = stepped.tensors()
    loaded = {name: torch.zeros(()) if name.startswith("step.") else tensor for name, tensor in moments.items()}
    resumed = fresh()
    resumed.restore(weights, loaded, {})  # a checkpoint's counts are read into the host's memory
    found = {name: tensor.device for name, tensor in resumed.tensors()[1].items()}
    assert found == {name: tensor.device for name, tensor in moments.items()}
    assert {device.type for name, device in found.items() if name.startswith("step.")} == {"meta" if fused else "cpu"}
    resumed.optimizer.step()
