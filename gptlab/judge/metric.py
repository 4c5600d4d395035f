"""The metric of a command: in what it printed, by a pattern or in JSON lines, or in a CSV file that it wrote."""

from __future__ import annotations

import csv
import io
import re
from pathlib import Path

from gptlab.errors import DataError
from gptlab.files import MB, parse_json, read_text
from gptlab.judge.lab import Metric

LONGEST_LINE = 4096
"""Characters of a line of output in which a pattern is looked for."""


def read_metric(output: str, metric: Metric) -> float | None:
    """The metric in a command's output; nan or inf where that is what it printed last; None where there is none.

    >>> read_metric("loss 2.5\\nloss nan", Metric(pattern=r"loss ([0-9.]+)"))
    nan
    """
    if metric.pattern:
        return last_match(output, metric.pattern)
    for line in reversed(output.splitlines()):
        try:
            found = parse_json(line)
            return float(found[metric.json])
        except (ValueError, TypeError, KeyError, IndexError):
            continue
    return None


def last_match(output: str, pattern: str) -> float | None:
    """The number in the last line that a pattern matches, also where it stands for a number and a NaN is printed."""
    number, without = re.compile(pattern), re.compile(_of_no_number(pattern), re.IGNORECASE)
    for line in reversed(output.splitlines()):
        for found in [*number.finditer(line[:LONGEST_LINE]), *without.finditer(line[:LONGEST_LINE])][::-1]:
            try:
                return float(found[1])
            except (ValueError, TypeError):
                continue
    return None


def _of_no_number(pattern: str) -> str:
    """The pattern with nan or inf in its one group.

    >>> _of_no_number(r"\\(loss\\) ([(0-9.]+)$")
    '\\\\(loss\\\\) ([-+]?(?:nan|inf(?:inity)?))$'
    """
    opened, depth, in_class, start = 0, 0, False, None
    for at, (c, before) in enumerate(zip(pattern, " " + pattern, strict=False)):
        escaped = before == "\\" and (at - len(pattern[:at].rstrip("\\"))) % 2 == 1
        if escaped:
            continue
        if c in "[]":
            in_class = c == "["
        elif c == "(" and not in_class:
            if start is None and not re.match(r"\(\?(?!P<)", pattern[at:]):
                start, opened = at, depth
            depth += 1
        elif c == ")" and not in_class:
            depth -= 1
            if start is not None and depth == opened:
                return pattern[:start] + "([-+]?(?:nan|inf(?:inity)?))" + pattern[at + 1 :]
    return pattern


def last_in_csv(work: Path, where: str) -> float | None:
    """The last number in a column of a CSV file that the command wrote."""
    name, _, column = where.rpartition(":")
    try:
        rows = list(csv.DictReader(io.StringIO(read_text(work / name, limit=64 * MB, inside=work))))
        return float(rows[-1][column])
    except (FileNotFoundError, DataError, IndexError, KeyError, TypeError, ValueError, csv.Error):
        return None
