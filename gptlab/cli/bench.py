"""`gptlab bench`: training speed as ratios in one run, against the matmul limit and against peers."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gptlab.cli.arguments import Parser
from gptlab.errors import UsageError, did_you_mean

if TYPE_CHECKING:
    from gptlab.benchmark.contenders import Step, Work
    from gptlab.benchmark.measure import Timing
    from gptlab.device import Placement

SIZES: dict[str, dict[str, int]] = {
    "tiny": {"n_layer": 4, "n_head": 4, "n_embd": 128, "vocab_size": 256, "block_size": 128, "batch": 16},
    "small": {"n_layer": 6, "n_head": 6, "n_embd": 384, "vocab_size": 50304, "block_size": 256, "batch": 4},
    "124m": {"n_layer": 12, "n_head": 12, "n_embd": 768, "vocab_size": 50304, "block_size": 256, "batch": 4},
}
MODES: dict[str, dict[str, Any]] = {
    "exact": {"name": "confidence"},
    "rotate": {"name": "confidence", "layers": "rotate"},
    "positions": {"name": "confidence", "positions": 0.125},
}


def main(argv: list[str]) -> int:
    """Measure and print; the JSON has `matmul_limit_tokens_per_second` and a row a contender."""
    parser = Parser(prog="gptlab bench", description=__doc__)
    parser.add_argument("--size", default="tiny", metavar="|".join(SIZES), help="the model and batch to measure [tiny]")
    parser.add_argument("--batch", type=int, help="sequences a step [the size's own]")
    parser.add_argument("--rounds", type=int, default=5, help="interleaved rounds [5]")
    parser.add_argument("--per_round", type=int, default=1, help="steps a round [1]")
    parser.add_argument("--modes", default=",".join(MODES), help=f"signal modes, of {', '.join(MODES)} [all]")
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=PATH", help="nanogpt or build-nanogpt")
    parser.add_argument("--dtypes", default="auto", help="fp32, bf16 or both, comma separated [as device.py decides]")
    parser.add_argument("--threads", type=int, default=0, help="threads [all cores]")
    parser.add_argument("--json", action="store_true", help="print JSON on standard output")
    options = parser.parse(argv)
    if options.size not in SIZES:
        raise UsageError(f"--size: unknown size {options.size!r}{did_you_mean(options.size, SIZES)}")
    modes = [m for m in options.modes.split(",") if m]
    for mode in modes:
        if mode not in MODES:
            raise UsageError(f"--modes: unknown mode {mode!r}{did_you_mean(mode, MODES)}")
    result = _measure(options, modes)
    if options.json:
        print(json.dumps(result))
    else:
        _print(result)
    return 0


def _measure(options: Any, modes: list[str]) -> dict[str, Any]:
    from gptlab.benchmark import limit
    from gptlab.benchmark.contenders import Work, placed
    from gptlab.benchmark.measure import interleave
    from gptlab.device import Machine, decide
    from gptlab.model.gpt import GPTConfig
    from gptlab.signals.config import SignalConfig

    size: dict[str, Any] = dict(SIZES[options.size])
    batch = options.batch or size.pop("batch")
    size.pop("batch", None)
    work = Work(GPTConfig(**size), batch)
    placement = decide(Machine.probe(), threads=options.threads, n_embd=work.config.n_embd, compile="off")
    placement.apply()
    dtypes = [placement.dtype_name] if options.dtypes == "auto" else options.dtypes.split(",")
    signals = {mode: SignalConfig(**MODES[mode]) for mode in modes}
    steps: dict[str, Step] = {}
    for dtype in dtypes:
        steps |= _contenders(work, placed(placement, dtype), dtype, signals, options.peer)
    timings = interleave(
        steps, options.rounds, options.per_round, told=lambda text: print(text, file=sys.stderr, flush=True)
    )
    limits = {
        (dtype, mode): limit.seconds(
            limit.products(work.config, work.tokens, signals.get(mode)), placed(placement, dtype)
        )
        for dtype in dtypes
        for mode in ("baseline", *modes)
    }
    rows = [_row(name, timing, work, timings, limits) for name, timing in timings.items()]
    return {
        "size": options.size,
        "batch": batch,
        "threads": placement.threads,
        "rounds": options.rounds,
        "matmul_limit_tokens_per_second": work.tokens / limits[dtypes[0], "baseline"],
        "rows": rows,
    }


def _contenders(
    work: Work, placement: Placement, dtype: str, signals: dict[str, Any], peers: list[str]
) -> dict[str, Step]:
    from gptlab.benchmark import contenders

    steps = {f"baseline {dtype}": contenders.ours(work, placement)}
    for mode, signal in signals.items():
        steps[f"{mode} {dtype}"] = contenders.ours(work, placement, signal)
    steps[f"transformers {dtype}"] = contenders.transformers_step(work, placement)
    for peer in peers:
        name, _, path = peer.partition("=")
        if name not in contenders.PEERS:
            raise UsageError(f"--peer: unknown peer {name!r}{did_you_mean(name, contenders.PEERS)}")
        steps[f"{name} {dtype}"] = contenders.PEERS[name](work, placement, Path(path))
    return steps


def _row(
    name: str, timing: Timing, work: Work, timings: dict[str, Timing], limits: dict[tuple[str, str], float]
) -> dict[str, Any]:
    mode, dtype = name.split()
    own_limit = limits.get((dtype, mode), limits[dtype, "baseline"])
    return {
        "name": name,
        "tokens_per_second": work.tokens / timing.median,
        "spread": timing.spread,
        "share_of_limit": own_limit / timing.median,
        "ratio_to_baseline": timing.median / timings[f"baseline {dtype}"].median,
        "peak_memory_bytes": timing.peak_bytes,
    }


def _print(result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    title = f"{result['size']}: batch {result['batch']}, {result['threads']} threads, {result['rounds']} rounds"
    table = Table(title=title, caption=f"matmul limit {result['matmul_limit_tokens_per_second']:,.0f} tokens/s")
    for column in ("step", "tokens/s", "±", "of its matmul limit", "time over baseline", "peak memory"):
        table.add_column(column, justify="left" if column == "step" else "right")
    for row in result["rows"]:
        table.add_row(
            row["name"],
            f"{row['tokens_per_second']:,.0f}",
            f"{row['spread']:.1%}",
            f"{row['share_of_limit']:.0%}",
            f"{row['ratio_to_baseline']:.2f}x",
            f"{row['peak_memory_bytes'] / 2**20:,.0f} MiB",
        )
    Console().print(table)
