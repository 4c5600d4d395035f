"""`gptlab bench`: training speed as ratios in one run, against the matmul limit and against peers."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from gptlab.benchmark import MODES, PEERS, SIZES
from gptlab.cli.arguments import Parser
from gptlab.cli.console import console, grid
from gptlab.errors import UsageError, did_you_mean, shown

if TYPE_CHECKING:
    from gptlab.benchmark.run import Bench


def main(argv: list[str]) -> int:
    """Measure and print, or show where a step's time goes."""
    parser = Parser(prog="gptlab bench", description=__doc__)
    parser.add_argument("--profile", action="store_true", help="show where one step's time goes, for each mode")
    parser.add_argument("--json", action="store_true", help="print JSON on standard output")
    bench, options = _asked(parser, argv)
    if options.profile:
        for mode in ("baseline", *bench.modes):
            print(bench.profile(mode))
        return 0
    result = bench.run()
    if options.json:
        print(json.dumps(result))
    else:
        _print(result)
    return 0


def measure(argv: list[str]) -> dict[str, Any]:
    """What `gptlab bench ARGV --json` prints: `matmul_limit_tokens_per_second` and a row a contender."""
    bench, _ = _asked(Parser(prog="gptlab bench"), argv)
    return bench.run()


def _asked(parser: Parser, argv: list[str]) -> tuple[Bench, Any]:
    """What the options ask for; raises UsageError naming the nearest word before torch is imported."""
    size = "the model and batch to measure [tiny]"
    parser.add_argument("--size", default="tiny", metavar="|".join(SIZES), choices=[*SIZES], help=size)
    parser.add_argument("--batch", type=int, default=0, help="sequences a step [the size's own]")
    parser.add_argument("--rounds", type=int, default=5, help="interleaved rounds [5]")
    parser.add_argument("--per_round", type=int, default=1, help="steps a round [1]")
    parser.add_argument("--modes", default=",".join(MODES), help=f"signal modes, of {', '.join(MODES)} [all]")
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=PATH", help=" or ".join(PEERS))
    parser.add_argument("--peers_in_both", action="store_true", help="peers in fp32 and bf16 [below 256 channels only]")
    dtype = "of our steps: auto, fp32, bf16 [auto]"
    parser.add_argument("--dtype", default="auto", metavar="DTYPE", choices=["auto", "fp32", "bf16"], help=dtype)
    parser.add_argument("--ladder", action="store_true", help="also one run a core, side by side, as experiments do")
    parser.add_argument("--threads", type=int, default=0, help="threads [all cores]")
    options = parser.parse(argv)
    modes = tuple(mode for mode in options.modes.split(",") if mode)
    peers = tuple((name, path) for name, _, path in (word.partition("=") for word in options.peer))
    for option, words, known in (("--modes", modes, MODES), ("--peer", [name for name, _ in peers], PEERS)):
        for word in words:
            if word not in known:
                raise UsageError(
                    f"{option}: expected {', '.join(known)}, found {shown(word)}{did_you_mean(word, known)}"
                )
    if options.rounds < 1 or options.per_round < 1:
        raise UsageError(f"--rounds and --per_round: expected at least 1, found {options.rounds}, {options.per_round}")
    if options.batch < 0:
        raise UsageError(f"--batch: expected at least 1, or 0 for the size's own, found {options.batch}")

    from gptlab.benchmark.run import Bench

    bench = Bench(
        options.size, modes, peers, options.batch, options.dtype, options.threads, options.rounds, options.per_round,
        options.ladder, options.peers_in_both,
    )  # fmt: skip
    return bench, options


def _print(result: dict[str, Any]) -> None:
    rows = [
        (
            row["name"], f"{row['tokens_per_second']:,.0f}", f"{row['spread']:.1%}",
            f"{row['share_of_limit']:.0%}" if row["share_of_limit"] else "", f"{row['ratio_to_baseline']:.2f}x",
            f"{row['peak_memory_bytes'] / 2**20:,.0f} MiB" if row["peak_memory_bytes"] else "",
        )
        for row in result["rows"]
    ]  # fmt: skip
    print("{size}: batch {batch}, {dtype}, {threads} threads, {rounds} rounds".format(**result))
    columns = ("step", ">tokens/s", ">±", ">of its matmul limit", ">time over baseline", ">peak memory")
    console().print(grid(columns, rows, boxed=True))
    print(f"matmul limit {result['matmul_limit_tokens_per_second']:,.0f} tokens/s")
