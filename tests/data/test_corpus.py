"""Opening folders, ours and other programs', and telling whether a corpus is the one a run began with."""

import json
import os
import pickle
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from gptlab.data.corpus import Corpus, open_corpus, wait_for_shard
from gptlab.data.prepare import prepare
from gptlab.data.shards import write_shard
from gptlab.errors import ConfigError, DataError

TOKENS = np.arange(100, dtype=np.uint16)


@pytest.fixture
def prepared(tmp_path: Path) -> Corpus:
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"text": f"document {i} " * 20}) + "\n" for i in range(40)))
    return prepare("text", tmp_path / "out", "bytes", inputs=[tmp_path / "in.jsonl"], shard_tokens=2000)


def shrunk(corpus: Corpus, shards: int) -> Corpus:
    """The corpus as it was when so many training shards were there."""
    return replace(corpus, complete=False, train=corpus.train[:shards])


def test_nanogpt_folders_are_read(tmp_path: Path) -> None:
    TOKENS.tofile(tmp_path / "train.bin")
    TOKENS[:9].tofile(tmp_path / "val.bin")
    corpus = open_corpus(tmp_path)
    assert (corpus.name, corpus.tokenizer, corpus.vocab_size, corpus.complete) == (tmp_path.name, "gpt2", 50257, True)
    assert corpus.read("train", 0).tolist() == TOKENS.tolist()
    assert (corpus.tokens("train"), corpus.tokens("val")) == (100, 9)


def test_build_nanogpt_folders_are_read(tmp_path: Path) -> None:
    for index, name in enumerate(["val_000000", "train_000001", "train_000002", "train_000010"]):
        np.save(tmp_path / f"edufineweb_{name}.npy", TOKENS + np.uint16(index))
    corpus = open_corpus(tmp_path)
    assert [int(corpus.read("train", index)[0]) for index in range(3)] == [1, 2, 3]
    assert int(corpus.read("val", 0)[0]) == 0


def test_llm_c_folders_are_read(tmp_path: Path) -> None:
    write_shard(tmp_path / "fineweb_train_000001.bin", TOKENS)
    write_shard(tmp_path / "fineweb_val_000000.bin", TOKENS[:5])
    corpus = open_corpus(tmp_path)
    assert corpus.tokens("train") == 100
    assert corpus.identity()["val"] == [corpus.val[0].sha256]


def test_a_folder_may_name_its_tokenizer(tmp_path: Path) -> None:
    for name in ("train.bin", "val.bin"):
        TOKENS.tofile(tmp_path / name)
    (tmp_path / "tokenizer.txt").write_text("bytes\n")
    assert open_corpus(tmp_path).vocab_size == 256
    (tmp_path / "tokenizer.txt").write_text("byte\n")
    with pytest.raises(ConfigError, match="did you mean 'bytes'"):
        open_corpus(tmp_path)


class _Trap:
    def __reduce__(self):
        return Path.touch, (Path("sprung"),)


def test_a_pickle_is_never_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("train.bin", "val.bin"):
        TOKENS.tofile(name)
    Path("meta.pkl").write_bytes(pickle.dumps(_Trap()))
    open_corpus(tmp_path)
    Path("train.bin").unlink()
    np.save("train_000000.npy", np.array([_Trap()], dtype=object), allow_pickle=True)
    with pytest.raises(DataError, match=r"train_000000\.npy"):
        open_corpus(tmp_path)
    assert not Path("sprung").exists()


