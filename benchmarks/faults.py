"""Twenty faults, many times over: survived/tried, to docs/reliability.md and results/measured.json.

python benchmarks/faults.py [--rounds 10] [--seed 1] [--only 11,12]

Each fault has its tests, marked with its number, which are made here at moments drawn from the seed; kills at any
moment, saves, numbers of processes and experiments have trials of their own besides. `--only` makes some and keeps the
figures of the others, each with its date and machine, so that all may take several sittings. A run survives if the same
command, given again, ends with the digest and the rows of an uninterrupted run.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "faults"), str(Path(__file__).parent)]

import torch  # noqa: E402
from experiment_kills import run as experiment_kills  # noqa: E402  # pyright: ignore[reportMissingImports]
from figures import MEASURED, keep, measured, rewrite  # noqa: E402
from harness import (  # noqa: E402  # pyright: ignore[reportMissingImports]
    Running,
    Trainer,
    kill,
    make_corpus,
    options,
    outcome,
    rows,
    settle,
)
from stops import table as table_of_stops  # noqa: E402  # pyright: ignore[reportMissingImports]

from gptlab.device import Machine  # noqa: E402

PAGE = ROOT / "docs" / "reliability.md"

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


VICTIMS = ("worker", "torchrun", "both")
FIVE_STEPS = {"steps": 5, "eval_every": 5, "sample_every": 0, "checkpoint_every": 5, "dose_every": 0}
TOLERANCE = 1e-4
"""Nats between validation losses after 5 steps from different numbers of processes."""


@dataclass
class Tally:
    """failures: what went wrong, one text a trial that was not survived."""

    tried: int = 0
    failures: list[str] = field(default_factory=list)

    @property
    def survived(self) -> int:
        return self.tried - len(self.failures)

    def count(self, wrong: list[str], trial: str) -> None:
        self.tried += 1
        if wrong:
            self.failures.append(f"{trial}: {'; '.join(wrong)}")

    def add(self, other: Tally) -> None:
        self.tried += other.tried
        self.failures += other.failures


def tests_of(number: int, rounds: int, seed: int, folder: Path) -> Tally:
    """The tests that are marked with a fault's number, each so many times; a test that is skipped was not tried."""
    report = folder / "tests.xml"
    command = [sys.executable, "-m", "pytest", "-n0", "-q", "-p", "no:cacheprovider", "-m", f"fault(number={number})",
               "--rounds", str(rounds), "--moments", str(seed), f"--junitxml={report}", "tests"]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    tally = Tally()
    if not report.exists():
        tally.count([done.stdout[-500:] + done.stderr[-500:]], "pytest")
        return tally
    for case in ElementTree.parse(report).iter("testcase"):
        wrong = [str(bad.get("message"))[:300] for kind in ("failure", "error") for bad in case.findall(kind)]
        if case.find("skipped") is None:
            tally.count(wrong, str(case.get("name")))
    return tally


class Rounds:
    """The uninterrupted run at one number of processes, and rounds of faults against it."""

    def __init__(self, trainer: Trainer, folder: Path, processes: int, seed: int) -> None:
        self.trainer, self.folder, self.processes, self.seed = trainer, folder, processes, seed
        whole = folder / f"whole_{processes}"
        began = time.monotonic()
        ended = trainer.train(whole, processes=processes)
        self.seconds = time.monotonic() - began
        assert ended.code == 0, ended.err
        self.expected, self.rows = outcome(whole), len(rows(whole))

    def draw(self, kind: str, number: int, strike: Callable[[Running, random.Random], None]) -> list[str] | None:
        """Strike at a random moment and start again; what went wrong, or None where the run was over already.

        Two of three moments are a row of metrics and a split second, the third a time since the start, which may fall
        into start-up.
        """
        choose = random.Random(f"{self.seed} {self.processes} {kind} {number}")
        run = self.folder / f"{kind}_{self.processes}_{number}".replace(" ", "_")
        running = self.trainer.start(run, processes=self.processes)
        if choose.random() < 2 / 3:
            running.wait_for_rows(run, choose.randrange(1, self.rows - 1))
            time.sleep(choose.uniform(0, 0.1))
        else:
            until = time.monotonic() + choose.uniform(0, self.seconds)
            while time.monotonic() < until and not running.over:
                running.workers()
                time.sleep(0.005)
        if running.over:
            return None
        strike(running, choose)
        left, written = settle(running, run, patience=35.0)
        wrong = [f"workers left: {left}"] * bool(left) + [f"{written} rows written since"] * bool(written)
        running.abandon()
        ended = self.trainer.train(run, processes=self.processes)
        if ended.code:
            wrong.append(f"started again, it ended with {ended.code}: {' '.join(ended.ours)}")
        else:
            wrong += ["another digest or step"] * (outcome(run)[0] != self.expected[0])
            wrong += ["other rows"] * (outcome(run)[1] != self.expected[1])
        shutil.rmtree(run)
        return wrong

    def repeat(self, kind: str, times: int, strike: Callable[[Running, random.Random], None]) -> Tally:
        """So many trials in which the run was struck before its end."""
        tally, number = Tally(), 0
        while tally.tried < times:
            wrong = self.draw(kind, number, strike)
            if wrong is not None:
                tally.count(wrong, f"{kind}, {self.processes} processes, trial {number}")
            number += 1
        return tally


