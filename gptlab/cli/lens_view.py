"""What a person sees of a lens: a table of positions and blocks for each reader, and what early exit costs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from gptlab.cli.terminal import printable

NAMES = {"raw": "raw reading", "tuned": "tuned reading"}


def show(found: Mapping[str, Any]) -> None:
    """Print whatever there is of `gptlab lens --json`'s content."""
    console = Console()
    for table in _tables(found):
        console.print(table)
    if "reader" in found:
        console.print(Text(f"kept in {found['reader']}"))


def _tables(found: Mapping[str, Any]) -> Iterator[Table]:
    if "divergence" in found:
        yield _divergence(found["divergence"])
    for name, points in found.get("early_exit", {}).items():
        yield _early_exit(NAMES[name], points, found["tokens"])
    for name, lens in found.get("readers", {}).items():
        yield _positions(NAMES[name], lens["positions"])
        yield _blocks(NAMES[name], lens["blocks"])


def _positions(name: str, positions: list[Mapping[str, Any]]) -> Table:
    """A row a position: each block's best next token, its probability, and below it the entropy."""
    L = len(positions[0]["blocks"])
    table = Table(title=name, caption="best next token and p, below it the entropy in nats; bold: the final block's")
    table.add_column("read", no_wrap=True)
    for number in range(1, L + 1):
        table.add_column(f"block {number}")
    for position in positions:
        cells = []
        for block in position["blocks"]:
            best = block["top"][0]
            cell = Text(f"{_shown(best['text'])} {best['probability']:.0%}", style="bold" if block["agrees"] else "")
            cells.append(cell.append(f"\n{block['entropy']:.2f}", style="not bold dim"))
        table.add_row(Text(_shown(position["text"])), *cells)
    return table


def _blocks(name: str, blocks: list[Mapping[str, float]]) -> Table:
    table = Table(title=f"{name}, mean over positions")
    for column in ("block", "confidence", "entropy, nats", "agrees with the final block"):
        table.add_column(column, justify="right")
    for number, block in enumerate(blocks, 1):
        table.add_row(str(number), f"{block['confidence']:.1%}", f"{block['entropy']:.3f}", f"{block['agreement']:.1%}")
    return table


def _early_exit(name: str, points: list[Mapping[str, Any]], tokens: int) -> Table:
    table = Table(title=f"early exit by the {name}, {tokens:,} validation tokens")
    table.caption = "compute: multiplications over the full model's, readings and filled-in keys and values included"
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
    table = Table(title="KL from the final block's reading, nats a token, validation")
    for column in ("block", "raw", "tuned"):
        table.add_column(column, justify="right")
    for number, (raw, tuned) in enumerate(zip(found["raw"], found["tuned"], strict=True), 1):
        table.add_row(str(number), f"{raw:.4f}", f"{tuned:.4f}")
    return table


def _shown(token: str) -> str:
    return repr(printable(token))
