"""What may differ between two runs that learn the same: how many processes, and when something is written down."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import Trainer, outcome, rows

from gptlab.data.batches import TrainingWindows
from gptlab.data.corpus import open_corpus
from gptlab.distributed import World
from gptlab.options import build
from gptlab.training.config import TrainingConfig
from gptlab.training.step import MicroBatches

FIVE_STEPS = {"steps": 5, "eval_every": 5, "sample_every": 0, "checkpoint_every": 5, "dose_every": 0}


def of_kind(run: Path, kind: str) -> list[dict[str, Any]]:
    return [row for row in rows(run) if row["kind"] == kind]


@pytest.mark.slow
def test_the_same_loss_from_one_process_and_from_two(trainer: Trainer, tmp_path: Path) -> None:
    runs = {processes: tmp_path / str(processes) for processes in (1, 2)}
    for processes, run in runs.items():
        ended = trainer.train(run, processes=processes, **FIVE_STEPS)
        assert ended.code == 0, ended.err
    one, two = ([row["loss"] for row in of_kind(run, "train")] for run in runs.values())
    assert two == pytest.approx(one, abs=1e-5)
    (one,), (two,) = ([row["loss"] for row in of_kind(run, "val")] for run in runs.values())
    assert two == pytest.approx(one, abs=1e-4)


@pytest.mark.parametrize("size", [2, 4, 8])
def test_the_same_sequences_in_the_same_order_for_any_ranks(size: int, corpus: Path) -> None:
    config = build(TrainingConfig, {"block_size": 32, "total_batch_tokens": 32 * 16, "batch_size": 4})
    windows = TrainingWindows(open_corpus(corpus), 32, 256, seed=1)

    def tokens(ranks: int, step: int) -> torch.Tensor:
        worlds = [World(rank, ranks) for rank in range(ranks)]
        batches = [b for world in worlds for b in MicroBatches(config, windows, world, torch.device("cpu")).of(step)]
        return torch.cat([batch.tokens for batch in batches])

    for step in range(6):  # across the end of an epoch
        alone = tokens(1, step)
        assert torch.equal(tokens(size, step), alone)
        assert torch.equal(alone, windows.rows(step * 16, 16)[0])


@pytest.mark.slow
@pytest.mark.fault(number=14)
def test_other_intervals_leave_the_trajectory_alone(
    trainer: Trainer, uninterrupted: Path, tmp_path: Path, choose: random.Random
) -> None:
    run = tmp_path / "run"
    every = {name: choose.randrange(least, 12) for name, least in (("log", 0), ("checkpoint", 1), ("sample", 0))}
    intervals = {f"{name}_every": value for name, value in every.items()}
    ended = trainer.train(run, **intervals, eval_every=choose.choice((1, 2, 3, 4)), noise_every=0)
    assert ended.code == 0, ended.err
    assert outcome(run)[0] == outcome(uninterrupted)[0]
    assert of_kind(run, "train") == of_kind(uninterrupted, "train")
    mine = {row["step"]: row for row in of_kind(run, "val")}
    shared = [row for row in of_kind(uninterrupted, "val") if row["step"] in mine]
    assert len(shared) >= 2
    assert all(mine[row["step"]] == row for row in shared)


@pytest.mark.slow
@pytest.mark.fault(number=14)
def test_measuring_the_dose_leaves_the_trajectory_alone(trainer: Trainer, uninterrupted: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    ended = trainer.train(run, dose_every=0, sample_every=0)
    assert ended.code == 0, ended.err
    assert outcome(run)[0] == outcome(uninterrupted)[0]
    assert [row["loss"] for row in of_kind(run, "train")] == [row["loss"] for row in of_kind(uninterrupted, "train")]
