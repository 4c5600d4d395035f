"""Before hours are spent: every arm for a few steps, whether its signal is active, and what the whole will cost.

Estimates, reported as such: of an arm's own speed, measured next to as many others as will run next to it. Nothing is
kept.
"""

from __future__ import annotations

import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

from gptlab.errors import Stopped
from gptlab.options import build
from gptlab.processes import how_it_ended
from gptlab.runs.cells import Cell, Claim, Rows
from gptlab.runs.executor import Child, Children, Packing, Queue
from gptlab.runs.experiment_runner import Runner
from gptlab.runs.experiment_spec import Arm, Experiment
from gptlab.runs.records import read_rows
from gptlab.training.config import TrainingConfig, run_flops
from gptlab.training.presets import preset_options

START_UP = 5.0
"""Seconds of a trial that are not training, as a guess before the first one is measured."""

FEWEST = 4
"""Steps below which nothing is said of a speed: the first ones fill caches."""

INACTIVE = 0.01
"""The dose under which a verdict calls a signal inactive."""

WORTH_A_RUN = 0.05
"""How much more an arm must cost than its baseline for a longer baseline to be worth a run, as a share."""


@dataclass(frozen=True)
class Trial:
    """What a few steps of an arm showed. seconds, bytes, flops: of one whole cell, about; None where it did not run."""

    arm: str
    steps: int
    signal: str
    dose: float | None
    reason: str | None
    seconds: float | None = None
    bytes: int | None = None
    flops: float | None = None


def smoke(
    experiment: Experiment,
    packing: Packing,
    budget: float,
    *,
    allow_code: bool = False,
    stop: Callable[[], bool] = lambda: False,
) -> Iterator[Trial]:
    """Try every arm within about `budget` seconds in all, and yield what was found, in the order of arms.

    Raises ConfigError where arms cannot run, Stopped where `stop` says so; leaves no process and no file.
    """
    often = {"dose_every": 5, "dose_first": 0, "sample_every": 0, "eval_every": 0, "log_every": 0}
    arms = {
        arm.name: replace(
            arm, options={**arm.options, **often, "checkpoint_every": arm.count("steps", experiment.preset)}
        )
        for arm in experiment.arms.values()
    }
    with tempfile.TemporaryDirectory(prefix="gptlab_smoke_") as scratch, closing(Children()) as children:
        runner = Runner(replace(experiment, arms=arms), Path(scratch), packing, seeds=1, allow_code=allow_code)
        runner.prepare()
        groups = list(_side_by_side(runner.cells, packing))
        for group in groups:
            for cell, code, start_up in _try(runner, children, group, budget / len(groups), stop):
                yield _trial(experiment, replace(cell, arm=experiment.arms[cell.arm.name]), code, start_up)


def _side_by_side(cells: list[Cell], packing: Packing | Queue) -> Iterator[list[Cell]]:
    """The cells in groups that run at a time."""
    group: list[Cell] = []
    for cell in cells:
        if group and not packing.fits(cell.n_embd, [c.n_embd for c in group]):
            yield group
            group = []
        group.append(cell)
    yield group


def _try(
    runner: Runner, children: Children, cells: list[Cell], seconds: float, stop: Callable[[], bool]
) -> Iterator[tuple[Cell, int, float]]:
    """Train cells for a while: each with its exit code, and the seconds until its first step."""
    started, first = time.monotonic(), dict.fromkeys((cell.name for cell in cells), 0.0)
    rows = {cell.name: Rows(cell) for cell in cells}
    processes: list[Child] = []
    asked: set[str] = set()
    try:
        for slot, cell in enumerate(cells):
            claim = Claim.take(cell.folder)
            assert claim, "the folder is nobody else's"
            processes.append(children.start(cell, claim, runner.code(cell), runner.words(cell, slot)))
        while not all(process.over() for process in processes):
            time.sleep(0.2)
            if stop():
                raise Stopped("stopped; nothing was kept")
            enough = time.monotonic() - started > max(seconds, START_UP)
            for cell, process in zip(cells, processes, strict=True):
                if rows[cell.name].look().step and not first[cell.name]:
                    first[cell.name] = time.monotonic() - started
                if enough and rows[cell.name].step >= FEWEST and cell.name not in asked:
                    process.stop()  # once: a second request is an order
                    asked.add(cell.name)
    finally:
        for process in processes:
            process.kill()
            process.close()
    for cell, process in zip(cells, processes, strict=True):
        yield cell, process.code, first[cell.name]


