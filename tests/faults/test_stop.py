"""Being asked to stop, a rank that falls silent, and two nodes of which one is killed."""

from __future__ import annotations

import random
import re
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from harness import Running, Trainer, alive, make_corpus, outcome, rank_of, row_count, rows, told, wait_until

from gptlab.runs import checkpoint
from gptlab.runs.folder import newest


@pytest.mark.slow
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
    running = trainer.start(run, total_batch_tokens=12_000_000 // 32 * 32)  # an update takes many seconds
    running.wait_for_words("starting")  # asked in warm-up, it listens already
    running.send(signal.SIGTERM)
    time.sleep(1.0)
    assert not running.over, running.end()
    for _ in range(60):  # on a busy machine both may come while one operation runs, and then they are heard as one
        if not running.over:
            running.send(signal.SIGTERM)
            time.sleep(1.0)
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


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
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


TIMEOUT = 8
"""Seconds; ranks that start on a busy machine may be some apart."""


@pytest.mark.slow
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


LOOPBACK = {"GLOO_SOCKET_IFNAME": "lo", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
"""The second is what lets an agent come back: docs/scale.md says why."""
PATIENCE = "keep_alive_interval=1,keep_alive_max_attempt=3,last_call_timeout=4"
"""Seconds: an agent that is silent for three of them is taken for lost, and others are waited for four. torchrun's own
defaults are 15 and 30."""
HOW = {"steps": 60, "schedule": "constant", "learning_rate": 0.001, "batch_size": 2, "eval_every": 20,
       "sample_every": 0, "rank_timeout": 120}  # fmt: skip


@pytest.fixture
def agent(trainer: Trainer, tmp_path: Path) -> Callable[..., Running]:
    """`agent(address, nodes)` starts an agent of one process, which trains tmp_path/run with the others there.

    host: whether the store where they meet is its own; without that store none of them can go on. Ranks go by address.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def start(address: str, nodes: str, *, host: bool = False, **changes: Any) -> Running:
        meeting = [f"--nnodes={nodes}", "--rdzv_backend=c10d", f"--rdzv_endpoint=127.0.0.1:{port}", "--rdzv_id=nodes",
                   f"--rdzv_conf={PATIENCE},is_host={int(host)}", f"--local_addr={address}"]  # fmt: skip
        how = HOW | changes
        return trainer.start(tmp_path / "run", processes=1, torchrun=meeting, environment=LOOPBACK, **how)

    return start


def in_world_of(size: int, *agents: Running) -> bool:
    """Whether each of these agents has a worker, and in a run of so many processes."""
    workers = [[worker for worker in agent.workers() if _size(worker) == size] for agent in agents]
    return all(workers) or any(agent.over for agent in agents)


def _size(worker: int) -> int | None:
    try:
        return told(worker, "WORLD_SIZE")
    except (OSError, KeyError):  # it has ended, or is not yet what it will be
        return None


@pytest.mark.slow
def test_two_agents_are_one_run(agent: Callable[..., Running], trainer: Trainer, tmp_path: Path) -> None:
    agents = [agent("127.0.0.1", "2", host=True), agent("127.0.0.2", "2")]
    for ended in [one.end() for one in agents]:
        assert ended.code == 0, ended.err
    ended = trainer.train(tmp_path / "one", processes=2, **HOW)
    assert ended.code == 0, ended.err
    assert outcome(tmp_path / "run") == outcome(tmp_path / "one")


@pytest.mark.slow
@pytest.mark.fault(number=12)
def test_an_agent_is_killed_and_comes_back(
    agent: Callable[..., Running], trainer: Trainer, tmp_path: Path, choose: random.Random
) -> None:
    """Who is killed is not the host of the meeting, but may be rank 0, which writes; then who is left becomes that."""
    run, (stays, leaves) = tmp_path / "run", choose.sample(["127.0.0.2", "127.0.0.1"], 2)
    how = {"deterministic": None, "restarts": 1}
    host = agent(stays, "1:2", host=True, **how)
    lost = agent(leaves, "1:2", **how)
    wait_until(lambda: in_world_of(2, host, lost), "a run of two")
    host.wait_for_rows(run, choose.randrange(7, 15))
    lost.send(signal.SIGKILL, lost.id, *lost.workers())
    assert not host.over
    wait_until(lambda: not lost.workers(), "the end of who was killed")
    written = row_count(run)
    whole = trainer.start(tmp_path / "whole", **HOW, deterministic=None)  # while the host waits to be alone

    wait_until(lambda: in_world_of(1, host), "a run of one")
    host.wait_for_rows(run, written + 3)
    (alone,) = [worker for worker in host.workers() if alive(worker)]
    host.send(signal.SIGSTOP, alone)  # else it would be done before the other is back
    assert row_count(run) < HOW["steps"], "it has gone on alone, and is not done"

    back = agent(leaves, "1:2", **how)
    host.wait_for_words("closing signal SIGTERM")  # to take the other in, it starts all anew
    host.send(signal.SIGCONT, alone)
    wait_until(lambda: in_world_of(2, host, back), "a run of two again")
    ends = [host.end(), back.end(), whole.end()]
    for ended in ends:
        assert ended.code == 0, ended.err
    assert any("another process of this run has ended or no longer answers" in line for line in ends[0].ours)
    assert outcome(run) == outcome(tmp_path / "whole")
