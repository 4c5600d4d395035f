"""`gptlab doctor` and `gptlab bench`: what this machine has, what a run would use here and why, and how fast it trains.

Neither changes anything. Speeds are ratios in one run, against the matmul limit and against peers.
"""

from __future__ import annotations

import importlib.metadata
import json
import platform
import shutil
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import gptlab
from gptlab.benchmark import MODES, PEERS, SIZES
from gptlab.cli.arguments import Parser, count, whole
from gptlab.cli.console import console, grid
from gptlab.errors import UsageError, did_you_mean, shown

if TYPE_CHECKING:
    from gptlab.benchmark.run import Bench


PACKAGES = ("numpy", "safetensors", "tiktoken", "rich", "transformers", "datasets", "pyarrow", "scipy", "matplotlib",
            "jinja2")  # fmt: skip
PROGRAMS = ("screen", "torchrun", "git")
MODELS = {"shakespeare-tiny": 128, "gpt2-124m": 768}
"""The models whose placement is shown, with the width that decides it."""


def doctor(argv: list[str]) -> int:
    """Print what was found."""
    parser = Parser(prog="gptlab doctor", description="What this machine has, and what a run would use here and why.")
    parser.add_argument("--json", action="store_true", help="machine-readable, on standard output")
    options = parser.parse(argv)
    found = examine()
    print(json.dumps(found, indent=1) if options.json else _examined_as_text(found))
    return 0


def examine() -> dict[str, Any]:
    """JSON values: software, machine, a placement for each of MODELS, measured matmul rates in FLOP/s by dtype."""
    import torch

    from gptlab.device import DTYPES, Machine, choose_compute, matmul_peak

    machine = Machine.probe()
    placements = {name: choose_compute(machine, n_embd=width) for name, width in MODELS.items()}
    largest = placements["gpt2-124m"]
    largest.apply()
    casts = {name: None if name == "fp32" else dtype for name, dtype in DTYPES.items()}
    return {
        "gptlab": gptlab.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "platform": f"{platform.system()} {platform.machine()}",
        "processor": machine.processor,
        "cores": machine.cores,
        "cpu_bf16": machine.cpu_bf16,
        "gpus": list(machine.gpus),
        "matmul_peak": {name: matmul_peak(replace(largest, autocast=cast)) for name, cast in casts.items()},
        "runs": {name: placement.as_json() for name, placement in placements.items()},
        "preset": "gpt2-124m" if machine.gpus else "shakespeare-tiny",
        "programs": {name: shutil.which(name) for name in PROGRAMS},
        "packages": {name: _version(name) for name in PACKAGES},
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _examined_as_text(found: dict[str, Any]) -> str:
    peaks = ", ".join(f"{name} {rate / 1e9:,.0f} GFLOP/s" for name, rate in found["matmul_peak"].items())
    lines = [
        f"gptlab {found['gptlab']}, Python {found['python']}, torch {found['torch']}, {found['platform']}",
        f"processor  {found['processor']}, {found['cores']} cores, {found['cpu_bf16'] or 'no'} bf16 in hardware",
        f"GPUs       {', '.join(found['gpus']) or 'none'}",
        f"matmul     {peaks} (measured now)",
        "",
        f"a run without --preset is {found['preset']}; what a run would use:",
    ]
    for name, used in found["runs"].items():
        shown = {**used, "compile": "on" if used["compile"] else "off"}
        keys = ("device", "dtype", "threads", "compile")
        lines += [f"  {name}", *(f"    {key:<8} {shown[key]} ({used['reasons'][key]})" for key in keys)]
    lines.append("")
    for kind in ("programs", "packages"):
        lines.append(f"{kind}   " + ", ".join(f"{n} {v or 'not installed'}" for n, v in found[kind].items()))
    return "\n".join(lines)


BENCH = "`gptlab bench`: training speed as ratios in one run, against the matmul limit and against peers."


def bench(argv: list[str]) -> int:
    """Measure and print, or show where a step's time goes."""
    parser = Parser(prog="gptlab bench", description=BENCH)
    parser.add_argument("--profile", action="store_true", help="show where one step's time goes, for each mode")
    parser.add_argument("--json", action="store_true", help="print JSON on standard output")
    asked, options = _asked(parser, argv)
    if options.profile:
        for mode in ("baseline", *asked.modes):
            print(asked.profile(mode))
        return 0
    result = asked.run()
    if options.json:
        print(json.dumps(result))
    else:
        _print_speeds(result)
    return 0


def measure(argv: list[str]) -> dict[str, Any]:
    """What `gptlab bench ARGV --json` prints: `matmul_limit_tokens_per_second` and a row a contender."""
    asked, _ = _asked(Parser(prog="gptlab bench"), argv)
    return asked.run()


def _asked(parser: Parser, argv: list[str]) -> tuple[Bench, Any]:
    """What the options ask for; raises UsageError naming the nearest word before torch is imported."""
    size = "the model and batch to measure [tiny]"
    parser.add_argument("--size", default="tiny", metavar="|".join(SIZES), choices=[*SIZES], help=size)
    parser.add_argument("--batch", type=whole, default=0, help="sequences a step [the size's own]")
    parser.add_argument("--rounds", type=count, default=5, help="interleaved rounds [5]")
    parser.add_argument("--per_round", type=count, default=1, help="steps a round [1]")
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

    from gptlab.benchmark.run import Bench

    asked = Bench(
        options.size, modes, peers, options.batch, options.dtype, options.threads, options.rounds, options.per_round,
        options.ladder, options.peers_in_both,
    )  # fmt: skip
    return asked, options


def _print_speeds(result: dict[str, Any]) -> None:
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
