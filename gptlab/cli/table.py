"""Tables of text on a terminal, names in them shown as they are."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gptlab.cli.terminal import printable

if TYPE_CHECKING:
    from rich.console import Console

    from gptlab.analysis.tables import Table


def show_table(console: Console, table: Table) -> None:
    """A table and an empty line after it; cells fold where the terminal is narrow, and are never cut.

    What is no terminal has no width: there rows are as long as they are.
    """
    from rich.table import Table as RichTable
    from rich.text import Text

    title, header, rows = table
    shown = RichTable(title=Text(printable(title), "bold"), title_justify="left", box=None, pad_edge=False)
    room = max(1, console.width // len(header) - 2)
    for name, *cells in zip(header, *rows, strict=True):
        widest = max(map(len, (name, *cells)))
        shown.add_column(name, overflow="fold", min_width=min(widest, 24, room) if console.is_terminal else widest)
    for row in rows:
        shown.add_row(*(Text(printable(cell)) for cell in row))
    console.print(shown, "", crop=False)
