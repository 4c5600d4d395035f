"""A user's own files as documents: which of them are read, by one rule for texts and shards, and in bounded memory.

A .txt is one document, a .jsonl one a line, a .json one an object (of a list, or one after the other), a .parquet one a
row; all but parquet may be compressed. Files come from anyone: neither what one unpacks to nor what it says of its size
is believed. Names that begin with a dot are no input: macOS, notebooks and editors put copies there. Suffixes count in
any case, a linked folder is followed once, and a link has the kind of its own name, not of what it leads to.
"""

from __future__ import annotations

import codecs
import contextlib
import functools
import gzip
import io
import json
import os
import re
import zlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

from gptlab.errors import DataError, needs_package, one_line, shortened, shown
from gptlab.files import GB, KB, MB, is_count, kind_of, open_regular, parse_json, read_bytes, size

SUFFIXES = (".txt", ".jsonl", ".json", ".parquet")
COMPRESSIONS = {".gz": ("",), ".zst": ("", ".gz")}
"""Endings of compressed files, each with those of the copies that are read instead where there are such."""


@dataclass
class LeftOut:
    """What in a folder is not read: how many entries of each kind, and the first names."""

    kinds: dict[str, int] = field(default_factory=dict)
    first: list[str] = field(default_factory=list)

    @property
    def count(self) -> int:
        return sum(self.kinds.values())

    def add(self, path: Path, kind: str = "") -> None:
        """Count an entry; its kind is its suffix if no other reason is given."""
        if not kind:
            kind = "hidden" if path.name.startswith(".") else path.suffix.lower() or "without a suffix"
        kind = shortened(kind, 30) if len(self.kinds) < 20 or kind in self.kinds else "other"
        self.kinds[kind] = self.kinds.get(kind, 0) + 1
        if len(self.first) < 8:
            self.first.append(shortened(path.name, 80))

    def as_json(self) -> dict[str, Any]:
        return {"count": self.count, "kinds": self.kinds, "first": self.first}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> LeftOut:
        """The inverse of `as_json`. Raises ValueError, KeyError or TypeError for anything else."""
        found = cls(dict(content["kinds"]), list(content["first"]))
        if not (all(map(is_count, found.kinds.values())) and all(isinstance(name, str) for name in found.first)):
            raise ValueError("expected counts and names")
        return found

    def __str__(self) -> str:
        kinds = ", ".join(f"{count:,} {kind}" for kind, count in self.kinds.items())
        more = ", ..." * (self.count > len(self.first))
        return f"left out {self.count:,}: {kinds} ({', '.join(self.first)}{more})"


def text_kind(name: str) -> tuple[str, str]:
    """(suffix, compression) of a file that can be read, by its name in any case; two empty strings for another.

    >>> text_kind("Part-0.JSONL.gz"), text_kind("a.parquet"), text_kind("a.csv")
    (('.jsonl', '.gz'), ('.parquet', ''), ('', ''))
    """
    name = name.lower()
    compression = next((ending for ending in COMPRESSIONS if name.endswith(ending)), "")
    suffix = os.path.splitext(name.removesuffix(compression))[1]
    known = suffix in SUFFIXES and not (compression and suffix == ".parquet")  # parquet compresses its pages itself
    return (suffix, compression) if known else ("", "")


def find_files(
    inputs: Sequence[str | Path], suffixes: Sequence[str] = SUFFIXES, text_field: str = "text"
) -> tuple[tuple[Path, ...], LeftOut]:
    """The files of these suffixes among `inputs`, each once, and an account of what is left out.

    Folders are searched through, linked ones too, and their files sorted. Names that begin with a dot are not read.
    Raises DataError naming an input that is missing, of another kind, or a folder without such files.
    """
    kinds = ", ".join(suffixes)
    found: list[Path] = []
    seen: set[tuple[int, int]] = set()
    left_out = LeftOut()
    for given in map(Path, inputs):
        if given.is_dir():
            if _identity(given) in seen:
                continue
            files = sorted(_files_below(given.resolve(), seen, left_out))
            known = frozenset(files)
            wanted = [file for file in files if _is_wanted(file, suffixes, text_field, known, left_out)]
            if not wanted:
                others = f" ({left_out})" if left_out.count else ""
                raise DataError(f"expected {kinds} files in folder {given}, found none{others}: choose another")
            found += wanted
        elif not given.exists():
            raise DataError(f"expected a file or folder at {given}, found nothing: look at --input")
        elif text_kind(given.name)[0] not in suffixes:
            raise DataError(f"expected a file of kind {kinds}, found {given}: convert or rename it")
        elif not given.is_file():
            raise DataError(f"{given}: expected a regular file, found {kind_of(given.stat().st_mode)}; copy it to one")
        else:
            found.append(_without_links(given))
    return tuple(dict.fromkeys(found)), left_out


