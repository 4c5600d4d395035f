"""The two vocabularies against known tokens, and what holds for every tokenizer and text."""

import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptlab.data import tokenizers
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
