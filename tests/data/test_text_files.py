"""Documents of a user's files: which are read, each kind as it comes, errors in one line, and never much memory."""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from gptlab.data.text_files import (
    LeftOut,
    _Budget,
    _check_pages,
    count_documents,
    find_files,
    read_documents,
    text_kind,
)
from gptlab.errors import DataError

TEXTS = ["plain", "two\nlines", "", "größer 你好 \N{GRINNING FACE}", 'quotes "and" \\ back', "last " * 500]
LINES = "".join(json.dumps({"id": n, "text": text}) + "\n\n" for n, text in enumerate(TEXTS))
INDENTED = json.dumps([{"text": text} for text in TEXTS], indent=2, ensure_ascii=False)


def zstd(content: bytes) -> bytes:
    return pyarrow.Codec("zstd").compress(content, asbytes=True)


COMPRESS: dict[str, Callable[[bytes], bytes]] = {"": lambda content: content, ".gz": gzip.compress, ".zst": zstd}


def write(path: Path, content: bytes | str) -> Path:
    """The content, compressed as the name says."""
    content = content.encode() if isinstance(content, str) else content
    path.write_bytes(COMPRESS.get(path.suffix, COMPRESS[""])(content))
    return path


def write_parquet(path: Path, column: pyarrow.Array, name: str = "text", **options: object) -> Path:
    parquet.write_table(pyarrow.table({"id": range(len(column)), name: column}), path, row_group_size=4, **options)
    return path


@pytest.mark.parametrize("compression", COMPRESS)
@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", LINES),
        ("a.jsonl", "\ufeff" + LINES.replace("\n\n", "\r\n").rstrip()),
        ("a.json", LINES),
        ("a.json", INDENTED),
        ("a.json", f"\ufeff \n{INDENTED}\n"),
        ("a.json", " ".join(json.dumps({"text": text}, indent=1) for text in TEXTS)),
    ],
)
def test_each_kind_is_read_from_any_document_on(tmp_path: Path, name: str, content: str, compression: str) -> None:
    file = write(tmp_path / (name + compression), content)
    assert count_documents(file) == (len(TEXTS), 0)
    for start in range(len(TEXTS) + 1):
        assert list(read_documents(file, start)) == TEXTS[start:]


@pytest.mark.parametrize("compression", COMPRESS)
def test_a_text_is_one_document(tmp_path: Path, compression: str) -> None:
    file = write(tmp_path / f"a.TXT{compression}", b"\xef\xbb\xbftext\r\n")
    assert list(read_documents(file)) == ["text\r\n"], "a byte order mark is no text"
    assert count_documents(file) == (1, 0)


def test_files_that_were_compressed_in_pieces_are_read_whole(tmp_path: Path) -> None:
    for name, compress in COMPRESS.items():
        (tmp_path / f"a.txt{name}").write_bytes(compress(b"first ") + compress(b"second"))
        assert list(read_documents(tmp_path / f"a.txt{name}")) == ["first second"]


