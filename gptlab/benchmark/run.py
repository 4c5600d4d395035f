"""One measurement: which contenders there are for a size, timed in turn, their memory and matmul limits beside them."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from gptlab.benchmark import contenders, limit, memory
from gptlab.benchmark.contenders import Step, Work, placed
from gptlab.benchmark.ladder import STEPS, Ladder
from gptlab.benchmark.measure import Timing, interleave
from gptlab.benchmark.sizes import MODES, SIZES
from gptlab.device import ComputeConfig, Machine, choose_compute
from gptlab.model.gpt import GPTConfig
from gptlab.signals.config import SignalConfig

NARROW = 256
"""Below this width a peer may well be faster in fp32, so that it is measured in both without being asked."""


@dataclass(frozen=True)
class Bench:
    """What to measure. modes: of MODES; peers: (name, checkout); batch, threads: 0 = the size's own, all cores.

    peers_in_both: peers in fp32 and in bf16 (where the processor has it) at every width, not below 256 channels only.
    """

    size: str
    modes: tuple[str, ...] = tuple(MODES)
    peers: tuple[tuple[str, str], ...] = ()
    batch: int = 0
    dtype: str = "auto"
    threads: int = 0
    rounds: int = 5
    per_round: int = 1
    ladder: bool = False
    peers_in_both: bool = False

    @cached_property
    def machine(self) -> Machine:
        return Machine.probe()

    @property
    def placement(self) -> ComputeConfig:
        n_embd = self.work.config.n_embd
        return choose_compute(self.machine, threads=self.threads, n_embd=n_embd, compile="off", dtype=self.dtype)

    @property
    def work(self) -> Work:
        size: dict[str, Any] = dict(SIZES[self.size])
        batch = size.pop("batch")
        return Work(GPTConfig(**size), self.batch or batch)

    def signal(self, mode: str) -> SignalConfig:
        """A mode's signal; the baseline's is none."""
        return SignalConfig(**MODES.get(mode, {}))

    def theirs(self) -> dict[str, Callable[[], Step]]:
        """How to build the step of each peer, in its dtypes."""
        wanted = self.peers_in_both or self.work.config.n_embd < NARROW
        both = wanted and (self.machine.cpu_bf16 or self.machine.gpu_bf16)
        steps: dict[str, Callable[[], Step]] = {}
        for dtype in ("fp32", "bf16") if both else (self.placement.dtype_name,):
            there = placed(self.placement, dtype)
            steps[f"transformers {dtype}"] = partial(contenders.transformers_step, self.work, there)
            for name, path in self.peers:
                steps[f"{name} {dtype}"] = partial(contenders.PEERS[name], self.work, there, Path(path))
        return steps

    def build(self, name: str) -> Step:
        """The step of one contender, by itself."""
        if name in ("baseline", *self.modes):
            return contenders.ours(self.work, self.placement, [self.signal(name)])[0]
        return self.theirs()[name]()

    def run(self) -> dict[str, Any]:
        """Measure; JSON values."""
        placement, work, own = self.placement, self.work, ("baseline", *self.modes)
        for name, path in self.peers:
            contenders.check_checkout(name, Path(path))
        placement.apply()
        tell = partial(print, file=sys.stderr, flush=True)
        peaks = {}
        for name in (*own, *self.theirs()):
            peaks[name] = memory.peak_bytes(replace(self, ladder=False), name)
            tell(f"memory of {name}: {peaks[name] / 2**20:,.0f} MiB")
        mine = contenders.ours(work, placement, [self.signal(mode) for mode in own])  # all on one model
        steps: dict[str, Step] = dict(zip(own, mine, strict=True))
        steps |= {name: build() for name, build in self.theirs().items()}

        needed = {mode: limit.products(work.config, work.tokens, self.signal(mode)) for mode in own}
        times = limit.MatmulTimes(placement)
        every = sum(needed.values(), start=Counter[limit.Product]())
        with Ladder(self.size, placement, self.machine.cores if self.ladder else 0) as ladder:
            if self.ladder:
                steps["ladder"] = ladder.steps
            timings = interleave(steps, self.rounds, self.per_round, tell, also=partial(times.measure, every))
        limits = {mode: times.seconds(products) for mode, products in needed.items()}

        def row(name: str, timing: Timing) -> dict[str, Any]:
            rate = work.tokens / timing.median * (self.machine.cores * STEPS if name == "ladder" else 1)
            return {
                "name": name,
                "tokens_per_second": rate,
                "spread": timing.spread,
                "share_of_limit": limits[name] / timing.median if name in limits else None,
                "ratio_to_baseline": work.tokens / timings["baseline"].median / rate,
                "peak_memory_bytes": peaks.get(name),
            }

        return {
            "size": self.size,
            "batch": work.batch,
            "dtype": placement.dtype_name,
            "processor": self.machine.processor,
            "bf16": self.machine.cpu_bf16,
            "threads": placement.threads,
            "rounds": self.rounds,
            "matmul_limit_tokens_per_second": work.tokens / limits["baseline"],
            "rows": [row(name, timing) for name, timing in timings.items()],
        }

    def profile(self, mode: str) -> str:
        """PyTorch's own profile of a step of the baseline or a mode, the dearest operations first."""
        from torch.profiler import ProfilerActivity, profile

        self.placement.apply()
        gpu = self.placement.device.type == "cuda"
        step = self.build(mode)
        step()
        step()
        with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])]) as found:
            step()
        table = found.key_averages().table(sort_by="self_cpu_time_total", row_limit=20, max_name_column_width=48)
        return f"{mode}, {self.size}, {self.placement.dtype_name}, {self.placement.threads} threads\n{table}"
