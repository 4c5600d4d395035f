"""Text that others wrote, made safe to show: a corpus, a prompt or a model may hold a terminal's control sequences."""

from __future__ import annotations

import unicodedata

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
