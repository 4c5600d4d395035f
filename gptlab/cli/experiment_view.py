"""What a person sees of an experiment: a live table, a line a cell in a file, and what a smoke test found."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from gptlab.cli.console import printable
from gptlab.runs.cells import State
from gptlab.runs.experiment_runner import Progress, Snapshot
from gptlab.runs.smoke import Trial

STYLE: dict[State, str] = {
    "waiting": "dim", "running": "cyan", "stopped": "yellow", "finished": "green", "diverged": "red", "failed": "red",
}  # fmt: skip
SPOKEN: tuple[State, ...] = ("finished", "diverged", "failed")


class Watch:
    """Shows snapshots as they come on standard error: a live table on a terminal, else a line a cell."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or stderr()
        self._live = Live(console=self.console, auto_refresh=False, transient=True)
        self._told: dict[str, State] = {}

    def __enter__(self) -> Watch:
        if self.console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._live.stop()

    def show(self, snapshot: Snapshot) -> None:
        ended = [cell for cell in snapshot.cells if cell.state in SPOKEN]
        for cell in snapshot.cells:
            before = self._told.get(cell.cell.name)
            if cell.state != before and (cell.state in SPOKEN or (cell.state == "running" and not self._is_live)):
                where = f"{len(ended)} of {len(snapshot.cells)} cells have ended, {minutes(snapshot.seconds_left)} left"
                self.console.print(Text.assemble(*_line(cell), ("  " + where, "dim")), soft_wrap=True)
            self._told[cell.cell.name] = cell.state
        if self._is_live:
            running = [cell for cell in snapshot.cells if cell.state == "running"]
            self._live.update(Group(cell_table(running), summary(snapshot)), refresh=True)

    @property
    def _is_live(self) -> bool:
        return self._live.is_started


def stderr() -> Console:
    return Console(stderr=True, highlight=False, width=None if sys.stderr.isatty() else 120)


def _line(cell: Progress) -> list[Any]:
    loss = "" if cell.loss is None or cell.state == "running" else f"  loss {cell.loss:.4f}"
    reason = f"  {printable(cell.reason)}" if cell.reason else ""
    return [(f"{cell.state:<9}", STYLE[cell.state]), f"{cell.cell.name}  step {cell.step:,}{loss}{reason}"]


def cell_table(cells: Sequence[Progress]) -> Table:
    """A row a cell: arm, seed, state, step, loss, dose, time left."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    for name in ("arm", "seed", "state"):
        table.add_column(name)
    for name in ("step", "of", "loss", "dose", "left"):
        table.add_column(name, justify="right")
    for one in cells:
        table.add_row(
            one.cell.arm.name,
            str(one.cell.seed),
            Text(one.state, STYLE[one.state]),
            f"{one.step:,}",
            f"{one.cell.steps:,}",
            "" if one.loss is None else f"{one.loss:.4f}",
            "" if one.dose is None else f"{one.dose:.3f}",
            "" if one.seconds_left is None else minutes(one.seconds_left),
        )
    return table


def ended_early(cells: Sequence[Progress]) -> Table:
    """A row an arm whose cells ended early in one way: its seeds, how far the first of them came, and why."""
    groups: dict[tuple[str, str], list[Progress]] = {}
    for one in cells:
        groups.setdefault((one.cell.arm.name, one.reason or "no reason given"), []).append(one)
    table = Table("arm", "seeds", "step", "reason", box=None, pad_edge=False, header_style="dim")
    for (arm, reason), found in groups.items():
        seeds = ", ".join(str(one.cell.seed) for one in found)
        table.add_row(arm, seeds, f"{found[0].step:,}", Text(printable(reason), "red"))
    return table


def reasons(cells: Sequence[Progress]) -> Text:
    """Why cells ended early, a line each."""
    lines = [f"{one.cell.name}: {printable(one.reason)}\n" for one in cells if one.reason]
    return Text("".join(lines), "red")


def choices(kept: Mapping[str, Any]) -> Text:
    """What tuning.json says was chosen, a line an arm, with what to know of it."""
    lines = []
    for arm, found in kept["arms"].items():
        options = ", ".join(f"{key} {_short(value)}" for key, value in found["options"].items()) or "as declared"
        whose = f", the best of {kept['trials']} trials" if found["trial"] else ""
        whose += f" of {found['follows']}" if found["follows"] else ""
        lines += [(f"{arm}: {options}{whose}\n", ""), *((f"  {note}\n", "yellow") for note in found["notes"])]
    return Text.assemble(*lines)


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else printable(str(value))


def summary(snapshot: Snapshot) -> Text:
    """How many cells are in which state, and the time left."""
    counts = Counter(cell.state for cell in snapshot.cells)
    parts = [(f"{counts[state]} {state}  ", style) for state, style in STYLE.items() if counts[state]]
    return Text.assemble(*parts, f"{minutes(snapshot.seconds_left)} left")


def minutes(seconds: float | None) -> str:
    """Seconds as hours, minutes and seconds; a dash where they are unknown.

    >>> minutes(3725.2)
    '1:02:05'
    """
    if seconds is None:
        return "–"
    total = int(seconds)
    hours, rest = divmod(total, 3600)
    return f"{hours}:{rest // 60:02}:{rest % 60:02}" if hours else f"{rest // 60}:{rest % 60:02}"


def smoke_table(trials: Sequence[Trial], cells: Mapping[str, int], longer: Mapping[str, int]) -> Table:
    """A row an arm: what a few steps showed, how many `cells` it takes, and what one whole cell would cost.

    longer: updates of its baseline that cost as many FLOPs.
    """
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("arm")
    for name in ("steps", "dose"):
        table.add_column(name, justify="right")
    table.add_column("signal")
    for name in ("cells", "time", "disk", "FLOPs", "as baseline steps"):
        table.add_column(name, justify="right")
    for one in trials:
        table.add_row(
            one.arm,
            f"{one.steps:,}",
            "" if one.dose is None else f"{one.dose:.3f}",
            Text(one.signal, "yellow" if one.signal == "inactive so far" else ""),
            str(cells[one.arm]),
            minutes(one.seconds),
            megabytes(one.bytes),
            "–" if one.flops is None else f"{one.flops:.2g}",
            f"{longer[one.arm]:,}" if one.arm in longer else "",
        )
    return table


def megabytes(count: int | None) -> str:
    return "–" if count is None else f"{count / 1e6:,.1f} MB"
