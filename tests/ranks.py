"""Starts a script as the ranks of one process group, over gloo on the loopback, and waits for them. No tests here."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path


def run_ranks(script: Path, size: int, *words: object) -> None:
    """Run a script in `size` processes; all of them have ended, and without error."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(size)}
    common |= {"OMP_NUM_THREADS": "1"}
    common.pop("PYTHONWARNINGS", None)
    ranks = [
        subprocess.Popen(
            [sys.executable, str(script), *map(str, words)],
            env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]
    try:
        errors = [process.communicate(timeout=300)[1] for process in ranks]
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    assert [process.returncode for process in ranks] == [0] * size, errors
