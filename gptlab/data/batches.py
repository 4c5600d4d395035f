"""Which windows of a corpus an update reads: a pure function of (seed, step), the same for any ranks and micro-batches.

A window is block_size tokens and the token after them; windows of a shard do not overlap but for that token. Sequence n
of a run (counted from its start) is the n-th window in the order of its epoch: shard by shard, the windows of a shard
shuffled. In the first epoch the shards come in their own order, so that training can start while later shards are still
being written; in later epochs they are shuffled too. Every window comes once an epoch.

RandomWindows are for batches that know nothing of a run's own: every sequence is a draw of its own. UnreadWindows are
for batches whose windows the run itself does not read.
"""

from __future__ import annotations

import copy
import hashlib
import math
from bisect import bisect_right
from collections.abc import Callable, Collection, Sequence
from functools import cached_property, lru_cache
from itertools import accumulate
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from gptlab.data.corpus import Corpus
from gptlab.data.shards import check_tokens
from gptlab.data.synthetic import is_synthetic, synthetic
from gptlab.errors import DataError
from gptlab.randomness import permutation, uniform_index

PATIENCE = 3600.0
"""Seconds to wait for a shard that is being prepared."""


Window = tuple[int, int]
"""(shard, window of the shard): what a training window is called in every epoch."""


class Windows(Protocol):
    """Training windows in some order of sequences, counted from 0."""

    def rows(self, first: int, count: int) -> tuple[Tensor, Tensor]:
        """Tokens and targets, (count, T) int64 each, of sequences first..first+count-1."""
        ...

    def window_ids(self, first: int, count: int) -> list[Window]:
        """Which windows these are: what draws that belong to a window are keyed by."""
        ...


