"""Before hours are spent: every arm for a few steps, whether its signal is active, and what the whole will cost.

Estimates, told as such: of an arm's own speed, measured beside as many others as will run beside it. Nothing is kept.
"""

from __future__ import annotations

import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gptlab.errors import Stopped
from gptlab.options import build
from gptlab.runs import child
from gptlab.runs.arm_options import as_toml, check_options, options_file
from gptlab.runs.cells import OUTPUT, Cell, Rows, cells_of
from gptlab.runs.experiment_file import Arm, Experiment
from gptlab.runs.packing import Packing
from gptlab.runs.patches import package, patched
from gptlab.runs.records import read_rows
from gptlab.training.config import TrainingConfig
from gptlab.training.flops import run_flops
from gptlab.training.presets import PRESETS

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

    Raises ConfigError for a patch that does not fit, Stopped where `stop` says so; leaves no process and no file.
    """
    with tempfile.TemporaryDirectory(prefix="gptlab_smoke_") as scratch:
        cells = cells_of(experiment, Path(scratch), seeds=1)
        groups = list(_side_by_side(cells, packing))
        for group in groups:
            yield from _try(experiment, group, packing, budget / len(groups), allow_code, stop)


def _side_by_side(cells: list[Cell], packing: Packing) -> Iterator[list[Cell]]:
    """The cells in groups that run at a time."""
    group: list[Cell] = []
    for cell in cells:
        if group and not packing.fits(cell.n_embd, [c.n_embd for c in group]):
            yield group
            group = []
        group.append(cell)
    yield group


def _try(
    experiment: Experiment,
    cells: list[Cell],
    packing: Packing,
    seconds: float,
    allow_code: bool,
    stop: Callable[[], bool],
) -> Iterator[Trial]:
    started, first = time.monotonic(), dict.fromkeys((cell.name for cell in cells), 0.0)
    rows = {cell.name: Rows(cell) for cell in cells}
    processes, asked = [], set()
    try:
        for gpu, cell in enumerate(cells):
            processes.append(_start(experiment, cell, packing, gpu, allow_code))
        while any(process.poll() is None for process in processes):
            time.sleep(0.2)
            if stop():
                raise Stopped("stopped; nothing was kept")
            enough = time.monotonic() - started > max(seconds, START_UP)
            for cell, process in zip(cells, processes, strict=True):
                if rows[cell.name].look().step and not first[cell.name]:
                    first[cell.name] = time.monotonic() - started
                if enough and rows[cell.name].step >= FEWEST and cell.name not in asked:
                    process.terminate()  # once: a second request is an order
                    asked.add(cell.name)
    finally:
        for process in processes:
            process.kill() if process.poll() is None else None
            process.wait()
    for cell, process in zip(cells, processes, strict=True):
        yield _trial(experiment, cell, process.returncode, first[cell.name])


def _start(experiment: Experiment, cell: Cell, packing: Packing, gpu: int, allow_code: bool) -> Any:
    arm, folder = cell.arm, cell.folder.parents[1]
    code = patched(arm.patch, folder / ".code") if arm.patch else package().parent
    cell.folder.mkdir(parents=True)
    every = max(1, int(arm.get("steps", experiment.preset)))
    often = {"dose_every": 5, "checkpoint_every": every, "sample_every": 0, "eval_every": 0, "log_every": 0}
    file = options_file(folder, arm)
    file.write_text(as_toml({"preset": experiment.preset, **arm.options, **often}), encoding="utf-8")
    if arm.patch:
        check_options(arm, code, file)
    words = ["train", "--config", str(file), "--seed", str(cell.seed), "--out", str(cell.folder)]
    words += ["--allow_code"] * allow_code
    for key, value in packing.options(cell.n_embd, gpu).items():
        words += [f"--{key}", value] if key not in arm.options else []
    return child.start(code, words, cell.folder / OUTPUT)


def _trial(experiment: Experiment, cell: Cell, code: int, start_up: float) -> Trial:
    arm, rows = cell.arm, Rows(cell).look()
    name = str(arm.options.get("signal.name", "none"))
    dose = statistics.fmean(rows.doses) if rows.doses else None
    if code not in (0, Stopped.exit_code):
        reason = (rows.reason or child.how_it_ended(code)).replace(str(cell.folder), cell.name)
        return Trial(arm.name, rows.step, _activity(arm, name, dose, rows.step), dose, reason)
    speed = statistics.median(_speeds(cell))
    seconds, validation = _seconds(arm, experiment.preset, speed)
    return Trial(
        arm.name, rows.step, _activity(arm, name, dose, rows.step), dose, None,
        seconds=start_up + seconds + validation,
        bytes=_bytes(cell, rows.step),
        flops=_flops(arm, experiment.preset),
    )  # fmt: skip


def _activity(arm: Arm, name: str, dose: float | None, step: int) -> str:
    """Whether the arm's signal did anything in these steps, in words."""
    if name == "none":
        return "no signal"
    if arm.options.get("signal.weight") == 0:
        return "weight 0"
    if (start := int(arm.options.get("signal.start", 0))) >= step:
        return f"starts at step {start}"
    return "inactive so far" if dose is None or dose < INACTIVE else "active"


def _speeds(cell: Cell) -> list[float]:
    rows = [row for row in read_rows(cell.folder) if row["kind"] == "train"]
    plain = [row["tokens_per_second"] for row in rows[1:] if "dose" not in row]  # measuring a dose takes time
    return plain or [row["tokens_per_second"] for row in rows]


def _seconds(arm: Arm, preset: str, tokens_per_second: float) -> tuple[float, float]:
    """Seconds of all updates, and of all validations, a validation token taking a third of a training token's time."""
    steps, every = int(arm.get("steps", preset)), int(arm.get("eval_every", preset))
    times = math.ceil(steps / every) if every else 0
    tokens = steps * int(arm.get("total_batch_tokens", preset))
    return tokens / tokens_per_second, times * int(arm.get("eval_tokens", preset)) / (3 * tokens_per_second)


def _bytes(cell: Cell, step: int) -> int:
    """Two checkpoints, and the rows of all steps."""
    saved = sum(f.stat().st_size for f in cell.folder.glob("checkpoints/*/*"))
    return 2 * saved + (cell.folder / "metrics.jsonl").stat().st_size // max(1, step) * cell.steps


def _flops(arm: Arm, preset: str) -> float | None:
    """Arithmetic of a cell's updates, as `run_flops`; None for patched code, which may do anything."""
    if arm.patch:
        return None
    config: TrainingConfig = build(TrainingConfig, {**PRESETS[preset], **arm.options})
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
            found[arm] = round(int(experiment.arms[baseline].get("steps", experiment.preset)) * own / theirs)
    return found
