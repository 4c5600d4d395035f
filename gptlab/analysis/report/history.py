"""What a run's rows say over its steps, as curves that can be drawn. Nothing is drawn here."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gptlab.analysis.records import read_rows
from gptlab.analysis.statistics import spread
from gptlab.runs.rows import Clock

BINS = 150
"""Points of a curve of updates: each is the mean of the updates since the point before."""

COARSE = 30
"""Points of a curve of shares, which takes more updates a point."""

Curve = Mapping[int, float]
"""{step: value}"""


@dataclass(frozen=True)
class History:
    """updates: {figure: {step: value}} of the train rows; validations, samples: their rows.

    seconds: spent in updates, all sessions together.
    """

    updates: Mapping[str, Curve]
    validations: Sequence[Mapping[str, Any]]
    samples: Sequence[Mapping[str, Any]]
    seconds: float = 0.0
    last: Mapping[str, Any] = field(default_factory=dict)

    @property
    def losses(self) -> Curve:
        return {row["step"]: row["loss"] for row in self.validations if row.get("loss") is not None}

    @property
    def blocks(self) -> int:
        return len(self.validations[-1].get("block_loss", ())) if self.validations else 0

    @property
    def tokens_per_second(self) -> float | None:
        speeds = self.updates["tokens_per_second"].values()
        return statistics.median(speeds) if speeds else None

    def of_block(self, figure: str, number: int) -> Curve:
        """`block_loss` or `block_confidence` of block `number`, from 1, at each validation."""
        return {row["step"]: row[figure][number - 1] for row in self.validations if figure in row}


FIGURES = ("loss", "signal_loss", "grad_norm", "clipped", "dose", "tokens_per_second")


def read_history(run: Path) -> History:
    """The history in a run's folder; raises CheckpointError where a row cannot be read."""
    updates: dict[str, dict[int, float]] = {figure: {} for figure in FIGURES}
    validations, samples = [], []
    clock, last = Clock(), {}
    for row in read_rows(run / "metrics.jsonl"):
        step, last = row["step"], row
        if row["kind"] == "val":
            validations.append(row)
        elif row["kind"] == "sample":
            samples.append(row)
        elif row["kind"] == "train":
            for figure in FIGURES:
                if row.get(figure) is not None:
                    updates[figure][step] = float(row[figure])
            clock.tick(row)
    return History(updates, validations, samples, clock.seconds, last)


def binned(curve: Curve, bins: int = BINS) -> Curve:
    """The curve in at most about `bins` points, each the mean of equally many and at the step of their last.

    >>> binned({1: 4.0, 2: 2.0, 3: 1.0, 4: 1.0}, bins=2)
    {2: 3.0, 4: 1.0}
    """
    steps = list(curve)
    size = -(-len(steps) // bins) or 1
    parts = [steps[i : i + size] for i in range(0, len(steps), size)]
    return {part[-1]: sum(curve[step] for step in part) / len(part) for part in parts}


@dataclass(frozen=True)
class Band:
    """A curve with what lies around it; low and high are equal to mean where there is nothing to tell a spread by."""

    steps: list[int]
    mean: list[float]
    low: list[float]
    high: list[float]

    @staticmethod
    def of(curve: Curve) -> Band:
        values = list(curve.values())
        return Band(list(curve), values, values, values)

    def without_spread(self) -> Band:
        return Band(self.steps, self.mean, self.mean, self.mean)


def over_seeds(curves: Iterable[Curve]) -> Band:
    """Mean and mean ± one standard deviation over seeds, at the steps that all curves have."""
    curves = list(curves)
    steps = sorted(set.intersection(*(set(curve) for curve in curves))) if curves else []
    values = [[curve[step] for curve in curves] for step in steps]
    means = [sum(v) / len(v) for v in values]
    around = [spread(v) or 0.0 for v in values]
    return Band(
        steps,
        means,
        [m - s for m, s in zip(means, around, strict=True)],
        [m + s for m, s in zip(means, around, strict=True)],
    )
