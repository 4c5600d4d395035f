"""Text to tokens and back: `bytes` (one token a byte) and `gpt2` (byte-pair encoding through tiktoken).

Nothing is downloaded: GPT-2's merges lie beside this file and are checked against the hash tiktoken pins. What the
tokens are written to, and where documents come from, is told in shards.py and corpora.py.
"""

from __future__ import annotations

import functools
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from gptlab.errors import ConfigError, DataError, did_you_mean

if TYPE_CHECKING:
    import tiktoken

Tokens = np.ndarray  # (n,) uint16

MERGES_FILE = Path(__file__).with_name("gpt2_merges.bpe")
MERGES_SHA256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"

# GPT-2's pre-tokenizer: contractions, letters, digits, other signs, blanks. In tiktoken's possessive form, which
# matches the same pieces as the original release's and runs faster.
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"


class Tokenizer(ABC):
    """A fixed vocabulary: `name`, `vocab_size` (real tokens, no padding) and `document_start`, put before documents.

    rows: of the embedding of a model that is trained on it; the last ones may only pad it.
    """

    name: str
    vocab_size: int
    rows: int
    document_start: int

    @abstractmethod
    def encode(self, text: str) -> Tokens:
        """Tokens of ordinary text, (n,) uint16: a special token spelled out in `text` is encoded as plain text.

        A lone surrogate, which UTF-8 cannot hold, becomes U+FFFD. Raises DataError for text the vocabulary cannot hold.
        """

    @functools.cached_property
    @abstractmethod
    def token_table(self) -> tuple[bytes, ...]:
        """The bytes of every token, by token."""

    def encode_batch(self, texts: Sequence[str], threads: int = 1) -> list[Tokens]:
        """`encode` of each text, in order, over `threads` threads."""
        if threads == 1 or len(texts) < 2:
            return [self.encode(text) for text in texts]
        with ThreadPoolExecutor(threads) as pool:
            return list(pool.map(self.encode, texts))

    def token_bytes(self, token: int) -> bytes:
        """The bytes one token stands for; a token often holds only a part of a UTF-8 character."""
        if not 0 <= token < self.vocab_size:
            raise DataError(f"expected a {self.name} token below {self.vocab_size}, found {token}")
        return self.token_table[token]

    def decode(self, tokens: Iterable[int]) -> str:
        """The text of `tokens`; bytes that are no UTF-8 become U+FFFD."""
        return b"".join(self.token_bytes(int(token)) for token in tokens).decode(errors="replace")

    @functools.cached_property
    def byte_lengths(self) -> np.ndarray:
        """UTF-8 bytes of each token, (vocab_size,) int64; document_start stands for no text and counts 0."""
        lengths = np.array([len(token) for token in self.token_table], dtype=np.int64)
        lengths[self.document_start] = 0
        return lengths

    def count_bytes(self, tokens: np.ndarray) -> int:
        """UTF-8 bytes that `tokens` (any shape) stand for: the divisor of bits per byte.

        >>> tokenizer = get_tokenizer("gpt2")
        >>> tokenizer.count_bytes(np.array([tokenizer.document_start, 31373, 995]))
        11
        """
        return int(self.byte_lengths[tokens].sum())


class BytesTokenizer(Tokenizer):
    """One token a byte of UTF-8. NUL starts documents, so text may not hold it."""

    name = "bytes"
    vocab_size = rows = 256
    document_start = 0

    def encode(self, text: str) -> Tokens:
        encoded = np.frombuffer(_encodable(text).encode(), dtype=np.uint8)
        if not encoded.all():
            position = int(np.argmin(encoded))
            raise DataError(
                f"expected text without NUL bytes (with the bytes tokenizer they start documents), "
                f"found one at byte {position}: remove it, or use the gpt2 tokenizer"
            )
        return encoded.astype(np.uint16)

    @functools.cached_property
    def token_table(self) -> tuple[bytes, ...]:
        return tuple(bytes([byte]) for byte in range(256))


class GPT2Tokenizer(Tokenizer):
    """GPT-2's 50,257 tokens: 256 bytes, 50,000 merges, and <|endoftext|>, which starts documents."""

    name = "gpt2"
    vocab_size = 50257
    rows = 50304  # a multiple of 128, which matmuls like; so in nanoGPT and build-nanogpt
    document_start = 50256

    def encode(self, text: str) -> Tokens:
        return self._encoding.encode_to_numpy(_encodable(text), disallowed_special=()).astype(np.uint16)

    @functools.cached_property
    def token_table(self) -> tuple[bytes, ...]:
        return (*_read_merges(MERGES_FILE), b"<|endoftext|>")

    @functools.cached_property
    def _encoding(self) -> tiktoken.Encoding:
        import tiktoken

        return tiktoken.Encoding(
            name=self.name,
            explicit_n_vocab=self.vocab_size,
            pat_str=GPT2_PATTERN,
            mergeable_ranks={token: rank for rank, token in enumerate(self.token_table[: self.document_start])},
            special_tokens={"<|endoftext|>": self.document_start},
        )


TOKENIZERS: dict[str, type[Tokenizer]] = {"bytes": BytesTokenizer, "gpt2": GPT2Tokenizer}
PADDING = {tokenizer.rows: tokenizer.rows - tokenizer.vocab_size for tokenizer in TOKENIZERS.values()}
"""Rows that are no tokens, by the rows of a vocabulary that is known to be padded."""


@functools.cache
def get_tokenizer(name: str) -> Tokenizer:
    """The tokenizer called `name`; raises ConfigError for an unknown one.

    >>> get_tokenizer("gpt2").encode("hello world").tolist()
    [31373, 995]
    """
    if name not in TOKENIZERS:
        known = ", ".join(TOKENIZERS)
        raise ConfigError(f"expected a tokenizer of {known}, found {name!r}{did_you_mean(name, TOKENIZERS)}")
    return TOKENIZERS[name]()


def _encodable(text: str) -> str:
    """`text` itself where UTF-8 can hold it, else the same with U+FFFD for each lone surrogate."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _read_merges(path: Path) -> list[bytes]:
    """GPT-2's 50,256 mergeable tokens in order of rank: first the bytes, then what each merge joins.

    The file writes each byte as one visible character: printable bytes of Latin-1 stand for themselves, the other 68
    for the characters from U+0100 on. Single bytes are ranked in that same order.
    """
    content = path.read_bytes()
    found = hashlib.sha256(content).hexdigest()
    if found != MERGES_SHA256:
        raise DataError(f"{path}: expected SHA-256 {MERGES_SHA256}, found {found}: install gptlab again")
    visible = [byte for byte in range(256) if chr(byte).isprintable() and chr(byte) != " "]
    byte_order = visible + [byte for byte in range(256) if byte not in visible]
    characters = [chr(byte) for byte in visible] + [chr(256 + extra) for extra in range(256 - len(visible))]
    byte_of = dict(zip(characters, byte_order, strict=True))
    merges = content.decode().splitlines()[1:]  # the first line is the format's version
    return [bytes([byte]) for byte in byte_order] + [
        bytes(byte_of[character] for character in merge.replace(" ", "")) for merge in merges
    ]
