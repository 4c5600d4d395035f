"""Twenty faults, many times over: survived/tried, to docs/reliability.md and results/faults.json.

python benchmarks/faults.py [--rounds 10] [--seed 1] [--only 11,12]

Each fault has its tests, marked with its number, which are made here at moments drawn from the seed; kills at any
moment, saves, numbers of processes and experiments have trials of their own besides. `--only` makes some and keeps the
figures of the others, each with its date and machine, so that all may take several sittings. A run survives if the same
command, given again, ends with the digest and the rows of an uninterrupted run.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "faults"), str(Path(__file__).parent)]

import torch  # noqa: E402
from experiment_kills import run as experiment_kills  # noqa: E402  # pyright: ignore[reportMissingImports]
from fault_trials import (  # noqa: E402  # pyright: ignore[reportMissingImports]
    Tally,
    kills,
    numbers_of_processes,
    stops,
    tests_of,
    within_saves,
)
from stops import table as table_of_stops  # noqa: E402  # pyright: ignore[reportMissingImports]

from gptlab.device import Machine  # noqa: E402

RESULTS, PAGE = ROOT / "benchmarks" / "results" / "faults.json", ROOT / "docs" / "reliability.md"
STOPS = ROOT / "benchmarks" / "results" / "stops.json"

FAULTS = {
    1: "Stopped and resumed: identical at every later step",
    2: "SIGKILL of a worker, of torchrun, of both, at any moment",
    3: "SIGKILL in each phase of a save, and within writes",
    4: "Disk full in a save or in a row of metrics",
    5: "One flipped byte in a checkpoint or a shard",
    6: "A shard truncated, missing, swapped",
    7: "SIGTERM to torchrun with 2 processes",
    8: "SIGTERM in evaluation, compilation, start-up and save",
    9: "NaN in the loss on one rank only",
    10: "NaN in a signal of one block",
    11: "SIGSTOP of a rank",
    12: "SIGKILL of a rank with `--max-restarts`",
    13: "1, 2, 4 and 1 processes, and identical with `--deterministic`",
    14: "Other intervals of logs, validation, saves and samples",
    15: "A save at an epoch's very end",
    16: "A second writer on a live run",
    17: "Data or options changed before a resume",
    18: "Moments restored, of AdamW and Muon, with 1 and 2 processes",
    19: "The experiment runner killed at any moment",
    20: "Weight 0 against the baseline, over every signal",
}


def experiments(rounds: int, seed: int, folder: Path) -> Tally:
    """Kills of an experiment's runner; an experiment that ends otherwise counts for all of its kills."""
    found, tally = experiment_kills(rounds, seed), Tally()
    tally.tried = found["kills"]
    tally.failures = [
        *found["failures"],
        *[f"{found['processes_left']} processes left"] * bool(found["processes_left"]),
    ]
    return tally


OWN_TRIALS: dict[int, Callable[[int, int, Path], Tally]] = {
    1: lambda rounds, seed, folder: stops(1, rounds, seed, folder),
    2: kills,
    3: within_saves,
    7: lambda rounds, seed, folder: stops(2, rounds, seed, folder),
    13: numbers_of_processes,
    19: experiments,
}
"""(rounds, seed, scratch folder) -> what came of them."""


def try_fault(number: int, rounds: int, seed: int) -> dict[str, Any]:
    """One row of the results."""
    with tempfile.TemporaryDirectory() as scratch:
        tally = Tally() if number == 19 else tests_of(number, rounds, seed, Path(scratch))
        if number in OWN_TRIALS:
            tally.add(OWN_TRIALS[number](rounds, seed, Path(scratch)))
    machine = Machine.probe()
    print(f"{tally.survived}/{tally.tried}  {number}. {FAULTS[number]}", *tally.failures, sep="\n      ", flush=True)
    return {
        "fault": FAULTS[number],
        "survived": tally.survived,
        "tried": tally.tried,
        "failures": tally.failures,
        "command": f"python benchmarks/faults.py --rounds {rounds} --seed {seed} --only {number}",
        "date": date.today().isoformat(),
        "machine": f"{machine.processor}, {machine.cores} cores, {platform.system()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def page(results: dict[str, dict[str, Any]]) -> str:
    """docs/reliability.md."""
    rows = []
    for number, name in FAULTS.items():
        row = results.get(str(number))
        figures = f"{row['survived']} | {row['tried']} | {row['date']}" if row else "| | not yet"
        rows.append(f"| {number} | {name} | {figures} |")
    failures = [f"- {number}: {text}" for number, row in results.items() for text in row["failures"]]
    made_on = sorted({f"- {r['machine']}; Python {r['python']}, torch {r['torch']}" for r in results.values()})
    fill = {
        "rows": "\n".join(rows),
        "machines": "\n".join(made_on),
        "stops": table_of_stops(json.loads(STOPS.read_text(encoding="utf-8"))),
        "failures": "\n".join(["What was not survived:", "", *failures] if failures else
                              ["Everything that was tried was survived."]),
    }  # fmt: skip
    return (Path(__file__).with_name("reliability.template.md")).read_text(encoding="utf-8").format(**fill)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10, help="of each fault")
    parser.add_argument("--seed", type=int, default=1, help="of the moments")
    parser.add_argument("--only", default="", help="numbers of faults, with commas; the others' figures are kept")
    chosen = parser.parse_args()
    numbers = [int(word) for word in chosen.only.split(",") if word] or list(FAULTS)
    results = json.loads(RESULTS.read_text(encoding="utf-8"))["faults"] if RESULTS.exists() else {}
    for number in numbers:
        results[str(number)] = try_fault(number, chosen.rounds, chosen.seed)
        results = {str(n): results[str(n)] for n in FAULTS if str(n) in results}
        RESULTS.write_text(json.dumps({"faults": results}, indent=1) + "\n", encoding="utf-8")
        PAGE.write_text(page(results), encoding="utf-8")
    print(f"written: {RESULTS.relative_to(ROOT)} and {PAGE.relative_to(ROOT)}")
    return int(any(results[str(number)]["failures"] for number in numbers))


if __name__ == "__main__":
    sys.exit(main())
