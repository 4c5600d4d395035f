"""What a source of documents is: an order, streams, a place to continue from; and the entropy floor of its loss.

Kinds of sources are in corpora.py, shakespeare.py and synthetic.py.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gptlab.data.input_files import LeftOut
from gptlab.errors import ConfigError, shown

Position = Any  # JSON-able; None is the beginning
Documents = Generator[tuple[str, Position], None, None]


class Source(ABC):
    """Documents in a fixed order, cut into `streams` that are read one after the other.

    A stream named "val" or "train" is that split; in one named "all" the first shard is validation.
    """

    name: str
    streams: tuple[str, ...]
    files: tuple[Path, ...] = ()
    """Where a change since the corpus was prepared can be seen."""
    left_out: LeftOut = LeftOut()
    """What lies next to the files and is not read."""

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """What decides the documents, JSON-able: a preparation continues only if it is the same."""

    @abstractmethod
    def documents(self, stream: str, position: Position = None) -> Documents:
        """The documents of a stream after `position`, each with the position after it. Raises DataError."""

    def count(self) -> int | None:
        """How many documents there are in all streams together, where that is known beforehand."""
        return None

    def floor(self) -> EntropyFloor | None:
        """The loss that no model can beat, where the documents come from a known distribution."""
        return None

    def nulls(self) -> int | None:
        """Documents that are left out because they are null, where that was asked for. Raises DataError."""
        return None


@dataclass(frozen=True)
class EntropyFloor:
    """The loss that no model can beat: nats of a source's characters, exact for the windows of a validation stream.

    The floor of a window's tokens is the conditional entropy of each given all tokens of the window before it, and
    nothing from outside the window, for one who knows the source and where the window stands in the stream. No model's
    expected loss is below it, and the source's own predictor reaches it. A model that learnt from windows of the same
    length knows where they stand too, by its position embeddings: a source is periodic, and a floor is only given for
    windows of whole periods. A validation stream is NUL and then one document.

    period: of the character at each place of a period, with all of the period before it in sight
    start: of a character with none, one, two, ... characters of its window in sight, where that is too few for `period`
    parts: nats of single kinds of character, by name, for the reader
    """

    period: tuple[float, ...]
    start: tuple[float, ...] = ()
    parts: Mapping[str, float] | None = None

    def __post_init__(self) -> None:
        assert self.period
        assert len(self.period) == 1 or not self.start, "only sources without places begin slowly"

    @property
    def rate(self) -> float:
        """Nats a character without end and without windows: the source's entropy rate."""
        return math.fsum(self.period) / len(self.period)

    def of_windows(self, block_size: int, count: int) -> float:
        """Nats a token, mean over all positions of the first `count` windows of a validation stream.

        A window's first token is NUL in the first window, which shows nothing, and a character in all others. Raises
        ConfigError where windows of block_size tokens are no whole periods.
        """
        if block_size % len(self.period):
            fitting = max(1, round(block_size / len(self.period))) * len(self.period)
            raise ConfigError(
                f"the floor of this corpus is known for windows of whole lines, of {len(self.period)} tokens each, "
                f"found block_size {block_size}; try {fitting}"
            )
        first, other = (
            math.fsum([*self.start[seen : seen + block_size], self.rate * max(0, block_size - len(self.start[seen:]))])
            for seen in (0, 1)
        )
        return (first + other * (count - 1)) / (block_size * count)

    def as_json(self) -> dict[str, Any]:
        """What a corpus's manifest holds of it; `rate` is there for the reader."""
        parts = {"parts": dict(self.parts)} if self.parts else {}
        return {"unit": "nats a token", "rate": self.rate, **parts, "period": [*self.period], "start": [*self.start]}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> EntropyFloor:
        """The inverse of `as_json`. Raises ValueError, KeyError or TypeError for anything else."""
        period, start = (_nats(content[key]) for key in ("period", "start"))
        if not period or (start and len(period) > 1):
            raise ValueError("expected a period, and a start only with a period of one")
        return cls(period, start, content.get("parts"))


def _nats(values: Sequence[Any]) -> tuple[float, ...]:
    found = tuple(map(float, values))
    if not all(0 <= value < math.inf for value in found):
        raise ValueError(f"expected entropies, found {shown(values)}")
    return found
