"""The three formats of shards, written here byte by byte, every way to be wrong, and corpora made in parts."""

from __future__ import annotations

import hashlib
import json
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from gptlab.cli.main import main
from gptlab.data.corpus import open_corpus
from gptlab.data.prepare import merge_parts, write_part
from gptlab.data.shards import HEADER_BYTES, MAGIC, VERSION, check_tokens, open_shard, sha256_of, write_shard
from gptlab.data.tokenizers import get_tokenizer
from gptlab.errors import ConfigError, DataError

TOKENS = [50256, 31373, 995, 0, 65535]
LLM_C = struct.pack("<3i", 20240520, 1, len(TOKENS)) + bytes(253 * 4) + struct.pack("<5H", *TOKENS)
NPY_HEADER = b"{'descr': '<u2', 'fortran_order': False, 'shape': (5,), }".ljust(117) + b"\n"
NPY = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(NPY_HEADER)) + NPY_HEADER + struct.pack("<5H", *TOKENS)
ARCHIVE = b"PK\x05\x06" + bytes(18)  # an empty one, which numpy would open
RAW = struct.pack("<5H", *TOKENS)

FORMATS = {
    "fineweb_train_000001.bin": LLM_C,  # llm.c
    "tiny_shakespeare_train.bin": LLM_C,  # llm.c again, known by its first bytes
    "edufineweb_train_000001.npy": NPY,  # build-nanogpt
    "train.bin": RAW,  # nanoGPT
}


def llm_c(**changes: int) -> bytes:
    """The shard with some of its header changed."""
    values = {"magic": 20240520, "version": 1, "count": len(TOKENS), **changes}
    return struct.pack("<3i", *values.values()) + LLM_C[12:]


@pytest.mark.parametrize(("name", "content"), FORMATS.items())
def test_each_format_is_read(tmp_path: Path, name: str, content: bytes) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    tokens = open_shard(path, hashlib.sha256(content).hexdigest())
    assert tokens.tolist() == TOKENS
    assert tokens.dtype == np.uint16
    assert isinstance(tokens, np.memmap)
    with pytest.raises(ValueError, match="read-only"):
        tokens[0] = 1


def test_a_shard_is_written_as_llm_c_writes_it(tmp_path: Path) -> None:
    shard = write_shard(tmp_path / "train_000000.bin", np.array(TOKENS, dtype=np.uint16))
    assert (tmp_path / "train_000000.bin").read_bytes() == LLM_C
    assert (shard.name, shard.tokens) == ("train_000000.bin", 5)
    assert shard.sha256 == hashlib.sha256(LLM_C).hexdigest()
    assert [path.name for path in tmp_path.iterdir()] == ["train_000000.bin"]


def test_a_part_of_a_larger_array_is_written(tmp_path: Path) -> None:
    write_shard(tmp_path / "train_000000.bin", np.arange(100, dtype=np.uint16)[10:20:3])
    assert open_shard(tmp_path / "train_000000.bin").tolist() == [10, 13, 16, 19]


@pytest.mark.fault(number=6)
@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a_000000.bin", LLM_C[:-1], "truncated: expected 1034 bytes for 5 tokens, found 1033"),
        ("a_000000.bin", LLM_C + b"\0\0", "padded: expected 1034 bytes for 5 tokens, found 1036"),
        ("a_000000.bin", LLM_C[:700], "truncated: expected a header of 1024 bytes, found 700"),
        ("a_000000.bin", b"", "truncated: expected a header of 1024 bytes, found 0"),
        ("a_000000.bin", llm_c(count=2**31 - 1), "truncated: expected 4294968318 bytes for 2147483647 tokens"),
        ("a_000000.bin", llm_c(count=-1), "token count above 0 in the header, found -1"),
        ("a_000000.bin", llm_c(count=0), "token count above 0 in the header, found 0"),
        ("a_000000.bin", llm_c(magic=20240801), "no shard: expected magic number 20240520, found 20240801"),
        ("a_000000.bin", llm_c(version=7), "expected shard version 1, found 7"),
        ("train.bin", llm_c(version=7), "expected shard version 1, found 7"),
        ("train.bin", RAW[:-1], "even number of bytes above 0, found 9"),
        ("train.bin", b"", "even number of bytes above 0, found 0"),
        ("a.npy", NPY[:-1], r"whole \.npy file of uint16 tokens, found: mmap length is greater"),
        ("a.npy", NPY + b"\0\0", "padded: expected 138 bytes for 5 tokens, found 140"),
        ("a.npy", NPY[:5], r"whole \.npy file"),
        ("a.npy", b"", r"whole \.npy file"),
        ("a.npy", NPY.replace(b"'<u2'", b"'<i2'"), "little-endian uint16, found int16"),
        ("a.npy", NPY.replace(b"'<u2'", b"'>u2'"), "little-endian uint16, found >u2"),
        ("a.npy", NPY.replace(b"(5,), ", b"(5,1),"), r"one-dimensional array .* found uint16 of shape \(5, 1\)"),
        ("a.npy", NPY.replace(b"'<u2'", b"'|O8'"), r"whole \.npy file"),
        ("a.npy", NPY.replace(b"(5,)", b"(0,)")[:128], r"a\.npy: expected tokens, found none"),
        ("a.npy", ARCHIVE, r"whole \.npy file of uint16 tokens, found one that begins b'PK"),
    ],
)
def test_a_damaged_file_is_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        open_shard(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("name", "content"), FORMATS.items())
@pytest.mark.parametrize("place", [0.0, 0.5, 1.0])
def test_a_flipped_bit_is_found_by_the_checksum(tmp_path: Path, name: str, content: bytes, place: float) -> None:
    path = tmp_path / name
    flipped = bytearray(content)
    flipped[int(place * (len(content) - 1))] ^= 16
    path.write_bytes(flipped)
    with pytest.raises(DataError, match=name.replace(".", r"\.")):
        open_shard(path, hashlib.sha256(content).hexdigest())