def kills(rounds: int, seed: int, folder: Path) -> Tally:
    """SIGKILL at any moment, with 1 and with 2 processes, of each victim in turn."""
    tally, trainer = Tally(), Trainer(make_corpus(folder / "corpus"), folder)
    try:
        for processes in (1, 2):
            tries = Rounds(trainer, folder, processes, seed)
            for k, victim in enumerate(VICTIMS):
                times = len(range(k, rounds, len(VICTIMS)))
                tally.add(tries.repeat(f"SIGKILL {victim}", times, lambda r, c, v=victim: kill(r, v, c)))
    finally:
        trainer.close()
    return tally


def stops(processes: int, rounds: int, seed: int, folder: Path) -> Tally:
    """SIGTERM to torchrun at any moment."""
    trainer = Trainer(make_corpus(folder / "corpus"), folder)
    try:
        return Rounds(trainer, folder, processes, seed).repeat("SIGTERM", rounds, lambda r, c: r.send(15))
    finally:
        trainer.close()


def within_saves(rounds: int, seed: int, folder: Path) -> Tally:
    """SIGKILL at every change that a run of three saves makes in its folder, and in the middle of each large write."""
    how = options(make_corpus(folder / "corpus"), folder, steps=6, checkpoint_every=2, eval_every=6, sample_every=0)
    where = how.index("--out")
    del how[where : where + 2]
    sizes = [str(size) for size in (500, 3_000, 20_000, 90_000, 150_000, 200_000, 250_000)]
    command = [sys.executable, "tests/faults/killed_inside.py", "--folder", str(folder), "--sizes", *sizes, "--", *how]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    trials = [json.loads(line) for line in done.stdout.splitlines()]
    expected = next(outcome(Path(trial["run"])) for trial in trials if trial["died"] == 0)
    tally = Tally()
    for trial in trials:
        if trial["died"] == 0:
            continue
        wrong = [f"{what}: {trial[what]}" for what in ("damaged", "debris", "ended") if trial[what]]
        if not trial["ended"] and outcome(Path(trial["run"])) != expected:
            wrong.append("another outcome")
        tally.count(wrong, trial["where"] or f"at {trial.get('size')} bytes")
    return tally


def numbers_of_processes(rounds: int, seed: int, folder: Path) -> Tally:
    """The validation loss after 5 steps at equal total batch, of 2 and of 8 processes against 1."""
    tally, losses = Tally(), {}
    trainer = Trainer(make_corpus(folder / "corpus"), folder)
    try:
        for processes in (1, 2, 8):
            run = folder / f"ranks_{processes}"
            ended = trainer.train(run, processes=processes, **FIVE_STEPS)
            assert ended.code == 0, ended.err
            (losses[processes],) = [row["loss"] for row in rows(run) if row["kind"] == "val"]
            if processes > 1:
                apart = abs(losses[processes] - losses[1])
                tally.count([f"{apart:g} apart"] * (apart > TOLERANCE), f"{processes} processes")
    finally:
        trainer.close()
    return tally


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


def write_page(results: dict[str, dict[str, Any]]) -> None:
    """The parts of docs/reliability.md that are measured."""
    lines = ["| | fault | survived | tried | date |", "|---|---|---|---|---|"]
    for number, name in FAULTS.items():
        row = results.get(str(number))
        figures = f"{row['survived']} | {row['tried']} | {row['date']}" if row else "| | not yet"
        lines.append(f"| {number} | {name} | {figures} |")
    failures = [f"- {number}: {text}" for number, row in results.items() for text in row["failures"]]
    lines += [
        "",
        *(["What was not survived:", "", *failures] if failures else ["Everything that was tried was survived."]),
    ]
    machines = {f"- {r['machine']}; Python {r['python']}, torch {r['torch']}" for r in results.values()}
    stopped = table_of_stops(measured("stops").get("cells", []))
    for name, content in (("faults", lines), ("machines", sorted(machines)), ("stops", [stopped])):
        rewrite(PAGE, f"<!-- {name} -->", f"<!-- end of {name} -->", "\n".join(content) + "\n\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10, help="of each fault")
    parser.add_argument("--seed", type=int, default=1, help="of the moments")
    parser.add_argument("--only", default="", help="numbers of faults, with commas; the others' figures are kept")
    chosen = parser.parse_args()
    numbers = [int(word) for word in chosen.only.split(",") if word] or list(FAULTS)
    results = measured("faults")
    for number in numbers:
        results[str(number)] = try_fault(number, chosen.rounds, chosen.seed)
        results = {str(n): results[str(n)] for n in FAULTS if str(n) in results}
        keep("faults", results)
        write_page(results)
    print(f"written: {MEASURED.relative_to(ROOT)} and {PAGE.relative_to(ROOT)}")
    return int(any(results[str(number)]["failures"] for number in numbers))


if __name__ == "__main__":
    sys.exit(main())
