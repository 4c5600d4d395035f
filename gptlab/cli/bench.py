"""`gptlab bench`: training speed as ratios in one run, against the matmul limit and against peers."""

from __future__ import annotations

import json
import sys
from collections import Counter
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gptlab.benchmark.sizes import MODES, SIZES
from gptlab.cli.arguments import Parser
from gptlab.errors import UsageError, did_you_mean

if TYPE_CHECKING:
    from gptlab.benchmark.contenders import Step
    from gptlab.benchmark.measure import Timing


NARROW = 256
"""Below this width a peer may be faster in fp32, so that it is measured in both."""


def main(argv: list[str]) -> int:
    """Measure and print."""
    options = _read(argv)
    if options.profile:
        return _profile(options)
    result = measured(options)
    if options.json:
        print(json.dumps(result))
    else:
        _print(result)
    return 0


def _read(argv: list[str]) -> Any:
    parser = Parser(prog="gptlab bench", description=__doc__)
    parser.add_argument("--size", default="tiny", metavar="|".join(SIZES), help="the model and batch to measure [tiny]")
    parser.add_argument("--batch", type=int, help="sequences a step [the size's own]")
    parser.add_argument("--rounds", type=int, default=5, help="interleaved rounds [5]")
    parser.add_argument("--per_round", type=int, default=1, help="steps a round [1]")
    parser.add_argument("--modes", default=",".join(MODES), help=f"signal modes, of {', '.join(MODES)} [all]")
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=PATH", help="nanogpt or build-nanogpt")
    parser.add_argument("--dtype", default="auto", help="of our steps: auto, fp32, bf16; peers run in each [auto]")
    parser.add_argument("--ladder", action="store_true", help="also one run a core, side by side, as experiments do")
    parser.add_argument("--threads", type=int, default=0, help="threads [all cores]")
    parser.add_argument("--profile", action="store_true", help="show where one step's time goes, for each mode")
    parser.add_argument("--json", action="store_true", help="print JSON on standard output")
    options = parser.parse(argv)
    if options.size not in SIZES:
        raise UsageError(f"--size: unknown size {options.size!r}{did_you_mean(options.size, SIZES)}")
    options.modes = [m for m in options.modes.split(",") if m]
    for mode in options.modes:
        if mode not in MODES:
            raise UsageError(f"--modes: unknown mode {mode!r}{did_you_mean(mode, MODES)}")
    return options


def measure(argv: list[str]) -> dict[str, Any]:
    """What `gptlab bench ARGV --json` prints: `matmul_limit_tokens_per_second` and a row a contender."""
    return measured(_read(argv))


def measured(options: Any) -> dict[str, Any]:
    from gptlab.benchmark import contenders, limit
    from gptlab.benchmark.contenders import Work, placed
    from gptlab.benchmark.ladder import STEPS, Ladder
    from gptlab.benchmark.measure import interleave
    from gptlab.device import Machine, decide
    from gptlab.model.gpt import GPTConfig
    from gptlab.signals.config import SignalConfig

    size: dict[str, Any] = dict(SIZES[options.size])
    batch = options.batch or size.pop("batch")
    size.pop("batch", None)
    work = Work(GPTConfig(**size), batch)
    machine = Machine.probe()
    placement = decide(machine, threads=options.threads, n_embd=work.config.n_embd, compile="off", dtype=options.dtype)
    placement.apply()
    modes = options.modes
    signals = {mode: SignalConfig(**MODES[mode]) for mode in modes}

    mine = contenders.ours(work, placement, [SignalConfig(), *signals.values()])
    steps: dict[str, Step] = dict(zip(["baseline", *modes], mine, strict=True))
    narrow = work.config.n_embd < NARROW and (machine.cpu_bf16 or machine.gpu_bf16)
    for dtype in ("fp32", "bf16") if narrow else (placement.dtype_name,):
        there = placed(placement, dtype)
        steps[f"transformers {dtype}"] = contenders.transformers_step(work, there)
        for peer in options.peer:
            name, _, path = peer.partition("=")
            if name not in contenders.PEERS:
                raise UsageError(f"--peer: unknown peer {name!r}{did_you_mean(name, contenders.PEERS)}")
            steps[f"{name} {dtype}"] = contenders.PEERS[name](work, there, Path(path))

    needed = {mode: limit.products(work.config, work.tokens, signals.get(mode)) for mode in ("baseline", *modes)}
    times = limit.MatmulTimes(placement)
    every = sum(needed.values(), start=Counter[limit.Product]())
    tell = partial(print, file=sys.stderr, flush=True)
    with Ladder(options.size, placement, machine.cores if options.ladder else 0) as ladder:
        if options.ladder:
            steps["ladder"] = ladder.steps
        timings = interleave(steps, options.rounds, options.per_round, tell, also=partial(times.measure, every))
    tokens = {"ladder": work.tokens * machine.cores * STEPS}
    limits = {mode: times.seconds(products) for mode, products in needed.items()}
    return {
        "size": options.size,
        "batch": batch,
        "dtype": placement.dtype_name,
        "processor": machine.processor,
        "bf16": machine.cpu_bf16,
        "threads": placement.threads,
        "rounds": options.rounds,
        "matmul_limit_tokens_per_second": work.tokens / limits["baseline"],
        "rows": [_row(name, tokens.get(name, work.tokens), work.tokens, timings, limits) for name in timings],
    }