@pytest.mark.parametrize(("files", "found"), [([], "neither"), (["train.bin"], "train"), (["val.bin"], "val")])
def test_a_folder_without_a_corpus_says_what_to_do(tmp_path: Path, files: list[str], found: str) -> None:
    for name in files:
        TOKENS.tofile(tmp_path / name)
    with pytest.raises(DataError, match=f"found {found}: make one with `gptlab data prepare`"):
        open_corpus(tmp_path)
    with pytest.raises(DataError, match="found no folder: make one with `gptlab data prepare`"):
        open_corpus(tmp_path / "gone")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text[: len(text) // 2], "damaged: expected a corpus manifest"),
        (lambda text: "[]", "damaged: expected a corpus manifest"),
        (
            lambda text: text.replace('"train_000001.bin"', '"../train_000001.bin"'),
            "damaged: expected a corpus manifest",
        ),
        (lambda text: text.replace('"sha256"', '"md5"'), "damaged: expected a corpus manifest"),
        (lambda text: text.replace('"format": 1', '"format": 2'), "expected manifest format 1, found 2"),
        (lambda text: text.replace('"tokens": 2000', '"tokens": 1999'), r"expected 1999 tokens, found 2000"),
        (lambda text: text.replace('"train_000001.bin"', '"train_000099.bin"'), r"train_000099\.bin: No such file"),
    ],
)
def test_a_damaged_manifest_is_named(prepared: Corpus, change, message: str) -> None:
    manifest = prepared.folder / "corpus.json"
    manifest.write_text(change(manifest.read_text()))
    with pytest.raises(DataError, match=message) as caught:
        open_corpus(prepared.folder)
    assert str(prepared.folder) in str(caught.value)


@pytest.mark.fault(number=6)
def test_a_shard_of_another_size_is_found_on_opening(prepared: Corpus) -> None:
    shard = prepared.folder / prepared.train[1].name
    shard.write_bytes(shard.read_bytes() + b"\0\0")
    with pytest.raises(DataError, match=r"train_000001\.bin is padded: expected 5024 bytes"):
        open_corpus(prepared.folder)


@pytest.mark.fault(number=5)
def test_a_flipped_bit_is_found_on_reading(prepared: Corpus) -> None:
    shard = prepared.folder / prepared.train[1].name
    content = bytearray(shard.read_bytes())
    content[3000] ^= 1
    shard.write_bytes(content)
    corpus = open_corpus(prepared.folder)
    assert len(corpus.read("train", 0)) == 2000
    with pytest.raises(DataError, match=r"train_000001\.bin is damaged: expected SHA-256"):
        corpus.read("train", 1)


@pytest.mark.fault(number=6)
def test_swapped_shards_are_named(prepared: Corpus) -> None:
    """Of one size, so that only checksums tell them apart."""
    first, second = (prepared.folder / shard.name for shard in prepared.train[:2])
    assert first.stat().st_size == second.stat().st_size
    aside = first.rename(first.with_suffix(".aside"))
    second.rename(first)
    aside.rename(second)
    corpus = open_corpus(prepared.folder)
    for number, shard in enumerate((first, second)):
        with pytest.raises(DataError, match=rf"{shard.name} is damaged: expected SHA-256"):
            corpus.read("train", number)


@pytest.mark.fault(number=6)
def test_a_shard_that_is_missing_is_named(prepared: Corpus) -> None:
    shard = prepared.folder / prepared.train[1].name
    shard.unlink()
    with pytest.raises(DataError, match=shard.name):
        open_corpus(prepared.folder)


def test_a_shard_is_verified_once(prepared: Corpus) -> None:
    assert prepared.read("train", 0) is prepared.read("train", 0)


def test_identity_survives_json_and_knows_itself(prepared: Corpus) -> None:
    identity = json.loads(json.dumps(prepared.identity()))
    assert set(identity) == {"tokenizer", "train", "val", "complete"}
    assert prepared.grew_from(identity) == []


def test_a_corpus_may_grow_only_while_it_is_incomplete(prepared: Corpus) -> None:
    early, late = shrunk(prepared, 1), shrunk(prepared, 3)
    assert prepared.grew_from(early.identity()) == []
    assert late.grew_from(early.identity()) == []
    assert early.grew_from(late.identity()) == ["train: recorded 3 shards, found 1"]
    closed = replace(early, complete=True)
    assert prepared.grew_from(closed.identity()) == [f"train: recorded 1 shards, found {len(prepared.train)}"]
    assert replace(prepared, complete=False).grew_from(prepared.identity()) == [
        "recorded a complete corpus, found one still being prepared"
    ]


