"""Text to tokens and back: `bytes` (one token a byte) and `gpt2` (byte-pair encoding through tiktoken).

Nothing is downloaded: GPT-2's merges lie next to this file and are checked against the hash tiktoken pins. What the
tokens are written to, and where documents come from, is in shards.py and corpora.py; another model's own tokenizer is
in huggingface_tokenizer.py.
"""

from __future__ import annotations

import codecs
import functools
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from gptlab.errors import ConfigError, DataError, did_you_mean
from gptlab.files import read_bytes

if TYPE_CHECKING:
    import numpy as np
    import tiktoken

MERGES_FILE = Path(__file__).with_name("gpt2_merges.bpe")
MERGES_SHA256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"

END_OF_TEXT = "<|endoftext|>"

# GPT-2's pre-tokenizer: contractions, letters, digits, other signs, blanks. In tiktoken's possessive form, which
# matches the same pieces as the original release's and runs faster.
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"


class Tokenizer(ABC):
    """A fixed vocabulary: its name, and `vocab_size`, the number that every token is below (padding not counted)."""

    name: str
    vocab_size: int

    @property
    @abstractmethod
    def document_start(self) -> int:
        """The token put before documents; raises DataError where there is none."""

    @property
    def end_of_text(self) -> int | None:
        """The token that ends a text, if there is one: with our tokenizers the next document's start."""
        return self.document_start

    @abstractmethod
    def encode(self, text: str) -> np.ndarray:
        """Tokens of text, (n,), none added before or after it.

        A lone surrogate, which UTF-8 cannot hold, becomes U+FFFD. Raises DataError for text the vocabulary cannot hold.
        """

    @abstractmethod
    def decode(self, tokens: Iterable[int]) -> str:
        """The text of `tokens`; bytes that are no UTF-8 become U+FFFD."""

    @abstractmethod
    def stream(self, prompt: Sequence[int]) -> Callable[[int | None], str]:
        """What the next token after `prompt` adds to the text, whole characters only; None ends it and flushes."""

    @abstractmethod
    def count_bytes(self, tokens: np.ndarray) -> int:
        """UTF-8 bytes that `tokens` (any shape) stand for: the divisor of bits per byte.

        >>> import numpy as np
        >>> tokenizer = get_tokenizer("gpt2")
        >>> tokenizer.count_bytes(np.array([tokenizer.document_start, 31373, 995]))
        11
        """

    def prompt(self, text: str) -> list[int]:
        """Tokens to continue from, at least one: those of the text, a document's start where it has none."""
        return self.encode(text).tolist() or [self.document_start]

    def beyond(self, rows: int) -> str:
        """What of the vocabulary a model of `rows` tokens does not know, in words; empty where it knows all."""
        return f"{self.name} has {self.vocab_size}" if self.vocab_size > rows else ""


class _ByteStrings(Tokenizer):
    """A tokenizer of ours: every token is a string of bytes, and a special token spelled out in text is plain text.

    rows: of the embedding of a model that is trained on it; the last ones may only pad it.
    """

    rows: int
    _start: int

    @property
    def document_start(self) -> int:
        return self._start

    @functools.cached_property
    @abstractmethod
    def token_table(self) -> tuple[bytes, ...]:
        """The bytes of every token, by token."""

    def token_bytes(self, token: int) -> bytes:
        """The bytes one token stands for; a token often holds only a part of a UTF-8 character."""
        if not 0 <= token < self.vocab_size:
            raise DataError(f"expected a {self.name} token below {self.vocab_size}, found {token}")
        return self.token_table[token]

    def decode(self, tokens: Iterable[int]) -> str:
        return b"".join(self.token_bytes(int(token)) for token in tokens).decode(errors="replace")

    def stream(self, prompt: Sequence[int]) -> Callable[[int | None], str]:
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        return lambda token: decoder.decode(b"" if token is None else self.token_bytes(token), final=token is None)

    @functools.cached_property
    def byte_lengths(self) -> np.ndarray:
        """UTF-8 bytes of each token, (vocab_size,) int64; document_start stands for no text and counts 0."""
        import numpy as np  # not above: options read vocabulary sizes here, and `--help` needs no arrays

        lengths = np.array([len(token) for token in self.token_table], dtype=np.int64)
        lengths[self.document_start] = 0
        return lengths

    def count_bytes(self, tokens: np.ndarray) -> int:
        return int(self.byte_lengths[tokens].sum())


