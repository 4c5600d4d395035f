"""Tables for people: nothing of a cell is lost, on a narrow terminal and in a pipe."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from gptlab.analysis.tables import Table
from gptlab.cli.console import show_table

HEADER = tuple(f"name of column {n}" for n in range(8))
ROW = tuple(f"{n} is what this cell says, in so many words" for n in range(8))


def shown(terminal: bool, width: int) -> list[str]:
    out = io.StringIO()
    show_table(
        Console(file=out, force_terminal=terminal, width=width, color_system=None), Table("a title", HEADER, [ROW])
    )
    return out.getvalue().splitlines()


def test_in_a_pipe_a_row_is_a_line() -> None:
    assert any(all(cell in line for cell in ROW) for line in shown(terminal=False, width=80))


@pytest.mark.parametrize("width", [60, 120])
def test_on_a_terminal_cells_fold_and_none_is_cut(width: int) -> None:
    found = "".join(shown(terminal=True, width=width))
    expected = "".join((*HEADER, *ROW)).replace(" ", "")
    assert {c: found.count(c) for c in expected} == {c: expected.count(c) + "a title".count(c) for c in expected}
