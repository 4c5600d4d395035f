"""A corpus made in parts: the same tokens as in one piece, in a format that every reader of shards knows."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from gptlab.cli.main import main
from gptlab.data.corpus import open_corpus
from gptlab.data.prepare import merge_parts, write_part
from gptlab.data.shards import HEADER_BYTES, MAGIC, VERSION, sha256_of
from gptlab.data.tokenizers import get_tokenizer
from gptlab.errors import ConfigError, DataError

TEXTS = [f"Document {i}: all the king's horses and {'all ' * (i % 7)}the king's men." for i in range(60)]
PARTS = 3


@pytest.fixture
def parts(tmp_path: Path) -> Path:
    """Parts 0 to 2, written in another order, of every third document each."""
    for number in (2, 0, 1):
        write_part(TEXTS[number::PARTS], tmp_path / "out", number, "gpt2", shard_tokens=100)
    return tmp_path / "out"


def test_every_document_is_there_once_in_the_order_of_parts(parts: Path) -> None:
    corpus = merge_parts(parts, "rhymes", PARTS)
    splits = [corpus.read(split, k) for split in ("val", "train") for k in range(len(corpus.splits[split]))]
    gpt2 = get_tokenizer("gpt2")
    expected = [
        np.concatenate([[gpt2.document_start], gpt2.encode(text)]) for n in range(PARTS) for text in TEXTS[n::PARTS]
    ]
    assert np.concatenate(splits).tolist() == np.concatenate(expected).tolist()
    assert (corpus.name, corpus.tokenizer, corpus.complete) == ("rhymes", "gpt2", True)
    assert corpus.tokens("val") == 100, "the first shard"
    assert json.loads((parts / "corpus.json").read_text())["documents"] == len(TEXTS)


def test_the_bytes_are_llm_cs_and_their_hashes_true(parts: Path) -> None:
    corpus = merge_parts(parts, "rhymes", PARTS)
    for shard in (*corpus.train, *corpus.val):
        path = parts / shard.name
        header = np.fromfile(path, dtype="<i4", count=256)
        assert header[:3].tolist() == [MAGIC, VERSION, shard.tokens]
        assert path.stat().st_size == HEADER_BYTES + 2 * shard.tokens
        assert sha256_of(path) == shard.sha256
    (parts / "corpus.json").unlink()
    plain = open_corpus(parts)  # by their names alone, as other programs read them
    assert (plain.train, plain.val) == (corpus.train, corpus.val)


def test_data_info_reads_it(parts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    merge_parts(parts, "rhymes", PARTS)
    assert main(["data", "info", str(parts), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["complete"]
    assert said["splits"]["val"]["excerpt"].startswith("Document 0: all the king's horses")


def test_a_part_that_is_written_again_is_the_same(parts: Path) -> None:
    before = {path.name: path.read_bytes() for path in parts.iterdir()}
    write_part(TEXTS[1::PARTS], parts, 1, "gpt2", shard_tokens=100, workers=3)
    assert {path.name: path.read_bytes() for path in parts.iterdir()} == before


def test_a_part_without_documents_counts(parts: Path) -> None:
    assert write_part([], parts, PARTS, "gpt2").documents == 0
    assert merge_parts(parts, "rhymes", PARTS + 1).train == merge_parts(parts, "rhymes", PARTS).train


def test_missing_and_damaged_parts_are_named(parts: Path) -> None:
    with pytest.raises(DataError, match="expected parts 0 to 4, found none of 3, 4: write them first"):
        merge_parts(parts, "rhymes", 5)
    write_part(TEXTS, parts, 3, "bytes")
    with pytest.raises(DataError, match="parts of one tokenizer, found bytes and gpt2"):
        merge_parts(parts, "rhymes", 4)
    (parts / "part_00001.json").write_text("{}")
    with pytest.raises(DataError, match=r"part_00001\.json is damaged"):
        merge_parts(parts, "rhymes", PARTS)


def test_a_shard_that_is_gone_leaves_no_corpus(parts: Path) -> None:
    (parts / "part_00002_train_000000.bin").unlink()
    with pytest.raises(DataError, match="part_00002_train_000000"):
        merge_parts(parts, "rhymes", PARTS)
    assert not (parts / "corpus.json").exists()


def test_a_listing_from_elsewhere_leads_to_no_other_folder(parts: Path) -> None:
    listing = parts / "part_00001.json"
    content = json.loads(listing.read_text())
    content["train"][0]["name"] = "../corpus/train_000000.bin"
    listing.write_text(json.dumps(content))
    with pytest.raises(DataError, match="damaged"):
        merge_parts(parts, "rhymes", PARTS)


def test_options_that_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="shard_tokens"):
        write_part(TEXTS, tmp_path / "out", 0, "gpt2", shard_tokens=0)
    with pytest.raises(ConfigError, match="gpt3"):
        write_part(TEXTS, tmp_path / "out", 0, "gpt3")
    assert not (tmp_path / "out").exists()
    write_part(["a"], tmp_path / "out", 0, "gpt2")
    with pytest.raises(DataError, match="too few"):
        merge_parts(tmp_path / "out", "one", 1)