@pytest.mark.fault(number=6)
def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot read shard .*gone_000000\.bin: No such file"):
        open_shard(tmp_path / "gone_000000.bin")


def test_a_disk_that_refuses_leaves_no_debris(tmp_path: Path) -> None:
    script = (
        "import sys, resource, pathlib, numpy as np\n"
        "from gptlab.data.shards import write_shard\n"
        "from gptlab.errors import DataError\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "try: write_shard(pathlib.Path(sys.argv[1]), np.zeros(100_000, dtype=np.uint16))\n"
        "except DataError as error: print(error)\n"
    )
    path = tmp_path / "train_000000.bin"
    done = subprocess.run([sys.executable, "-c", script, str(path)], capture_output=True, text=True, check=True)
    assert done.stdout.startswith(f"cannot write train_000000.bin in {tmp_path}: File too large")
    assert list(tmp_path.iterdir()) == []


def test_the_first_token_out_of_range_is_named() -> None:
    tokens = np.zeros(5_000_000, dtype=np.uint16)
    check_tokens(tokens, 1, "train_000000.bin")
    tokens[[4_500_000, 4_900_000]] = 300, 301
    check_tokens(tokens, 302, "train_000000.bin")
    expected = (
        "train_000000.bin: token out of range: .* below the model's vocab_size 256, found 300 at position 4500000"
    )
    with pytest.raises(DataError, match=expected):
        check_tokens(tokens, 256, "train_000000.bin")


WIDTHS = ("<u4", "<i4", "<i8", ">u4", ">i8")
NUMBERS = {
    "GPT-2's": np.arange(1000) * 37 % 50257,
    "a larger vocabulary's": np.arange(1000) * 1237 % 128_000,
    "characters": np.arange(1000) * 7 % 65,
}


@pytest.mark.parametrize("numbers", NUMBERS)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("count", [20, 1000])
def test_raw_tokens_of_another_width_are_refused(tmp_path: Path, numbers: str, width: str, count: int) -> None:
    NUMBERS[numbers][-count:].astype(width).tofile(tmp_path / "train.bin")
    bits = "64" if width.endswith("8") else "32"
    with pytest.raises(DataError, match=rf"train\.bin: expected uint16 tokens, found what looks like .*{bits}-bit"):
        open_shard(tmp_path / "train.bin")


TEXT = "First Citizen:\nBefore we proceed any further, hear me speak.\n"


@pytest.mark.parametrize("content", [TEXT.encode(), "größere 你好 ".encode() * 9, bytes(range(1, 65)) * 2])
def test_text_under_the_name_of_a_shard_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "train.bin").write_bytes(content[: len(content) // 2 * 2])
    with pytest.raises(DataError, match=r"train\.bin: expected uint16 tokens, found what looks like text or single"):
        open_shard(tmp_path / "train.bin")


@pytest.mark.parametrize("kind", ["few", "bytes", "characters", "noise", "two", "zeros"])
def test_raw_tokens_of_any_kind_are_read(tmp_path: Path, kind: str) -> None:
    draw = np.random.default_rng(1)
    tokens = {
        "few": np.array([5, 0, 60, 0, 70, 1]),
        "bytes": np.frombuffer((TEXT * 9).encode(), dtype=np.uint8),
        "characters": draw.integers(0, 65, 5000),
        "noise": draw.integers(0, 50257, 5000),
        "two": draw.integers(0, 2, 5000),
        "zeros": np.zeros(5000),
    }[kind].astype(np.uint16)
    tokens.tofile(tmp_path / "train.bin")
    assert np.array_equal(open_shard(tmp_path / "train.bin"), tokens)


@pytest.mark.parametrize("dtype", ["<i8", "<i4", "<u4", "<f4", "u1"])
def test_an_array_of_another_type_says_how_to_convert_it(tmp_path: Path, dtype: str) -> None:
    np.save(tmp_path / "train.npy", np.arange(9).astype(dtype))
    with pytest.raises(
        DataError, match=rf"train\.npy: .* found {np.dtype(dtype)} of shape .*: convert it with tokens\.astype"
    ):
        open_shard(tmp_path / "train.npy")


def test_the_position_of_a_token_is_that_in_the_file() -> None:
    with pytest.raises(DataError, match=r"a\.bin: .* found 300 at position 1001"):
        check_tokens(np.array([1, 300, 301]), 256, "a.bin", first=1000)


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
