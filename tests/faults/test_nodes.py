"""Two agents of torchrun, as on two nodes, here on this machine's loopback: they are one run; where one is killed, the
other goes on alone, and takes the one that comes back in.

Two agents with one process each end with the digest and rows of one agent with two. A run that loses a process and gets
it back has updates of both numbers of processes: with `--deterministic` it is identical to one that nothing disturbed,
and without it as close as test_world_sizes.py says of such runs.
"""

from __future__ import annotations

import random
import signal
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from harness import Running, Trainer, alive, outcome, row_count, told, wait_until

pytestmark = pytest.mark.slow

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


def test_two_agents_are_one_run(agent: Callable[..., Running], trainer: Trainer, tmp_path: Path) -> None:
    agents = [agent("127.0.0.1", "2", host=True), agent("127.0.0.2", "2")]
    for ended in [one.end() for one in agents]:
        assert ended.code == 0, ended.err
    ended = trainer.train(tmp_path / "one", processes=2, **HOW)
    assert ended.code == 0, ended.err
    assert outcome(tmp_path / "run") == outcome(tmp_path / "one")


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
