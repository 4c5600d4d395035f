"""What a run's rows say over its steps, as curves that can be drawn. Nothing is drawn here."""

from __future__ import annotations

import math
import statistics
from array import array
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from gptlab.analysis.run import blocks_of
from gptlab.analysis.statistics import spread
from gptlab.runs.records import Clock, Row, Source, read_config, read_rows

BINS = 150
"""Points of a curve of updates: each is the mean of the updates since the point before."""

COARSE = 30
"""Points of a curve of shares, which takes more updates a point."""

MOST_BLOCKS_SHOWN = 24
"""Of more blocks so many are drawn, evenly spaced from the first to the last."""
MOST_SAMPLES, MOST_TOKENS, MOST_CHARACTERS = 8, 128, 10_000
"""Samples of a run that are shown, the newest; of each so many tokens, and so much of its prompt and text."""

Curve = Mapping[int, float]
"""{step: value}"""


class Points:
    """A curve that grows, 16 bytes a point: a run may have a million updates."""

    def __init__(self) -> None:
        self.steps, self.values = array("q"), array("d")

    def add(self, step: int, value: float) -> None:
        self.steps.append(step)
        self.values.append(value)


@dataclass(frozen=True)
class History:
    """updates: {figure: its points} of the train rows; losses: validation losses; last: the last validation's row.

    blocks: {(figure, number from 1): its points} of the blocks that are shown, of n_blocks; samples: the newest rows of
    `n_samples`. seconds: spent in updates, all sessions together.
    """

    updates: Mapping[str, Points]
    losses: Points
    blocks: Mapping[tuple[str, int], Points]
    samples: Sequence[Mapping[str, Any]]
    n_samples: int = 0
    n_blocks: int = 0
    seconds: float = 0.0
    last: Mapping[str, Any] = field(default_factory=dict)

    @property
    def tokens_per_second(self) -> float | None:
        speeds = self.updates["tokens_per_second"].values
        return statistics.median(speeds) if speeds else None

    def of_block(self, figure: str, number: int) -> Curve:
        """`block_loss` or `block_confidence` of block `number`, from 1, over validations."""
        return binned(self.blocks.get((figure, number), Points()))


FIGURES = ("loss", "signal_loss", "grad_norm", "clipped", "dose", "tokens_per_second")
OF_BLOCKS = ("block_loss", "block_confidence")


class Recorder:
    """Makes a history of a run's rows, which `add` takes in their order."""

    def __init__(self) -> None:
        self._updates: dict[str, Points] = {figure: Points() for figure in FIGURES}
        self._losses = Points()
        self._blocks: dict[tuple[str, int], Points] = {}
        self._samples: deque[Mapping[str, Any]] = deque(maxlen=MOST_SAMPLES)
        self._n_samples, self._clock = 0, Clock()
        self._last: Mapping[str, Any] = {}

    def add(self, row: Row) -> None:
        step = row["step"]
        if row["kind"] == "val":
            self._last = row
            self._losses.add(step, row["loss"])
            for figure in OF_BLOCKS:
                for number in blocks_shown(len(row.get(figure, ()))):
                    self._blocks.setdefault((figure, number), Points()).add(step, row[figure][number - 1])
        elif row["kind"] == "sample":
            self._samples.append(_cut(row))
            self._n_samples += 1
        elif row["kind"] == "train":
            for figure in FIGURES:
                if row.get(figure) is not None:
                    self._updates[figure].add(step, float(row[figure]))
            self._clock.tick(row)

    def history(self) -> History:
        return History(
            self._updates, self._losses, self._blocks, list(self._samples), self._n_samples,
            len(self._last.get("block_loss", ())), self._clock.seconds, self._last,
        )  # fmt: skip


def read_history(run: Source, until: float = math.inf) -> History:
    """The history of a run; raises CheckpointError where a row cannot be read. until: as for read_rows."""
    recorder = Recorder()
    for row in read_rows(run, blocks=blocks_of(read_config(run)), until=until):
        recorder.add(row)
    return recorder.history()


def blocks_shown(blocks: int) -> list[int]:
    """The numbers of the blocks that are drawn, from 1.

    >>> blocks_shown(3), len(blocks_shown(1000)), blocks_shown(1000)[-1]
    ([1, 2, 3], 24, 1000)
    """
    most = MOST_BLOCKS_SHOWN
    return list(range(1, blocks + 1)) if blocks <= most else [1 + i * (blocks - 1) // (most - 1) for i in range(most)]


def _cut(sample: Mapping[str, Any]) -> Mapping[str, Any]:
    """The parts of a sample's row that are shown."""
    texts = {name: sample[name][:MOST_CHARACTERS] for name in ("prompt", "text")}
    shown = [[blocks[k - 1] for k in blocks_shown(len(blocks))] for blocks in sample["blocks"][:MOST_TOKENS]]
    written = [word[:MOST_CHARACTERS] for word in sample["written"][:MOST_TOKENS]]
    return {"step": sample["step"], **texts, "written": written, "blocks": shown}


def binned(points: Points, bins: int = BINS) -> Curve:
    """The curve in at most about `bins` points, each the mean of equally many and at the step of their last."""
    steps, values = points.steps, points.values
    size = -(-len(steps) // bins) or 1
    parts = [slice(i, i + size) for i in range(0, len(steps), size)]
    return {steps[part][-1]: sum(values[part]) / len(values[part]) for part in parts}


@dataclass(frozen=True)
class Band:
    """A curve with what lies around it; low and high are equal to mean where there is no spread to show."""

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
