"""Training windows drawn by key, away from some that are spoken for: batches that know nothing of those.

A run's own order (batches.py) gives every window once an epoch. Here every sequence is a draw of its own, so that any
number of batches can be had for one step, each independent of the others and of the step's own.
"""

from __future__ import annotations

import copy
from bisect import bisect_right
from collections.abc import Collection
from itertools import accumulate

from torch import Tensor

from gptlab.data.batches import TrainingWindows, Window
from gptlab.errors import DataError
from gptlab.randomness import uniform_index


class DrawnWindows:
    """Sequences 0, 1, 2, ...: each a window uniform over those of the corpus that are not `taken`, by (key, n)."""

    def __init__(self, windows: TrainingWindows, taken: Collection[Window], *key: str | int) -> None:
        """Raises DataError where more than half of the windows are taken.

        windows: of which corpus; its shards as they are now, so that a draw stays what it is while others are written.
        """
        self.windows, self.taken, self.key = windows, frozenset(taken), key
        self._ends = list(accumulate(windows.counts))
        if 2 * len(self.taken) > self._ends[-1]:
            raise DataError(
                f"{windows.corpus.folder} has {self._ends[-1]} training windows of {windows.block_size} tokens and "
                f"{len(self.taken)} of them are spoken for: too few are left to draw others from; take fewer steps or "
                "add text"
            )

    def keyed(self, *more: str | int) -> DrawnWindows:
        """Other draws from the same windows, by the key and `more`."""
        other = copy.copy(self)
        other.key = (*self.key, *more)
        return other

    def window(self, n: int) -> Window:
        """(shard, window of the shard) of sequence n."""
        attempt = 0
        while True:
            place = uniform_index(self._ends[-1], "drawn window", *self.key, n, attempt)
            shard = bisect_right(self._ends, place)
            found = shard, place - (self._ends[shard - 1] if shard else 0)
            if found not in self.taken:
                return found
            attempt += 1

    def window_ids(self, first: int, count: int) -> list[Window]:
        """The windows of sequences first..first+count-1."""
        return [self.window(first + row) for row in range(count)]

    def rows(self, first: int, count: int) -> tuple[Tensor, Tensor]:
        """Tokens and targets, (count, T) int64 each, of the same sequences."""
        return self.windows.read(self.window_ids(first, count))