class TrainingWindows:
    """The training windows of a corpus in the order of a seed."""

    def __init__(
        self,
        corpus: Corpus,
        block_size: int,
        vocab_size: int,
        seed: int,
        alive: Callable[[], bool] = lambda: False,
    ) -> None:
        """vocab_size: the model's; a token beyond it is refused by name. alive: whether somebody is still preparing a
        corpus that is not complete."""
        self.corpus, self.block_size, self.vocab_size, self.seed = corpus, block_size, vocab_size, seed
        self.alive = alive
        self._order = lru_cache(maxsize=4)(self._shuffled)
        self._later = lru_cache(maxsize=2)(self._shuffled_shards)
        self._ends: list[int] = []  # windows up to the end of each shard, as far as they were needed
        self._wait_for(0)
        if self._windows(0) < 1:
            raise DataError(
                f"{corpus.folder} has no training window of {block_size} tokens and one more; "
                "shorten --block_size or add text"
            )

    def _wait_for(self, shard: int) -> bool:
        """Whether the corpus has this training shard, waiting for it while it is being prepared."""
        if shard >= len(self.corpus.train) and not self.corpus.complete:
            self.corpus = self.corpus.wait_for("train", shard, timeout=PATIENCE, alive=self.alive)
        return shard < len(self.corpus.train)

    @property
    def counts(self) -> list[int]:
        """Windows of every training shard there is so far."""
        return [self._windows(shard) for shard in range(len(self.corpus.train))]

    def _windows(self, shard: int) -> int:
        return max(0, (self.corpus.train[shard].tokens - 1) // self.block_size)

    def _shuffled(self, epoch: int, shard: int) -> np.ndarray:
        return permutation(self._windows(shard), "windows", self.seed, epoch, shard)

    def _shuffled_shards(self, epoch: int) -> tuple[list[int], list[int]]:
        """The shards of a later epoch in its order, and how many windows there are up to the end of each."""
        shards = permutation(len(self.corpus.train), "shards", self.seed, epoch).tolist()
        return shards, list(accumulate(map(self._windows, shards)))

    def _counted(self, n: float) -> list[int]:
        """`_ends` as far as sequence n of the first epoch, or to its end."""
        ends = self._ends
        while (not ends or n >= ends[-1]) and self._wait_for(len(ends)):
            ends.append((ends[-1] if ends else 0) + self._windows(len(ends)))
        return ends

    @property
    def epoch(self) -> int:
        """Sequences of an epoch; waits for the end of a corpus that is being prepared."""
        return self._counted(math.inf)[-1]

    def locate(self, n: int) -> tuple[int, int, int]:
        """(epoch, shard, window of the shard) of sequence n of the run."""
        ends = self._counted(n)
        epoch, place = divmod(n, ends[-1])
        shards, ends = self._later(epoch) if epoch else (range(len(ends)), ends)
        at = bisect_right(ends, place)
        shard = shards[at]
        return epoch, shard, int(self._order(epoch, shard)[place - (ends[at - 1] if at else 0)])

    def rows(self, first: int, count: int) -> tuple[Tensor, Tensor]:
        """Tokens and targets, (count, T) int64 each, of sequences first..first+count-1 of the run."""
        return self.read(self.window_ids(first, count))

    def read(self, ids: Sequence[Window]) -> tuple[Tensor, Tensor]:
        """Tokens and targets, (n, T) int64 each, of the windows named. Raises DataError for a token out of range."""
        T = self.block_size
        windows = np.empty((len(ids), T + 1), dtype=np.int64)
        for row, (shard, window) in enumerate(ids):
            windows[row] = self.corpus.read("train", shard)[window * T : window * T + T + 1]
            if windows[row].max() >= self.vocab_size:
                name = self.corpus.folder / self.corpus.train[shard].name
                check_tokens(windows[row], self.vocab_size, name, first=window * T)
        both = torch.from_numpy(windows)
        return both[:, :-1].contiguous(), both[:, 1:].contiguous()

    def window_ids(self, first: int, count: int) -> list[Window]:
        """(shard, window) of the same sequences: what draws that belong to a window are keyed by."""
        return [self.locate(first + row)[1:] for row in range(count)]

    def cursor(self, step: int, sequences: int) -> dict[str, Any]:
        """Where the data stands after `step` updates of `sequences` each; derived, recorded for the reader."""
        epoch, shard, window = self.locate(step * sequences)
        return {"sequence": step * sequences, "epoch": epoch, "shard": shard, "window": window}


class UnreadWindows:
    """Sequences 0, 1, 2, ...: those of a run's first epoch, from its end backwards, which the run does not come to."""

    def __init__(self, windows: TrainingWindows, read: int, wanted: int) -> None:
        """read: sequences of the whole run; wanted: how many are taken here. Raises DataError for too few."""
        self.windows, self._last = windows, windows.epoch - 1
        if read + wanted > windows.epoch:
            raise DataError(
                f"gradient_noise_shape batch reads {wanted:,} windows that nothing else reads, next to the {read:,} of "
                f"the run; {windows.corpus.folder} has {windows.epoch:,} of {windows.block_size} tokens; take fewer "
                "steps, add text, or use --gradient_noise_shape isotropic"
            )

    def window_ids(self, first: int, count: int) -> list[Window]:
        """The windows of sequences first..first+count-1."""
        return [self.windows.locate(self._last - first - row)[1:] for row in range(count)]

    def rows(self, first: int, count: int) -> tuple[Tensor, Tensor]:
        """Tokens and targets, (count, T) int64 each, of the same sequences."""
        return self.windows.read(self.window_ids(first, count))


class RandomWindows:
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

    def keyed(self, *more: str | int) -> RandomWindows:
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


class ValidationWindows:
    """The pinned validation set: the first tokens of the validation stream, whatever its shards, cut into windows.

    floor: nats a token that no model's expected loss is below on windows such as these, where that is known. wanted:
    figures that the corpus's source names, each with the token of every target (n, T) that it is the probability of, -1
    for none.
    """

    def __init__(self, corpus: Corpus, block_size: int, vocab_size: int, tokens: int) -> None:
        parts, have = [], 0
        for shard in range(len(corpus.val)):
            if have > tokens:
                break
            parts.append(np.asarray(corpus.read("val", shard)[: tokens + 1 - have]))
            check_tokens(parts[-1], vocab_size, corpus.folder / corpus.val[shard].name)
            have += len(parts[-1])
        count = (have - 1) // block_size
        if count < 1:
            raise DataError(
                f"{corpus.folder} has {corpus.tokens('val')} validation tokens, eval_tokens reads {tokens} of them: "
                f"too few for one window of {block_size} and one more; shorten --block_size, or give more "
                "of both"
            )
        stream = np.concatenate(parts)[: count * block_size + 1]
        self.block_size, self.count = block_size, count
        self.sha256 = hashlib.sha256(stream.astype("<u2").tobytes()).hexdigest()
        self.stream = stream
        self.floor = corpus.floor.of_windows(block_size, count) if corpus.floor else None
        made_up = corpus.floor and is_synthetic(corpus.name)  # another program's folder may have such a name
        named = synthetic(corpus.name).wanted(stream) if made_up else {}
        self.wanted = {name: torch.from_numpy(of[1:].reshape(count, block_size)) for name, of in named.items()}

    def __len__(self) -> int:
        return self.count

    @cached_property
    def unigram_loss(self) -> float:
        """Entropy of the targets' own frequencies, nats: no model that only counts tokens has a lower loss."""
        counts = np.bincount(self.stream[1:])
        shares = counts[counts > 0] / (len(self.stream) - 1)
        return float(-(shares * np.log(shares)).sum())

    @cached_property
    def bigram_loss(self) -> float | None:
        """Entropy of a target given the token before it, nats, by the windows' own frequencies of pairs: no model that
        knows no more than pairs has a lower loss.

        None where more than one pair in ten comes but once, as with large vocabularies: that entropy would be far below
        what frequencies of pairs can do on any other text.
        """
        first, target = self.stream[:-1].astype(np.int64), self.stream[1:].astype(np.int64)
        _, pairs = np.unique(first * (int(self.stream.max()) + 1) + target, return_counts=True)
        if 10 * np.sum(pairs == 1) > len(target):
            return None
        alone = np.bincount(first)
        alone = alone[alone > 0]
        return float((alone @ np.log(alone) - pairs @ np.log(pairs)) / len(target))

    def rows(self, first: int, count: int) -> tuple[Tensor, Tensor]:
        """Tokens and targets, (count, T) int64 each; rows beyond the last window are zeros (one shape for all)."""
        T = self.block_size
        tokens, targets = np.zeros((count, T), dtype=np.int64), np.zeros((count, T), dtype=np.int64)
        for row in range(min(count, self.count - first)):
            start = (first + row) * T
            tokens[row] = self.stream[start : start + T]
            targets[row] = self.stream[start + 1 : start + T + 1]
        return torch.from_numpy(tokens), torch.from_numpy(targets)
