"""Being asked to stop: a checkpoint, one line that says how to go on, exit code 75, and then the very same run."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from harness import Trainer, make_corpus, outcome, rows, wait_until

from gptlab.runs import checkpoint
from gptlab.runs.folder import newest

pytestmark = pytest.mark.slow


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


def test_a_second_signal_ends_at_once(trainer: Trainer, tmp_path: Path) -> None:
    run = tmp_path / "run"
    running = trainer.start(run, total_batch_tokens=12_000_000 // 32 * 32)  # an update takes many seconds
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


def hears_hang_up(process: int) -> bool:
    """Whether a process has set what SIGHUP does to it."""
    status = Path(f"/proc/{process}/status").read_text()
    caught = next(line.split()[1] for line in status.splitlines() if line.startswith("SigCgt:"))
    return bool(int(caught, 16) >> (signal.SIGHUP - 1) & 1)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_stopped_before_there_is_anything_to_save(trainer: Trainer, tmp_path: Path, number: signal.Signals) -> None:
    """While torch is being imported: the signal's own code, one line, and nothing left; run again, it trains."""
    run = tmp_path / "run"
    running = trainer.start(run)
    wait_until(lambda: running.over or hears_hang_up(running.id), "the trainer's options")
    running.send(number)
    ended = running.end()
    assert ended.code == 128 + number, ended.err
    (line,) = ended.ours
    assert f"stopped by {number.name} before there was anything to save" in line
    assert "Traceback" not in ended.err
    assert not (run / "checkpoints").exists()


def test_a_start_with_a_checkpoint_behind_it_is_stopped_with_75(
    trainer: Trainer, killed: Callable[[], Path], uninterrupted: Path
) -> None:
    run = killed()
    running = trainer.start(run)
    wait_until(lambda: running.over or hears_hang_up(running.id), "the trainer's options")
    running.send(signal.SIGTERM)
    ended = running.end()
    assert ended.code == 75, ended.err
    assert "run the same command again" in ended.ours[0]
    assert trainer.train(run).code == 0
    assert outcome(run) == outcome(uninterrupted)


def test_a_terminal_that_goes_is_a_request_and_goes_more_than_once(
    trainer: Trainer, uninterrupted: Path, tmp_path: Path
) -> None:
    """The kernel, the shell and torchrun may each say that it has gone: that is no second request."""
    run = tmp_path / "run"
    running = trainer.start(run, total_batch_tokens=40_000 // 32 * 32, steps=4, eval_every=0)
    running.wait_for_words("starting")
    for _ in range(3):
        running.send(signal.SIGHUP)
        time.sleep(0.6)
    ended = running.end()
    assert ended.code == 75, ended.err
    assert checkpoint.verify(newest(run)) == []


@pytest.mark.parametrize("processes", [0, 2])
def test_under_nohup_a_hang_up_stops_only_what_torchrun_would_kill(
    processes: int, trainer: Trainer, tmp_path: Path
) -> None:
    """torchrun ends its processes when it hears SIGHUP, ignored or not; they save first. Alone, a run continues."""
    run = tmp_path / "run"
    ignored = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        running = trainer.start(run, processes=processes, steps=400 if processes else 40)
    finally:
        signal.signal(signal.SIGHUP, ignored)
    running.wait_for_rows(run, 5)
    running.send(signal.SIGHUP, running.id, *running.workers())
    ended = running.end()
    last = rows(run)[-1]
    if processes:
        assert last["event"] == "Stopped", ended.err
        assert checkpoint.verify(newest(run)) == []
    else:
        assert (ended.code, last["event"]) == (0, "finished"), ended.err


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
