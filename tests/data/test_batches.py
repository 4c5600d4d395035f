"""Windows drawn by key: uniform over what is not taken, the same however they are asked for."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from gptlab.data.batches import RandomWindows, TrainingWindows, ValidationWindows
from gptlab.data.corpus import open_corpus
from gptlab.data.shards import write_shard
from gptlab.errors import DataError
from gptlab.randomness import permutation

T = 4
SIZES = (21, 41, 9)
"""Tokens of the training shards: 5, 10 and 2 windows. The first token of each window is its number."""


@pytest.fixture
def windows(tmp_path: Path) -> TrainingWindows:
    (tmp_path / "tokenizer.txt").write_text("bytes\n")
    first = 0
    for shard, size in enumerate(SIZES):
        write_shard(tmp_path / f"train_{shard:06d}.bin", (first + np.arange(size) // T).astype(np.uint16))
        first += size // T
    write_shard(tmp_path / "val_000000.bin", np.zeros(9, np.uint16))
    return TrainingWindows(open_corpus(tmp_path), T, 256, seed=1)


ALL = [(0, n) for n in range(5)] + [(1, n) for n in range(10)] + [(2, n) for n in range(2)]
TAKEN = [(0, 3), (1, 0), (1, 9), (2, 0)]


def test_a_sequence_is_found_without_a_walk_over_the_shards(
    windows: TrainingWindows, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In every epoch the window that the walk finds, asked for in any order; shards are counted once an epoch."""

    def walked(n: int) -> tuple[int, int, int]:
        epoch, place = divmod(n, len(ALL))
        shards = permutation(3, "shards", 1, epoch) if epoch else range(3)
        for shard in map(int, shards):
            count = (SIZES[shard] - 1) // T
            if place < count:
                return epoch, shard, int(permutation(count, "windows", 1, epoch, shard)[place])
            place -= count
        raise AssertionError(n)

    asked = [40, 0, 16, 17, 5, 4, 14, 15, 33, 34, 50, 51, 3, 1000, *range(60)]
    assert [windows.locate(n) for n in asked] == [walked(n) for n in asked]
    for epoch in range(3):
        assert {windows.locate(epoch * 17 + n)[1:] for n in range(17)} == set(ALL)
    counted: list[int] = []
    plain = TrainingWindows._windows
    monkeypatch.setattr(TrainingWindows, "_windows", lambda self, shard: counted.append(shard) or plain(self, shard))
    for n in range(16):
        windows.locate(n)
    assert len(counted) <= len(SIZES)  # to shuffle a shard that is not remembered


def test_draws_are_uniform_over_every_shard_and_leave_out_what_is_taken(windows: TrainingWindows) -> None:
    count = 13_000
    found = Counter(RandomWindows(windows, TAKEN, "test").window_ids(0, count))
    assert sorted(found) == sorted(set(ALL) - set(TAKEN))
    expected = count / len(found)
    chi_squared = sum((n - expected) ** 2 / expected for n in found.values())
    assert chi_squared < 26.2, "the 99% point of 12 degrees of freedom"


def test_a_draw_is_decided_by_its_key_and_its_number_alone(windows: TrainingWindows) -> None:
    drawn = RandomWindows(windows, TAKEN, "test", 1)
    ids = drawn.window_ids(100, 40)
    assert ids == [*drawn.window_ids(100, 7), *RandomWindows(windows, TAKEN, "test", 1).window_ids(107, 33)]
    assert ids == RandomWindows(windows, TAKEN, "test").keyed(1).window_ids(100, 40)
    assert ids != RandomWindows(windows, TAKEN, "test", 2).window_ids(100, 40)
    assert ids != drawn.window_ids(140, 40)


def test_the_rows_are_those_of_the_windows(windows: TrainingWindows) -> None:
    drawn = RandomWindows(windows, TAKEN, "test")
    tokens, targets = drawn.rows(3, 30)
    assert tokens[:, 0].tolist() == [ALL.index(window) for window in drawn.window_ids(3, 30)]
    assert torch.equal(tokens[:, 1:], targets[:, :-1])


def test_a_corpus_too_small_to_draw_from_is_refused(windows: TrainingWindows) -> None:
    with pytest.raises(DataError, match="17 training windows of 4 tokens and 9 of them are spoken for"):
        RandomWindows(windows, ALL[:9], "test")


@pytest.mark.parametrize("tokens", [9, 16, 1000])
def test_the_unigram_loss_is_that_of_the_best_model_that_only_counts(tmp_path: Path, tokens: int) -> None:
    """Of the targets of whole windows alone, for any cut into shards."""
    (tmp_path / "tokenizer.txt").write_text("bytes\n")
    stream = np.random.default_rng(1).geometric(0.2, 60).astype(np.uint16)
    write_shard(tmp_path / "train_000000.bin", stream)
    for shard, part in enumerate(np.split(stream, [7, 30])):
        write_shard(tmp_path / f"val_{shard:06d}.bin", part)
    validation = ValidationWindows(open_corpus(tmp_path), T, 256, tokens)
    targets = torch.cat([validation.rows(n, 1)[1].flatten() for n in range(len(validation))]).tolist()
    counts = Counter(targets)
    assert validation.unigram_loss == pytest.approx(
        -sum(math.log(counts[x] / len(targets)) for x in targets) / len(targets)
    )
