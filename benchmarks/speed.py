"""Training speed as ratios in one run: `gptlab bench` over its sizes, and the tables of docs/performance.md from it.

    python benchmarks/speed.py [--sizes tiny,small,124m,weak,help] [--rounds N] [--json] [--peer nanogpt=PATH] [...]

Peers run in fp32 and in bf16, and the tables compare with the fastest of them all.
Writes benchmarks/results/speed.json, by size, and the tables of all that is there; `weak` is weak scaling, 1 process
against 2, and `help` times `gptlab --help`. --json prints what was measured, too.
Run it on a machine that does nothing else: what counts is the ratios within a run, and a busy machine blurs them.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

from figures import rewrite

from gptlab.benchmark import SIZES
from gptlab.benchmark.contenders import STEPS, Ladder, Timing, interleave
from gptlab.cli.machine import measure
from gptlab.device import Machine, choose_compute

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/performance.md"
RESULTS = ROOT / "benchmarks/results/speed.json"
START, END = "<!-- measured by benchmarks/speed.py -->", "<!-- end of what was measured -->"
PEERS = ("transformers", "nanogpt", "build-nanogpt")
PER_ROUND = {"tiny": "8", "small": "2", "124m": "1"}
HELP, WEAK, PEERS_ALONE = "help", "weak", "small_peers_in_bf16"
WEAK_SIZES = ("tiny", "small")
HELP_TIMES = 15
TEAMS = {"1 process, 1 thread": (1, 1), "1 process, 2 threads": (1, 2), "2 processes, 1 thread each": (2, 1)}
"""name -> processes, threads of each. Two processes of one thread are what `torchrun --nproc_per_node=2` starts."""


def main(argv: list[str]) -> int:
    """Measure the sizes asked for and renew the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default=",".join([*SIZES, WEAK, HELP]), help="what to measure, with commas [all]")
    parser.add_argument("--rounds", type=int, default=5, help="interleaved rounds [5]")
    parser.add_argument("--json", action="store_true", help="print JSON on standard output instead of tables")
    chosen, passed_on = parser.parse_known_args(argv)  # to `gptlab bench`
    measured: dict[str, Any] = {}
    for size in chosen.sizes.split(","):
        if size == HELP:
            measured[size] = help_time()
        elif size == WEAK:
            measured[size] = weak(chosen.rounds)
        else:
            measured[size] = steps(size, ["--rounds", str(chosen.rounds), *passed_on])
        RESULTS.write_text(json.dumps({**kept(), size: measured[size]}, indent=1) + "\n", encoding="utf-8")
        if not chosen.json and size != HELP:
            print(weak_table(measured[size]) if size == WEAK else table(measured[size]))
    if chosen.json:
        print(json.dumps(measured))
    rewrite(PAGE, START, END, page())
    return 0


def kept() -> dict[str, Any]:
    """What was measured before, by size."""
    return json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}


def page() -> str:
    """The tables and lines of all results there are."""
    found = kept()
    sizes = [found[size] for size in SIZES if size in found]
    scaling = weak_table(found[WEAK]) if WEAK in found else ""
    return "".join(map(table, sizes)) + alone_line(found) + scaling + (help_line(found[HELP]) if HELP in found else "")


def steps(size: str, passed_on: list[str]) -> dict[str, Any]:
    """`gptlab bench` at one size."""
    ladder = [] if size == "124m" else ["--ladder"]
    options = ["--size", size, "--per_round", PER_ROUND[size], "--peers_in_both", *ladder, *passed_on]
    shown = [word.partition("=")[0] + "=PATH" if "=" in word else word for word in options]
    command = " ".join(["gptlab", "bench", *shown])
    return measure(options) | {"command": command, "date": date.today().isoformat()}


def weak(rounds: int) -> dict[str, Any]:
    """Weak scaling, at the sizes of which two fit a machine with little memory."""
    tell = partial(print, file=sys.stderr, flush=True)
    return {
        "command": f"python benchmarks/speed.py --sizes {WEAK} --rounds {rounds}",
        "date": date.today().isoformat(),
        "sizes": [weak_scaling(size, rounds, int(PER_ROUND[size]), tell) for size in WEAK_SIZES],
    }


def weak_scaling(size: str, rounds: int, per_round: int = 1, report: Callable[[str], None] = print) -> dict[str, Any]:
    """As much work a thread, in one process and in two that sum their gradients, in turn at one size; JSON values.

    Twice the threads should make twice the tokens.
    """
    machine = Machine.probe()
    placement = choose_compute(machine, device="cpu", n_embd=SIZES[size]["n_embd"])
    batch = SIZES[size]["batch"]
    with ExitStack() as running:
        teams = {
            name: running.enter_context(
                Ladder(size, placement, processes, threads=threads, batch=batch * threads, together=processes > 1)
            )
            for name, (processes, threads) in TEAMS.items()
        }
        timings = interleave({name: team.steps for name, team in teams.items()}, rounds, per_round, report)
    return {
        "size": size,
        "batch_per_thread": batch,
        "dtype": placement.dtype_name,
        "processor": machine.processor,
        "bf16": machine.cpu_bf16,
        "rounds": rounds,
        "rows": rows(timings, STEPS * batch * SIZES[size]["block_size"]),
    }


