"""Faults at random moments, many times over: survived/tried, to docs/reliability.md and results/faults.json.

python benchmarks/faults.py [--rounds 20] [--seed 1]

The tests in tests/faults/ hold a quick variant of each, at chosen moments. Here the moments are drawn from the seed,
but the machine's own timing makes each run another one. A fault is survived if the same command, given again, ends
with the digest and the rows of an uninterrupted run.
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
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "faults")]

import torch  # noqa: E402
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

from gptlab.device import Machine  # noqa: E402

RESULTS, PAGE = ROOT / "benchmarks" / "results" / "faults.json", ROOT / "docs" / "reliability.md"
VICTIMS = ("worker", "torchrun", "both")
FIVE_STEPS = {"steps": 5, "eval_every": 5, "sample_every": 0, "checkpoint_every": 5, "dose_every": 0}
TOLERANCE = 1e-4


@dataclass
class Fault:
    """fault: in words; failures: what went wrong, one text a trial that was not survived."""

    fault: str
    tried: int = 0
    failures: list[str] = field(default_factory=list)

    @property
    def survived(self) -> int:
        return self.tried - len(self.failures)

    def count(self, wrong: list[str], trial: str) -> None:
        self.tried += 1
        if wrong:
            self.failures.append(f"{trial}: {'; '.join(wrong)}")


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

    def draw(self, kind: str, number: int, strike: Callable[[Running, random.Random], None]) -> Iterator[list[str]]:
        """Strike at a random moment and start again; what went wrong, for every trial in which the run was struck.

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
            return
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
        yield wrong

    def repeat(self, kind: str, times: int, strike: Callable[[Running, random.Random], None]) -> Fault:
        """So many trials in which the run was struck before its end."""
        fault, number = Fault(f"{kind}, {self.processes} process{'es' * (self.processes > 1)}"), 0
        while fault.tried < times:
            for wrong in self.draw(kind, number, strike):
                fault.count(wrong, f"trial {number}")
            number += 1
        return tell(fault)


def tell(fault: Fault) -> Fault:
    print(f"{fault.survived}/{fault.tried}  {fault.fault}", *fault.failures, sep="\n      ", flush=True)
    return fault


def stop(running: Running, choose: random.Random) -> None:
    running.send(15)


def within_a_save(corpus: Path, folder: Path) -> Fault:
    """SIGKILL at every change that a run of three saves makes in its folder, and in the middle of each large write."""
    folder.mkdir()
    how = options(corpus, folder, steps=6, checkpoint_every=2, eval_every=6, sample_every=0)
    where = how.index("--out")
    del how[where : where + 2]
    sizes = [str(size) for size in (500, 3_000, 20_000, 90_000, 150_000, 200_000, 250_000)]
    command = [sys.executable, "tests/faults/killed_inside.py", "--folder", str(folder), "--sizes", *sizes, "--", *how]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    trials = [json.loads(line) for line in done.stdout.splitlines()]
    expected = next(outcome(Path(trial["run"])) for trial in trials if trial["died"] == 0)
    fault = Fault("SIGKILL before each change in the run's folder, and within writes")
    for trial in trials:
        if trial["died"] == 0:
            continue
        wrong = [f"{what}: {trial[what]}" for what in ("damaged", "debris", "ended") if trial[what]]
        if not trial["ended"] and outcome(Path(trial["run"])) != expected:
            wrong.append("another outcome")
        fault.count(wrong, trial["where"] or f"at {trial.get('size')} bytes")
    return tell(fault)


def numbers_of_processes(trainer: Trainer, folder: Path) -> tuple[Fault, dict[str, float]]:
    """The validation loss after 5 steps at equal total batch."""
    fault, losses = Fault(f"1, 2 and 8 processes: validation loss after 5 steps within {TOLERANCE:g} of one's"), {}
    for processes in (1, 2, 8):
        run = folder / f"ranks_{processes}"
        ended = trainer.train(run, processes=processes, **FIVE_STEPS)
        assert ended.code == 0, ended.err
        (losses[str(processes)],) = [row["loss"] for row in rows(run) if row["kind"] == "val"]
        if processes > 1:
            apart = abs(losses[str(processes)] - losses["1"])
            fault.count([f"{apart:g} apart"] * (apart > TOLERANCE), f"{processes} processes")
    return tell(fault), losses


