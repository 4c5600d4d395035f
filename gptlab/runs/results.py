"""results.json: what an experiment's cells came to, without a clock, so that a killed and an unkilled one are equal."""

from __future__ import annotations

import fcntl
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gptlab.errors import DataError
from gptlab.files import read_json
from gptlab.runs.cells import ENDED, Cell, Rows, claimed
from gptlab.runs.experiment_file import Experiment

FILE = "results.json"
WEIGHTS = "model.safetensors"


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
        with (self.folder / ".results.lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            content = self.content()
            write_whole(self.folder / FILE, json.dumps(content, indent=1, allow_nan=False, sort_keys=True) + "\n")
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
            cells = read_json(self.folder / FILE, inside=self.folder)["cells"]
            return {(cell["arm"], cell["seed"]): cell for cell in cells}
        except (OSError, DataError, KeyError, TypeError):
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
        "dose": sum(rows.doses) / len(rows.doses) if rows.doses else None,
        "clipped_share": done.get("clipped_share"),
        "validation_sha256": done.get("validation_sha256"),
        "weights_sha256": _weights(cell, rows.step) if done else None,
        "reason": None if done else (rows.reason or "").replace(str(cell.folder), cell.name),
    }


def _weights(cell: Cell, step: int) -> str | None:
    """SHA-256 of the weights as the checkpoint's manifest has it."""
    manifest = cell.folder / "checkpoints" / f"step_{step:08d}" / "MANIFEST.json"
    try:
        found = read_json(manifest, inside=cell.folder)["files"][WEIGHTS]["sha256"]
    except (OSError, DataError, KeyError, TypeError):  # none, or a damaged one, which `gptlab verify` names
        return None
    return found if is_sha256(found) else None


def is_sha256(value: object) -> bool:
    """Whether it is a SHA-256 as hex digits."""
    return isinstance(value, str) and re.fullmatch(r"[0-9a-f]{64}", value) is not None


def write_whole(path: Path, text: str) -> None:
    """Write a file so that a reader, and a kill, find the old one or the new one."""
    building = path.with_name(f".{path.name}.{os.getpid()}")
    building.write_text(text, encoding="utf-8")
    building.replace(path)
