"""One measurement: the contenders of a size, timed in turn, next to the memory they take and the matmul limit.

The matmul limit is how fast a step would be if it were nothing but its own matmuls, each measured alone: every product
that a training step needs, forward and both backward ones, in the dtype the step computes in. Attention's own products
are not among them (they are a few percent of a step at T=256).

The memory of a contender is the most that a process of its own held, above what it held before building it: model,
gradients, moments and all that a step needs for a while. A process each, since memory that one contender freed would
else hide what the next one takes.
"""

from __future__ import annotations

import json
import resource
import statistics
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch

from gptlab.benchmark import MODES, ON_A_GPU, SIZES, contenders
from gptlab.benchmark.contenders import STEPS, Ladder, Step, Timing, Work, interleave, placed, wait
from gptlab.device import ComputeConfig, Machine, choose_compute, seconds
from gptlab.errors import ConfigError, UsageError
from gptlab.model.gpt import GPTConfig
from gptlab.processes import python_command
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
        n_embd = SIZES[self.size]["n_embd"]
        return choose_compute(self.machine, threads=self.threads, n_embd=n_embd, dtype=self.dtype)

    @property
    def work(self) -> Work:
        size: dict[str, Any] = SIZES[self.size] | (ON_A_GPU[self.size] if self.machine.gpus else {})
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
                steps[f"{name} {dtype}"] = partial(contenders.peer_step, name, self.work, there, Path(path))
        return steps

    def build(self, name: str) -> Step:
        """The step of one contender, by itself."""
        if name in ("baseline", *self.modes):
            return contenders.ours(self.work, self.placement, [self.signal(name)])[0]
        return self.theirs()[name]()

    def run(self) -> dict[str, Any]:
        """Measure; JSON values."""
        placement, work, own = self.placement, self.work, ("baseline", *self.modes)
        if self.ladder and self.machine.gpus:
            raise UsageError("--ladder runs one process a core, and this machine's steps are a GPU's; leave it out")
        for name, path in self.peers:
            contenders.check_checkout(name, Path(path))
        placement.apply()
        report = partial(print, file=sys.stderr, flush=True)
        peaks = {}
        for name in (*own, *self.theirs()):
            peaks[name] = peak_bytes(replace(self, ladder=False), name)
            report(f"memory of {name}: {peaks[name] / 2**20:,.0f} MiB")
        mine = contenders.ours(work, placement, [self.signal(mode) for mode in own])  # all on one model
        steps: dict[str, Step] = dict(zip(own, mine, strict=True))
        steps |= {name: build() for name, build in self.theirs().items()}

        needed = {mode: products(work.config, work.tokens, self.signal(mode)) for mode in own}
        times = MatmulTimes(placement)
        every = sum(needed.values(), start=Counter[Product]())
        with Ladder(self.size, placement, self.machine.cores if self.ladder else 0) as ladder:
            if self.ladder:
                steps["ladder"] = ladder.steps
            timings = interleave(steps, self.rounds, self.per_round, report, also=partial(times.measure, every))
        limits = {mode: times.seconds(of_mode) for mode, of_mode in needed.items()}

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
            "processor": self.machine.gpus[0] if self.machine.gpus else self.machine.processor,
            "bf16": "" if self.machine.gpus else self.machine.cpu_bf16,
            "compiled": placement.compile,
            "threads": placement.threads,
            "rounds": self.rounds,
            "matmul_limit_tokens_per_second": work.tokens / limits["baseline"],
            "rows": [row(name, timing) for name, timing in timings.items()],
        }

    def profile(self, mode: str) -> str:
        """PyTorch's own profile of a step of the baseline or a mode, the most expensive operations first."""
        from torch.profiler import ProfilerActivity, profile

        self.placement.apply()
        gpu = self.placement.device.type == "cuda"
        step = self.build(mode)
        step()
        step()
        with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])]) as found:
            step()
        by = "self_cuda_time_total" if gpu else "self_cpu_time_total"
        table = found.key_averages().table(sort_by=by, row_limit=20, max_name_column_width=48)
        return f"{mode}, {self.size}, {self.placement.dtype_name}, {self.placement.threads} threads\n{table}"


Product = tuple[int, int, int]
"""(m, k, n): an (m, k) by (k, n) product."""


def products(config: GPTConfig, tokens: int, signal: SignalConfig | None = None) -> Counter[Product]:
    """The matmuls of one step over `tokens` tokens, with how often each is needed.

    A judged block costs its reading (forward and to its input, no weight gradient) and the input gradients of its four
    linear layers; `rotate` judges one block, `positions` read a share of the tokens.
    """
    C, V = config.n_embd, config.vocab_size
    layers = [(C, 3 * C), (C, C), (C, 4 * C), (4 * C, C)]
    needed: Counter[Product] = Counter()
    for k, n in layers:
        needed[tokens, k, n] += config.n_layer
        needed[tokens, n, k] += config.n_layer
        needed[k, tokens, n] += config.n_layer
    for product in ((tokens, C, V), (tokens, V, C), (C, tokens, V)):
        needed[product] += 1
    if signal is not None and signal.name != "none":
        judges = len(signal.judges_at(0, config.n_layer, 0)[0])
        read = round(tokens * signal.positions)
        needed[read, C, V] += judges
        needed[read, V, C] += judges
        for k, n in layers:
            needed[tokens, n, k] += judges
    return needed


class MatmulTimes:
    """Seconds of single products of one dtype, measured alone, once a call of `measure`."""

    def __init__(self, placement: ComputeConfig) -> None:
        self.placement, self.dtype = placement, placement.autocast or torch.float32
        self._times: dict[Product, list[float]] = defaultdict(list)

    def measure(self, needed: Counter[Product], repeats: int = 3) -> None:
        """Time every product of `needed`, of random numbers, some times more."""
        device = self.placement.device
        for m, k, n in needed:
            a = torch.randn(m, k, device=device).to(self.dtype)
            b = torch.randn(n, k, device=device).to(self.dtype).t()
            out = a @ b  # warms up, and takes the memory that the system would else clear within the measurement
            wait()
            product = partial(torch.mm, a, b, out=out)
            self._times[m, k, n] += [seconds(product, device) for _ in range(repeats)]

    def seconds(self, needed: Counter[Product]) -> float:
        """The medians of the products of `needed`, summed."""
        return sum(count * statistics.median(self._times[product]) for product, count in needed.items())


def peak_bytes(bench: Bench, contender: str) -> int:
    """The peak of one contender; raises ConfigError where its process fails."""
    command = python_command("gptlab.benchmark.run:print_peak", contender, json.dumps(asdict(bench)))
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        killed = "; it was killed, for want of memory perhaps: lower --batch" * (done.returncode < 0)
        raise ConfigError(f"{contender} failed in a process of its own (exit code {done.returncode}){killed}")
    return json.loads(done.stdout.splitlines()[-1])


def _most(device: torch.device) -> int:
    """The most memory so far: of a GPU what tensors take; of a host what is resident, on Linux from the kernel's own
    mark, since getrusage's starts at the parent's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():
        return int(status.read_text().partition("VmHWM:")[2].split()[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def print_peak(words: list[str]) -> None:
    """Print the peak of a contender: its name, and the Bench as JSON."""
    contender, bench = words
    what = Bench(**json.loads(bench))
    what.placement.apply()
    device = what.placement.device
    before = _most(device)
    step = what.build(contender)
    for _ in range(3):
        step()
    print(json.dumps(_most(device) - before))
