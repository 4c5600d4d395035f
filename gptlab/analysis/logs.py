"""Logs of other trainers: CSV or JSON lines with step, loss, arm and seed -> losses. Other columns are left alone."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from gptlab.errors import DataError
from gptlab.files import open_regular
from gptlab.parsing import is_count, parse_json

COLUMNS = ("step", "loss", "arm", "seed")
SUFFIXES = (".csv", ".jsonl")

Logged = dict[str, dict[int, dict[int, float]]]
"""{arm: {seed: {step: loss in nats}}}"""


def read_log(path: str | Path) -> Logged:
    """What a log holds, arms in the order of their first rows; raises DataError naming the line that does not fit.

    An empty loss, or one that is no finite number, is a run that diverged.
    """
    path = Path(path)
    found: Logged = {}
    try:
        with io.TextIOWrapper(open_regular(path), encoding="utf-8", newline="") as file:
            for number, row in _rows(path, file):
                arm, seed, step, loss = _typed(path, number, row)
                steps = found.setdefault(arm, {}).setdefault(seed, {})
                if step in steps:
                    raise DataError(f"{path}, line {number}: {arm} with seed {seed} has a loss at step {step} already")
                steps[step] = loss
    except FileNotFoundError:
        raise DataError(f"expected a log at {path}, found none; check the path") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: expected text in UTF-8: {error}") from None
    if not found:
        raise DataError(f"{path}: expected rows with {', '.join(COLUMNS)}, found none")
    return found


def _rows(path: Path, file: Iterable[str]) -> Iterable[tuple[int, Mapping[str, Any]]]:
    if path.suffix == ".csv":
        try:
            yield from enumerate(csv.DictReader(file), 2)
        except csv.Error as error:
            raise DataError(f"{path}: expected comma-separated values: {error}") from None
        return
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        try:
            row = parse_json(line)
        except ValueError as error:
            raise DataError(f"{path}, line {number}: expected a JSON object: {error}") from None
        if not isinstance(row, dict):
            raise DataError(f"{path}, line {number}: expected a JSON object, found {line.strip()[:40]!r}")
        yield number, row


def _typed(path: Path, number: int, row: Mapping[str, Any]) -> tuple[str, int, int, float]:
    missing = [column for column in COLUMNS if column not in row]
    if missing:
        have = ", ".join(str(key) for key in row)
        raise DataError(f"{path}, line {number}: expected {', '.join(COLUMNS)}, found no {missing[0]} among {have}")
    try:
        loss = float("nan") if row["loss"] in ("", None) else float(row["loss"])
        seed, step = int(row["seed"]), int(row["step"])
        if not (is_count(seed) and is_count(step)):
            raise ValueError
        return str(row["arm"]), seed, step, loss if math.isfinite(loss) else math.nan
    except (ValueError, TypeError, OverflowError):
        shown = ", ".join(f"{column}={row[column]!r:.60}" for column in COLUMNS)
        raise DataError(f"{path}, line {number}: expected numbers in step, loss and seed, found {shown}") from None
