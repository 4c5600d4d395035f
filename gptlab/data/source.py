"""What a source of documents is: an order, streams, a place to go on from. Kinds are in corpora.py and synthetic.py."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Generator
from typing import Any

from gptlab.data.floor import Floor

Position = Any  # JSON-able; None is the beginning
Documents = Generator[tuple[str, Position], None, None]


class Source(ABC):
    """Documents in a fixed order, cut into `streams` that are read one after the other.

    A stream named "val" or "train" is that split; in one named "all" the first shard is validation.
    """

    name: str
    streams: tuple[str, ...]

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """What decides the documents, JSON-able: a preparation is gone on with only if it is the same."""

    @abstractmethod
    def documents(self, stream: str, position: Position = None) -> Documents:
        """The documents of a stream after `position`, each with the position after it. Raises DataError."""

    def count(self) -> int | None:
        """How many documents there are in all streams together, where that is known beforehand."""
        return None

    def floor(self) -> Floor | None:
        """The loss that no model can beat, where the documents come from a known distribution."""
        return None
