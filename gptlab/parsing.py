"""Text that others wrote as plain values: JSON and TOML, of which whatever is wrong is one kind of error, ValueError.

The parsers themselves raise RecursionError for what is nested deeply, and what they let pass would raise it in whoever
walks through it. Numbers beyond 64 bits, infinities and NaN are no damage to a parser; they are asked for here.
"""

from __future__ import annotations

import json
import math
import tomllib
from typing import Any

DEEPEST = 64
"""Levels of objects and lists, one within the other; nothing of ours has more than 6."""


def parse_json(text: str | bytes, *, unique: bool = False) -> Any:
    """The value of a JSON text; ValueError for anything else, and for more than DEEPEST levels.

    unique: refuse objects in which a key occurs twice, of which parsers take one or the other.

    >>> parse_json('{"step": [1, 2]}')
    {'step': [1, 2]}
    """
    try:
        value = json.loads(text, object_pairs_hook=_unique if unique else None)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    return _checked(value)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)[:40]!r} twice")
    return found


def parse_toml(text: str) -> dict[str, Any]:
    """The table of a TOML text; ValueError for anything else, and for more than DEEPEST levels."""
    try:
        table = tomllib.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    return _checked(table)


def is_count(value: object) -> bool:
    """Whether it is a whole number from 0 on that 64 bits hold, as steps, tokens and sizes are.

    >>> [is_count(value) for value in (0, 7, -1, 1.0, True, 2**63)]
    [True, True, False, False, False, False]
    """
    return type(value) is int and 0 <= value < 2**63


def is_number(value: object) -> bool:
    """Whether it is a finite number, as losses and doses are."""
    return (type(value) is int and -(2**63) <= value < 2**63) or (isinstance(value, float) and math.isfinite(value))


def _checked(value: Any) -> Any:
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(DEEPEST):
        level = [
            inner
            for one in level
            for inner in (one.values() if type(one) is dict else one)
            if type(inner) is dict or type(inner) is list
        ]
        if not level:
            return value
    raise ValueError("nested too deeply")