def run(rounds: int, seed: int) -> dict[str, Any]:
    """Everything, and what it was measured on."""
    faults: list[Fault] = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        corpus = make_corpus(folder / "corpus")
        trainer = Trainer(corpus, folder)
        try:
            for processes in (1, 2):
                tries = Rounds(trainer, folder, processes, seed)
                for k, victim in enumerate(VICTIMS):
                    times = len(range(k, rounds, len(VICTIMS)))
                    name = {"worker": "a worker", "torchrun": "torchrun", "both": "torchrun and a worker"}[victim]
                    faults.append(tries.repeat(f"SIGKILL of {name}", times, lambda r, c, v=victim: kill(r, v, c)))
                faults.append(tries.repeat("SIGTERM to torchrun", -(-rounds // 4), stop))
            faults.append(within_a_save(corpus, folder / "saves"))
            last, losses = numbers_of_processes(trainer, folder)
        finally:
            trainer.close()
    machine = Machine.probe()
    return {
        "command": f"python benchmarks/faults.py --rounds {rounds} --seed {seed}",
        "date": date.today().isoformat(),
        "machine": f"{machine.processor}, {machine.cores} cores, {platform.system()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "faults": [{**asdict(fault), "survived": fault.survived} for fault in [*faults, last]],
        "validation_loss_by_processes": losses,
    }


def page(results: dict[str, Any]) -> str:
    """docs/reliability.md."""
    table = [f"| {f['fault']} | {f['survived']} | {f['tried']} |" for f in results["faults"]]
    failures = [f"- {f['fault']}: {text}" for f in results["faults"] for text in f["failures"]]
    losses = [f"| {n} | {loss:.8f} |" for n, loss in results["validation_loss_by_processes"].items()]
    return "\n".join(
        [
            "# What a run survives",
            "",
            "Written by `benchmarks/faults.py`; do not edit. A fault is survived if the same command, given again, "
            "ends with",
            "the same `gptlab digest` and the same rows of `metrics.jsonl` (but for clocks) as a run that nothing "
            "disturbed, and",
            "no process of the disturbed run is left that writes. Moments are drawn at random over the whole run, "
            "start-up and",
            "saves included. The model is tiny (2 blocks, 32 wide; 40 updates over five epochs, a checkpoint every 5), "
            "the",
            "processes are real: torchrun, gloo, CPU.",
            "",
            f"- measured {results['date']} with `{results['command']}`",
            f"- on {results['machine']}; Python {results['python']}, torch {results['torch']}",
            "",
            "| fault | survived | tried |",
            "|---|---|---|",
            *table,
            "",
            "What was not survived:" if failures else "Everything that was tried was survived.",
            *failures,
            "",
            "The validation loss after 5 updates of the same total batch:",
            "",
            "| processes | nats a token |",
            "|---|---|",
            *losses,
            "",
            "`tests/faults/` holds a quick variant of each at chosen moments, and besides: a full disk, a flipped byte "
            "in any",
            "file of a checkpoint, a loss that is not finite on one rank only, a second writer, other intervals.",
            "",
        ]
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20, help="SIGKILLs at each of 1 and 2 processes")
    parser.add_argument("--seed", type=int, default=1, help="of the moments")
    chosen = parser.parse_args()
    results = run(chosen.rounds, chosen.seed)
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    PAGE.parent.mkdir(parents=True, exist_ok=True)
    PAGE.write_text(page(results), encoding="utf-8")
    print(f"written: {RESULTS.relative_to(ROOT)} and {PAGE.relative_to(ROOT)}")
    return int(any(fault["failures"] for fault in results["faults"]))


if __name__ == "__main__":
    sys.exit(main())
