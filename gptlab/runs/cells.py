"""A cell of an experiment: one arm at one seed, an ordinary run folder. Whose it is, and how far it has come.

Only JSON is read here, again and again while others write it; torch is not needed.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Literal

from gptlab.errors import CheckpointError
from gptlab.runs.experiment_file import Arm, Experiment
from gptlab.runs.lock import held, take
from gptlab.runs.records import new_rows

OUTPUT = "output.txt"
"""What a cell's process said, in the cell's folder."""

CLAIM = ".claim"

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

    seeds: only so many of the first.
    """
    return [
        Cell(
            arm,
            seed,
            folder / arm.name / f"seed_{seed}",
            int(arm.get("steps", experiment.preset)),
            int(arm.get("n_embd", experiment.preset)),
        )
        for seed in experiment.seeds[:seeds]
        for arm in experiment.arms.values()
    ]


class Claim:
    """The right to run a cell, held by a lock on CELL/.claim for as long as it is open here or in a child."""

    def __init__(self, file: IO[str]) -> None:
        self._file = file

    @classmethod
    def take(cls, cell: Cell) -> Claim | None:
        """The claim, or None where another process has it."""
        return cls.in_folder(cell.folder)

    @classmethod
    def in_folder(cls, folder: Path) -> Claim | None:
        """The claim on the cell that lives in a folder, or None where another process has it."""
        file = take(folder / CLAIM)
        return cls(file) if file else None

    @property
    def descriptor(self) -> int:
        """To be left open in the child that trains the cell: then the claim outlives a killed runner until it ends."""
        return self._file.fileno()

    def release(self) -> None:
        self._file.close()


def claimed(cell: Cell) -> bool:
    """Whether any process has the cell's claim."""
    return held(cell.folder, CLAIM)


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
    doses: list[float] = field(default_factory=list)
    damage: str | None = None
    _offset: int = 0

    def look(self) -> Rows:
        """Read what was added; all of it where a resume has cut the file back, be it that it has grown again since."""
        path = self.cell.folder / "metrics.jsonl"
        size = path.stat().st_size if path.exists() else 0
        try:
            if size < self._offset:
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
                self.doses += [row["dose"]] if row.get("dose") is not None else []
            elif row["kind"] == "val":
                self.val_loss = row["loss"]

    @property
    def event(self) -> str | None:
        """The name of the event that closes the rows, if one does."""
        return self.last.get("event") if self.last.get("kind") == "event" else None

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
        if self.event in (None, "Stopped", "finished") and said(self.cell) is None:
            return "stopped" if self.step else "waiting"
        return "failed"

    @property
    def reason(self) -> str | None:
        """Why the cell ended early: the text of its last event, else the last line of ours that it printed."""
        if self.event in (None, "Stopped", "finished"):
            return said(self.cell) or self.damage
        return self.last.get("text")


def saved_step(cell: Cell) -> int:
    """The step of the cell's newest checkpoint; 0 while there is none."""
    manifests = cell.folder.glob("checkpoints/step_*/MANIFEST.json")
    return max((int(path.parent.name.removeprefix("step_")) for path in manifests), default=0)


def said(cell: Cell) -> str | None:
    """The error that ended the cell's last process, as it printed it, on one line; None where it printed none."""
    try:
        with (cell.folder / OUTPUT).open("rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - 20_000))
            text = "\n" + file.read().decode(errors="replace")
    except FileNotFoundError:
        return None
    _, found, error = text.rpartition("\ngptlab: ")
    return " ".join(error.split()) if found and not error.startswith("stopped ") else None
