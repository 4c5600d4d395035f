"""report.html of a single run, and a run's rows over its steps as curves that can be drawn."""

from __future__ import annotations

import math
import statistics
from array import array
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from gptlab.analysis.report import FILE, theme
from gptlab.analysis.report.page import Panel, block_class, render, sample, write
from gptlab.analysis.report.plots import Band, Curve, Line, curves
from gptlab.analysis.run import Run, blocks_of, passport, read_run
from gptlab.analysis.statistics import spread
from gptlab.analysis.tables import number
from gptlab.options import build, flatten
from gptlab.runs.records import Clock, Row, Source, read_config, read_rows
from gptlab.training.config import TrainingConfig
from gptlab.training.presets import PRESETS

BINS, COARSE = 150, 30
"""Points of a curve of updates, each the mean of the updates since the point before; of a curve of shares."""
MOST_BLOCKS_SHOWN = 24
"""Of more blocks so many are drawn, evenly spaced from the first to the last."""
MOST_SAMPLES, MOST_TOKENS, MOST_CHARACTERS = 8, 128, 10_000
"""Samples of a run that are shown, the newest; of each so many tokens, and so much of its prompt and text."""


class Points:
    """A curve that grows, 16 bytes a point: a run may have a million updates."""

    def __init__(self) -> None:
        self.steps, self.values = array("q"), array("d")

    def add(self, step: int, value: float) -> None:
        self.steps.append(step)
        self.values.append(value)


FIGURES = ("loss", "signal_loss", "grad_norm", "clipped", "dose", "tokens_per_second")


class History:
    """A run's rows, which `add` takes in their order, as curves.

    updates: {figure: its points} of the train rows; losses: validation losses; last: the last validation's row; blocks:
    {(figure, number from 1): its points} of the blocks that are shown; samples: the newest rows of `n_samples`.
    """

    def __init__(self) -> None:
        self.updates: dict[str, Points] = {figure: Points() for figure in FIGURES}
        self.losses = Points()
        self.blocks: dict[tuple[str, int], Points] = {}
        self.samples: deque[Mapping[str, Any]] = deque(maxlen=MOST_SAMPLES)
        self.n_samples, self._clock = 0, Clock()
        self.last: Mapping[str, Any] = {}

    def add(self, row: Row) -> None:
        step = row["step"]
        if row["kind"] == "val":
            self.last = row
            self.losses.add(step, row["loss"])
            for figure in ("block_loss", "block_confidence"):
                for number in blocks_shown(len(row.get(figure, ()))):
                    self.blocks.setdefault((figure, number), Points()).add(step, row[figure][number - 1])
        elif row["kind"] == "sample":
            self.samples.append(_cut(row))
            self.n_samples += 1
        elif row["kind"] == "train":
            for figure in FIGURES:
                if row.get(figure) is not None:
                    self.updates[figure].add(step, float(row[figure]))
            self._clock.tick(row)

    @property
    def n_blocks(self) -> int:
        return len(self.last.get("block_loss", ()))

    @property
    def seconds(self) -> float:
        """Spent in updates, all sessions together."""
        return self._clock.seconds

    @property
    def tokens_per_second(self) -> float | None:
        speeds = self.updates["tokens_per_second"].values
        return statistics.median(speeds) if speeds else None

    def of_block(self, figure: str, number: int) -> Curve:
        """`block_loss` or `block_confidence` of block `number`, from 1, over validations."""
        return binned(self.blocks.get((figure, number), Points()))


def read_history(run: Source, until: float = math.inf) -> History:
    """The history of a run; raises CheckpointError where a row cannot be read. until: as for read_rows."""
    history = History()
    for row in read_rows(run, blocks=blocks_of(read_config(run)), until=until):
        history.add(row)
    return history


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


def over_seeds(curves: Iterable[Curve]) -> Band:
    """Mean and mean ± one standard deviation over seeds, at the steps that all curves have."""
    curves = list(curves)
    steps = sorted(set.intersection(*(set(curve) for curve in curves))) if curves else []
    values = [[curve[step] for curve in curves] for step in steps]
    means = [sum(v) / len(v) for v in values]
    around = [spread(v) or 0.0 for v in values]
    both = list(zip(means, around, strict=True))
    return Band(steps, means, [m - s for m, s in both], [m + s for m, s in both])


PLACES = {"out", "resume", "preset", "seed"}
"""Options that are shown elsewhere, or say only where the run lies."""


def write_run(folder: str | Path) -> Path:
    """Write the report of the run in `folder` into it and give its path; raises CheckpointError where there is none."""
    history = History()
    run = read_run(Path(folder), each=history.add)
    return write(Path(folder) / FILE, page(run, history))


def page(run: Run, history: History) -> str:
    """The report as HTML; the same bytes for the same folder."""
    return render("run.html", **content(run, history))


def content(run: Run, history: History) -> dict[str, Any]:
    """What the template run.html is filled with."""
    options = run.options
    signal, path = options.get("signal.name", "none"), run.path.resolve()
    return {
        "title": f"{path.parent.name}/{path.name}" if path.name.startswith("seed_") else path.name,  # a cell's arm too
        "preset": options.get("preset"),
        "arm": options.get("arm"),
        "signal": None if signal == "none" else signal,
        "seed": run.seed,
        "step": run.last_step,
        "facts": list(facts(run, history)),
        "panels": list(panels(history, has_signal=signal != "none")),
        "n_samples": history.n_samples,
        "samples": [sample(row, f"step {row['step']:,}") for row in reversed(history.samples)],
        "changes": changes(options),
        "environment": flat(run.environment),
    }


