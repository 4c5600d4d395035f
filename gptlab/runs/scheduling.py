"""How many cells run at a time, with how many threads or on which GPU, and why. A pure choice; nothing is started.

Packing is the choice for this machine, Queue the one for a cluster, which packs its nodes itself.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

SIDE_BY_SIDE = 512
"""The widest model, in channels, of which one run a core is trained rather than one run over all cores.

Two single-threaded runs of the preset shakespeare-tiny (128 wide) side by side gave 1.26 times the tokens a second of
one run with two threads: threads of small matrices wait for each other. Wider models fill their threads, and two of
them need twice the memory and share the caches.
"""


@dataclass(frozen=True)
class Packing:
    """cores: that may be used; gpus: how many there are; jobs: the most cells at a time, None for what fits."""

    cores: int
    gpus: int = 0
    jobs: int | None = None

    @classmethod
    def of_this_machine(cls, jobs: int | None = None) -> Packing:
        """torch is only asked where a GPU's device file is there: loading it takes seconds and memory."""
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        files = [*Path("/dev").glob("nvidia[0-9]*"), *Path("/dev").glob("kfd"), *Path("/dev").glob("dxg")]
        gpus = 0
        if files:
            from gptlab.device import Machine

            gpus = len(Machine.probe().gpus)
        return cls(cores, gpus, jobs)

    def threads(self, n_embd: int) -> int:
        """Threads of a run of a model that wide, on the CPU; sums round by it, so `jobs` has no say."""
        return self.cores if n_embd > SIDE_BY_SIDE else 1

    def fits(self, n_embd: int, running: list[int]) -> bool:
        """Whether a run may start beside those that run, given their models' widths."""
        if self.jobs and len(running) >= self.jobs:
            return False
        if self.gpus:
            return len(running) < self.gpus
        return not running or sum(map(self.threads, [n_embd, *running])) <= self.cores

    def options(self, n_embd: int, slot: int) -> dict[str, str]:
        """What a run of a model that wide is given where its arm says nothing; slot: the lowest that no run has."""
        return {"device": f"cuda:{slot}"} if self.gpus else {"threads": str(self.threads(n_embd))}

    def why(self, widths: set[int]) -> str:
        """The choice for models of these widths, in words."""
        if self.gpus:
            some = f"{self.jobs} of " if self.jobs and self.jobs < self.gpus else ""
            return f"one run on each of {some}{self.gpus} GPU{'s' * (self.gpus > 1)}"
        said = []
        if min(widths) <= SIDE_BY_SIDE:
            many = min(self.jobs or self.cores, self.cores)
            said.append(
                f"{many} run{'s' * (many > 1)} at a time of one thread: models up to {SIDE_BY_SIDE} wide gain more "
                "from cores of their own than from threads"
            )
        if max(widths) > SIDE_BY_SIDE:
            said.append(f"one run over all {self.cores} cores for models wider than {SIDE_BY_SIDE}")
        return "; ".join(said)


@dataclass(frozen=True)
class Queue:
    """jobs: the most that wait or run at a time, None for all; cores, gpus: of a job, 0 where none are asked for."""

    jobs: int | None = None
    cores: int = 0
    gpus: int = 0

    def fits(self, n_embd: int, running: list[int]) -> bool:
        """Whether one more may join the queue: which node has room for it, the cluster knows."""
        return self.jobs is None or len(running) < self.jobs

    def options(self, n_embd: int, slot: int) -> dict[str, str]:
        """The job's GPU; else threads as on this machine, wide models taking all the cores that the node gives."""
        if self.gpus:
            return {"device": "cuda:0"}
        if n_embd <= SIDE_BY_SIDE:
            return {"threads": "1"}
        return {"threads": str(self.cores)} if self.cores else {}

    def why(self, widths: set[int]) -> str:
        """The choice in words."""
        return f"a job a cell, {f'{self.jobs} at a time' if self.jobs else 'all in the queue at once'}"
