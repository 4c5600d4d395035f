"""Tokenizers: our two vocabularies against known tokens, a model's own against transformers'."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from gptlab.data import huggingface_tokenizer, tokenizers
from gptlab.data.huggingface_tokenizer import OwnTokenizer, files_of, read_tokenizer
from gptlab.data.tokenizers import TOKENIZERS, get_tokenizer
from gptlab.errors import ConfigError, DataError

# From GPT-2's own encoder.json, with the original release's pattern and a plain merge loop.
GPT2_TOKENS = {
    "hello world": [31373, 995],
    "The quick brown fox jumps over the lazy dog.": [464, 2068, 7586, 21831, 18045, 625, 262, 16931, 3290, 13],
    "I'll say they've 1234 dogs,\n\n\tisn't it?  ": (
        [40, 1183, 910, 484, 1053, 1105, 2682, 6844, 11, 628, 197, 271, 77, 470, 340, 30, 220, 220]
    ),
    "naïve café — 東京 🙂": [2616, 38776, 40304, 851, 10545, 251, 109, 12859, 105, 32485],
    "<|endoftext|>": [27, 91, 437, 1659, 5239, 91, 29],
    "  indented\r\n": [220, 773, 4714, 201, 198],
    "": [],
}
# SHA-256 over the 50,257 entries of encoder.json in order, each as its length in two bytes and its own bytes.
ENCODER_JSON_SHA256 = "e2590feaf01aa33ec03500b3e6e31a280ae6ef18c182801ca78ce9d2235f5f72"

text_without_nul = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]))


@pytest.mark.parametrize(("text", "tokens"), GPT2_TOKENS.items())
def test_gpt2_encodes_known_texts(text: str, tokens: list[int]) -> None:
    encoded = get_tokenizer("gpt2").encode(text)
    assert encoded.tolist() == tokens
    assert encoded.dtype == np.uint16


def test_gpt2_has_the_vocabulary_of_the_release() -> None:
    table = get_tokenizer("gpt2").token_table
    entries = b"".join(len(token).to_bytes(2, "little") + token for token in table)
    assert len(table) == 50257
    assert hashlib.sha256(entries).hexdigest() == ENCODER_JSON_SHA256


def test_gpt2_names_a_damaged_merges_file(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    damaged = tmp_path / "merges.bpe"
    damaged.write_bytes(tokenizers.MERGES_FILE.read_bytes()[:-1])
    monkeypatch.setattr(tokenizers, "MERGES_FILE", damaged)
    with pytest.raises(DataError, match=r"merges\.bpe: expected SHA-256 1ce16647"):
        tokenizers.GPT2Tokenizer().encode("x")


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(deadline=None)  # a busy machine is no fault
@given(text=text_without_nul)
def test_text_survives_the_round_trip(name: str, text: str) -> None:
    tokenizer = get_tokenizer(name)
    tokens = tokenizer.encode(text)
    assert tokenizer.decode(tokens) == text
    assert tokenizer.count_bytes(tokens) == len(text.encode())
    assert not np.isin(tokenizer.document_start, tokens)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_document_start_stands_for_no_text(name: str) -> None:
    tokenizer = get_tokenizer(name)
    tokens = np.array([[tokenizer.document_start, *tokenizer.encode("é")], [tokenizer.document_start] * 3][:1])
    assert tokenizer.count_bytes(tokens) == 2
    assert tokenizer.count_bytes(np.array([tokenizer.document_start], dtype=np.uint16)) == 0


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_lone_surrogate_becomes_the_replacement_character(name: str) -> None:
    tokenizer = get_tokenizer(name)
    assert tokenizer.decode(tokenizer.encode("a\ud800b")) == "a\ufffdb"


@pytest.mark.parametrize("name", TOKENIZERS)
def test_half_a_character_decodes_to_the_replacement_character(name: str) -> None:
    tokenizer = get_tokenizer(name)
    assert tokenizer.decode(tokenizer.encode("🙂")[:1]).startswith("\ufffd")


def test_bytes_refuse_nul() -> None:
    with pytest.raises(DataError, match="found one at byte 3"):
        get_tokenizer("bytes").encode("é!\0x")


@pytest.mark.parametrize(("name", "token"), [("bytes", 256), ("gpt2", 50257), ("gpt2", -1)])
def test_a_token_out_of_range_is_named(name: str, token: int) -> None:
    with pytest.raises(DataError, match=rf"{name} token below \d+, found {token}"):
        get_tokenizer(name).token_bytes(token)


def test_an_unknown_tokenizer_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="found 'gpt-2'; did you mean 'gpt2'"):
        get_tokenizer("gpt-2")


LEARNT = ["the lord of the manor spoke, and they're all gone. naïve 中文 🙂\n" * 3, "what of the play? no more of it"]
TEXTS = [
    "The lord of the manor", " gone", "they're  all\n\n gone.", "naïve 中文 🙂 ok", "<|end|>the<|user|> play", "",
    "zzz", "a\ud800b", "\u0100 [UNK] <unk>",
]  # fmt: skip
END = "<|end|>"


def write_tokenizer(folder: Path, block_size: int, tokenizer: str) -> None:
    for name, content in files_of(tokenizer, block_size).items():
        (folder / name).write_bytes(content)


def byte_level(**changes: Any) -> Tokenizer:
    found = Tokenizer(models.BPE())
    found.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    found.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    for name, value in changes.items():
        setattr(found, name, value)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=330, special_tokens=[END], initial_alphabet=alphabet, show_progress=False)  # pyright: ignore[reportCallIssue]
    found.train_from_iterator(LEARNT, trainer)
    return found


def words() -> Tokenizer:
    found = Tokenizer(models.WordLevel(unk_token="<unk>"))  # pyright: ignore[reportCallIssue]
    found.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
    trainer = trainers.WordLevelTrainer(special_tokens=["<unk>", END], show_progress=False)  # pyright: ignore
    found.train_from_iterator(LEARNT, trainer)
    return found


def pieces() -> Tokenizer:
    """As sentencepiece has it: blanks are letters, and one is put before a text."""
    found = Tokenizer(models.Unigram())
    found.pre_tokenizer = pre_tokenizers.Metaspace()  # type: ignore[assignment]
    found.decoder = decoders.Metaspace()  # type: ignore[assignment]
    how = {"vocab_size": 70, "unk_token": "<unk>", "special_tokens": ["<unk>", END], "show_progress": False}
    trainer = trainers.UnigramTrainer(**how)
    found.train_from_iterator(LEARNT, trainer)
    return found


def cut_short() -> Tokenizer:
    """Trained with texts cut and filled up, which its file remembers."""
    found = byte_level()
    found.enable_truncation(max_length=2)
    found.enable_padding(length=9)
    return found


def started() -> Tokenizer:
    found = byte_level()
    found.post_processor = processors.TemplateProcessing(single=f"{END} $A", special_tokens=[(END, 0)])  # type: ignore[assignment]
    return found


def two_files(folder: Path, **settings: Any) -> None:
    byte_level().model.save(str(folder))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"eos_token": END, "bos_token": END, "unk_token": END, **settings})
    )


def with_added(folder: Path) -> None:
    """GPT-2's two files, and tokens that were added to them, as transformers 4 wrote them."""
    flags = {"__type": "AddedToken", "lstrip": False, "rstrip": False, "normalized": False, "single_word": False}
    two_files(folder, unk_token={"content": END, **flags}, pad_token="<|pad|>", additional_special_tokens=["<|user|>"])
    count = len(json.loads((folder / "vocab.json").read_text()))
    (folder / "added_tokens.json").write_text(json.dumps({"<|user|>": count, "<|pad|>": count + 1}))


