"""report.html of a single run, from what its folder holds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from gptlab.analysis.report import FILE, theme
from gptlab.analysis.report.history import COARSE, Band, History, Recorder, binned, blocks_shown
from gptlab.analysis.report.page import Panel, block_class, figure, render, sample, write
from gptlab.analysis.report.plots import Line, curves
from gptlab.analysis.run import Run, passport, read_run
from gptlab.options import build, flatten
from gptlab.training.config import TrainingConfig
from gptlab.training.presets import PRESETS

PLACES = {"out", "resume", "preset", "seed"}
"""Options that are shown elsewhere, or say only where the run lies."""


def write_run(folder: str | Path) -> Path:
    """Write the report of the run in `folder` into it and give its path; raises CheckpointError where there is none."""
    folder = Path(folder)
    path, recorder = folder / FILE, Recorder()
    run = read_run(folder, each=recorder.add)
    write(path, page(run, recorder.history()))
    return path


def page(run: Run, history: History) -> str:
    """The report as HTML; the same bytes for the same folder."""
    return render("run.html", **content(run, history))


def content(run: Run, history: History) -> dict[str, Any]:
    """What the template run.html is filled with."""
    options = run.options
    signal = options.get("signal.name", "none")
    return {
        "title": _name(run.path.resolve()),
        "preset": options["preset"],
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


def _name(path: Path) -> str:
    """A run's name: its folder's, with its arm's where it is a cell of an experiment."""
    return f"{path.parent.name}/{path.name}" if path.name.startswith("seed_") else path.name


def facts(run: Run, history: History) -> Iterator[tuple[str, str, str]]:
    """(name, figure, unit) of what one asks first."""
    last = history.last
    of = passport([run], run.last_step)
    yield "validation loss", figure(last.get("loss"), ".4f"), "nats a token"
    if "excess_loss" in last:
        yield "over the floor", figure(last["excess_loss"], "+.4f"), "nats a token"
    yield "for each byte of text", figure(last.get("bits_per_byte"), ".4f"), "bits a byte"
    if last.get("tempered_loss") is not None:
        at = figure(last.get("temperature"), ".3g")
        yield "at the best temperature", figure(last["tempered_loss"], ".4f"), f"nats, at {at}"
    yield "parameters", figure(of["parameters"], ","), f"{figure(of['tokens_per_parameter'], '.3g')} tokens each"
    epochs = f", {figure(of['epochs'], '.3g')} epochs" if of["epochs"] else ""
    yield "training tokens", figure(of["tokens"], ","), f"{run.last_step:,} updates{epochs}"
    yield "speed", figure(history.tokens_per_second, ",.0f"), "tokens/s, median update"
    yield "time in updates", duration(history.seconds), "all sessions"
    if run.has_signal:
        yield "dose", figure(of["dose"], ".3f"), "of the true loss’s gradient, mean"
    yield "clipped", figure(of["clipped_share"], ".0%"), "of the updates"


def panels(history: History, *, has_signal: bool) -> Iterator[Panel]:
    """The plots there is something to show in."""
    updates, blocks = history.updates, history.n_blocks
    lines = [
        Line(Band.of(binned(updates["loss"])), theme.MUTED, "training", faint=True),
        Line(Band.of(binned(history.losses)), theme.arm(1), "validation"),
    ]
    legend = [("muted", "training"), ("arm-1", "validation")]
    yield from _panel("Loss", lines, "loss", "nats a token", legend)
    if has_signal:
        of_signal = [Line(Band.of(binned(updates["signal_loss"])), theme.arm(2))]
        yield from _panel("Signal loss", of_signal, "signal", "nats a token", note="the weighted sum over judges")
        dose = [Line(Band.of(binned(updates["dose"])), theme.arm(2))]
        note = "the signal’s gradient as a share of the true loss’s"
        yield from _panel("Dose", dose, "dose", "ratio", note=note)
    for title, name, unit in (("Loss", "block_loss", "nats a token"), ("Confidence", "block_confidence", "mean p_max")):
        of_blocks = [
            Line(Band.of(history.of_block(name, j)), theme.block(j, blocks), f"block {j}") for j in blocks_shown(blocks)
        ]
        yield from _panel(f"{title} of every block’s reading", of_blocks, name, unit, block_legend(blocks))
    norm = [Line(Band.of(binned(updates["grad_norm"])), theme.arm(3))]
    yield from _panel("Gradient norm", norm, "gradient", "before clipping")
    clipped = [Line(Band.of(binned(updates["clipped"], COARSE)), theme.arm(3))]
    yield from _panel("Clipped updates", clipped, "clipped", "share", share=True)
    speed = [Line(Band.of(binned(updates["tokens_per_second"])), theme.MUTED)]
    yield from _panel("Speed", speed, "speed", "tokens/s")


def _panel(
    title: str,
    lines: list[Line],
    name: str,
    unit: str,
    legend: list[tuple[str, str]] | None = None,
    note: str = "",
    *,
    share: bool = False,
) -> Iterator[Panel]:
    lines = [line for line in lines if line.band.steps]
    if lines:
        yield Panel(title, curves(lines, name, title, unit=unit, share=share), legend or [], note)


def block_legend(blocks: int, most: int = 8) -> list[tuple[str, str]]:
    """The colours of blocks 1..blocks; of many, some of them."""
    shown = range(1, blocks + 1) if blocks <= most else (1, 1 + blocks // 3, 1 + 2 * blocks // 3, blocks)
    return [(block_class(j, blocks), f"block {j}") for j in shown]


def changes(options: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """(option, the preset's value, the run's) of what the run sets over its preset."""
    usual = flatten(build(TrainingConfig, PRESETS.get(options["preset"], {})))
    return [
        (key, usual.get(key), value) for key, value in options.items() if key not in PLACES and value != usual.get(key)
    ]


def duration(seconds: float) -> str:
    """Hours and minutes, or minutes and seconds.

    >>> duration(3725)
    '1 h 02 min'
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes_left = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes_left:02} min"
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