def _without_links(given: Path) -> Path:
    """The file that a link leads to, but for one of another name's kind: Hugging Face caches call files by hash."""
    own, real = given.parent.resolve() / given.name, given.resolve()
    return real if text_kind(real.name) == text_kind(own.name) else own


def _files_below(folder: Path, seen: set[tuple[int, int]], left_out: LeftOut) -> Iterator[Path]:
    """The regular files of a folder and those in it, each folder once, and by its own name where it has one."""
    folders, links = [folder], []
    while folders or links:
        place = folders.pop() if folders else links.pop(0)
        if _identity(place) in seen:
            continue
        seen.add(_identity(place))
        for path in sorted(place.iterdir()):
            if path.name.startswith("."):
                left_out.add(path)
            elif path.is_dir():
                (links if path.is_symlink() else folders).append(path)
            elif path.is_file():
                yield path
            else:
                left_out.add(path, kind_of(path.stat().st_mode) if path.exists() else "links to nothing")
        links.sort()


def _identity(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_dev, status.st_ino


def _is_wanted(
    file: Path, suffixes: Sequence[str], text_field: str, known: Collection[Path], left_out: LeftOut
) -> bool:
    suffix, compression = text_kind(file.name)
    if suffix not in suffixes:
        left_out.add(file)
    elif compression and any(file.with_suffix(other) in known for other in COMPRESSIONS[compression]):
        left_out.add(file, "compressed copies")
    elif suffix == ".json" and not compression and _is_metadata(file, text_field):
        left_out.add(file, ".json without documents")
    else:
        return True
    return False


def _is_metadata(file: Path, text_field: str) -> bool:
    """Whether a .json is one object that is no document, as datasets have next to their files."""
    try:
        content = parse_json(read_bytes(file, limit=MB))
    except (ValueError, DataError):
        return False
    return isinstance(content, dict) and text_field not in content


LONGEST = GB
"""Bytes of a line, of a .json, of a compressed .txt; more is a sign of damage or malice."""
LARGEST_TEXT = 16 * GB
"""Bytes of a .txt, which is one document and lies in memory whole."""
EXPANSION, FREE_EXPANSION = 200, 64 * MB
"""Bytes that a compressed byte may stand for, beyond the first 64 MB. Text that people write comes to 3 to 30."""

LARGEST_PAGE_HEADER = 64 * KB
"""Bytes of a parquet page's header, which may hold the least and the largest text of the page."""

Row = tuple[str, str | None]
"""Where a document stands, in words, and its text; None for a null."""

_BLANKS = re.compile(r"[ \t\r\n]*")
_STARTS = {
    codecs.BOM_UTF32_LE: "UTF-32 (iconv -f UTF-32 -t UTF-8 FILE > NEW)",
    codecs.BOM_UTF16_LE: "UTF-16 (iconv -f UTF-16 -t UTF-8 FILE > NEW)",
    codecs.BOM_UTF16_BE: "UTF-16 (iconv -f UTF-16 -t UTF-8 FILE > NEW)",
    b"\x1f\x8b": "gzip, whose name ends in .gz",
    b"\x28\xb5\x2f\xfd": "zstd, whose name ends in .zst",
    b"PAR1": "parquet, whose name ends in .parquet",
    b"PK\3\4": "a zip archive, which is to be unpacked",
    b"\0\5\x16\7": "what macOS writes next to a file, which can be removed",
}
"""What files begin with that are no UTF-8, and what they are."""


def count_documents(file: Path, text_field: str = "text", skip_null: bool = False) -> tuple[int, int]:
    """(documents, nulls left out) of one file; without `skip_null` they are counted without decoding them."""
    suffix, _ = text_kind(file.name)
    if suffix == ".txt":
        return 1, 0
    if skip_null:
        nulls = [text is None for _, text in _rows(file, 0, text_field)]
        return nulls.count(False), nulls.count(True)
    if suffix == ".parquet":
        with _open_parquet(file, text_field) as table:
            return table.metadata.num_rows, 0
    with _enough_memory(file), _unpacked(file) as stream:
        return sum(1 for _ in (_lines if suffix == ".jsonl" else _json_values)(stream, file)), 0


def read_documents(file: Path, start: int = 0, text_field: str = "text", skip_null: bool = False) -> Iterator[str]:
    """The documents of one file from number `start` on. Raises DataError naming the file and the line or row.

    skip_null: leave nulls out, uncounted; otherwise one is an error.
    """
    if skip_null:
        yield from islice((text for _, text in _rows(file, 0, text_field) if text is not None), start, None)
        return
    for where, text in _rows(file, start, text_field):
        if text is None:
            raise DataError(f"{where}: expected text in {shown(text_field)}, found null: mend it, or add --skip_null")
        yield text


def _rows(file: Path, start: int, text_field: str) -> Iterator[Row]:
    """What stands in a file from row `start` on."""
    suffix, _ = text_kind(file.name)
    with _enough_memory(file):
        if suffix == ".parquet":
            yield from _read_parquet(file, start, text_field)
            return
        with _unpacked(file) as stream:
            if suffix == ".txt":
                yield from [(str(file), decode(_whole(stream, file), str(file)))][start:]
            elif suffix == ".jsonl":
                for number, line in islice(_lines(stream, file), start, None):
                    where = f"{file}, line {number}"
                    yield _row(_parsed(line, where), text_field, where)
            else:
                for number, value in enumerate(islice(_json_values(stream, file), start, None), start + 1):
                    yield _row(value, text_field, f"{file}, object {number}")


@contextlib.contextmanager
def _enough_memory(file: Path) -> Iterator[None]:
    try:
        yield
    except MemoryError as error:
        reason = f" ({shortened(str(error), 100)})" if str(error) else ""
        raise DataError(f"{file} takes more memory than there is{reason}: cut it into smaller documents") from error


def decode(content: bytes, where: str) -> str:
    """The text of UTF-8 bytes, without a mark; raises DataError that says what they look like instead."""
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        other = "UTF-16" if b"\0" in content else "another encoding, such as Latin-1,"
        looks = _other_encoding(content) or f"{other} or no text at all"
        raise DataError(
            f"{where}: expected UTF-8, found a stray byte at {error.start}; it may be {looks}: convert the file"
        ) from error
    if "\0" in text and (looks := _other_encoding(content)):
        raise DataError(f"{where}: expected UTF-8, found NUL bytes; it may be {looks}: convert the file")
    return text


def _other_encoding(content: bytes) -> str:
    """What bytes look like that are no UTF-8 text; empty where there is no telling."""
    for start, kind in _STARTS.items():
        if content.startswith(start):
            return kind
    if (first := content.find(b"\0")) < 0:
        return ""
    if not content[first : first + 4096].strip(b"\0") and len(content) > first + 1:
        return f"damaged from byte {first} on, where NULs begin"
    sample = content[first & ~1 : (first & ~1) + 4096]
    for name, half in (("UTF-16LE", sample[1::2]), ("UTF-16BE", sample[::2])):
        if len(half) > 1 and 0 in half and sum(byte < 32 for byte in half) > 0.9 * len(half):
            wide = sample.count(0) > 0.6 * len(sample)
            name = name.replace("16", "32") if wide else name
            return f"{name} (iconv -f {name} -t UTF-8 FILE > NEW)"
    return ""


@contextlib.contextmanager
def _unpacked(file: Path) -> Iterator[BinaryIO]:
    """The content of a file as a stream, decompressed by its name. Raises DataError where it is damaged or a bomb."""
    _, compression = text_kind(file.name)
    with open_regular(file) as raw:
        if not compression:
            yield raw
            return
        if compression == ".gz":
            inner: Any = gzip.GzipFile(fileobj=raw)
        else:
            pyarrow = _pyarrow(file)
            inner = pyarrow.CompressedInputStream(pyarrow.PythonFile(raw, mode="r"), "zstd")
        yield io.BufferedReader(_Unpacking(inner, file), 1 << 18)  # type: ignore[return-value]


class _Unpacking(io.RawIOBase):
    """What a compressed file holds, up to what one of its size may."""

    def __init__(self, inner: Any, file: Path) -> None:
        self._read, self._budget = inner.read, _Budget(file)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            piece = self._read(len(buffer))
        except (OSError, EOFError, zlib.error) as error:
            raise DataError(f"{self._budget.file} is damaged: {one_line(error)}: fetch or make it again") from error
        self._budget.take(len(piece))
        buffer[: len(piece)] = piece
        return len(piece)


class _Budget:
    """How many bytes a compressed file may still come to."""

    def __init__(self, file: Path) -> None:
        self.file, self.size = file, file.stat().st_size
        self.limit = self.left = max(FREE_EXPANSION, EXPANSION * self.size)

    def take(self, count: int) -> None:
        """Raises DataError where a file of its size should not hold so many bytes more."""
        self.left -= count
        if self.left < 0:
            raise DataError(
                f"{self.file}: {size(self.size)} come to more than {size(self.limit)}, as no text does that people "
                "write: leave it out, or give its content uncompressed"
            )


def _whole(stream: BinaryIO, file: Path) -> bytes:
    """The rest of a stream. Raises DataError where it is too long for one document."""
    compressed, content = text_kind(file.name)[1], bytearray()
    limit = LARGEST_TEXT if text_kind(file.name) == (".txt", "") else LONGEST
    if not compressed and file.stat().st_size <= limit:
        return stream.read()
    while compressed and len(content) <= limit:
        if not (piece := stream.read(MB)):
            return bytes(content)
        content += piece
    raise DataError(f"{file}: expected a document of at most {size(limit)}, found a longer one: cut it into several")


def _lines(stream: BinaryIO, file: Path) -> Iterator[tuple[int, bytes]]:
    """(number, line) of every line that is not blank, counted from 1. Raises DataError for one without end."""
    for number, line in enumerate(iter(functools.partial(stream.readline, LONGEST), b""), 1):
        if len(line) == LONGEST:
            raise DataError(f"{file}, line {number}: expected at most {size(LONGEST)}, found more: cut it into several")
        if not line.isspace():
            yield number, line


def _parsed(line: bytes, where: str) -> Any:
    try:
        return parse_json(line.decode("utf-8-sig"))
    except ValueError as error:  # bad JSON, bad UTF-8
        looks = _other_encoding(line)
        found = f"what may be {looks}" if looks else one_line(error)
        raise DataError(f"{where}: expected a JSON object, found {found}: mend that line") from error


def _json_values(stream: BinaryIO, file: Path) -> Iterator[Any]:
    """The values of a JSON list, or those that stand one after the other. Raises DataError naming the file."""
    text, place = decode(_whole(stream, file), str(file)), 0
    try:
        if text.lstrip().startswith("["):
            yield from parse_json(text)
            return
        while (place := _BLANKS.match(text, place).end()) < len(text):  # type: ignore[union-attr]
            value, place = json.JSONDecoder().raw_decode(text, place)
            yield value
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file}: expected JSON, found {one_line(error)}: mend that place") from error