def fast(make: Callable[[], Tokenizer], *added: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=make(), eos_token=END)
        theirs.add_tokens(list(added))
        theirs.save_pretrained(folder)

    return write


FOLDERS: dict[str, Callable[[Path], None]] = {
    "byte-level": fast(byte_level),
    "added tokens": fast(byte_level, "<|user|>", "<|bot|>"),
    "lower case": fast(lambda: byte_level(normalizer=normalizers.Lowercase())),
    "a blank before": fast(lambda: byte_level(pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=True))),
    "a start before": fast(started),
    "words": fast(words),
    "pieces": fast(pieces),
    "cut short": fast(cut_short),
    "two files": two_files,
    "two files, a blank": lambda folder: two_files(folder, add_prefix_space=True),
    "two files, a start": lambda folder: two_files(folder, add_bos_token=True),
    "two files, added": with_added,
}


@pytest.mark.parametrize("kind", FOLDERS)
def test_tokens_are_those_of_transformers(kind: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "gpt2", "vocab_size": 400, "eos_token_id": 5}')
    FOLDERS[kind](tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    ours = read_tokenizer(tmp_path, {"eos_token_id": 5})
    assert isinstance(ours, OwnTokenizer)
    assert ours.vocab_size == max(theirs.get_vocab().values()) + 1
    assert ours.end_of_text == theirs.eos_token_id
    for text in TEXTS:
        plain = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        ids = theirs(plain, add_special_tokens=False).input_ids
        assert ours.encode(text).tolist() == ids, text
        assert ours.prompt(text) == (theirs(plain).input_ids or [ours.document_start]), text
        assert ours.decode(ids) == theirs.decode(ids, clean_up_tokenization_spaces=False), text
        whole = theirs(LEARNT[0] + plain).input_ids
        for before in (1, len(whole) // 2):
            stream = ours.stream(whole[:before])
            shown = "".join([*(stream(token) for token in whole[before:]), stream(None)])
            given = ours.decode(whole[:before])
            assert given.endswith("\ufffd") or given + shown == ours.decode(whole), text


def test_a_byte_level_text_has_its_own_length() -> None:
    description = byte_level().to_str()
    ours = OwnTokenizer(description, "x", {"eos_token": END}, {})
    text = "naïve 中文 🙂 gone"
    tokens = [ours.document_start, *ours.encode(text).tolist(), ours.document_start]
    assert ours.count_bytes(np.array([tokens])) == len(text.encode())


@pytest.mark.parametrize("settings", [{}, {"eos_token": "no such"}, {"eos_token": None}, {"eos_token": {"content": 3}}])
def test_the_end_is_the_models_where_the_tokenizer_says_none(settings: dict[str, Any]) -> None:
    description = byte_level().to_str()
    for found, end in ((7, 7), ([8, 9], 8), (50256, None), ("3", None), (None, None)):
        ours = OwnTokenizer(description, "x", settings, {"eos_token_id": found})
        assert ours.end_of_text == end
        if end is None:
            with pytest.raises(DataError, match="has no token that starts a document"):
                ours.prompt("")
    both = OwnTokenizer(description, "x", settings, {"bos_token_id": 3, "eos_token_id": 4})
    assert (both.document_start, both.end_of_text) == (3, 4)


def test_unknown_words_without_a_token_for_them_are_one_line() -> None:
    model = Tokenizer(models.WordLevel({"a": 0}, unk_token="[UNK]"))  # pyright: ignore[reportCallIssue]
    with pytest.raises(DataError, match=r"x: it has no tokens for this text: .*UNK"):
        OwnTokenizer(model.to_str(), "x", {}, {}).encode("b")


@pytest.mark.parametrize("kind", ["ours", "transformers'", "merges as text"])
def test_gpt2_and_bytes_are_known_by_their_content(kind: str, tmp_path: Path) -> None:
    for name in ("gpt2", "bytes"):
        folder = tmp_path / name
        folder.mkdir()
        write_tokenizer(folder, 64, name)
        if kind != "ours":
            theirs = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
            for file in folder.iterdir():
                file.unlink()
            theirs.save_pretrained(folder)
            assert (folder / "tokenizer.json").is_file()
        if kind == "merges as text":
            content = json.loads((folder / "tokenizer.json").read_text())
            content["model"]["merges"] = [" ".join(merge) for merge in content["model"]["merges"]]
            (folder / "tokenizer.json").write_text(json.dumps(content))
        assert read_tokenizer(folder, {}) is get_tokenizer(name)


@pytest.mark.parametrize("text", [*TEXTS[:-2], "\u0100\u0143 é\x01"])
def test_transformers_reads_bytes_as_we_do(text: str, tmp_path: Path) -> None:
    write_tokenizer(tmp_path, 64, "bytes")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    assert theirs(text).input_ids == list(text.encode())
    assert theirs.decode(list(text.encode())) == text


def changed(**changes: Any) -> dict[str, bytes]:
    """GPT-2's tokenizer.json but for one thing."""
    vocabulary = json.loads(files_of("gpt2", 64)["vocab.json"])
    merges = files_of("gpt2", 64)["merges.txt"].decode().splitlines()[1:]
    content = json.loads(files_of("bytes", 64)["tokenizer.json"])
    content["model"] |= {"vocab": vocabulary, "merges": merges}
    for key, value in changes.items():
        (content["model"] if key in content["model"] else content)[key] = value
    return {"tokenizer.json": json.dumps(content).encode()}


def test_what_differs_from_gpt2_in_anything_is_not_gpt2(tmp_path: Path) -> None:
    plain = json.loads(changed()["tokenizer.json"])
    vocabulary, merges, level = plain["model"]["vocab"], plain["model"]["merges"], plain["pre_tokenizer"]
    swapped = {**vocabulary, "!": vocabulary['"'], '"': vocabulary["!"]}
    assert read(changed(), tmp_path) is get_tokenizer("gpt2")
    for change in (
        {"vocab": swapped}, {"merges": [merges[1], merges[0], *merges[2:]]}, {"merges": merges[:-1]},
        {"pre_tokenizer": {**level, "add_prefix_space": True}}, {"pre_tokenizer": {**level, "use_regex": False}},
        {"pre_tokenizer": None}, {"normalizer": {"type": "Lowercase"}}, {"dropout": 0.1},
        {"added_tokens": [{"id": 50257, "content": "<|user|>", "single_word": False, "lstrip": False, "rstrip": False,
                           "normalized": False, "special": True}]},
    ):  # fmt: skip
        assert isinstance(read(changed(**change), tmp_path), OwnTokenizer), change


def read(files: dict[str, bytes], folder: Path) -> object:
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return read_tokenizer(folder, {})


def test_nothing_is_concluded_from_a_size(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "gpt2", "vocab_size": 50257}')
    assert read_tokenizer(tmp_path, {"vocab_size": 50257}) is None


@pytest.mark.parametrize("names", [["spiece.model"], ["vocab.txt"], ["vocab.json"], ["merges.txt", "tokenizer.model"]])
def test_a_kind_that_is_not_read_says_how_to_write_one_that_is(names: list[str], tmp_path: Path) -> None:
    for name in names:
        (tmp_path / name).write_text("{}")
    with pytest.raises(DataError, match=rf"found {' and '.join(names)}; write the first with transformers\.Auto"):
        read_tokenizer(tmp_path, {})


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "added_tokens.json", "vocab.json"])
@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"3", b'{"model": {"type": "BPE"}}', b'{"a": "b"}', b"\xff", b"[" * 999]
)
def test_a_damaged_file_is_one_line(name: str, content: bytes, tmp_path: Path) -> None:
    two_files(tmp_path)
    byte_level().save(str(tmp_path / "tokenizer.json"))
    if name in ("added_tokens.json", "vocab.json"):
        (tmp_path / "tokenizer.json").unlink()
    (tmp_path / name).write_bytes(content)
    harmless = name == "tokenizer_config.json" and content.startswith(b'{"')
    if harmless:
        read_tokenizer(tmp_path, {})
        return
    with pytest.raises(DataError) as refused:
        read_tokenizer(tmp_path, {})
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 600


@pytest.mark.parametrize("kind", ["large", "pipe", "folder", "device"])
def test_a_file_that_is_too_large_or_no_file_is_refused(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "tokenizer.json"
    if kind == "large":
        monkeypatch.setattr(huggingface_tokenizer, "LIMIT", 100)
        byte_level().save(str(path))
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        path.mkdir()
    with pytest.raises(DataError, match=r"expected at most 100 bytes|expected a regular file, found a"):
        read_tokenizer(tmp_path, {})


def test_without_the_package_ours_are_read_and_others_are_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    assert read(changed(), tmp_path) is get_tokenizer("gpt2")
    with pytest.raises(DataError, match="needs the package tokenizers, which is not installed; "):
        read(changed(dropout=0.1), tmp_path)


def test_tokens_that_a_model_does_not_know_are_named(tmp_path: Path) -> None:
    FOLDERS["added tokens"](tmp_path)
    ours = read_tokenizer(tmp_path, {})
    assert ours is not None
    assert ours.beyond(ours.vocab_size) == ""
    assert ours.beyond(ours.vocab_size - 2).endswith(f"has '<|user|>' as token {ours.vocab_size - 2}")
    assert get_tokenizer("gpt2").beyond(400) == "gpt2 has 50257"
