"""A row of metrics.jsonl, as whoever reads it may rely on it: step, kind, and figures that are numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gptlab.parsing import is_count, is_number, parse_json

FIGURES = ("loss", "tempered_loss", "tokens_per_second", "dose", "bits_per_byte", "clipped_share")
TEXTS = ("event", "text")


def parse_row(line: str | bytes) -> dict[str, Any] | None:
    """The row that a line holds, or None: a file from elsewhere may hold anything.

    >>> parse_row('{"step": 3, "kind": "val", "loss": 2.5}')
    {'step': 3, 'kind': 'val', 'loss': 2.5}
    >>> parse_row('{"step": 3, "kind": "val", "loss": "low"}')
    """
    try:
        row = parse_json(line)
    except ValueError:
        return None
    if not isinstance(row, dict) or not is_count(row.get("step")) or not isinstance(row.get("kind"), str):
        return None
    numbers = all(row.get(name) is None or is_number(row[name]) for name in FIGURES)
    texts = all(name not in row or isinstance(row[name], str) for name in TEXTS)
    counted = row["kind"] == "sample" or row.get("tokens") is None or is_count(row["tokens"])  # a sample lists its own
    paced = row["kind"] != "train" or not row.get("tokens_per_second") or is_count(row.get("tokens"))
    known = row["kind"] != "val" or is_number(row.get("loss"))
    return row if numbers and texts and counted and paced and known else None


@dataclass
class Clock:
    """Seconds spent in updates, from train rows in their order; rows left out count at the speed of the next."""

    seconds: float = 0.0
    _tokens: int = 0

    def tick(self, row: Mapping[str, Any]) -> None:
        if row.get("tokens_per_second"):
            self.seconds += (row["tokens"] - self._tokens) / row["tokens_per_second"]
        self._tokens = row.get("tokens", self._tokens)
