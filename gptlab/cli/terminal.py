"""Text that others wrote, made safe to show: a corpus, a prompt or a model may hold a terminal's control sequences."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

_KEPT = "\n\t"
_BIDI = {0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A)}
"""Marks that change the direction of what follows: shown text could be made to read otherwise than it is."""


def printable(text: str) -> str:
    """`text` with a visible stand-in for every character that would steer the terminal; lines and tabs are kept.

    >>> printable("a\\x1b[2Jb\\r\\n")
    'a␛[2Jb␍\\n'
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in _KEPT else _stand_in(c) for c in text)


def _stand_in(character: str) -> str:
    code = ord(character)
    if code < 0x20:
        return chr(0x2400 + code)  # Unicode's pictures of control characters
    if code == 0x7F:
        return "␡"
    steers = unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp") or code in _BIDI
    return "\N{REPLACEMENT CHARACTER}" if steers else character


def show_table(console: Console, title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table of text that others may have chosen; narrow columns stay whole, wide ones fold."""
    from rich.table import Table
    from rich.text import Text

    shown = Table(title=Text(printable(title), "bold"), title_justify="left", box=None, pad_edge=False)
    for name, cells in zip(header, zip(*rows, strict=True), strict=True):
        widest = max(map(len, (name, *cells)))
        shown.add_column(name, overflow="fold", min_width=min(widest, 24))
    for row in rows:
        shown.add_row(*(Text(printable(cell)) for cell in row))
    console.print(shown, "")