def _row(record: Any, text_field: str, where: str) -> Row:
    """(where, text) of an object. Raises DataError for one without that field, or with something else in it."""
    text = record.get(text_field, 0) if isinstance(record, dict) else 0
    if text is None or isinstance(text, str):
        return where, text
    found = type(record).__name__
    if isinstance(record, dict):
        fields = shortened(", ".join(record), 200) or "none"
        found = f"{shown(text)} there" if text_field in record else f"the fields {fields}"
    raise DataError(
        f"{where}: expected a JSON object with a string field {shown(text_field)}, found {found}: mend it, or name the "
        "field with --text_field"
    )


def _read_parquet(file: Path, start: int, text_field: str) -> Iterator[Row]:
    number, budget, pyarrow = 0, _Budget(file), _pyarrow(file)
    try:
        with _open_parquet(file, text_field) as table:
            # A text that many rows share is stored once and decoded for each, so that a batch of them may be huge.
            batch_rows = min(64, max(4, 256 * MB // max([1, *_row_groups(table)])))
            for batch in table.iter_batches(batch_rows, columns=[text_field], use_threads=False):
                for value in batch.column(0):
                    number += 1
                    if number > start:
                        text, where = value.as_py(), f"{file}, row {number}"
                        budget.take(1 + len(text or ""))
                        yield where, decode(text, where) if isinstance(text, bytes) else text
    except MemoryError:
        raise
    except (ValueError, OSError, pyarrow.ArrowException) as error:  # what damaged pages come to
        raise DataError(f"{file} is damaged after row {number}: {one_line(error)}: mend it or leave it out") from error


def _row_groups(table: Any) -> list[int]:
    """The uncompressed bytes that the footer states of each; asking for those of a damaged column ends the process."""
    return [table.metadata.row_group(group).total_byte_size for group in range(table.num_row_groups)]


@contextlib.contextmanager
def _open_parquet(file: Path, text_field: str) -> Iterator[Any]:
    """The parquet file, seen to have a column of text and to claim no more than its size allows. Raises DataError."""
    pyarrow = _pyarrow(file)
    from pyarrow import parquet

    with open_regular(file) as raw:
        try:
            table = parquet.ParquetFile(pyarrow.PythonFile(raw, mode="r"), buffer_size=MB)  # no column is held whole
            _check_column(table.schema_arrow, text_field, file)
            _Budget(file).take(max(table.metadata.num_rows, sum(_row_groups(table))))
        except (pyarrow.ArrowException, OSError, ValueError) as error:
            raise DataError(
                f"{file}: expected a parquet file, found {one_line(error)}: mend or leave out that file"
            ) from error
        try:
            _check_pages(raw, text_field, file)
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise DataError(
                f"{file} is damaged: expected pages of column {shown(text_field)}, found something else: mend or leave "
                "out that file"
            ) from error
        yield table


def _check_pages(raw: BinaryIO, text_field: str, file: Path) -> None:
    """Raise DataError where the pages of a column claim more bytes than the file's size allows, or one over LONGEST.

    A page states its own size, which the footer need not know of; reading it takes that much memory at once. Other
    errors mean that there are no such pages.
    """
    budget = _Budget(file)
    raw.seek(-8, io.SEEK_END)
    footer_bytes = int.from_bytes(raw.read(4), "little")
    raw.seek(-8 - footer_bytes, io.SEEK_END)
    footer, _ = _thrift(raw.read(footer_bytes))
    chunks = [chunk[3] for group in footer.get(4, ()) for chunk in group[1] if chunk[3][3][0] == text_field.encode()]
    for chunk in chunks:  # 5: its values, 7: bytes, 9: where its data begins, 11: where its dictionary does
        at, values = min(filter(None, (chunk[9], chunk.get(11)))), 0
        end = at + chunk[7]
        while at < end and values < chunk[5]:
            raw.seek(at)
            page, length = _thrift(raw.read(LARGEST_PAGE_HEADER))
            if page[2] > LONGEST:
                raise DataError(f"{file}: expected pages of at most {size(LONGEST)}, found one of {size(page[2])}")
            budget.take(max(0, page[2]))
            values += (page.get(5) or page.get(8) or {}).get(1, 0)
            at += length + max(0, page[3])


def _thrift(content: bytes, at: int = 0, kind: int = 12) -> tuple[Any, int]:
    """A value in Thrift's compact protocol and where it ends: a struct, which is the kind 12, by its fields' numbers.

    Raises ValueError or IndexError for what is none.
    """
    if kind in (1, 2):
        return kind == 1, at
    if kind in (3, 7):
        return content[at], at + (1 if kind == 3 else 8)
    if kind == 12:
        fields, number = {}, 0
        while head := content[at]:
            number, at = (number + (head >> 4), at + 1) if head >> 4 else _thrift(content, at + 1, 4)
            fields[number], at = _thrift(content, at, head & 15)
        return fields, at + 1
    if kind in (9, 10):
        count, inner = content[at] >> 4, content[at] & 15
        count, at = (count, at + 1) if count < 15 else _varint(content, at + 1)
        values = []
        for _ in range(count):
            value, at = (content[at], at + 1) if inner < 3 else _thrift(content, at, inner)
            values.append(value)
        return values, at
    number, at = _varint(content, at)
    if kind in (4, 5, 6):
        return number >> 1 ^ -(number & 1), at
    if kind == 8 and at + number <= len(content):
        return content[at : at + number], at + number
    raise ValueError("what Thrift does not write")


def _varint(content: bytes, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        value |= (content[at + shift // 7] & 127) << shift
        if content[at + shift // 7] < 128:
            return value, at + shift // 7 + 1
    raise ValueError("a number without an end")


def _check_column(schema: Any, text_field: str, file: Path) -> None:
    from pyarrow import types

    names = schema.names
    if names.count(text_field) != 1:
        columns = shortened(", ".join(names), 200) or "none"
        raise DataError(f"{file}: expected a column {shown(text_field)}, found {columns}: name one with --text_field")
    kind = schema.field(text_field).type
    inner = kind.value_type if types.is_dictionary(kind) else kind
    fitting = (types.is_string, types.is_large_string, types.is_binary, types.is_large_binary, types.is_null)
    if not any(fits(inner) for fits in fitting):
        raise DataError(
            f"{file}: expected text in column {shown(text_field)}, found {shortened(str(kind), 80)}: name another "
            "column with --text_field, or make it one text a row"
        )


def _pyarrow(file: Path) -> Any:
    try:
        import pyarrow
    except ImportError as error:
        raise DataError(needs_package(str(file), "pyarrow")) from error
    return pyarrow
