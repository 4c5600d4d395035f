"""Blocks cut over processes (FSDP2): the same updates as by one process, with one block whole at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from scripts import load_script
from sharded_ranks import RUNS, outcome, runs_of
from small_run import SEQUENCES, L, T, V, make_run

from gptlab.distributed import World
from gptlab.errors import ConfigError
from gptlab.model import GPTConfig
from gptlab.training import TrainingConfig
from gptlab.training.parallel import full_tensor, global_norm, local_shards, shard_like


@pytest.mark.parametrize(
    ("ranks", "which"),
    [
        (2, "kinds"),
        pytest.param(2, "signals", marks=pytest.mark.slow),
        pytest.param(4, "kinds", marks=pytest.mark.slow),
    ],
)
def test_cut_blocks_make_what_one_process_makes(ranks: int, which: str, tmp_path: Path) -> None:
    """Real processes over gloo on the loopback, every signal and control, in float64: far below the 1e-6 promised."""
    out = tmp_path / "out.pt"
    run_ranks(Path(__file__).with_name("sharded_ranks.py"), ranks, out, which)
    found = torch.load(out, weights_only=True)
    assert set(found) == set(runs_of(which))
    for name, options in runs_of(which).items():
        most, passes = found[name].pop("whole blocks").tolist()
        assert most == 1, f"{name}: {most} blocks were whole at a time"
        assert passes > 8
        weights, moments = found[name].pop("bytes").tolist()
        if name == "baseline":  # docs/scale.md counts fp32
            said = load_script("tools/scale.py").state(GPTConfig(T, V, L, 2, 16), ranks, "fsdp")
            assert (weights, moments) == (2 * said.weights, 2 * said.moments)
        expected = outcome(make_run(**options), (SEQUENCES,), World())
        assert found[name].keys() == expected.keys()
        for key, tensor in expected.items():
            torch.testing.assert_close(found[name][key], tensor, rtol=1e-7, atol=1e-9, msg=f"{name}: {key}")


@pytest.mark.parametrize("name", ["baseline", "confidence", "live", "placebo", "one block shared"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_recomputed_activations_are_the_ones_that_were_not_kept(name: str, dtype: torch.dtype) -> None:
    options = RUNS[name] | {"dtype": torch.float32, "autocast": None if dtype == torch.float32 else dtype}
    kept = outcome(make_run(**options), (5, 7), World())
    again = outcome(make_run(**options, activation_checkpointing=True), (5, 7), World())
    for key, tensor in kept.items():
        assert torch.equal(again[key], tensor), key


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"optimizer": "muon"}, "whole matrices"),
        ({"deterministic": True, "threads": 1}, "one fixed order"),
        ({"noise_every": 5}, "single sequences"),
    ],
)
def test_what_needs_whole_tensors_is_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=rf"{next(iter(options))}.*{words}.*--parallel ddp"):
        TrainingConfig(parallel="fsdp", **options)


def test_whole_tensors_need_no_processes() -> None:
    tensors = [torch.tensor([3.0, 0.0]), torch.tensor([[4.0]])]
    assert global_norm(tensors) == pytest.approx(5.0)
    assert full_tensor(tensors[0]) is tensors[0]
    assert shard_like(tensors[0], tensors[1]) is tensors[0]
    assert all(a is b for a, b in zip(local_shards(tensors), tensors, strict=True))
