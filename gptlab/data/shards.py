"""Token files: llm.c's shards written and read, build-nanogpt's .npy and nanoGPT's raw .bin read.

A shard is 256 little-endian int32 (magic 20240520, version 1, token count, the rest 0), then that many little-endian
uint16 tokens. A file is mapped, never loaded, and its size is checked before a token is touched. Which shards make a
corpus is corpus.py's business.
"""

from __future__ import annotations

import codecs
import hashlib
import os
import re
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from gptlab.errors import DataError, one_line, shortened
from gptlab.files import flush, open_regular, writing

MAGIC = 20240520
VERSION = 1
HEADER_BYTES = 256 * 4
TOKEN = np.dtype("<u2")
NPY_MAGIC = b"\x93NUMPY"
WIDTH_SAMPLE = 1 << 16
"""Words of a raw file that are looked at: whoever wrote it may have meant other numbers."""

_NUMBERED = re.compile(r"_\d{6}\.bin$")  # llm.c's names: always with a header


@dataclass(frozen=True)
class ShardInfo:
    """A finished shard: its file name, its tokens, and the SHA-256 of the whole file."""

    name: str
    tokens: int
    sha256: str

    def as_json(self) -> dict[str, str | int]:
        """What a manifest lists."""
        return {"file": self.name, "tokens": self.tokens, "sha256": self.sha256}


def write_shard(path: Path, tokens: np.ndarray) -> ShardInfo:
    """Write (n,) uint16 `tokens` to `path`, whole or not at all. Raises DataError where the disk refuses."""
    assert tokens.dtype == np.uint16, tokens.dtype
    assert tokens.ndim == 1, tokens.shape
    assert 0 < len(tokens) < 2**31, len(tokens)
    header = np.zeros(256, dtype="<i4")
    header[:3] = MAGIC, VERSION, len(tokens)
    parts = (header.data.cast("B"), np.ascontiguousarray(tokens, dtype=TOKEN).data.cast("B"))
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    write_atomically(path, parts)
    return ShardInfo(path.name, len(tokens), digest.hexdigest())


def write_atomically(path: Path, parts: Iterable[bytes | memoryview]) -> None:
    """Write `parts` to `path`, whole or not at all, so that it lasts through a power cut.

    Raises DataError where the disk is full or may not be written, and leaves no debris then.
    """
    try:
        with writing(path) as file:
            for part in parts:
                file.write(part)
        flush(path.parent)  # a rename is an entry of the folder, which is data of its own
    except OSError as error:
        raise DataError(
            f"cannot write {path.name} in {path.parent}: {error.strerror or error}: make room there, or choose "
            "another folder, then run again to continue"
        ) from error


def open_shard(path: Path, sha256: str | None = None) -> np.ndarray:
    """The tokens of a file, (n,) uint16, read-only and mapped.

    `.npy` is build-nanogpt's. A `.bin` whose name ends in six digits, or that starts with the magic number, is llm.c's;
    any other is nanoGPT's, tokens from the first byte on. With `sha256` the whole file is read and compared once.
    Raises DataError naming the file where it is missing, damaged, of another size or kind, or not what was hashed.
    """
    try:
        tokens = _open_npy(path) if path.suffix.lower() == ".npy" else _open_bin(path)
        found = sha256_of(path) if sha256 else None
    except OSError as error:
        raise DataError(f"cannot read shard {path}: {error.strerror or error}: prepare the corpus again") from error
    if found != sha256:
        raise DataError(f"{path} is damaged: expected SHA-256 {sha256}, found {found}: prepare the corpus again")
    return tokens


def check_tokens(tokens: np.ndarray, vocab_size: int, name: str | Path, first: int = 0) -> None:
    """Raise DataError, naming the file, the position and the token, if one is not below `vocab_size`.

    first: the position in the file of the first of `tokens`.
    """
    if len(tokens) == 0 or tokens.max() < vocab_size:
        return
    window = 1 << 22  # a comparison over the whole shard would take a byte a token
    for start in range(0, len(tokens), window):
        outside = np.flatnonzero(tokens[start : start + window] >= vocab_size)
        if len(outside):
            found, position = int(tokens[start + outside[0]]), first + start + int(outside[0])
            raise DataError(
                f"{name}: token out of range: expected tokens below the model's vocab_size {vocab_size}, found "
                f"{found} at position {position}: choose a model or a corpus of the other's tokenizer"
            )


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]


