"""A cell of an experiment: one arm at one seed, an ordinary run folder. Whose it is, how far it came, what came out.

Only JSON is read here, again and again while others write it; torch is not needed.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Literal

from gptlab.errors import CheckpointError, ConfigError
from gptlab.files import is_locked, open_regular, read_json, refuse_links, take_lock, write_json
from gptlab.runs.experiment_spec import Arm, Experiment
from gptlab.runs.records import mean_over_updates, new_rows

OUTPUT = "output.txt"
"""What a cell's process printed, in the cell's folder."""

CLAIM = ".claim"
LEASE = ".job"

RESULTS = "results.json"
"""What an experiment's cells came to, without a clock, so that a killed and an unkilled one are equal."""

WEIGHTS = "model.safetensors"

State = Literal["waiting", "running", "stopped", "finished", "diverged", "failed"]
ENDED: tuple[State, ...] = ("finished", "diverged")
"""States after which a cell needs no more work. A diverged one would diverge again, bit for bit."""


@dataclass(frozen=True)
class Cell:
    """steps: updates that its run is to make; n_embd: its model's width."""

    arm: Arm
    seed: int
    folder: Path
    steps: int
    n_embd: int

    @property
    def name(self) -> str:
        return f"{self.arm.name}/seed_{self.seed}"


def cells_of(experiment: Experiment, folder: Path, seeds: int | None = None) -> list[Cell]:
    """The cells in the order in which they are run: seed by seed, so that what is there early can be paired.

    seeds: only so many of the first; one, which tries an arm, leaves out what baselines have besides.
    """
    sized = [
        (arm, arm.count("steps", experiment.preset), arm.count("n_embd", experiment.preset))
        for arm in experiment.arms.values()
    ]
    further = experiment.further if seeds != 1 else ()
    return [
        Cell(arm, seed, folder / arm.name / f"seed_{seed}", steps, n_embd)
        for seed in (*experiment.seeds[:seeds], *further)
        for arm, steps, n_embd in sized
        if seed not in further or arm.name in experiment.baselines
    ]


class Claim:
    """The right to run a cell, held by a lock on CELL/.claim for as long as it is open here or in a child."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    @classmethod
    def take(cls, folder: Path) -> Claim | None:
        """The claim on the cell that lives in a folder, or None where another process has it.

        Raises ConfigError where the cell's or the arm's folder, or one of the files that are written there, is a link.
        """
        for name in (CLAIM, LEASE, OUTPUT):
            refuse_links(folder / name, folder.parents[1], error=ConfigError)
        file = take_lock(folder / CLAIM, error=ConfigError)
        return cls(file) if file else None

    @property
    def descriptor(self) -> int:
        """To be left open in the child that trains the cell: then the claim outlives a killed runner until it ends."""
        return self._file.fileno()

    def release(self) -> None:
        self._file.close()


def claimed(cell: Cell) -> bool:
    """Whether any process has the cell's claim."""
    return is_locked(cell.folder / CLAIM)


def lease(folder: Path, token: str, **about: str) -> None:
    """Write the lease of the job with this token, in place of any other; about: what finds the job again."""
    write_json(folder / LEASE, {"token": token, **about})


def leased(folder: Path) -> Mapping[str, Any]:
    """The lease that a cell's folder holds; empty where there is none."""
    try:
        found = read_json(folder / LEASE, inside=folder, error=CheckpointError)
    except (FileNotFoundError, CheckpointError):
        return {}
    return found if isinstance(found, dict) else {}


def revoke(folder: Path, token: str | None = None) -> None:
    """Take a job's lease away, only that of this token if one is given."""
    if token is None or leased(folder).get("token") == token:
        (folder / LEASE).unlink(missing_ok=True)


@dataclass
class Rows:
    """The rows of a cell's metrics.jsonl, read on from where the last look ended; `look` after `look` it is up to date.

    step: of the last row; last: that row; doses: as measured; loss, val_loss: the newest of training and validation;
    damage: what is wrong with the file, if anything is.
    """

    cell: Cell
    step: int = 0
    last: Mapping[str, Any] = field(default_factory=dict)
    loss: float | None = None
    val_loss: float | None = None
    tokens_per_second: float | None = None
    doses: list[tuple[int, float]] = field(default_factory=list)
    damage: str | None = None
    _offset: int = 0

    def look(self) -> Rows:
        """Read what was added; all of it where a resume has cut the file back, be it that it has grown again since."""
        path = self.cell.folder / "metrics.jsonl"
        try:
            if (path.stat().st_size if path.exists() else 0) < self._offset:
                raise CheckpointError
            self._read(path)
        except CheckpointError:
            self.__init__(self.cell)
            try:
                self._read(path)
            except CheckpointError as error:
                self.damage = f"{error}; remove {self.cell.folder}"
        return self

    def _read(self, path: Path) -> None:
        for row, end in new_rows(path, self._offset):
            self.step, self.last, self._offset = row["step"], row, end
            if row["kind"] == "train":
                self.loss = row.get("loss", self.loss)  # a packed cell's rows may hold a dose alone
                self.tokens_per_second = row.get("tokens_per_second", self.tokens_per_second)
                self.doses += [(self.step, row["dose"])] if row.get("dose") is not None else []
            elif row["kind"] == "val":
                self.val_loss = row["loss"]

    @property
    def event(self) -> str | None:
        """The name of the event that closes the rows, if one does."""
        return self.last.get("event") if self.last.get("kind") == "event" else None

    @property
    def dose(self) -> float | None:
        """The mean of |weight·g_signal| / |g_CE| over updates; None where it was not measured."""
        return mean_over_updates(self.doses)

    def state(self, running: bool) -> State:
        """What the rows say of a cell that somebody runs, or nobody."""
        if self.event == "finished" and self.step >= self.cell.steps and not self.damage:
            return "finished"
        if running:
            return "running"
        if self.event == "DivergedError" and not self.damage:
            return "diverged"
        if self.damage:
            return "failed"
        if self.event in (None, "Stopped", "finished") and last_error(self.cell) is None:
            return "stopped" if self.step else "waiting"
        return "failed"

    @property
    def reason(self) -> str | None:
        """Why the cell ended early: the text of its last event, else the last line of ours that it printed."""
        if self.event in (None, "Stopped", "finished"):
            return last_error(self.cell) or self.damage
        return self.last.get("text")


