"""What a person sees of a lens: tables of positions and blocks for each reader, and what early exit costs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.cells import cell_len
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from gptlab.cli.console import printable

NAMES = {"raw": "raw reading", "tuned": "tuned reading"}
FRAME = 3
"""What a column takes beside its text: a line and two blanks."""


def show(found: Mapping[str, Any], top: int = 1) -> None:
    """Print whatever there is of `gptlab lens --json`'s content; top: tokens shown of every block and position."""
    console = Console()
    for part in _parts(found, top, console.width):
        console.print(part)


def _parts(found: Mapping[str, Any], top: int, width: int) -> Iterator[RenderableType]:
    if "divergence" in found:
        yield from _titled(
            "KL from the final block's reading, nats a token, validation", _divergence(found["divergence"])
        )
    for name, points in found.get("early_exit", {}).items():
        title = f"early exit by the {NAMES[name]}, {found['tokens']:,} validation tokens"
        note = "compute: multiplications over the full model's, readings and filled-in keys and values included"
        yield from _titled(title, _early_exit(points), note)
    for name, lens in found.get("readers", {}).items():
        yield from _positions(NAMES[name], lens["positions"], top, width)
        yield from _titled(f"{NAMES[name]}, mean over positions", _blocks(lens["blocks"]))
    if "reader" in found:
        yield Text(f"kept in {found['reader']}")


def _titled(title: str, table: Table, note: str = "") -> Iterator[RenderableType]:
    """A table under its title. Both words are lines of their own: rich would fold them to the table's width."""
    yield Text(title, style="bold")
    yield table
    if note:
        yield Text(note, style="dim")


def _positions(name: str, positions: Sequence[Mapping[str, Any]], top: int, width: int) -> Iterator[RenderableType]:
    """A row a position: each block's best next tokens and below them the entropy; as many blocks a table as fit."""
    L = len(positions[0]["blocks"])
    read = [Text(_shown(position["text"])) for position in positions]
    columns = {j: [_cell(position["blocks"][j - 1], top) for position in positions] for j in range(1, L + 1)}
    wide = {j: max(_width(cell) for cell in (Text(_named(j)), *cells)) + FRAME for j, cells in columns.items()}
    room = width - max(map(_width, (Text("read"), *read))) - FRAME - 1
    while columns:
        fit, left = [], room
        for j in columns:
            left -= wide[j]
            if fit and left < 0:
                break
            fit.append(j)
        table = Table()
        table.add_column("read", no_wrap=True)
        for j in fit:
            table.add_column(_named(j), overflow="fold")
        for row in zip(read, *(columns.pop(j) for j in fit), strict=True):
            table.add_row(*row)
        part = "" if len(fit) == L else f", blocks {fit[0]} to {fit[-1]} of {L}"
        yield from _titled(name + part, table)
    yield Text("best next token and p, below it the entropy in nats; bold: the final block's", style="dim")


def _named(block: int) -> str:
    return f"block {block}"


def _cell(block: Mapping[str, Any], top: int) -> Text:
    """The likeliest tokens, the first of them bold where the final block says the same, and the entropy."""
    cell = Text()
    for place, best in enumerate(block["top"][:top]):
        bold = place == 0 and block["agrees"]
        cell.append(f"{_shown(best['text'])} {best['probability']:.0%}\n", style="bold" if bold else "")
    return cell.append(f"{block['entropy']:.2f}", style="dim")


def _width(text: Text) -> int:
    return max(map(cell_len, text.plain.splitlines()))


def _blocks(blocks: Sequence[Mapping[str, float]]) -> Table:
    table = Table()
    for column in ("block", "confidence", "entropy, nats", "agrees with the final block"):
        table.add_column(column, justify="right")
    for number, block in enumerate(blocks, 1):
        table.add_row(str(number), f"{block['confidence']:.1%}", f"{block['entropy']:.3f}", f"{block['agreement']:.1%}")
    return table


def _early_exit(points: Sequence[Mapping[str, Any]]) -> Table:
    table = Table()
    for column in ("confidence", "loss, nats", "agreement", "blocks", "compute", "left at block 1..L"):
        table.add_column(column, justify="right")
    for p in points:
        exits = " ".join(f"{share:.0%}" for share in p["exits"])
        table.add_row(
            f"{p['confidence']:g}", f"{p['loss']:.4f}", f"{p['agreement']:.1%}", f"{p['blocks']:.1%}",
            f"{p['compute']:.1%}", exits,
        )  # fmt: skip
    return table


def _divergence(found: Mapping[str, list[float]]) -> Table:
    table = Table()
    for column in ("block", "raw", "tuned"):
        table.add_column(column, justify="right")
    for number, (raw, tuned) in enumerate(zip(found["raw"], found["tuned"], strict=True), 1):
        table.add_row(str(number), f"{raw:.4f}", f"{tuned:.4f}")
    return table


def _shown(token: str) -> str:
    return repr(printable(token))
