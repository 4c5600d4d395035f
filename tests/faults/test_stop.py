"""Being asked to stop: a checkpoint, one line that says how to go on, exit code 75, and then the very same run."""

from __future__ import annotations

import random
import signal
import time
from pathlib import Path

import pytest
from harness import Trainer, make_corpus, outcome, rows

from gptlab.runs import checkpoint
from gptlab.runs.folder import newest


@pytest.mark.fault(number=1)
def test_stopped_twice_and_identical(
    trainer: Trainer, uninterrupted: Path, tmp_path: Path, choose: random.Random
) -> None:
    run = tmp_path / "run"
    for number, at in ((signal.SIGTERM, choose.randrange(1, 16)), (signal.SIGINT, choose.randrange(20, 32))):
        running = trainer.start(run)
        running.wait_for_rows(run, at)
        running.send(number)
        ended = running.end()
        assert ended.code == 75, ended.err
        (line,) = ended.ours
        assert "with a checkpoint saved" in line
        assert "run the same command again" in line
        assert "Traceback" not in ended.err
        last = rows(run)[-1]
        assert (last["kind"], last["event"]) == ("event", "Stopped")
        assert last["text"] in line
        assert (run / "checkpoints" / f"step_{last['step']:08d}").is_dir()
    ended = trainer.train(run)
    assert ended.code == 0, ended.err
    assert outcome(run) == outcome(uninterrupted)


@pytest.mark.slow
@pytest.mark.fault(number=8)
def test_stopped_while_validating(tmp_path: Path) -> None:
    """A validation that takes seconds is not waited for; it is made anew."""
    trainer = Trainer(make_corpus(tmp_path / "corpus", val=300_000), tmp_path)
    long = {"steps": 4, "eval_every": 2, "eval_tokens": 299_000, "sample_every": 0}
    try:
        run, whole = tmp_path / "run", tmp_path / "whole"
        assert trainer.train(whole, **long).code == 0
        running = trainer.start(run, **long)
        running.wait_for_rows(run, 2)
        time.sleep(0.3)
        running.send(signal.SIGTERM)
        ended = running.end()
        assert ended.code == 75, ended.err
        assert [row["kind"] for row in rows(run)] == ["train", "train", "event"]
        assert trainer.train(run, **long).code == 0
        assert outcome(run) == outcome(whole)
        assert [row["kind"] for row in rows(run)] == ["train", "train", "val", "train", "train", "val", "event"]
    finally:
        trainer.close()


@pytest.mark.slow
def test_a_second_signal_ends_at_once(trainer: Trainer, tmp_path: Path) -> None:
    run = tmp_path / "run"
    running = trainer.start(run, total_batch_tokens=400_000 // 32 * 32)  # an update takes seconds
    running.wait_for_words("starting")  # asked in warm-up, it listens already
    running.send(signal.SIGTERM)
    time.sleep(1.0)
    assert not running.over, running.end()
    running.send(signal.SIGTERM)
    ended = running.end()
    assert ended.code == 128 + signal.SIGTERM, ended.err
    assert not ended.ours
    assert rows(run) == []
    assert not (run / "checkpoints").exists()


SLOW_COMPILER = '''
"""The launcher, with torch.compile's own front and a compiler behind it that takes its time and changes nothing."""
import functools, sys, time
from pathlib import Path
import torch
from gptlab.cli.main import guarded
from gptlab.cli.train import main

def slow(graph, inputs):
    print("compiling", file=sys.stderr, flush=True)
    time.sleep(1.0)
    return graph.forward

torch.nn.Module.compile = functools.partialmethod(torch.nn.Module.compile, backend=slow)
sys.exit(guarded(functools.partial(main, defaults={"signal.name": "confidence"}), sys.argv[1:]))
'''


@pytest.mark.slow
@pytest.mark.fault(number=8)
def test_stopped_while_compiling(trainer: Trainer, tmp_path: Path, choose: random.Random) -> None:
    """The compiler is not cut off; the first update is made, and saved."""
    run, launcher = tmp_path / "run", tmp_path / "slow_compiler.py"
    launcher.write_text(SLOW_COMPILER)
    running = trainer.start(run, launcher=launcher, compile="on", steps=400)
    running.wait_for_words("compiling")
    time.sleep(choose.uniform(0, 0.9))
    running.send(signal.SIGTERM)
    ended = running.end()
    assert ended.code == 75, ended.err
    assert "compiled: as asked" in ended.err
    assert [(row["step"], row["kind"]) for row in rows(run)] == [(1, "train"), (1, "event")]
    assert checkpoint.verify(newest(run)) == []