def saved_step(cell: Cell) -> int:
    """The step of the cell's newest checkpoint; 0 while there is none."""
    manifests = cell.folder.glob("checkpoints/step_*/MANIFEST.json")
    steps = [path.parent.name.removeprefix("step_") for path in manifests]
    return max((int(step) for step in steps if step.isdecimal()), default=0)


def last_error(cell: Cell) -> str | None:
    """The error that ended the cell's last process, as it printed it, on one line; None where it printed none."""
    try:
        with open_regular(cell.folder / OUTPUT, inside=cell.folder, error=CheckpointError) as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - 20_000))
            text = "\n" + file.read(20_000).decode(errors="replace")
    except (FileNotFoundError, CheckpointError):
        return None
    _, found, error = text.rpartition("\ngptlab: ")
    return " ".join(error.split()) if found and not error.startswith("stopped ") else None


class Results:
    """Writes results.json of an experiment's cells, those of other runners too."""

    def __init__(self, experiment: Experiment, folder: Path, cells: Sequence[Cell]) -> None:
        self.experiment, self.folder = experiment, folder
        self.cells = sorted(cells, key=lambda cell: (cell.arm.name, cell.seed))
        self._ended: dict[str, dict[str, Any]] = {}
        self._before: dict[tuple[str, int], dict[str, Any]] = {}

    def write(self) -> dict[str, Any]:
        """Read the cells and write the file, whole or not at all; give its content.

        One runner at a time does both, so that an older look never takes the place of a newer one.
        """
        lock = take_lock(self.folder / ".results.lock", wait=True, error=ConfigError)
        assert lock
        with lock:
            content = self.content()
            write_json(self.folder / RESULTS, content, sort_keys=True)
        return content

    def content(self) -> dict[str, Any]:
        """What the file holds of the cells as they stand now."""
        self._before = self._written()
        return {
            "experiment": self.experiment.name,
            "baseline": self.experiment.baseline,
            "cells": [found for cell in self.cells if (found := self._outcome(cell))],
        }

    def _written(self) -> dict[tuple[str, int], dict[str, Any]]:
        """The entries that the file has now; none of a file that cannot be read, which is about to be replaced."""
        try:
            cells = read_json(self.folder / RESULTS, inside=self.folder, error=ConfigError)["cells"]
            return {(cell["arm"], cell["seed"]): dict(cell) for cell in cells}
        except (FileNotFoundError, ConfigError, KeyError, TypeError, ValueError):
            return {}

    def _outcome(self, cell: Cell) -> dict[str, Any] | None:
        """What became of a cell; None of one that has not ended."""
        if cell.name not in self._ended:
            rows = Rows(cell).look()
            state = rows.state(running=claimed(cell))
            if state not in (*ENDED, "failed"):
                return None
            found = outcome(rows, state)
            before = self._before.get((cell.arm.name, cell.seed), {})
            known = before.get("weights_sha256") if before.get("loss") == found["loss"] else None
            if found["weights_sha256"] is None and is_sha256(known):  # an unpacked cell has no weights
                found["weights_sha256"] = known
            if state == "failed":  # it may be tried again
                return found
            self._ended[cell.name] = found
        return self._ended[cell.name]


def outcome(rows: Rows, state: str) -> dict[str, Any]:
    """A cell's entry: losses in nats a token of the final block, null where there is none.

    dose: the mean of |weight·g_signal| / |g_CE| where it was measured; clipped_share: of all updates;
    validation_sha256: of the validation tokens; weights_sha256: of the last checkpoint's weights.
    """
    cell, done = rows.cell, rows.last if state == "finished" else {}
    return {
        "arm": cell.arm.name,
        "seed": cell.seed,
        "state": state,
        "step": rows.step,
        "loss": done.get("loss"),
        "bits_per_byte": done.get("bits_per_byte"),
        "tokens": done.get("tokens"),
        "dose": rows.dose,
        "clipped_share": done.get("clipped_share"),
        "validation_sha256": done.get("validation_sha256"),
        "weights_sha256": _weights(cell, rows.step) if done else None,
        "reason": None if done else (rows.reason or "").replace(str(cell.folder), cell.name),
    }


def _weights(cell: Cell, step: int) -> str | None:
    """SHA-256 of the weights as the checkpoint's manifest has it."""
    manifest = cell.folder / "checkpoints" / f"step_{step:08d}" / "MANIFEST.json"
    try:
        found = read_json(manifest, inside=cell.folder, error=CheckpointError)["files"][WEIGHTS]["sha256"]
    except (FileNotFoundError, CheckpointError, KeyError, TypeError):  # none, or damaged: `gptlab verify` names it
        return None
    return found if is_sha256(found) else None


def is_sha256(value: object) -> bool:
    """Whether it is a SHA-256 as hex digits."""
    return isinstance(value, str) and re.fullmatch(r"[0-9a-f]{64}", value) is not None
