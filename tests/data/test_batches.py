"""Keyed draws; windows drawn by key, the same however they are asked for; corpora, bit for bit as they always were."""

from __future__ import annotations

import hashlib
import json
import math
import sys
import tempfile
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
import torch
from pyarrow import parquet

from gptlab.data.batches import RandomWindows, TrainingWindows, UnreadWindows, ValidationWindows
from gptlab.data.corpus import Corpus, open_corpus
from gptlab.data.prepare import prepare
from gptlab.data.shards import write_shard
from gptlab.distributed import World
from gptlab.errors import DataError
from gptlab.randomness import key_bits, permutation, torch_generator, uniform_index
from gptlab.training.config import TrainingConfig
from gptlab.training.step import MicroBatches

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


def test_windows_that_a_run_does_not_read_come_from_the_epochs_end(windows: TrainingWindows) -> None:
    order = windows.window_ids(0, 17)
    unread = UnreadWindows(windows, 5, 12)
    assert unread.window_ids(0, 12) == order[:4:-1]
    assert unread.window_ids(3, 4) == order[13:9:-1]
    assert torch.equal(unread.rows(3, 4)[0], windows.read(order[13:9:-1])[0])


def test_a_corpus_without_enough_of_them_is_refused(windows: TrainingWindows) -> None:
    with pytest.raises(DataError, match=r"reads 12 windows .* next to the 6 of the run; .* has 17 of 4 tokens"):
        UnreadWindows(windows, 6, 12)


@pytest.mark.parametrize("batch_size", [1, 2])
def test_batch_noise_reads_what_no_update_of_the_run_reads(windows: TrainingWindows, batch_size: int) -> None:
    """Each window once, the same ones for any micro-batches; the run's own stay what they are without noise."""
    options: dict[str, Any] = {"block_size": T, "total_batch_tokens": 2 * T, "batch_size": batch_size, "steps": 2,
                               "eval_tokens": T}  # fmt: skip
    found: dict[str, list[Any]] = {"all": [], "noise": []}
    noisy = TrainingConfig(**options, gradient_noise=0.5, gradient_noise_shape="batch")
    batches = MicroBatches(noisy, windows, World(), torch.device("cpu"))
    shares = []
    for step in range(2):
        for batch in batches.of(step):
            found[batch.part] += batch.names
            shares.append(batch.share if batch.part == "noise" else 0.0)
    assert (sum(shares), sum(map(abs, shares))) == (0.0, 4.0), "of either half the whole, with its sign"
    assert sorted(found["noise"]) == sorted(windows.window_ids(9, 8))
    plain = MicroBatches(TrainingConfig(**options), windows, World(), torch.device("cpu"))
    assert found["all"] == [name for step in range(2) for batch in plain.of(step) for name in batch.names]
    with pytest.raises(DataError, match="take fewer steps, add text, or use --gradient_noise_shape isotropic"):
        MicroBatches(replace(noisy, steps=3), windows, World(), torch.device("cpu"))


def stream_of(folder: Path, stream: np.ndarray, tokens: int) -> ValidationWindows:
    (folder / "tokenizer.txt").write_text("bytes\n")
    for kind in ("train", "val"):
        write_shard(folder / f"{kind}_000000.bin", stream.astype(np.uint16))
    return ValidationWindows(open_corpus(folder), T, 256, tokens)


@pytest.mark.parametrize("tokens", [400, 1000])
def test_the_bigram_loss_is_that_of_the_best_model_that_only_counts_pairs(tmp_path: Path, tokens: int) -> None:
    stream = np.random.default_rng(1).integers(0, 4, 900).cumsum() % 5
    validation = stream_of(tmp_path, stream, tokens)
    shown, targets = (torch.cat(of).flatten().tolist() for of in zip(
        *(validation.rows(n, 1) for n in range(len(validation))), strict=True))  # fmt: skip
    pairs, firsts = Counter(zip(shown, targets, strict=True)), Counter(shown)
    expected = -sum(n * math.log(n / firsts[first]) for (first, _), n in pairs.items()) / len(targets)
    assert validation.bigram_loss == pytest.approx(expected)
    assert 0 < expected < validation.unigram_loss


def test_no_bigram_loss_is_recorded_where_pairs_are_too_rare_to_count(tmp_path: Path) -> None:
    assert stream_of(tmp_path, np.random.default_rng(1).integers(0, 200, 900), 800).bigram_loss is None


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


GOLDEN = Path(__file__).parents[1] / "golden.json"
T_READ = 32


def write_inputs(folder: Path) -> list[Path]:
    """Files of each kind, in two folders and one named alone."""
    (folder / "in" / "deep").mkdir(parents=True)
    (folder / "in" / "b.txt").write_text("A text\r\nof two lines. " * 90, encoding="utf-8-sig", newline="")
    lines = [json.dumps({"id": i, "text": f"Zeile {i} der Größe {i * i} " * (i % 9)}) for i in range(40)]
    (folder / "in" / "a.jsonl").write_text("\n\n".join(lines), encoding="utf-8")
    rows = [f"row {i}: the king's horses, {i % 7} of them" for i in range(50)]
    parquet.write_table(pyarrow.table({"id": range(50), "text": rows}), folder / "in" / "deep" / "c.parquet")
    (folder / "alone.txt").write_text("alone " * 50)
    return [folder / "alone.txt", folder / "in"]


