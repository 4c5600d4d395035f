"""The memory of a contender: the most that a process of its own held, above what it held before building it.

That is model, gradients, moments and all that a step needs for a while. A process each, since memory that one contender
freed would else hide what the next one takes.
"""

from __future__ import annotations

import json
import resource
import subprocess
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from gptlab.errors import ConfigError
from gptlab.processes import python_command

if TYPE_CHECKING:
    from gptlab.benchmark.run import Bench


def peak_bytes(bench: Bench, contender: str) -> int:
    """The peak of one contender; raises ConfigError where its process fails."""
    command = python_command("gptlab.benchmark.memory:main", contender, json.dumps(asdict(bench)))
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        killed = "; it was killed, for want of memory perhaps: lower --batch" * (done.returncode < 0)
        raise ConfigError(f"{contender} failed in a process of its own (exit code {done.returncode}){killed}")
    return json.loads(done.stdout.splitlines()[-1])


def _most() -> int:
    """The most resident memory so far. On Linux from the kernel's own mark: getrusage's starts at the parent's."""
    status = Path("/proc/self/status")
    if status.exists():
        return int(status.read_text().partition("VmHWM:")[2].split()[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def main(words: list[str]) -> None:
    """Print the peak of a contender: its name, and the Bench as JSON."""
    from gptlab.benchmark.run import Bench

    contender, bench = words

    what = Bench(**json.loads(bench))
    what.placement.apply()
    before = _most()
    step = what.build(contender)
    for _ in range(3):
        step()
    print(json.dumps(_most() - before))
