"""Cells of experiments on this code against another checkout of gptlab: the same work, in turn.

python benchmarks/cells.py --old PATH [--rounds 3] [--whole 1] [--only placebo_cell,short_cells,whole_cells]

Three sizes of work, each with every option of the recipe given, so that both do the same (doses of the first updates,
which the old code did not measure, are left out of the new one's): a placebo cell of 150
updates; an experiment of 9 cells (3 arms, 3 seeds) of 10 updates, which is mostly starting; and, --whole times, one of
9 cells of shakespeare-tiny-v1's 700 updates. What runs at a time is what `experiment run` chooses.
The corpus is prepared before. Last losses are compared. PATH is a checkout; the packages are this one's. Writes
benchmarks/results/measured.json.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import date
from pathlib import Path

from figures import keep, measured

ROOT = Path(__file__).parents[1]
RECIPE = {
    "block_size": 128, "batch_size": 16, "total_batch_tokens": 2048, "learning_rate": 1e-3, "warmup_steps": 5,
    "log_every": 10, "eval_every": 100, "checkpoint_every": 100, "sample_every": 0, "dose_every": 50, "min_lr": 1e-4,
}  # fmt: skip
"""shakespeare-tiny-v1, whose name the old code does not know."""
PLACEBO = {"signal.name": "confidence", "signal.control": "placebo"}


def experiment(code: Path, steps: int, seeds: int) -> str:
    """The text of an experiment file for a checkout: a baseline, confidence and its placebo."""
    own = {"dose_first": 0} if code == ROOT else {}
    options = "".join(f"{key} = {json.dumps(value)}\n" for key, value in {**RECIPE, **own, "steps": steps}.items())
    return (
        f'name = "cells"\npreset = "shakespeare-tiny"\nbaseline = "baseline"\ndelta = 0.01\n'
        f"seeds = {list(range(1, seeds + 1))}\n[options]\n{options}[arms.baseline]\n"
        '[arms.confidence]\nsignal.name = "confidence"\n'
        '[arms.placebo]\nsignal.name = "confidence"\nsignal.control = "placebo"\n'
    )


def timed(words: Sequence[str], code: Path, folder: Path) -> float:
    """Seconds of a command of gptlab, of the checkout `code`, in a folder; raises where it fails."""
    environment = {**os.environ, "PYTHONPATH": str(code)}
    began = time.perf_counter()
    subprocess.run(
        [sys.executable, "-m", "gptlab", *words], check=True, cwd=folder, env=environment, stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    return time.perf_counter() - began


def placebo_cell(code: Path, folder: Path) -> float:
    own = {"dose_first": 0} if code == ROOT else {}
    words = [f"--{key}={value}" for key, value in {**RECIPE, **own, "steps": 150, "threads": 1, **PLACEBO}.items()]
    return timed(["train", *words, "--out", "placebo"], code, folder)


def cells(code: Path, folder: Path, steps: int, seeds: int) -> float:
    (folder / "cells.toml").write_text(experiment(code, steps, seeds), encoding="utf-8")
    return timed(["experiment", "run", "cells.toml"], code, folder)


def losses(folder: Path) -> dict[str, float]:
    """{cell: its last validation loss} of all runs below a folder."""
    found = {}
    for path in sorted(folder.rglob("metrics.jsonl")):
        rows = (json.loads(line) for line in path.read_text(encoding="utf-8").splitlines())
        validated = [row["loss"] for row in rows if row.get("kind", row.get("type")) == "val"]
        found[str(path.relative_to(folder).parent)] = validated[-1]
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Run all kinds of work with both, in turn, and print the medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--old", type=Path, required=True, help="a checkout of gptlab")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--whole", type=int, default=1, metavar="N", help="rounds of the 9 whole cells [1]")
    parser.add_argument("--only", metavar="NAME,..", help="these kinds alone")
    asked = parser.parse_args(argv)
    kinds = {
        "placebo_cell": (asked.rounds, placebo_cell),
        "short_cells": (asked.rounds, lambda code, folder: cells(code, folder, 10, 3)),
        "whole_cells": (asked.whole, lambda code, folder: cells(code, folder, 700, 3)),
    }
    result: dict[str, object] = {**measured("cells"), "date": date.today().isoformat(), "cores": os.cpu_count()}
    for name in asked.only.split(",") if asked.only else kinds:
        rounds, work = kinds[name]
        seconds: dict[str, list[float]] = {"old": [], "new": []}
        apart = 0.0
        for _ in range(rounds):
            last = {}
            for which, code in (("old", asked.old.resolve()), ("new", ROOT)):
                with tempfile.TemporaryDirectory(prefix="cells_") as scratch:
                    timed(["train", "--steps=1", "--eval_tokens=1024", "--out", "first"], code, Path(scratch))
                    shutil.rmtree(Path(scratch, "first"))
                    seconds[which].append(work(code, Path(scratch)))
                    last[which] = losses(Path(scratch))
            if last["old"].keys() != last["new"].keys():
                raise SystemExit(f"{name}: the old code made {sorted(last['old'])}, the new one {sorted(last['new'])}")
            apart = max(apart, *(abs(last["old"][cell] - last["new"][cell]) for cell in last["old"]))
        ratio = statistics.median(new / old for old, new in zip(seconds["old"], seconds["new"], strict=True))
        result[name] = {"seconds": seconds, "new_over_old": ratio, "largest_difference_of_losses": apart}
        print(f"{name}: {ratio:.3f} of the old time ({seconds}); losses within {apart:.2g}", flush=True)
        keep("cells", result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