def test_every_difference_is_told(prepared: Corpus) -> None:
    recorded = prepared.identity()
    recorded["tokenizer"] = "gpt2"
    recorded["train"] = [recorded["train"][0], "0" * 64, *recorded["train"][2:]]
    recorded["val"] = [*recorded["val"], "1" * 64]
    differences = prepared.grew_from(recorded)
    assert differences[0] == "tokenizer: recorded gpt2, found bytes"
    assert differences[1].startswith("train shard 1: recorded SHA-256 000000000000…, found ")
    assert differences[2] == f"val: recorded {len(prepared.val) + 1} shards, found {len(prepared.val)}"


def test_waiting_ends_with_the_shard(prepared: Corpus, tmp_path: Path) -> None:
    out, options = tmp_path / "slow", {"inputs": [tmp_path / "in.jsonl"], "shard_tokens": 2000}

    def prepare_slowly() -> None:
        for limit in (1, 2, 1000):
            time.sleep(0.1)
            prepare("text", out, "bytes", **options, limit_shards=limit)

    preparing = threading.Thread(target=prepare_slowly)
    preparing.start()
    first = wait_for_shard(out, "train", 0, alive=preparing.is_alive, timeout=30)
    assert first.train[0] == prepared.train[0]
    verified = first.read("train", 0)
    second = first.wait_for("train", 1, alive=preparing.is_alive, timeout=30)
    assert second.train[1] == prepared.train[1]
    assert second.read("train", 0) is verified
    whole = second.wait_for("train", 10_000, alive=preparing.is_alive, timeout=30)
    assert whole.complete
    assert whole.train == prepared.train
    preparing.join()


def test_waiting_does_not_outlast_hope(prepared: Corpus, tmp_path: Path) -> None:
    options = {"inputs": [tmp_path / "in.jsonl"], "shard_tokens": 2000, "limit_shards": 1}
    part = prepare("text", tmp_path / "part", "bytes", **options)
    with pytest.raises(DataError, match="expected train shard 1, but its preparation ended: start it again"):
        part.wait_for("train", 1, alive=lambda: False)
    with pytest.raises(DataError, match=r"expected train shard 1 within 0\.05 seconds, found none"):
        part.wait_for("train", 1, alive=lambda: True, timeout=0.05)
    assert part.wait_for("train", 0, alive=lambda: False) is part
    assert prepared.wait_for("train", 10_000, alive=lambda: False) is prepared


def raw_shards(folder: Path, **files: np.ndarray) -> None:
    """Raw shards by name; two underscores stand for a dot."""
    for name, tokens in files.items():
        tokens.tofile(folder / name.replace("__", "."))


GPT2 = (np.arange(3000) * 16 % 50000).astype(np.uint16)


@pytest.mark.parametrize(
    "others",
    [
        ["._train.bin", "._val.bin", ".DS_Store"],
        ["old_train.bin", "train.bin.bak", "mytrain.bin", "train_old.bin", "Train.bin"],
        ["old_train.bin", "old_val.bin", "train_1.bin", "train_0000001.bin", "train.bin~"],
        ["README.md", ".train_000000.bin.swp", "train.bin.gz", "val (1).bin", "train\n.bin"],
    ],
)
def test_files_next_to_the_shards_are_no_data_and_are_counted(tmp_path: Path, others: list[str]) -> None:
    raw_shards(tmp_path, train__bin=GPT2, val__bin=GPT2[:40])
    before = open_corpus(tmp_path)
    assert not before.left_out.count
    for name in others:
        GPT2[:500].tofile(tmp_path / name)
    found = open_corpus(tmp_path)
    assert found.identity() == before.identity()
    assert (found.left_out.count, set(found.left_out.first)) == (len(others), set(others))


@pytest.mark.parametrize(
    ("others", "message"),
    [
        (["train_000000.bin"], r"expected the train tokens once, found train\.bin and train_000000\.bin"),
        (["val.npy"], r"expected the val tokens once, found val\.bin and val\.npy"),
        (["train.BIN"], r"expected the train tokens once, found train\.BIN and train\.bin"),
    ],
)
def test_tokens_that_are_there_twice_are_refused(tmp_path: Path, others: list[str], message: str) -> None:
    raw_shards(tmp_path, train__bin=GPT2, val__bin=GPT2[:40])
    for name in others:
        GPT2[:500].tofile(tmp_path / name)
    with pytest.raises(DataError, match=message):
        open_corpus(tmp_path)


