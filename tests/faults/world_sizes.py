"""Sittings of runs, each in so many processes over gloo: `python world_sizes.py`, with a JSON list on standard input.

An entry is [processes, options]. The ranks are forked from this process, which has loaded torch already: real
processes, without the seconds that each would take to start. Exit codes go to standard output, a list an entry.
"""

from __future__ import annotations

import json
import os
import socket
import sys
from functools import partial

from killed_inside import ended, start_in_child

from gptlab.distributed import end_with_launcher


def become(rank: int, size: int, port: int) -> None:
    """Be that rank, and end with the process that this one was forked from."""
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in names.items()} | {"MASTER_ADDR": "127.0.0.1"}
    end_with_launcher()


def sitting(processes: int, options: list[str]) -> list[int]:
    """Train in so many processes; their exit codes, by rank."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = [start_in_child(options, partial(become, rank, processes, port)) for rank in range(processes)]
    return [ended(rank) for rank in ranks]


if __name__ == "__main__":
    print(json.dumps([sitting(processes, options) for processes, options in json.load(sys.stdin)]))