def _profile(options: Any) -> int:
    """Print PyTorch's own profile of a step of the baseline and of each mode, the dearest operations first."""
    from torch.profiler import ProfilerActivity, profile

    from gptlab.benchmark import contenders
    from gptlab.device import Machine, decide
    from gptlab.model.gpt import GPTConfig
    from gptlab.signals.config import SignalConfig

    size: dict[str, Any] = dict(SIZES[options.size])
    batch = size.pop("batch")
    work = contenders.Work(GPTConfig(**size), options.batch or batch)
    placement = decide(
        Machine.probe(), threads=options.threads, n_embd=work.config.n_embd, compile="off", dtype=options.dtype
    )
    placement.apply()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if placement.device.type == "cuda" else [])]
    for mode in ("baseline", *options.modes):
        (step,) = contenders.ours(work, placement, [SignalConfig(**MODES.get(mode, {}))])
        step()
        step()
        with profile(activities=activities) as found:
            step()
        table = found.key_averages().table(sort_by="self_cpu_time_total", row_limit=20, max_name_column_width=48)
        print(f"{mode}, {options.size}, {placement.dtype_name}, {placement.threads} threads\n{table}")
    return 0


def _row(
    name: str, tokens: int, baseline_tokens: int, timings: dict[str, Timing], limits: dict[str, float]
) -> dict[str, Any]:
    timing, limit = timings[name], limits.get(name)
    return {
        "name": name,
        "tokens_per_second": tokens / timing.median,
        "spread": timing.spread,
        "share_of_limit": limit / timing.median if limit else None,
        "ratio_to_baseline": timing.median / timings["baseline"].median * baseline_tokens / tokens,
        "peak_memory_bytes": timing.peak_bytes,
    }


def _print(result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    title = "{size}: batch {batch}, {dtype}, {threads} threads, {rounds} rounds".format(**result)
    table = Table(title=title, caption=f"matmul limit {result['matmul_limit_tokens_per_second']:,.0f} tokens/s")
    for column in ("step", "tokens/s", "±", "of its matmul limit", "time over baseline", "peak memory"):
        table.add_column(column, justify="left" if column == "step" else "right", no_wrap=column == "step")
    for row in result["rows"]:
        table.add_row(
            row["name"],
            f"{row['tokens_per_second']:,.0f}",
            f"{row['spread']:.1%}",
            f"{row['share_of_limit']:.0%}" if row["share_of_limit"] else "",
            f"{row['ratio_to_baseline']:.2f}x",
            f"{row['peak_memory_bytes'] / 2**20:,.0f} MiB",
        )
    Console().print(table)