def facts(run: Run, history: History) -> Iterator[tuple[str, str, str]]:
    """(name, figure, unit) of what one asks first."""
    last = history.last
    of = passport([run], run.last_step)
    yield "validation loss", number(last.get("loss"), ".4f"), "nats a token"
    if "excess_loss" in last:
        yield "over the floor", number(last["excess_loss"], "+.4f"), "nats a token"
    if of:
        yield "for each byte of text", number(last.get("bits_per_byte"), ".4f"), "bits a byte"
    if last.get("tempered_loss") is not None:
        at = number(last.get("temperature"), ".3g")
        yield "at the best temperature", number(last["tempered_loss"], ".4f"), f"nats, at {at}"
    if not of:  # of another trainer: nothing more is known
        return
    yield "parameters", number(of["parameters"], ","), f"{number(of['tokens_per_parameter'], '.3g')} tokens each"
    epochs = f", {number(of['epochs'], '.3g')} epochs" if of["epochs"] else ""
    yield "training tokens", number(of["tokens"], ","), f"{run.last_step:,} updates{epochs}"
    yield "speed", number(history.tokens_per_second, ",.0f"), "tokens/s, median update"
    yield "time in updates", duration(history.seconds), "all sessions"
    if run.has_signal:
        yield "dose", number(of["dose"], ".3f"), "of the true loss’s gradient, mean"
    yield "clipped", number(of["clipped_share"], ".0%"), "of the updates"


def panels(history: History, *, has_signal: bool) -> Iterator[Panel]:
    """The plots there is something to show in."""
    updates, blocks = history.updates, history.n_blocks

    def line(figure: str, colour: str, bins: int = BINS) -> list[Line]:
        return [Line(Band.of(binned(updates[figure], bins)), colour)]

    lines = [
        Line(Band.of(binned(updates["loss"])), theme.MUTED, "training", faint=True),
        Line(Band.of(binned(history.losses)), theme.arm(1), "validation"),
    ]
    legend = [("muted", "training"), ("arm-1", "validation")]
    yield from _panel("Loss", lines, "loss", "nats a token", legend)
    if has_signal:
        note = "the weighted sum over judges"
        yield from _panel("Signal loss", line("signal_loss", theme.arm(2)), "signal", "nats a token", note=note)
        note = "the signal’s gradient as a share of the true loss’s"
        yield from _panel("Dose", line("dose", theme.arm(2)), "dose", "ratio", note=note)
    for title, name, unit in (("Loss", "block_loss", "nats a token"), ("Confidence", "block_confidence", "mean p_max")):
        bands = {j: Band.of(history.of_block(name, j)) for j in blocks_shown(blocks)}
        of_blocks = [Line(band, theme.block(j, blocks), f"block {j}") for j, band in bands.items()]
        yield from _panel(f"{title} of every block’s reading", of_blocks, name, unit, block_legend(blocks))
    yield from _panel("Gradient norm", line("grad_norm", theme.arm(3)), "gradient", "before clipping")
    yield from _panel("Clipped updates", line("clipped", theme.arm(3), COARSE), "clipped", "share", share=True)
    yield from _panel("Speed", line("tokens_per_second", theme.MUTED), "speed", "tokens/s")


def _panel(
    title: str, lines: list[Line], name: str, unit: str, legend: Sequence[tuple[str, str]] = (), note: str = "", *,
    share: bool = False,
) -> Iterator[Panel]:  # fmt: skip
    if lines := [line for line in lines if line.band.steps]:
        yield Panel(title, curves(lines, name, title, unit=unit, share=share), legend, note)


def block_legend(blocks: int, most: int = 8) -> list[tuple[str, str]]:
    """The colours of blocks 1..blocks; of many, some of them."""
    shown = range(1, blocks + 1) if blocks <= most else (1, 1 + blocks // 3, 1 + 2 * blocks // 3, blocks)
    return [(block_class(j, blocks), f"block {j}") for j in shown]


def changes(options: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """(option, the preset's value, the run's) of what the run sets over its preset."""
    preset = options.get("preset")
    usual = flatten(build(TrainingConfig, PRESETS.get(preset, {}))) if preset else {"also": []}
    rows = [(key, usual.get(key), value) for key, value in options.items() if key not in PLACES]
    return [row for row in rows if row[1] != row[2]]


def duration(seconds: float) -> str:
    """Hours and minutes, or minutes and seconds.

    >>> duration(3725)
    '1 h 02 min'
    """
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60:02} min"
    return f"{minutes} min {rest:02} s" if minutes else f"{rest} s"


def flat(table: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """A table of tables as rows of (name, what it is) for reading."""
    rows: list[tuple[str, str]] = []
    for key, value in table.items():
        if isinstance(value, Mapping):
            rows += flat(value, f"{prefix}{key}.")
        elif isinstance(value, list) and any(isinstance(one, Mapping) for one in value):
            rows += flat({f"{key} {n}": one for n, one in enumerate(value, 1)}, prefix)
        else:
            shown = ", ".join(map(str, value)) or "none" if isinstance(value, list) else str(value)
            rows.append((f"{prefix}{key}".replace("_", " ").replace(".", ": "), shown))
    return rows