KINDS = {
    "string": pyarrow.string(),
    "large": pyarrow.large_string(),
    "binary": pyarrow.binary(),
    "large binary": pyarrow.large_binary(),
    "dictionary": pyarrow.dictionary(pyarrow.int32(), pyarrow.string()),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_parquet_column_of_text_is_read_whatever_its_type(tmp_path: Path, kind: str) -> None:
    file = write_parquet(tmp_path / "a.parquet", pyarrow.array(TEXTS).cast(KINDS[kind]))
    assert count_documents(file) == (len(TEXTS), 0)
    for start in range(len(TEXTS) + 1):
        assert list(read_documents(file, start)) == TEXTS[start:]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.jsonl.gz", "a.jsonl.zst", "a.parquet", "groups.parquet"])
def test_a_file_may_hold_no_document(tmp_path: Path, name: str) -> None:
    file, schema = tmp_path / name, pyarrow.schema({"text": pyarrow.string()})
    if name == "groups.parquet":
        parquet.ParquetWriter(file, schema).close()  # not even a group of rows
    elif name == "a.parquet":
        parquet.write_table(schema.empty_table(), file)
    else:
        write(file, b"")
    assert count_documents(file) == (0, 0)
    assert list(read_documents(file)) == []


WITH_NULLS = ["a", None, "b", None, None, "c"]


@pytest.fixture(params=["jsonl", "json", "list", "parquet", "gz", "binary"])
def with_nulls(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, str]:
    """A file with nulls in its field `content`, and where the first stands."""
    rows = [{"content": text} for text in WITH_NULLS]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    if request.param in ("parquet", "binary"):
        kind = pyarrow.binary() if request.param == "binary" else pyarrow.string()
        return write_parquet(tmp_path / "a.parquet", pyarrow.array(WITH_NULLS).cast(kind), "content"), "row 2"
    if request.param == "list":
        return write(tmp_path / "a.json", json.dumps(rows)), "object 2"
    name = {"jsonl": "a.jsonl", "json": "a.json", "gz": "a.jsonl.gz"}[request.param]
    return write(tmp_path / name, lines), "object 2" if request.param == "json" else "line 2"


def test_a_null_is_named_and_can_be_left_out(with_nulls: tuple[Path, str]) -> None:
    file, where = with_nulls
    with pytest.raises(
        DataError, match=f"{where}: expected text in 'content', found null: .* add --skip_null"
    ) as caught:
        list(read_documents(file, text_field="content"))
    assert str(file) in str(caught.value)
    assert count_documents(file, "content", skip_null=True) == (3, 3)
    for start in range(4):
        assert list(read_documents(file, start, "content", skip_null=True)) == ["a", "b", "c"][start:]


def test_another_field_says_so(with_nulls: tuple[Path, str]) -> None:
    with pytest.raises(DataError, match=r"'text', found .*content.*: .*--text_field"):
        list(read_documents(with_nulls[0]))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": ', "line 3: expected a JSON object, found Expecting value"),
        ('{"txt": 1, "id": 1}', "line 3: expected a JSON object with a string field 'text', found the fields txt, id"),
        ('{"text": 5}', "line 3: expected a JSON object with a string field 'text', found 5 there"),
        ('{"text": ["a"]}', "found \\['a'\\] there"),
        ('["text"]', "line 3: expected a JSON object with a string field 'text', found list"),
        ("[" * 100_000, "line 3: expected a JSON object, found nested too deeply"),
        ("text", "line 3: expected a JSON object, found Expecting value"),
    ],
)
@pytest.mark.parametrize("compression", COMPRESS)
def test_a_bad_line_is_named(tmp_path: Path, line: str, message: str, compression: str) -> None:
    path = write(tmp_path / f"a.jsonl{compression}", '{"text": "good"}\n\n' + line + "\n")
    with pytest.raises(DataError, match=message) as caught:
        list(read_documents(path))
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[{"text": "a"}, {"text": "b"]', r"a\.json: expected JSON, found Expecting ',' delimiter: line 1 column 29"),
        ('[{"text": "a"}', r"a\.json: expected JSON, found Expecting ',' delimiter"),
        ('{"text": "a"} {"text": ', r"a\.json: expected JSON, found Expecting value: line 1 column 24"),
        ('[{"text": "a"}] more', r"a\.json: expected JSON, found Extra data"),
        ('{"text": "a"} 5', r"a\.json, object 2: expected a JSON object with a string field 'text', found int"),
        ('["a"]', r"a\.json, object 1: expected a JSON object with a string field 'text', found str"),
        ('{"a":' * 100_000, r"a\.json: expected JSON, found "),
    ],
)
def test_a_bad_object_is_named(tmp_path: Path, content: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        list(read_documents(write(tmp_path / "a.json", content)))


SAMPLE = "The quick brown fox.\nÄrger im Café.\n" * 40
CYRILLIC = "Привет, мир! Как дела?\n" * 3
OTHERS = {
    "latin-1": (SAMPLE.encode("latin-1"), "another encoding, such as Latin-1"),
    "utf-16 with a mark": (SAMPLE.encode("utf-16"), "UTF-16"),
    "utf-16le": (SAMPLE.encode("utf-16le"), "UTF-16"),
    "utf-16be": (SAMPLE.encode("utf-16be"), "UTF-16"),
    "utf-16le of few words": ("ok".encode("utf-16le"), "UTF-16LE"),
    "utf-16le, ASCII alone": (("plain " * 9).encode("utf-16le"), "UTF-16LE"),
    "utf-16be, ASCII alone": (("plain " * 9).encode("utf-16be"), "UTF-16BE"),
    "utf-16le, Cyrillic": (CYRILLIC.encode("utf-16le"), "UTF-16LE"),
    "utf-32le": (("plain " * 9).encode("utf-32le"), "UTF-32LE"),
    "utf-32be": (("plain " * 9).encode("utf-32be"), "UTF-32BE"),
    "utf-16 from the middle on": (b"plain UTF-8\n" + ("and more " * 9).encode("utf-16le"), "UTF-16LE"),
    "NULs after a crash": (b"text\n" + bytes(5000), "damaged from byte 5 on, where NULs begin"),
    "gzip": (gzip.compress(SAMPLE.encode()), "gzip"),
    "zstd": (zstd(SAMPLE.encode()), "zstd"),
    "AppleDouble": (b"\0\5\x16\7\0\2\0\0Mac OS X        \0\2\0\0\0\xc9", "what macOS writes next to a file"),
    "zip": (b"PK\3\4\x14\0\0\0\x08\0\xff\xfe", "zip"),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_what_is_no_utf8_is_named_for_what_it_is(tmp_path: Path, kind: str) -> None:
    content, looks = OTHERS[kind]
    file = write(tmp_path / "a.txt", content)
    with pytest.raises(DataError, match=f"a.txt: expected UTF-8, found .*{looks}") as caught:
        list(read_documents(file))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16", "utf-16le", "utf-16be", "utf-32"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_json_in_another_encoding_is_named(tmp_path: Path, name: str, encoding: str) -> None:
    line = json.dumps({"text": "Ärger"}, ensure_ascii=False) + "\n"
    file = write(tmp_path / name, line.encode(encoding))
    with pytest.raises(DataError, match=r"utf-8|UTF-16|UTF-32|Latin-1") as caught:
        list(read_documents(file))
    assert str(file) in str(caught.value)


@pytest.mark.parametrize("text", ["a\0b", "one\0two\0three\0" * 50, "Привет \0 мир", "\t\r\n\t" * 99])
def test_text_in_utf8_is_read_with_the_signs_it_has(tmp_path: Path, text: str) -> None:
    assert list(read_documents(write(tmp_path / "a.txt", text))) == [text]


@pytest.mark.parametrize("compression", [".gz", ".zst"])
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.json"])
@pytest.mark.parametrize("damage", ["cut", "not compressed", "followed by something"])
def test_a_damaged_compressed_file_is_named(tmp_path: Path, name: str, compression: str, damage: str) -> None:
    file = write(tmp_path / (name + compression), LINES)
    content = file.read_bytes()
    file.write_bytes(
        {"cut": content[:-5], "not compressed": LINES.encode(), "followed by something": content + b"x" * 9}[damage]
    )
    with pytest.raises(DataError, match=r"is damaged: .*: fetch or make it again") as caught:
        list(read_documents(file))
    assert str(file) in str(caught.value)


@pytest.mark.parametrize("content", [b"no parquet", b"", b"PAR1" + b"\xff" * 60 + b"PAR1"])
def test_a_damaged_parquet_file_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.parquet").write_bytes(content)
    with pytest.raises(DataError, match=r"a\.parquet: expected a parquet file, found"):
        count_documents(tmp_path / "a.parquet")


@pytest.mark.parametrize(
    ("place", "found"), [(4, "is damaged: expected pages of column 'text'"), (50, "is damaged after row 0")]
)
def test_damaged_pages_are_named(tmp_path: Path, place: int, found: str) -> None:
    """From the first header on, or what follows it."""
    options: dict[str, Any] = {"compression": "none", "use_dictionary": False, "write_statistics": False}
    content = bytearray(write_parquet(tmp_path / "a.parquet", pyarrow.array(TEXTS), **options).read_bytes())
    start = parquet.ParquetFile(tmp_path / "a.parquet").metadata.row_group(0).column(1).data_page_offset
    content[start + place - 4 : start + place + 10] = b"\xff" * 14
    (tmp_path / "a.parquet").write_bytes(content)
    with pytest.raises(DataError, match=rf"a\.parquet {found}"):
        list(read_documents(tmp_path / "a.parquet"))


@pytest.mark.parametrize("kind", ["binary", "string"])
def test_bytes_that_are_no_text_are_named(tmp_path: Path, kind: str) -> None:
    column = pyarrow.array([b"good", b"caf\xe9"])
    if kind == "string":
        column = pyarrow.Array.from_buffers(pyarrow.string(), 2, column.buffers())
    with pytest.raises(DataError, match=r"a\.parquet.* row [12].*"):
        list(read_documents(write_parquet(tmp_path / "a.parquet", column)))


LONG = "x" * 3_000_000
NESTED = {
    "list": pyarrow.array([[LONG], [LONG]]),
    "struct": pyarrow.array([{"a": LONG}]),
    "number": pyarrow.array([1, 2]),
    "list of structs": pyarrow.array([[{"role": LONG, "content": LONG}]]),
}


@pytest.mark.parametrize("kind", NESTED)
def test_a_column_of_something_else_is_one_short_line(tmp_path: Path, kind: str) -> None:
    file = write_parquet(tmp_path / "a.parquet", NESTED[kind])
    with pytest.raises(DataError, match=r"expected text in column 'text', found (list|struct|int64)") as caught:
        count_documents(file)
    assert len(str(caught.value)) < 1000 + len(str(file))


def test_what_an_error_quotes_is_short(tmp_path: Path) -> None:
    for content in (json.dumps({"text": [LONG]}), json.dumps({LONG: 1}), json.dumps(LONG), f'{{"text": "{LONG}'):
        for name in ("a.jsonl", "a.json"):
            with pytest.raises(DataError) as caught:
                list(read_documents(write(tmp_path / name, content)))
            assert len(str(caught.value)) < 1000 + len(str(tmp_path))


def test_a_line_without_end_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gptlab.data.text_files.LONGEST", 1000)
    for name in ("a.jsonl", "a.jsonl.gz", "a.json", "a.json.zst", "a.txt.gz"):
        file = write(tmp_path / name, '{"text": "good"}\n' + "x" * 5000)
        with pytest.raises(DataError, match=r"expected .*at most 1000 bytes, found .*: cut it into several"):
            list(read_documents(file))


# A process with little room reads files that unpack to, or claim, more than that.
BOMBS = """
import json, resource, sys
from pathlib import Path
from gptlab.data.text_files import count_documents, read_documents
from gptlab.errors import DataError
files = [Path(name) for name in sys.argv[1:]]
for good in ("good.parquet", "good.txt.zst"):  # loads what is loaded late
    list(read_documents(files[0].with_name(good)))
pages = int(Path("/proc/self/statm").read_text().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 2**29,) * 2)
for file in files:
    for read in (count_documents, lambda file: sum(1 for _ in read_documents(file))):
        try:
            found = read(file)
        except DataError as error:
            found = f"DataError: {error}"
        print(json.dumps([file.name, found]))
"""


def _number(value: int, length: int = 1) -> bytes:
    """A whole number as Thrift's compact protocol writes it, in so many bytes or more."""
    value, content = value << 1, bytearray()
    while value or len(content) < length:
        content.append(value & 127 | 128)
        value >>= 7
    content[-1] &= 127
    return bytes(content)


def _hidden_page(size: int, claim: int = 0, **options: Any) -> bytes:
    """A parquet file with a page of about so many bytes, of which the footer says 1000; claim: what the page says."""
    buffer = io.BytesIO()
    parquet.write_table(pyarrow.table({"text": ["x" * size]}), buffer, use_dictionary=False, **options)
    content, metadata = buffer.getvalue(), parquet.ParquetFile(buffer).metadata
    footer = len(content) - 8 - metadata.serialized_size
    head, foot = content[:footer], content[footer:]
    for stated in {metadata.row_group(0).total_byte_size, metadata.row_group(0).column(0).total_uncompressed_size}:
        assert _number(stated) in foot
        foot = foot.replace(_number(stated), _number(1000, len(_number(stated))))
    page = next(n for n in range(size, size + 64) if _number(n) in head[:64])
    return (head.replace(_number(page), _number(claim, len(_number(page))), 1) if claim else head) + foot


def _bombs(folder: Path) -> list[Path]:
    """Small files that come to half a GB, or to 40."""
    block, line = b" " * 2**26, (b'{"text": "' + b"x" * (2**20 - 13) + b'"}\n') * 64
    for compression in (".gz", ".zst"):
        for content, names in ((block, ("one.txt", "blank.jsonl")), (line, ("lines.jsonl", "lines.json"))):
            compressed = COMPRESS[compression](content) * 8
            for name in names:
                (folder / (name + compression)).write_bytes(compressed)
    column = {
        "a text in every row": ([0] * 40_000, "x" * 10**6),
        "a long one": ([0] * 800, "x" * (5 * 10**7)),
        "a page": ([0], "x" * 10**8),
    }
    for name, (rows, text) in column.items():
        shared = pyarrow.DictionaryArray.from_arrays(pyarrow.array(rows, pyarrow.int8()), pyarrow.array([text]))
        parquet.write_table(pyarrow.table({"text": shared}), folder / f"{name}.parquet", compression="zstd")
    for compression in ("zstd", "gzip"):
        for version in ("1.0", "2.0"):
            hidden = _hidden_page(2**27, compression=compression, data_page_version=version)
            (folder / f"a hidden page {compression} {version}.parquet").write_bytes(hidden)
    files = sorted(folder.iterdir())
    assert all(file.stat().st_size < 2**23 for file in files)
    return files


def test_a_bomb_is_refused_in_little_memory(tmp_path: Path) -> None:
    files = _bombs(tmp_path)
    write_parquet(tmp_path / "good.parquet", pyarrow.array(TEXTS))
    write(tmp_path / "good.txt.zst", "text")
    done = subprocess.run(
        [sys.executable, "-c", BOMBS, *map(str, files)], capture_output=True, text=True, check=False,
        env={**os.environ, "ARROW_DEFAULT_MEMORY_POOL": "system", "OPENBLAS_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert [name for name, _ in found[::2]] == [file.name for file in files]
    for name, read in found[1::2]:
        assert str(tmp_path / name) in read
        assert "as no text does that people write" in read or "more memory than there is" in read
    counted = dict(found[::2])
    for name in ("a page.parquet", "a hidden page zstd 1.0.parquet", "a hidden page gzip 2.0.parquet"):
        assert counted[name].startswith("DataError"), "from its footer or its page's header, before it is read"
    assert counted["lines.jsonl.zst"].startswith("DataError")


def test_a_page_may_claim_so_much(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a.parquet"
    file.write_bytes(_hidden_page(2**17, claim=2**20 - 1))
    monkeypatch.setattr("gptlab.data.text_files.LONGEST", 2**19)
    with pytest.raises(DataError, match=r"a\.parquet: expected pages of at most 512 kB, found one of 1023 kB"):
        list(read_documents(file))
    monkeypatch.setattr("gptlab.data.text_files.FREE_EXPANSION", 2**19)
    monkeypatch.setattr("gptlab.data.text_files.EXPANSION", 1)
    monkeypatch.setattr("gptlab.data.text_files.LONGEST", 2**30)
    with pytest.raises(DataError, match="come to more than 512 kB"):
        count_documents(file)


@pytest.mark.parametrize("version", ["1.0", "2.0"])
@pytest.mark.parametrize("compression", ["none", "snappy", "gzip", "zstd"])
@pytest.mark.parametrize("dictionary", [True, False])
def test_pages_of_every_kind_are_walked_through(
    tmp_path: Path, version: str, compression: str, dictionary: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever lies between the headers; of 200 texts in 20 groups, with a few pages each."""
    sizes: list[int] = []
    monkeypatch.setattr(_Budget, "take", lambda _, count: sizes.append(count))
    table = pyarrow.table({"id": range(200), "text": [f"text {n} " * 40 for n in range(200)], "flag": [True] * 200})
    options: dict[str, Any] = {"use_dictionary": dictionary, "data_page_size": 1000, "write_batch_size": 1}
    parquet.write_table(
        table, tmp_path / "a.parquet", row_group_size=10, data_page_version=version, compression=compression, **options
    )
    assert count_documents(tmp_path / "a.parquet") == (200, 0)
    assert len(sizes) > 1 + 20
    columns = [parquet.ParquetFile(tmp_path / "a.parquet").metadata.row_group(n).column(1) for n in range(20)]
    stated = sum(column.total_uncompressed_size for column in columns)  # headers count there
    texts = sum(len(text) for text in table.column("text").to_pylist())
    assert texts < sum(sizes[1:]) < stated


@pytest.mark.parametrize("place", range(4, 300, 7))
def test_a_damaged_footer_or_header_is_walked_through_to_an_end(tmp_path: Path, place: int) -> None:
    content = _hidden_page(100)
    for byte in (0, 1, 12, 127, 128, 140, 156, 249, 252, 255):
        damaged = bytearray(content)
        damaged[place % len(content)] = byte
        (tmp_path / "a.parquet").write_bytes(damaged)
        with contextlib.suppress(
            DataError, ValueError, LookupError, TypeError, AttributeError, OSError
        ):  # which its caller names
            _check_pages(io.BytesIO(damaged), "text", tmp_path / "a.parquet")


def test_text_that_repeats_itself_is_no_bomb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As records of a log do, of which gzip makes a fiftieth."""
    monkeypatch.setattr("gptlab.data.text_files.FREE_EXPANSION", 0)
    texts = [f"{n} and the same again and again " * 9 for n in range(3000)]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    files = [write(tmp_path / f"a.jsonl{compression}", lines) for compression in (".gz", ".zst")]
    files.append(write_parquet(tmp_path / "a.parquet", pyarrow.array(texts), compression="zstd"))
    for file in files:
        assert list(read_documents(file)) == texts


@pytest.mark.parametrize("name", ["a.txt.gz", "a.jsonl.gz", "a.json.zst", "a.jsonl.zst", "a.parquet"])
def test_a_file_may_come_to_so_much_of_its_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    texts = ["the same" * 1000] * 20
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    file = tmp_path / name
    write_parquet(file, pyarrow.array(texts)) if name.endswith("parquet") else write(file, lines)
    monkeypatch.setattr("gptlab.data.text_files.FREE_EXPANSION", 200_000)
    assert len("".join(read_documents(file))) >= 160_000
    monkeypatch.setattr("gptlab.data.text_files.FREE_EXPANSION", 150_000)
    monkeypatch.setattr("gptlab.data.text_files.EXPANSION", 1)
    with pytest.raises(DataError, match=f"{name}: .* come to more than 146 kB"):
        list(read_documents(file))


def test_rows_that_are_said_to_be_there_are_counted_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each costs time, a null or an empty text no byte."""
    monkeypatch.setattr("gptlab.data.text_files.FREE_EXPANSION", 0)
    file = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"text": [""] * 300_000}), file)
    with pytest.raises(DataError, match="as no text does that people write"):
        count_documents(file)


# Which files are read.


def write_all(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("text")


def names(folder: Path, **options: str) -> list[str]:
    return [str(file.relative_to(folder)) for file in find_files([folder], **options)[0]]


HIDDEN = [
    "._a.txt",
    ".ipynb_checkpoints/a-checkpoint.txt",
    ".DS_Store",
    ".git/a.txt",
    "deep/.a.jsonl.swp",
    "deep/._.json",
]


def test_names_that_begin_with_a_dot_are_no_input(tmp_path: Path) -> None:
    write_all(tmp_path, "a.txt", "deep/b.txt", *HIDDEN)
    files, left_out = find_files([tmp_path])
    assert [file.name for file in files] == ["a.txt", "b.txt"]
    assert left_out.kinds == {"hidden": 6}
    assert {"._a.txt", ".ipynb_checkpoints", ".DS_Store", ".git", "._.json"} < set(left_out.first)


def test_a_hidden_folder_or_file_that_is_named_itself_is_read(tmp_path: Path) -> None:
    """As the cache of Hugging Face is, which lies in ~/.cache."""
    write_all(tmp_path, ".cache/a.txt", ".b.txt")
    assert [file.name for file in find_files([tmp_path / ".cache", tmp_path / ".b.txt"])[0]] == ["a.txt", ".b.txt"]


def test_suffixes_count_in_any_case_and_compressed(tmp_path: Path) -> None:
    kinds = ["a.TXT", "b.Jsonl", "c.JSON", "d.PARQUET", "e.txt.gz", "f.JSONL.GZ", "g.json.zst", "h.Txt.Zst"]
    write_all(tmp_path, *kinds)
    (tmp_path / "c.JSON").write_text("[]")
    assert names(tmp_path) == kinds
    assert [text_kind(name)[0] for name in kinds[4:]] == [".txt", ".jsonl", ".json", ".txt"]


def test_what_is_left_out_is_counted_by_kind(tmp_path: Path) -> None:
    write_all(tmp_path, "a.txt", "b.csv", "c.CSV", "d.md", "e", "f.parquet.gz", "deep/g.csv", "h.gz")
    os.mkfifo(tmp_path / "i.txt")
    (tmp_path / "j.txt").symlink_to("gone")
    files, left_out = find_files([tmp_path])
    assert len(files) == 1
    assert left_out.kinds == {
        ".csv": 3, ".md": 1, "without a suffix": 1, ".gz": 2, "a pipe": 1, "links to nothing": 1
    }  # fmt: skip
    assert left_out.count == 9
    assert str(left_out).startswith("left out 9: ")
    assert LeftOut.from_json(json.loads(json.dumps(left_out.as_json()))) == left_out


def test_an_account_stays_short_whatever_lies_there(tmp_path: Path) -> None:
    write_all(tmp_path, "a.txt", *(f"{n}.{'k' * 150}{n}" for n in range(200)), "b" * 200)
    (tmp_path / "\x1b[2J\udcff").write_text("")
    _, left_out = find_files([tmp_path])
    assert left_out.count == 202
    assert len(json.dumps(left_out.as_json())) < 3000


@pytest.mark.parametrize("content", [{"count": 1}, {"kinds": {"a": -1}, "first": []}, {"kinds": {}, "first": [1]}, []])
def test_an_account_from_elsewhere_is_checked(content: dict[str, object]) -> None:
    with pytest.raises((ValueError, KeyError, TypeError)):
        LeftOut.from_json(content)


@pytest.mark.parametrize("kept", ["a.txt", "deep/b.jsonl"])
def test_a_compressed_copy_of_a_file_is_no_second_document(tmp_path: Path, kept: str) -> None:
    write_all(tmp_path, kept, f"{kept}.gz", f"{kept}.zst", "other.txt.gz", "other.txt.zst")
    files, left_out = find_files([tmp_path])
    assert sorted(file.name for file in files) == sorted([Path(kept).name, "other.txt.gz"])
    assert left_out.kinds == {"compressed copies": 3}


def test_the_description_of_a_dataset_is_no_document(tmp_path: Path) -> None:
    write_all(tmp_path, "a.txt")
    for name, content in {"dataset_info": {"features": {}}, "one": {"text": "a"}, "list": [{"content": "b"}]}.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    files, left_out = find_files([tmp_path])
    assert [file.name for file in files] == ["a.txt", "list.json", "one.json"]
    assert left_out.as_json() == {"count": 1, "kinds": {".json without documents": 1}, "first": ["dataset_info.json"]}
    assert "dataset_info.json" in names(tmp_path, text_field="features")


def test_linked_folders_are_read_once(tmp_path: Path) -> None:
    write_all(tmp_path, "elsewhere/x.txt", "in/a/b/y.txt", "in/z.txt", "elsewhere/more/w.txt")
    (tmp_path / "in" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "in" / "second").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "in" / "0-inner").symlink_to("a")  # of a folder that is there anyway
    (tmp_path / "in" / "a" / "b" / "cycle").symlink_to(tmp_path / "in")
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path)
    expected = ["a/b/y.txt", "link/more/w.txt", "link/x.txt", "z.txt"]
    assert names(tmp_path / "in") == expected
    again, left_out = find_files([tmp_path / "in", tmp_path / "in" / "a", tmp_path / "elsewhere"])
    assert [str(file.relative_to(tmp_path / "in")) for file in again] == expected
    assert not left_out.count


def cache(tmp_path: Path) -> Path:
    """A file as a Hugging Face cache has it: a link to one that is called by its hash."""
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "0f3e").write_text("text")
    (tmp_path / "snapshots" / "abc").mkdir(parents=True)
    link = tmp_path / "snapshots" / "abc" / "train.txt"
    link.symlink_to("../../blobs/0f3e")
    return link


@pytest.mark.parametrize("named", ["file", "folder"])
def test_a_link_has_the_kind_of_its_own_name(tmp_path: Path, named: str) -> None:
    link = cache(tmp_path)
    assert find_files([link if named == "file" else link.parent])[0] == (link,)


def test_a_link_of_another_name_does_not_make_a_kind(tmp_path: Path) -> None:
    write_all(tmp_path, "a.txt")
    (tmp_path / "b.dat").symlink_to("a.txt")
    with pytest.raises(DataError, match=r"found .*b\.dat: convert or rename it"):
        find_files([tmp_path / "b.dat"])
    (tmp_path / "c.txt").symlink_to("a.txt")
    assert find_files([tmp_path / "c.txt", tmp_path / "a.txt"])[0] == (tmp_path / "a.txt",)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (["gone.txt"], "expected a file or folder at .*gone.txt, found nothing"),
        (["table.csv"], "expected a file of kind .txt, .jsonl, .json, .parquet, found .*table.csv"),
        (["empty"], "expected .txt, .jsonl, .json, .parquet files in folder .*empty, found none:"),
        (["others"], r"found none \(left out 2: 1 hidden, 1 .csv \(._a.txt, t.csv\)\): choose another"),
    ],
)
def test_unfit_inputs_are_named(tmp_path: Path, inputs: list[str], message: str) -> None:
    (tmp_path / "empty").mkdir()
    write_all(tmp_path, "table.csv", "others/t.csv", "others/._a.txt")
    with pytest.raises(DataError, match=message):
        find_files([tmp_path / name for name in inputs])


def test_a_file_named_twice_is_read_once(tmp_path: Path) -> None:
    write_all(tmp_path, "z.parquet", "a.txt", "deep/c.jsonl")
    files, _ = find_files([tmp_path / "z.parquet", tmp_path, tmp_path / "deep"])
    assert [file.name for file in files] == ["z.parquet", "a.txt", "c.jsonl"]
