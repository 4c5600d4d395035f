"""Training speed as ratios in one run: `gptlab bench` over its sizes, and the tables of docs/performance.md from it.

    python benchmarks/speed.py [--sizes tiny,small,124m] [--rounds N] [--peer nanogpt=PATH] [--peer build-nanogpt=PATH]

Writes benchmarks/results/speed_SIZE.json and, from all that are there, the tables. Run it on a machine that does
nothing else: what counts is the ratios within a run, and a busy machine blurs them.
"""

from __future__ import annotations

import json
import sys
from datetime import date
from pathlib import Path
from typing import Any

from gptlab.benchmark.sizes import SIZES
from gptlab.cli.bench import measure

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/performance.md"
RESULTS = ROOT / "benchmarks/results"
START, END = "<!-- measured by benchmarks/speed.py -->", "<!-- end of what was measured -->"
PEERS = ("transformers", "nanogpt", "build-nanogpt")
PER_ROUND = {"tiny": "8", "small": "2", "124m": "1"}


def main(argv: list[str]) -> int:
    """Measure the sizes asked for and renew the page."""
    sizes = list(SIZES)
    if "--sizes" in argv:
        at = argv.index("--sizes")
        sizes = argv[at + 1].split(",")
        argv = argv[:at] + argv[at + 2 :]
    RESULTS.mkdir(parents=True, exist_ok=True)
    for size in [s for s in sizes if s]:
        ladder = [] if size == "124m" else ["--ladder"]
        options = ["--size", size, "--per_round", PER_ROUND[size], *ladder, *argv]
        result = measure(options)
        shown = [word.partition("=")[0] + "=PATH" if "=" in word else word for word in options]
        result |= {"command": " ".join(["gptlab", "bench", *shown]), "date": date.today().isoformat()}
        (RESULTS / f"speed_{size}.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        print(table(result))
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(START)
    _, _, after = rest.partition(END)
    paths = [path for size in SIZES if (path := RESULTS / f"speed_{size}.json").exists()]
    found = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    PAGE.write_text(f"{before}{START}\n\n{''.join(map(table, found))}{END}{after}", encoding="utf-8")
    return 0


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