def rows(timings: Mapping[str, Timing], tokens: int) -> list[dict[str, Any]]:
    """A row a team, of `tokens` tokens a thread in each timed step.

    efficiency: the rate a thread over that of one thread alone. ratio_to_one_process: the rate over that of one process
    with as many threads in all.
    """
    rates = {(p, t): tokens * p * t / timings[name].median for name, (p, t) in TEAMS.items()}  # tokens/s
    return [
        {
            "name": name,
            "processes": processes,
            "threads": threads,
            "tokens_per_second": rates[processes, threads],
            "spread": timings[name].spread,
            "efficiency": rates[processes, threads] / (processes * threads * rates[1, 1]),
            "ratio_to_one_process": rates[processes, threads] / rates[1, processes * threads],
        }
        for name, (processes, threads) in TEAMS.items()
    ]


def weak_table(found: dict[str, Any]) -> str:
    """Weak scaling as Markdown."""
    first = found["sizes"][0]
    where = f"{first['processor']} ({first['bf16'] or 'no bf16'})"
    lines = [
        "**Weak scaling**: as much work a thread, in one process or in two that sum their gradients over gloo; medians "
        f"of {first['rounds']} interleaved rounds; {where}, {found['date']}. "
        "*Efficiency* is the rate a thread over that of one thread alone.",
        "",
        f"`{found['command']}`",
        "",
        "| size | who | sequences a thread | tokens/s | ± | efficiency | against one process with as many threads |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for size in found["sizes"]:
        for row in size["rows"]:
            lines.append(
                f"| {size['size']}, {size['dtype']} | {row['name']} | {size['batch_per_thread']} | "
                f"{row['tokens_per_second']:,.0f} | {row['spread']:.1%} | {row['efficiency']:.0%} | "
                f"{row['ratio_to_one_process']:.2f}x |"
            )
    return "\n".join([*lines, "", ""])


def help_time() -> dict[str, Any]:
    """Seconds of `gptlab --help` and of a Python that does nothing, in turn."""
    commands = {"help": [str(Path(sys.executable).with_name("gptlab")), "--help"], "python": [sys.executable, "-c", ""]}
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(HELP_TIMES):
        for name, command in commands.items():
            start = time.perf_counter()
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            seconds[name].append(time.perf_counter() - start)
    return {
        "command": "gptlab --help",
        "date": date.today().isoformat(),
        "rounds": HELP_TIMES,
        **{name: {"median": statistics.median(x), "least": min(x), "most": max(x)} for name, x in seconds.items()},
    }


def help_line(found: dict[str, Any]) -> str:
    one, none = found["help"], found["python"]
    return (
        f"`{found['command']}` takes {one['median']:.3f} s ({one['least']:.3f} to {one['most']:.3f}; Python alone "
        f"{none['median']:.3f}), median of {found['rounds']}, {found['date']}.\n\n"
    )


def alone_line(found: Mapping[str, Any]) -> str:
    """How the ladder stands against the best peer, here and in the run in which peers were fastest."""
    before, now = found[PEERS_ALONE], found["small"]
    said = [f"{rate:,.0f} tokens/s and the ladder {ratio:.2f}x" for rate, ratio in map(against_best, (now, before))]
    return (
        f"At the small size the best peer made {said[0]} of it here, but {said[1]} in an earlier run of peers in bf16 "
        f"alone ({before['date']}, {PEERS_ALONE} in [the figures](../benchmarks/results/speed.json)). "
        "Take the lower ratio.\n\n"
    )


def against_best(result: dict[str, Any]) -> tuple[float, float]:
    """The best peer's tokens/s, and the ladder's over it."""
    rates = {row["name"]: row["tokens_per_second"] for row in result["rows"]}
    best = max(rate for name, rate in rates.items() if name.split()[0] in PEERS)
    return best, rates["ladder"] / best


def table(result: dict[str, Any]) -> str:
    """One size's figures as Markdown."""
    peers = [row for row in result["rows"] if row["name"].split()[0] in PEERS]
    best = max(peers, key=lambda row: row["tokens_per_second"])
    lines = [
        f"**{result['size']}**, batch {result['batch']}, {result['dtype']}, {result['threads']} threads, medians of "
        f"{result['rounds']} interleaved rounds; {result['processor']} ({result['bf16'] or 'no bf16'}), "
        f"{result['date']}; matmul limit {result['matmul_limit_tokens_per_second']:,.0f} tokens/s.",
        "",
        f"`{result['command']}`",
        "",
        f"| step | tokens/s | ± | of its matmul limit | against {best['name']} | time over baseline | memory |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in result["rows"]:
        share = f"{row['share_of_limit']:.0%}" if row["share_of_limit"] else ""
        memory = f"{row['peak_memory_bytes'] / 2**20:,.0f} MiB" if row["peak_memory_bytes"] else ""
        lines.append(
            f"| {row['name']} | {row['tokens_per_second']:,.0f} | {row['spread']:.1%} | {share} | "
            f"{row['tokens_per_second'] / best['tokens_per_second']:.2f}x | "
            f"{row['ratio_to_baseline']:.2f}x | {memory} |"
        )
    return "\n".join([*lines, "", ""])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