PREPARED: dict[str, dict[str, Any]] = {
    "shakespeare": {"tokenizer": "bytes"},
    "markov:order=3,tokens=200000": {"tokenizer": "bytes"},
    "lpn:bits=14,noise=0.2,tokens=100000": {"tokenizer": "bytes", "shard_tokens": 30_000, "block_size": 16},
    "copy:tokens=50000": {"tokenizer": "bytes"},
    "text": {"tokenizer": "gpt2", "shard_tokens": 700, "val_fraction": 0.2},
    "fineweb-edu": {"tokenizer": "gpt2", "shard_tokens": 200},
}


def digest(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def described(corpus: Corpus, block_size: int) -> dict[str, Any]:
    """Its identity, its manifest, its first batches in two orders, drawn windows and the validation windows."""
    manifest = json.loads((corpus.folder / "corpus.json").read_text())
    kept = {key: manifest[key] for key in ("format", "name", "tokenizer", "vocab_size", "documents", "splits")}
    if "inputs" not in manifest["source"]:  # else it holds this machine's folders; see below
        kept["source"] = manifest["source"]
    windows = TrainingWindows(corpus, block_size, corpus.vocab_size, seed=3)
    validation = ValidationWindows(corpus, block_size, corpus.vocab_size, 4096)
    drawn = RandomWindows(windows, windows.window_ids(0, 2), "golden", 7)
    count = min(40, sum(windows.counts))
    return {
        "identity": digest(corpus.identity()),
        "manifest": digest(json.dumps(kept)),
        "floor": corpus.floor and [round(corpus.floor.rate, 12), round(validation.floor or 0, 12)],
        "windows": digest(windows.window_ids(0, 3 * count)),
        "batch": digest([rows.tolist() for rows in windows.rows(count - 4, 8)]),
        "cursor": windows.cursor(3, 9),
        "drawn": digest(drawn.window_ids(0, 50)),
        "validation": validation.sha256,
    }


def found(name: str, folder: Path) -> dict[str, Any]:
    options = dict(PREPARED[name])
    block_size = options.pop("block_size", T_READ)
    if name in ("text", "fineweb-edu"):
        options["inputs"] = write_inputs(folder)
        if name == "fineweb-edu":
            options["inputs"] = [folder / "in" / "deep"]
    return described(prepare(name, folder / "out", **options), block_size)


@pytest.mark.parametrize("name", PREPARED)
def test_a_corpus_and_its_batches_are_what_they_were(name: str, tmp_path: Path) -> None:
    assert found(name, tmp_path) == json.loads(GOLDEN.read_text())["corpora"][name]


def test_the_settings_of_a_users_files_are_what_they_were(tmp_path: Path) -> None:
    """By which a corpus that was prepared earlier is known: paths without links, and sizes, in order."""
    inputs = write_inputs(tmp_path)
    corpus = prepare("text", tmp_path / "out", "bytes", inputs=inputs, val_fraction=0.2)
    names = ("alone.txt", "in/a.jsonl", "in/b.txt", "in/deep/c.parquet")
    files = [(str((tmp_path / name).resolve()), (tmp_path / name).stat().st_size) for name in names]
    assert json.loads((corpus.folder / "corpus.json").read_text())["source"] == {
        "inputs": {
            "files": 4,
            "bytes": sum(size for _, size in files),
            "names_and_sizes_sha256": hashlib.sha256(json.dumps(files).encode()).hexdigest(),
        },
        "val_fraction": 0.2,
    }


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        golden = {name: found(name, Path(scratch, str(place))) for place, name in enumerate(PREPARED)}
    GOLDEN.write_text(json.dumps(golden, indent=1) + "\n")
    sys.stdout.write(f"{GOLDEN} written\n")


def test_a_key_stands_for_the_same_numbers_for_good() -> None:
    """Golden values: a change of them would change every run's data order."""
    assert key_bits("windows", 1, 0, 0) == 115686943453296968236951949290310013670
    assert permutation(10, "windows", 1, 0, 0).tolist() == [5, 2, 9, 6, 8, 4, 1, 3, 7, 0]
    assert [uniform_index(11, "rotate", 1, step) for step in range(8)] == [5, 2, 10, 7, 2, 4, 0, 0]


def test_keys_that_differ_in_any_part_differ() -> None:
    keys = [("a", 1), ("a", 2), ("b", 1), ("a", "1"), ("a1",), ("a", 1, 0), ("a", 11), ("a", 1, 1), ()]
    assert len({key_bits(*key) for key in keys}) == len(keys)
    orders = {tuple(permutation(20, *key)) for key in keys}
    assert len(orders) == len(keys)


def test_a_permutation_has_every_number_once() -> None:
    for n in (0, 1, 2, 1000):
        assert sorted(permutation(n, "x", n).tolist()) == list(range(n))


def test_permutations_and_indices_are_uniform() -> None:
    """Each of 4 places is taken about as often: 4,000 draws, five standard deviations."""
    firsts = np.bincount([permutation(4, "first", i)[0] for i in range(4000)], minlength=4)
    indices = np.bincount([uniform_index(4, "index", i) for i in range(4000)], minlength=4)
    for counts in (firsts, indices):
        assert np.abs(counts - 1000).max() < 5 * np.sqrt(4000 * 0.25 * 0.75)


def test_torch_generators_are_fresh_and_leave_the_global_one_alone() -> None:
    before = torch.get_rng_state()
    first, again, other = (torch.rand(3, generator=torch_generator("x", seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), before)
