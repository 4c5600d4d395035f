"""What may differ between two runs that learn the same: processes, their number on the way, and what is written."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import ROOT, Trainer, options, outcome, rows

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


SITTINGS = (1, 2, 4, 1)
QUIET = {"steps": 16, "schedule": "constant", "eval_every": 0, "checkpoint_every": 100, "sample_every": 0,
         "batch_size": 2, "rank_timeout": 120}  # fmt: skip
DETERMINISTIC, MUON = QUIET | {"deterministic": None}, QUIET | {"optimizer": "muon"}
TOLERANCE = 1e-4
"""Nats; losses of 16 updates at a learning rate of 0.01 differ by a hundredth of that."""


def train(sittings: list[tuple[int, list[str]]]) -> None:
    """Train in so many processes with these options, one sitting after the other."""
    driver = [sys.executable, str(Path(__file__).with_name("world_sizes.py"))]
    done = subprocess.run(driver, input=json.dumps(sittings), cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [[0] * processes for processes, _ in sittings], done.stderr


def losses(run: Path) -> list[float]:
    return [row["loss"] for row in rows(run) if row["kind"] in ("train", "val")]


@pytest.mark.slow
@pytest.mark.fault(number=13)
@pytest.mark.fault(number=18)
def test_one_two_four_and_one_process(corpus: Path, tmp_path: Path, choose: random.Random) -> None:
    """A signal whose dose is measured now and then, so that parts of gradients are summed too; Muon in another run."""
    cuts = [*sorted(choose.sample(range(1, 16), 3)), 16]

    def changing(run: str, last: dict[str, Any], **how: Any) -> list[tuple[int, list[str]]]:
        each = [(n, {**how, "steps": stop}) for n, stop in zip(SITTINGS, cuts, strict=True)]
        each[-1] = (each[-1][0], each[-1][1] | last)
        return [(n, options(corpus, tmp_path / run, **changed)) for n, changed in each]

    at_last = {"eval_every": 100}
    train(
        [
            (1, options(corpus, tmp_path / "whole", **DETERMINISTIC | {"eval_every": 100})),
            *changing("changing", at_last, **DETERMINISTIC),
            *changing("fast", at_last, **QUIET),
            (2, options(corpus, tmp_path / "muon", **MUON)),
            *(
                (2, options(corpus, tmp_path / "muon in two", **QUIET | {"steps": n}, optimizer="muon"))
                for n in (7, 16)
            ),
        ]
    )
    assert outcome(tmp_path / "changing") == outcome(tmp_path / "whole")
    assert losses(tmp_path / "fast") == pytest.approx(losses(tmp_path / "whole"), abs=TOLERANCE)
    assert outcome(tmp_path / "fast")[0] != outcome(tmp_path / "whole")[0], "the fast path adds in another order"
    assert outcome(tmp_path / "muon in two") == outcome(tmp_path / "muon")


@pytest.mark.slow
@pytest.mark.fault(number=13)
@pytest.mark.fault(number=18)
def test_blocks_cut_over_four_two_and_one_process(corpus: Path, tmp_path: Path, choose: random.Random) -> None:
    """FSDP2's rows go on in other processes' hands; with the same number of them a stop changes no bit."""
    first, second = sorted(choose.sample(range(1, 16), 2))
    at_last = QUIET | {"eval_every": 100}
    cut = at_last | {"parallel": "fsdp", "batch_size": 1}
    sittings = ((4, first), (2, second), (1, 16))
    train(
        [
            (1, options(corpus, tmp_path / "whole", **at_last)),
            *((n, options(corpus, tmp_path / "cut", **cut | {"steps": stop})) for n, stop in sittings),
            (2, options(corpus, tmp_path / "two", **cut)),
            (2, options(corpus, tmp_path / "two saving", **cut | {"checkpoint_every": first, "steps": 16})),
            *((2, options(corpus, tmp_path / "stopped", **cut | {"steps": n, "eval_every": 0})) for n in (second, 16)),
            (2, options(corpus, tmp_path / "kept on", **cut | {"eval_every": 0})),
        ]
    )
    expected = losses(tmp_path / "whole")
    of_each_step = [row["loss"] for row in rows(tmp_path / "cut") if row["kind"] == "train"]
    assert of_each_step == pytest.approx(expected[: len(of_each_step)], abs=TOLERANCE)
    assert losses(tmp_path / "two") == pytest.approx(expected, abs=TOLERANCE)
    assert outcome(tmp_path / "two saving") == outcome(tmp_path / "two")
    assert outcome(tmp_path / "stopped") == outcome(tmp_path / "kept on")
