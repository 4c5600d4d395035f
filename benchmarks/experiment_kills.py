"""Kills of an experiment's runner at random moments: is results.json the same, byte for byte, as an unkilled one's?

python benchmarks/experiment_kills.py [--rounds 20] [--seed 1]

An experiment of three arms and two seeds, one arm diverging, is run again and again until it has ended; its runner is
killed at moments drawn from the seed, start-up included. tests/runs/test_experiment_runner.py holds a quick variant.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import signal
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), *(str(ROOT / part) for part in ("benchmarks", "tests/runs", "tests/faults"))]

import torch  # noqa: E402
from figures import keep  # noqa: E402
from tiny_experiment import (  # noqa: E402  # pyright: ignore[reportMissingImports]
    ARMS,
    RunnerProcess,
    rows,
    write,
)

from gptlab.device import Machine  # noqa: E402

DIVERGED = 4


def run(rounds: int, seed: int) -> dict[str, Any]:
    """So many kills, over as many experiments as that takes."""
    choose, kills, experiments, failures, left = random.Random(seed), [], 0, [], 0
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        file = write(folder)
        began = time.monotonic()
        expected = finish(RunnerProcess(file, folder / "whole"))
        seconds = time.monotonic() - began
        while len(kills) < rounds:
            out = folder / f"killed_{experiments}"
            for _ in range(min(rounds - len(kills), 5)):
                runner = RunnerProcess(file, out)
                until = time.monotonic() + choose.uniform(0, seconds / 3)
                while time.monotonic() < until and not runner.over:
                    runner.trainers()
                    time.sleep(0.005)
                if runner.over or ((out / "results.json").exists() and complete(out)):  # no work is left to disturb
                    runner.end()
                    break
                trainers = len(runner.trainers())
                runner.send(signal.SIGKILL)
                runner.end()
                left += len(runner.trainers())
                kills.append({"experiment": experiments, "trainers": trainers, "rows": rows(out)})
                print(f"kill {len(kills)}: {trainers} trainers, {kills[-1]['rows']} rows", flush=True)
            found = finish(RunnerProcess(file, out))
            if found != expected:
                failures.append(f"experiment {experiments}: another results.json")
            experiments += 1
            print(f"experiment {experiments}: {'identical' if found == expected else 'DIFFERENT'}", flush=True)
    machine = Machine.probe()
    return {
        "command": f"python benchmarks/experiment_kills.py --rounds {rounds} --seed {seed}",
        "date": date.today().isoformat(),
        "machine": f"{machine.processor}, {machine.cores} cores, {platform.system()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cells": 2 * len(ARMS),
        "kills": len(kills),
        "experiments": experiments,
        "identical": experiments - len(failures),
        "processes_left": left,
        "failures": failures,
        "moments": kills,
    }


def complete(out: Path) -> bool:
    return len(json.loads((out / "results.json").read_text())["cells"]) == 2 * len(ARMS)


def finish(runner: RunnerProcess) -> bytes:
    """Its results.json, once it has ended; one of its arms diverges."""
    code, _, err = runner.end()
    assert code == DIVERGED, err
    return (runner.out / "results.json").read_bytes()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20, help="kills in all")
    parser.add_argument("--seed", type=int, default=1, help="of the moments")
    chosen = parser.parse_args()
    results = run(chosen.rounds, chosen.seed)
    keep("experiment_kills", results)
    print(f"{results['identical']} of {results['experiments']} experiments identical after {results['kills']} kills")
    return int(bool(results["failures"] or results["processes_left"]))


if __name__ == "__main__":
    sys.exit(main())
