"""Prepared corpora and what is read of them, bit for bit as they always were: a run can be repeated years later.

python tests/data/test_golden.py    writes tests/golden/corpora.json again, after a change that is meant
"""

from __future__ import annotations

import hashlib
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from gptlab.data.batches import RandomWindows, TrainingWindows, ValidationWindows
from gptlab.data.corpus import Corpus
from gptlab.data.prepare import prepare

GOLDEN = Path(__file__).parents[1] / "golden" / "corpora.json"
T = 32


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
    block_size = options.pop("block_size", T)
    if name in ("text", "fineweb-edu"):
        options["inputs"] = write_inputs(folder)
        if name == "fineweb-edu":
            options["inputs"] = [folder / "in" / "deep"]
    return described(prepare(name, folder / "out", **options), block_size)


@pytest.mark.parametrize("name", PREPARED)
def test_a_corpus_and_its_batches_are_what_they_were(name: str, tmp_path: Path) -> None:
    assert found(name, tmp_path) == json.loads(GOLDEN.read_text())[name]


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
