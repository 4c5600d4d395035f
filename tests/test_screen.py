"""The commands for a long job under GNU screen, as the README gives them, on a model that trains in a moment."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
QUICK = (
    "--n_layer 2 --n_head 2 --n_embd 32 --block_size 32 --batch_size 4 --total_batch_tokens 128 --steps 3 --threads 1 "
    "--eval_every 0 --sample_every 0 --dose_every 0 --checkpoint_every 3 --compile off"
)
PATIENCE = 180.0
"""Seconds after which a session is taken for stuck; it takes about ten."""


class Screen:
    """screen with sockets of its own, so that no session of the user's is seen or touched."""

    def __init__(self, program: str, sockets: Path) -> None:
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        self._program = program
        self._environment = os.environ | {"SCREENDIR": str(sockets), "PATH": path}

    def __call__(self, *arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
        command = [self._program, *arguments]
        settings = {"cwd": cwd, "env": self._environment, "stdin": subprocess.DEVNULL}
        return subprocess.run(command, capture_output=True, text=True, timeout=30, **settings)

    def sessions(self) -> list[int]:
        """The process ids of the sessions there are."""
        return [int(found) for found in re.findall(r"^\s+(\d+)\.", self("-ls").stdout, re.MULTILINE)]


@pytest.fixture
def screen(requires_program: Callable[[str], str]) -> Iterator[Screen]:
    with tempfile.TemporaryDirectory(prefix="screen") as sockets:  # in a short path, as a socket's name has a limit
        screen = Screen(requires_program("screen"), Path(sockets))
        yield screen
        for session in screen.sessions():
            os.kill(session, signal.SIGTERM)  # hangs up on the training, which ends with its torchrun
        until(lambda: not screen.sessions())


def until(true: Callable[[], bool]) -> bool:
    """Wait for it, at most PATIENCE; whether it came."""
    deadline = time.monotonic() + PATIENCE
    while not true() and time.monotonic() < deadline:
        time.sleep(0.1)
    return true()


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["train_gpt2.py", "train_gpt2_ben.py"])
def test_a_detached_session_trains_to_the_end_and_logs_it(launcher: str, screen: Screen, tmp_path: Path) -> None:
    (tmp_path / "log").mkdir()  # as setup.sh leaves it
    shutil.copy(ROOT / launcher, tmp_path)
    command = f"torchrun --standalone --nproc_per_node=1 {launcher} {QUICK} > log/screen.txt 2>&1"
    started = screen("-dm", "bash", "-c", command, cwd=tmp_path)
    assert (started.returncode, started.stdout, started.stderr) == (0, "", "")
    assert until(lambda: len(screen.sessions()) == 1), "a session to come back to with screen -r"
    assert until(lambda: not screen.sessions()), (tmp_path / "log/screen.txt").read_text()
    output = (tmp_path / "log/screen.txt").read_text()
    assert "step 3: finished" in output, output
    [checkpoint] = tmp_path.glob("log/*/checkpoints/step_*")
    assert checkpoint.name == "step_00000003"
