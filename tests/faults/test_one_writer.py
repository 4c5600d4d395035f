"""One writer a run: a second is refused by the holder's name, and the lock ends with its holder."""

from __future__ import annotations

import random
import signal
from pathlib import Path

import pytest
from harness import Trainer, kill, row_count, rows

from gptlab.errors import CheckpointError
from gptlab.runs.folder import RunFolder

pytestmark = pytest.mark.slow


@pytest.mark.fault(number=16)
def test_a_second_writer_is_refused_until_the_first_is_gone(trainer: Trainer, tmp_path: Path) -> None:
    run = tmp_path / "run"
    running = trainer.start(run, processes=2, steps=4000)
    running.wait_for_rows(run, 2)
    with pytest.raises(CheckpointError, match=r"is being written by process (\d+) on ") as refused:
        RunFolder(run).lock(patience=0.5)
    assert any(f"process {worker} on" in str(refused.value) for worker in running.workers())
    before = row_count(run)
    running.wait_for_rows(run, before + 2)
    kill(running, "both", random.Random(3))
    running.end()
    folder = RunFolder(run)
    folder.lock(patience=5.0)
    count = row_count(run)
    steps = [row["step"] for row in rows(run) if row["kind"] == "train"]
    assert steps == list(range(1, len(steps) + 1)), "one writer's rows, in order"
    assert row_count(run) == count
    folder.close()


@pytest.mark.fault(number=16)
def test_a_writer_waits_for_one_that_is_about_to_end(trainer: Trainer, tmp_path: Path) -> None:
    """The second start of a run that is being stopped goes on with it, rather than fail."""
    run = tmp_path / "run"
    running = trainer.start(run, steps=4000)
    running.wait_for_rows(run, 3)
    second = trainer.start(run, steps=4000)
    running.send(signal.SIGTERM)
    assert running.end().code == 75
    stopped_at = rows(run)[-1]["step"]
    second.wait_for_rows(run, row_count(run) + 3)
    second.send(signal.SIGTERM)
    ended = second.end()
    assert ended.code == 75, ended.err
    steps = [row["step"] for row in rows(run) if row["kind"] == "train"]
    assert steps == list(range(1, len(steps) + 1))
    assert steps[-1] > stopped_at
