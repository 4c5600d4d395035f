"""What a person sees of `gptlab eval`: how far it is, on standard error, and the figures as a table."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from gptlab.cli.console import printable

EVERY_SECONDS = 10.0
"""Between two lines of progress in a file."""


class Display:
    """Progress on standard error: a bar on a terminal, a line now and then elsewhere; `quiet` shows nothing."""

    def __init__(self, *, quiet: bool = False) -> None:
        self.console = Console(stderr=True, highlight=False, quiet=quiet, width=None if sys.stderr.isatty() else 110)
        self._bar: Progress | None = None

    def note(self, text: str) -> None:
        self.console.print(Text(printable(text), style="dim"), soft_wrap=True)

    @contextmanager
    def counting(self, name: str, total: int, done: int) -> Iterator[Callable[[int, dict[str, float]], None]]:
        """Show rows as they are finished; `done` of them were finished before."""
        if done:
            self.note(f"{name}: {done:,} of {total:,} rows were finished before")
        started, last = time.perf_counter(), 0.0
        bar = task = None
        if self.console.is_terminal:
            self._bar = bar = Progress(
                TextColumn(name), MofNCompleteColumn(), BarColumn(bar_width=24), TextColumn("{task.description}"),
                TimeRemainingColumn(compact=True), TextColumn("left"), console=self.console,
            )  # fmt: skip
            task = bar.add_task("", total=total, completed=done)
            bar.start()

        def progress(now: int, figures: dict[str, float]) -> None:
            nonlocal last
            words = shown(figures)
            if bar is not None and task is not None:
                bar.update(task, completed=now, description=words)
            elif time.perf_counter() - last > EVERY_SECONDS or now == total:
                last = time.perf_counter()
                left = (last - started) / (now - done) * (total - now)
                self.note(f"{name} {now:,}/{total:,} rows  {words}  {left / 60:.0f} min left")

        try:
            yield progress
        finally:
            self.close()

    def close(self) -> None:
        if self._bar:
            self._bar.stop()
            self._bar = None


def shown(figures: Mapping[str, Any]) -> str:
    """The numbers of a test in one line."""
    return "  ".join(f"{name} {value:.4f}" for name, value in figures.items() if isinstance(value, float))


def table(result: Mapping[str, Any]) -> None:
    """Print a task a row; with every block's figures, a row a block."""
    console = Console(highlight=False)
    title = Text(printable(f"{result['model']}, {result['dtype']}"), "bold")
    rows = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for name in ("task", "block", "score"):
        rows.add_column(name, overflow="fold")
    for task, told in result["tasks"].items():
        blocks = told.get("blocks") or [told]
        for number, figures in enumerate(blocks, 1):
            block = str(number) if "blocks" in told else "last"
            rows.add_row(Text(printable(task)) if number == 1 else "", block, Text(shown(figures)))
        about = [f"{told['tokens']:,} tokens"] if "tokens" in told else []
        about += [f"{told['rows']:,} rows"] if "rows" in told else []
        about += [told["source"]] if "source" in told else []
        if about:
            rows.add_row("", "", Text(printable(", ".join(about)), "dim"))
    console.print(rows)