def _trial(experiment: Experiment, cell: Cell, code: int, start_up: float) -> Trial:
    arm, rows = cell.arm, Rows(cell).look()
    found = Trial(arm.name, rows.step, _activity(arm, rows.dose, rows.step), rows.dose, None)
    if code not in (0, Stopped.exit_code) and rows.state(False) != "finished":  # stopped as it ended
        reason = (rows.reason or how_it_ended(code)).replace(str(cell.folder), cell.name)
        return replace(found, reason=reason)
    return replace(
        found,
        seconds=start_up + _seconds(arm, experiment.preset, statistics.median(_speeds(cell))),
        bytes=_bytes(cell, rows.step),
        flops=_flops(arm, experiment.preset),
    )


def _activity(arm: Arm, dose: float | None, step: int) -> str:
    """Whether the arm's signal did anything in these steps, in words."""
    if next(arm.signals) == "none":
        return "no signal"
    if arm.options.get("signal.weight") == 0:
        return "weight 0"
    if (start := arm.options.get("signal.start", 0)) >= step:
        return f"starts at step {start}"
    return "inactive so far" if dose is None or dose < INACTIVE else "active"


def _speeds(cell: Cell) -> list[float]:
    rows = [row for row in read_rows(cell.folder) if row["kind"] == "train"]
    plain = [row["tokens_per_second"] for row in rows[1:] if "dose" not in row]  # measuring a dose takes time
    return plain or [row["tokens_per_second"] for row in rows]


def _seconds(arm: Arm, preset: str, tokens_per_second: float) -> float:
    """Seconds of all updates and validations, a validation token taking a third of a training token's time."""
    steps, every = arm.count("steps", preset), arm.count("eval_every", preset)
    validations = math.ceil(steps / every) if every else 0
    tokens = steps * arm.count("total_batch_tokens", preset) + validations * arm.count("eval_tokens", preset) / 3
    return tokens / tokens_per_second


def _bytes(cell: Cell, step: int) -> int:
    """Two checkpoints, and the rows of all steps."""
    saved = sum(f.stat().st_size for f in cell.folder.glob("checkpoints/*/*"))
    return 2 * saved + (cell.folder / "metrics.jsonl").stat().st_size // max(1, step) * cell.steps


def _flops(arm: Arm, preset: str) -> float | None:
    """Arithmetic of a cell's updates, as `run_flops`; None for patched code, which may do anything."""
    if arm.patch:
        return None
    config: TrainingConfig = build(TrainingConfig, {**preset_options(preset, arm.options), **arm.options})
    return run_flops(config)


def equal_steps(experiment: Experiment, trials: Sequence[Trial]) -> dict[str, int]:
    """{arm: updates of its baseline that cost as many FLOPs as the arm's}: what a longer baseline takes.

    Arms that cost what their baseline does, and patched ones, whose arithmetic nobody knows, are left out.
    """
    flops = {trial.arm: trial.flops for trial in trials}
    groups: Mapping[str, Sequence[str]] = experiment.table.get("groups", {})
    baselines = {arm: members[0] for members in groups.values() for arm in members}
    found = {}
    for arm, own in flops.items():
        baseline = baselines.get(arm, experiment.baseline)
        theirs = flops.get(baseline)
        if own and theirs and abs(own / theirs - 1) > WORTH_A_RUN:
            found[arm] = round(experiment.arms[baseline].count("steps", experiment.preset) * own / theirs)
    return found