def test_several_corpora_in_a_folder_are_refused(tmp_path: Path) -> None:
    for name in ("tinystories_train", "tinystories_val", "wiki_train", "wiki_val"):
        write_shard(tmp_path / f"{name}.bin", GPT2)
    with pytest.raises(DataError, match=r"found several \(tinystories_train\.bin, wiki_train\.bin\): move"):
        open_corpus(tmp_path)
    (tmp_path / "wiki_train.bin").rename(tmp_path / "._wiki_train.bin")
    (tmp_path / "wiki_val.bin").unlink()
    assert open_corpus(tmp_path).train[0].name == "tinystories_train.bin"


def test_hidden_shards_alone_are_no_corpus(tmp_path: Path) -> None:
    for name in ("._train.bin", ".train_000000.bin"):
        GPT2.tofile(tmp_path / name)
    with pytest.raises(DataError, match=r"found neither \(left out 2: 2 hidden"):
        open_corpus(tmp_path)


@pytest.mark.parametrize("suffix", ["bin", "npy"])
def test_tokens_of_a_vocabulary_of_their_own_are_not_taken_for_gpt2s(tmp_path: Path, suffix: str) -> None:
    """nanoGPT's shakespeare_char: numbers of characters, next to a pickle with their meaning."""
    characters = (np.arange(5000) * 7 % 65).astype(np.uint16)
    for split in ("train", "val"):
        characters.tofile(tmp_path / f"{split}.bin") if suffix == "bin" else np.save(
            tmp_path / f"{split}.npy", characters
        )
    doubtful = open_corpus(tmp_path)
    assert (doubtful.tokenizer, doubtful.vocab_size) == ("unknown", 65)
    assert doubtful.doubt == "no token is above 64, which is no text of GPT-2's tokenizer"
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps(_Trap()))
    assert open_corpus(tmp_path).doubt == "meta.pkl stands for a vocabulary of their own"
    assert not open_corpus(tmp_path).left_out.count
    (tmp_path / "tokenizer.txt").write_text("gpt2")
    assert (open_corpus(tmp_path).tokenizer, open_corpus(tmp_path).doubt) == ("gpt2", "")
    assert not Path("sprung").exists()


def test_a_large_vocabulary_of_characters_is_known_by_its_pickle(tmp_path: Path) -> None:
    raw_shards(tmp_path, train__bin=GPT2, val__bin=GPT2)
    assert open_corpus(tmp_path).tokenizer == "gpt2"
    (tmp_path / "meta.pkl").write_bytes(b"anything")
    assert open_corpus(tmp_path).tokenizer == "unknown"


def test_a_token_beyond_gpt2s_is_named(tmp_path: Path) -> None:
    tokens = GPT2.copy()
    tokens[123] = 60000
    raw_shards(tmp_path, train__bin=tokens, val__bin=GPT2)
    found = open_corpus(tmp_path)
    assert (found.tokenizer, found.vocab_size) == ("unknown", 60001)
    assert found.doubt == "train.bin has token 60000 at position 123, GPT-2 has 50257"


def test_linked_shards_are_read(tmp_path: Path) -> None:
    """As a Hugging Face cache holds them."""
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshot").mkdir()
    for split in ("train", "val"):
        GPT2.tofile(tmp_path / "blobs" / f"hash-of-{split}")
        (tmp_path / "snapshot" / f"{split}.bin").symlink_to(f"../blobs/hash-of-{split}")
    assert open_corpus(tmp_path / "snapshot").tokens("train") == len(GPT2)


@pytest.mark.parametrize("name", ["train.bin", "corpus.json", "tokenizer.txt", "train_000000.bin"])
@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_what_never_ends_is_refused_at_once(tmp_path: Path, name: str, kind: str) -> None:
    raw_shards(tmp_path, val__bin=GPT2)
    if not name.startswith("train"):
        raw_shards(tmp_path, train__bin=GPT2)
    os.mkfifo(tmp_path / name) if kind == "pipe" else (tmp_path / name).symlink_to("/dev/zero")
    with pytest.raises(DataError, match=f"{name}: expected a regular file, found a {kind}"):
        open_corpus(tmp_path)