def _open_bin(path: Path) -> np.ndarray:
    with open_regular(path) as file:
        size, start = os.fstat(file.fileno()).st_size, file.read(HEADER_BYTES)
        header = np.frombuffer(start[: len(start) // 4 * 4], dtype="<i4")
        # No raw file of GPT-2 tokens starts with the magic number: its first half would be token 55496.
        if not _NUMBERED.search(path.name.lower()) and (len(header) == 0 or header[0] != MAGIC):
            return _open_raw(path, file, size)
        if size < HEADER_BYTES:
            raise DataError(f"{path} is truncated: expected a header of {HEADER_BYTES} bytes, found {size} bytes")
        if header[0] != MAGIC:
            raise DataError(f"{path} is no shard: expected magic number {MAGIC}, found {header[0]}")
        if header[1] != VERSION:
            raise DataError(f"{path}: expected shard version {VERSION}, found {header[1]}")
        count = int(header[2])
        if count < 1:
            raise DataError(f"{path}: expected a token count above 0 in the header, found {count}")
        _check_size(path, size, HEADER_BYTES + count * TOKEN.itemsize, f"for {count} tokens")
        return np.memmap(file, dtype=TOKEN, mode="r", offset=HEADER_BYTES, shape=(count,))


def _open_raw(path: Path, file: BinaryIO, size: int) -> np.ndarray:
    if size == 0 or size % TOKEN.itemsize:
        raise DataError(f"{path}: expected uint16 tokens, so an even number of bytes above 0, found {size} bytes")
    tokens = np.memmap(file, dtype=TOKEN, mode="r")
    if other := _other_width(tokens[:WIDTH_SAMPLE]):
        raise DataError(
            f"{path}: expected uint16 tokens, found what looks like {other}: convert the file, or prepare the corpus "
            "again"
        )
    return tokens


def _other_width(sample: np.ndarray) -> str:
    """What the first words of a raw file look like, if not uint16 tokens; empty where they may be."""
    for order, words in ("", sample), ("big-endian ", sample.byteswap()):
        pairs = words[: len(words) // 2 * 2].reshape(-1, 2)
        low, high = (pairs[:, 1], pairs[:, 0]) if order else (pairs[:, 0], pairs[:, 1])
        # Words that are always about 0 next to words that are not: halves of numbers below 2**20.
        if len(pairs) >= 16 and high.max() < 16 and np.mean(low > 15) > 0.25:
            return f"{order}{64 if not (pairs[::2].any() and pairs[1::2].any()) else 32}-bit integers"
    return "text or single bytes" if np.mean(sample > 255) > 0.5 and _is_utf8(sample.tobytes()) else ""


def _is_utf8(content: bytes) -> bool:
    """Whether it is the beginning of UTF-8: a sample may end within a character."""
    try:
        codecs.getincrementaldecoder("utf-8")().decode(content)
    except UnicodeDecodeError:
        return False
    return True


def _open_npy(path: Path) -> np.ndarray:
    with open_regular(path) as file:
        start = file.read(len(NPY_MAGIC))
    if start != NPY_MAGIC:  # numpy would take an archive, too
        raise DataError(f"{path}: expected a whole .npy file of uint16 tokens, found one that begins {start!r}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # a header may be of another time, or wrong in a way that Python warns of
            tokens = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # a header is a Python literal, and numpy lets pass what reading one may raise
        raise DataError(f"{path}: expected a whole .npy file of uint16 tokens, found: {one_line(error)}") from error
    if not isinstance(tokens, np.memmap) or tokens.dtype != TOKEN or tokens.ndim != 1:
        found = f"{tokens.dtype} of shape {tokens.shape}" if isinstance(tokens, np.ndarray) else type(tokens).__name__
        raise DataError(
            f"{path}: expected a one-dimensional array of little-endian uint16, found {shortened(found, 200)}: convert "
            "it with tokens.astype('<u2')"
        )
    if not len(tokens):
        raise DataError(f"{path}: expected tokens, found none: prepare the corpus again")
    _check_size(path, path.stat().st_size, tokens.offset + tokens.nbytes, f"for {len(tokens)} tokens")
    return tokens


def _check_size(path: Path, found: int, expected: int, what: str) -> None:
    if found != expected:
        state = "truncated" if found < expected else "padded"
        raise DataError(f"{path} is {state}: expected {expected} bytes {what}, found {found}: prepare the corpus again")