class BytesTokenizer(_ByteStrings):
    """One token a byte of UTF-8. NUL starts documents, so text may not hold it."""

    name = "bytes"
    vocab_size = rows = 256
    _start = 0

    def encode(self, text: str) -> np.ndarray:
        import numpy as np

        encoded = np.frombuffer(encodable(text).encode(), dtype=np.uint8)
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


class GPT2Tokenizer(_ByteStrings):
    """GPT-2's 50,257 tokens: 256 bytes, 50,000 merges, and <|endoftext|>, which starts documents."""

    name = "gpt2"
    vocab_size = 50257
    rows = 50304  # a multiple of 128, which matmuls like; so in nanoGPT and build-nanogpt
    _start = 50256

    def encode(self, text: str) -> np.ndarray:
        return self._encoding.encode_to_numpy(encodable(text), disallowed_special=()).astype("uint16")

    @functools.cached_property
    def token_table(self) -> tuple[bytes, ...]:
        byte_of = {character: byte for byte, character in visible_bytes().items()}
        joined = (merge.replace(" ", "") for merge in read_merges(MERGES_FILE))
        strings = [*visible_bytes().values(), *joined]
        return (*(bytes(byte_of[character] for character in string) for string in strings), END_OF_TEXT.encode())

    @functools.cached_property
    def _encoding(self) -> tiktoken.Encoding:
        import tiktoken

        return tiktoken.Encoding(
            name=self.name,
            explicit_n_vocab=self.vocab_size,
            pat_str=GPT2_PATTERN,
            mergeable_ranks={token: rank for rank, token in enumerate(self.token_table[: self.document_start])},
            special_tokens={END_OF_TEXT: self.document_start},
        )


TOKENIZERS: dict[str, type[_ByteStrings]] = {"bytes": BytesTokenizer, "gpt2": GPT2Tokenizer}
PADDING = {tokenizer.rows: tokenizer.rows - tokenizer.vocab_size for tokenizer in TOKENIZERS.values()}
"""Rows that are no tokens, by the rows of a vocabulary that is known to be padded."""


@functools.cache
def get_tokenizer(name: str) -> _ByteStrings:
    """The tokenizer called `name`; raises ConfigError for an unknown one.

    >>> get_tokenizer("gpt2").encode("hello world").tolist()
    [31373, 995]
    """
    if name not in TOKENIZERS:
        known = ", ".join(TOKENIZERS)
        raise ConfigError(f"expected a tokenizer of {known}, found {name!r}{did_you_mean(name, TOKENIZERS)}")
    return TOKENIZERS[name]()


def encodable(text: str) -> str:
    """`text` itself where UTF-8 can hold it, else the same with U+FFFD for each lone surrogate."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


@functools.cache
def visible_bytes() -> dict[int, str]:
    """The character that stands for each byte in GPT-2's files, bytes in the order of their ranks.

    Printable bytes of Latin-1 stand for themselves, the other 68 for the characters from U+0100 on.
    """
    own = [byte for byte in range(256) if chr(byte).isprintable() and chr(byte) != " "]
    others = [byte for byte in range(256) if byte not in own]
    return {byte: chr(byte) for byte in own} | {byte: chr(256 + number) for number, byte in enumerate(others)}


def read_merges(path: Path) -> list[str]:
    """GPT-2's 50,000 merges by rank, each two strings of visible bytes with a blank between them."""
    content = read_bytes(path)
    found = hashlib.sha256(content).hexdigest()
    if found != MERGES_SHA256:
        raise DataError(f"{path}: expected SHA-256 {MERGES_SHA256}, found {found}: install gptlab again")
    return content.decode().splitlines()[1:]  # the first line is the format's version
