"""gptlab on its first GPU, in eight minutes: are its numbers right, do they repeat, does a run resume, how fast is it?

    python benchmarks/gpu.py [--only parity,speed] [--out FILE]
    python benchmarks/gpu.py --tiny

Each section is a process of its own with a time limit, and keeps every figure as it is found, so that one that fails or
is cut off leaves what it had. Exit code 1 if any section is not ok. Writes benchmarks/results/gpu.json, where sections
that were not asked for stay as they were, and the table of docs/performance.md. --tiny runs every section on a CPU,
small and without the code generator of torch.compile; it writes nothing but FILE. No network. Run it on a machine that
does nothing else.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from figures import rewrite

from gptlab.cli.arguments import Parser
from gptlab.cli.main import guarded
from gptlab.device import Machine
from gptlab.errors import UsageError
from gptlab.processes import how_it_ended

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "benchmarks" / "gpu_sections.py"
RESULT = ROOT / "benchmarks" / "results" / "gpu.json"
PAGE = ROOT / "docs" / "performance.md"
START, END = "<!-- measured by benchmarks/gpu.py -->", "<!-- end of what gpu.py measured -->"
SECTIONS = {"parity": 120, "determinism": 120, "resume": 120, "speed": 220, "torchrun": 75, "generate": 55}
"""name -> its limit in seconds on a GPU."""
TINY_LIMIT = 600
TOGETHER = ("parity", "determinism", "resume")
"""Side by side on a GPU, since no time in them counts."""


def run_together(names: Sequence[str], folder: Path, tiny: bool, limit: float) -> dict[str, dict[str, Any]]:
    """Some sections side by side, each ended at its limit with all that it started; what they found."""
    started: dict[str, tuple[subprocess.Popen[str], float]] = {}
    for name in names:
        (folder / name).mkdir()
        command = [sys.executable, str(SCRIPT), name, str(folder / name / "found.json"), *["tiny"] * tiny]
        log = (folder / name / "log.txt").open("w")
        run = subprocess.Popen(command, stdout=log, stderr=log, text=True, start_new_session=True)
        log.close()
        started[name] = run, time.monotonic()
    ended = {}
    for name, (run, start) in started.items():
        allowed = limit or (TINY_LIMIT if tiny else SECTIONS[name])
        try:
            how = how_it_ended(run.wait(max(0.0, start + allowed - time.monotonic())))
        except subprocess.TimeoutExpired:
            how = f"cut off after {allowed:g} s"
            os.killpg(run.pid, signal.SIGKILL)
            run.wait()
        file = folder / name / "found.json"
        found = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        last = (folder / name / "log.txt").read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
        problems = found.pop("problems", []) + [f"{how}: {''.join(last)}"] * (run.returncode != 0)
        ended[name] = {"status": "; ".join(problems) or "ok", "seconds": round(time.monotonic() - start, 1), **found}
        print(f"{name}: {ended[name]['status']} ({ended[name]['seconds']} s)", flush=True)
    return ended


def page(found: dict[str, Any]) -> str:
    """What was found, as Markdown; of nothing, that it was not measured."""
    if not found:
        return "Not measured.\n\n"
    lines = ["`python benchmarks/gpu.py`", "", "| section | outcome | found | where |", "|---|---|---|---|"]
    for name, of in found.items():
        where = f"{of['machine']}, torch {of['torch']}, {of['date']}" if "machine" in of else ""
        lines.append(f"| {name} | {of['status'].replace('|', '/')} | {'; '.join(of.get('summary', []))} | {where} |")
    if rows := found.get("speed", {}).get("rows"):
        lines += ["", f"Updates of GPT-2 124M, {found['speed']['tokens']} tokens a sequence, bf16, compiled:", ""]
        lines += ["| step | batch | tokens/s | ± | of its matmul limit | against |", "|---|---:|---:|---:|---:|---:|"]
        for row in rows:
            limit = f"{row['share_of_limit']:.0%}" if row["share_of_limit"] else ""
            lines.append(f"| {row['name']} | {row['batch']} | {row['tokens_per_second']:,.0f} | {row['spread']:.1%} | "
                         f"{limit} | {row['peer']} {row['against_peer']:.2f}x |")  # fmt: skip
    return "\n".join([*lines, "", ""])


def main(argv: list[str]) -> int:
    """Run the sections asked for; 1 if any is not ok."""
    parser = Parser(prog="benchmarks/gpu.py", description=__doc__)
    parser.add_argument("--only", default=",".join(SECTIONS), metavar="SECTION", help="sections, with commas [all]")
    parser.add_argument("--tiny", action="store_true", help="every section small, on a CPU")
    parser.add_argument("--out", type=Path, help="where the results go as JSON [benchmarks/results/gpu.json]")
    parser.add_argument("--limit", type=float, default=0, help="seconds of each section [its own]")
    options = parser.parse(argv)
    wanted = options.only.split(",")
    if unknown := [name for name in wanted if name not in SECTIONS]:
        raise UsageError(f"--only takes {', '.join(SECTIONS)}, found {', '.join(unknown)}")
    if not options.tiny and not Machine.probe().gpus:
        raise UsageError("expected a GPU, found none; --tiny runs every section on the CPU")
    together = [name for name in TOGETHER if name in wanted and not options.tiny]
    groups = [together, *([name] for name in SECTIONS if name in wanted and name not in together)]
    out = options.out or (None if options.tiny else RESULT)
    found = json.loads(out.read_text(encoding="utf-8")) if out and out.exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        for group in groups:
            found |= run_together(group, Path(folder), options.tiny, options.limit)
            found = {name: found[name] for name in SECTIONS if name in found}
            if out:
                out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(page(found))
    if out == RESULT:
        rewrite(PAGE, START, END, page(found))
    return int(any(found[name]["status"] != "ok" for name in wanted))


if __name__ == "__main__":
    sys.exit(guarded(main, sys.argv[1:]))
