"""A rank that is stopped, not killed: the others find out in time, name it, and end."""

from __future__ import annotations

import random
import re
import signal
import time
from pathlib import Path

import pytest
from harness import Trainer, rank_of, rows, wait_until

pytestmark = pytest.mark.slow

TIMEOUT = 8
"""Seconds; ranks that start on a busy machine may be some apart."""


@pytest.mark.fault(number=11)
def test_a_rank_that_no_longer_answers_is_named_within_the_timeout(
    trainer: Trainer, tmp_path: Path, choose: random.Random
) -> None:
    run = tmp_path / "run"
    running = trainer.start(run, processes=2, steps=40_000, rank_timeout=TIMEOUT)
    running.wait_for_rows(run, choose.randrange(2, 20))
    workers = {rank_of(process): process for process in running.workers()}
    silent = choose.randrange(2)
    stopped = time.monotonic()
    running.send(signal.SIGSTOP, workers[silent])
    running.wait_for_words("gptlab: ")
    assert time.monotonic() - stopped < TIMEOUT + 6.0, "the timeout, and a few seconds of roll call"
    wait_until(lambda: len(running.workers()) < 2, "the other rank's end")
    running.send(signal.SIGKILL, workers[silent])  # torchrun would wait 30 seconds for it
    ended = running.end()
    assert ended.exit_codes[1 - silent] == 3
    (line,) = ended.ours
    assert re.search(rf"has ended or no longer answers: rank {silent} of 2; ", line)
    assert "gptlab/training/" not in ended.err, "a traceback of ours"
    if silent != 0:  # else the writer itself is silent
        last = rows(run)[-1]
        assert (last["event"], last["text"]) == ("LostProcessError", line.removeprefix("gptlab: "))
