"""Being asked to stop: a checkpoint, one line that says how to go on, exit code 75, and then the very same run."""

from __future__ import annotations

import signal
import time
from pathlib import Path

from harness import Trainer, make_corpus, outcome, rows


def test_stopped_twice_and_identical(trainer: Trainer, uninterrupted: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    for number, at in ((signal.SIGTERM, 11), (signal.SIGINT, 24)):
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


def test_torchrun_passes_a_stop_on(trainer: Trainer, tmp_path: Path) -> None:
    """Both ranks stop after the same update and one of them speaks; torchrun's own exit code is 1 or the signal's."""
    run = tmp_path / "run"
    running = trainer.start(run, processes=2, steps=400)
    running.wait_for_rows(run, 5)
    running.send(signal.SIGTERM)
    ended = running.end()
    assert ended.code != 0
    (line,) = ended.ours
    assert "with a checkpoint saved" in line
    assert rows(run)[-1]["event"] == "Stopped"
    assert not running.workers()
