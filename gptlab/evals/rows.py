"""A test made of rows, run so that it can be stopped at any moment: what is finished is kept in one small JSON file.

Rows are taken in portions of like length that depend on the test alone. A portion is scored whole, its outcomes are
written, and a later run begins with the first portion that is not there; the figures are those of an unbroken run.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gptlab.errors import DataError
from gptlab.evals.scoring import Request, Scorer, Scores
from gptlab.parsing import parse_json

PORTION = 64
"""Rows of a portion."""


@dataclass(frozen=True)
class Row:
    """The requests that one row asks, and its right answer where it has one."""

    requests: tuple[Request, ...]
    label: int = 0


@dataclass(frozen=True)
class Task:
    """A test. outcome: a row and its scores -> two numbers for every block (J, 2); figures: those of all rows
    (n, 2) of one block -> what is reported."""

    name: str
    rows: Sequence[Row]
    source: str
    sha256: str
    outcome: Callable[[Row, Scores], Tensor]
    figures: Callable[[Tensor], dict[str, float]]


class Record:
    """The outcomes of finished rows in a JSON file, for one identity: model, rows and settings."""

    def __init__(self, path: Path | None, identity: Mapping[str, Any]) -> None:
        self.path, self.identity = path, dict(identity)
        self.done: dict[int, list[list[float]]] = self._read() if path else {}

    def _read(self) -> dict[int, list[list[float]]]:
        """What the file holds, where it is of the same identity; a file that cannot be read counts for nothing."""
        assert self.path
        try:
            content = parse_json(self.path.read_text(encoding="utf-8"))
            if content["identity"] != self.identity:
                return {}
            return {int(row): _pairs(outcome) for row, outcome in content["done"].items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError):
            return {}

    def write(self) -> None:
        """Write the file, whole or not at all."""
        if self.path is None:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            temporary = self.path.with_name(f".{self.path.name}.tmp")
            temporary.write_text(json.dumps({"identity": self.identity, "done": self.done}), encoding="utf-8")
            temporary.replace(self.path)
        except OSError as error:
            raise DataError(f"could not write {self.path}: {error.strerror}; give another folder with --out") from None


def _pairs(outcome: Any) -> list[list[float]]:
    return torch.tensor(outcome, dtype=torch.float64).view(-1, 2).tolist()


def portions(rows: Sequence[Row]) -> list[list[int]]:
    """Numbers of rows, longest first: a batch's rows are of like length, and too little memory shows at once."""
    length = [max(len(r.context) + len(r.continuation) for r in row.requests) for row in rows]
    order = sorted(range(len(rows)), key=lambda n: (-length[n], n))
    return [order[at : at + PORTION] for at in range(0, len(order), PORTION)]


def run_task(
    task: Task, scorer: Scorer, record: Record, progress: Callable[[int, dict[str, float]], None]
) -> list[dict[str, float]]:
    """Every block's figures, the last block's last. progress: rows that are done and the last block's figures so far.

    Every rank calls it alike; the one that writes has a record with a path, and `record.done` is the same on all.
    """
    for portion in portions(task.rows):
        if all(len(record.done.get(n, ())) == scorer.blocks for n in portion):
            continue
        asked = [request for n in portion for request in task.rows[n].requests]
        scores, at = scorer(asked), 0
        for n in portion:
            row = task.rows[n]
            part = slice(at, at := at + len(row.requests))
            record.done[n] = task.outcome(row, Scores(scores.loss[part], scores.greedy[part])).tolist()
        record.write()
        done = torch.tensor([record.done[n] for n in sorted(record.done)], dtype=torch.float64)
        progress(len(record.done), task.figures(done[:, -1]))
    done = torch.tensor([record.done[n] for n in range(len(task.rows))], dtype=torch.float64)  # (n, J, 2)
    return [task.figures(done[:, j]) for j in range(scorer.blocks)]
