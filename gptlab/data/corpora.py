"""Where documents come from: a user's own files, FineWeb-Edu; and every corpus by its name.

A source yields (document, position) pairs in a fixed order; started again at a position, it goes on with the next
document and loses or doubles none. Sources know nothing of tokens or shards: prepare.py makes those. Shakespeare's
works are in shakespeare.py, sources that are made up, and whose floor is known, in synthetic.py.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gptlab.data.shakespeare import Shakespeare
from gptlab.data.source import Documents, Position, Source
from gptlab.data.synthetic import SYNTHETIC, synthetic
from gptlab.errors import ConfigError, DataError, did_you_mean, needs_package
from gptlab.parsing import parse_json
from gptlab.randomness import key_bits

if TYPE_CHECKING:
    import datasets

CORPORA = {
    "shakespeare": "Shakespeare's works, whole plays kept for validation",
    "text": "your own .txt, .jsonl and .parquet files, given with --input",
    "fineweb-edu": "FineWeb-Edu, the 10-billion-token sample",
    **{name: kind.SUMMARY for name, kind in SYNTHETIC.items()},
}
TEXT_SUFFIXES = (".txt", ".jsonl", ".parquet")

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
    return corpus in CORPORA or base_name(corpus) in SYNTHETIC


def default_tokenizer(corpus: str) -> str:
    """`bytes` for shakespeare, which is too small to fill GPT-2's vocabulary, and what is made up; else `gpt2`."""
    return "bytes" if base_name(corpus) in ("shakespeare", *SYNTHETIC) else "gpt2"


def get_source(name: str, inputs: Sequence[str | Path] = (), val_fraction: float = 0.05) -> Source:
    """The source of corpus `name`; raises ConfigError for an unknown name or unfit options, DataError for no data."""
    if not is_known(name):
        raise ConfigError(f"expected a corpus of {', '.join(CORPORA)}, found {name!r}{did_you_mean(name, CORPORA)}")
    if not 0 < val_fraction < 1:
        raise ConfigError(f"expected val_fraction between 0 and 1, found {val_fraction}: 0.05 is usual")
    if name == "text":
        if not inputs:
            raise ConfigError("corpus 'text' expects files or folders, found none: name them with --input PATH")
        return TextFiles(find_files(inputs, TEXT_SUFFIXES), val_fraction)
    if name == "fineweb-edu":
        return FineWebEdu(find_files(inputs, (".parquet",)))
    if inputs:
        raise ConfigError(f"corpus {name!r} has its own documents, found --input: use corpus 'text' for yours")
    return synthetic(name) if base_name(name) in SYNTHETIC else Shakespeare()


@dataclass(frozen=True)
class TextFiles(Source):
    """A user's files: a .txt is one document, a .jsonl one a line (`text` field), a .parquet one a row (`text` column).

    A document is for validation where the hash of its index falls below `val_fraction`; each split gets at least one,
    and of a single document validation is the tail.
    """

    files: tuple[Path, ...]
    val_fraction: float
    name = "text"
    streams = ("val", "train")

    def settings(self) -> dict[str, Any]:
        return {"inputs": describe_files(self.files), "val_fraction": self.val_fraction}

    def documents(self, stream: str, position: Position = None) -> Documents:
        total = sum(self._counts)
        is_validation = _validation_rule(total, self.val_fraction)
        start = position or 0
        first = 0  # index of the file's first document
        for file, count in zip(self.files, self._counts, strict=True):
            if first + count > start:
                for index, text in enumerate(read_documents(file, max(0, start - first)), max(first, start)):
                    if total == 1:
                        yield _head_and_tail(text, self.val_fraction, file)[stream == "val"], index + 1
                    elif is_validation(index) == (stream == "val"):
                        yield text, index + 1
            first += count

    def count(self) -> int:
        return max(2, sum(self._counts))  # one document is cut in two

    @functools.cached_property
    def _counts(self) -> list[int]:
        return [count_documents(file) for file in self.files]


@dataclass(frozen=True)
class FineWebEdu(Source):
    """FineWeb-Edu's 10B-token sample, streamed; or the same from downloaded .parquet `files`."""

    files: tuple[Path, ...] = ()
    name = "fineweb-edu"
    streams = ("all",)

    def settings(self) -> dict[str, Any]:
        inputs = {"inputs": describe_files(self.files)} if self.files else {}
        return {"dataset": FINEWEB_EDU, "config": FINEWEB_EDU_CONFIG, **inputs}

    def documents(self, stream: str, position: Position = None) -> Documents:
        if self.files:
            return stream_documents(open_stream("parquet", data_files=self.files), position)
        return stream_documents(open_stream(FINEWEB_EDU, FINEWEB_EDU_CONFIG), position)

    def count(self) -> int | None:
        return sum(count_documents(file) for file in self.files) if self.files else None


def open_stream(
    dataset: str, config: str | None = None, data_files: Sequence[Path] | None = None
) -> datasets.IterableDataset:
    """The `text` column of a dataset of parquet files on the Hugging Face hub, or of local `data_files`.

    Nothing is downloaded ahead of reading. Raises DataError where `datasets` is missing or the dataset out of reach.
    """
    try:
        import datasets
    except ImportError as error:
        raise DataError(needs_package(f"corpus '{dataset}'", "datasets")) from error
    files = [str(file) for file in data_files] if data_files else None
    try:
        return datasets.load_dataset(
            dataset, config, data_files=files, split="train", streaming=True, columns=["text"]
        )  # columns: the others stay on the server
    except Exception as error:  # the hub's client raises dozens of kinds, from several packages
        raise DataError(
            f"cannot open {dataset}: {_one_line(error)}: a network is needed, or parquet files given with --input"
        ) from error


def stream_documents(dataset: datasets.IterableDataset, position: Position = None) -> Documents:
    """The `text` of each row after `position` with the position after it, which is the dataset's own state.

    The state names the file and the row, so going on reads at most one file again and downloads none before it.
    """
    if position is not None:
        dataset.load_state_dict(position)
    with contextlib.closing(iter(dataset)) as rows:  # type: ignore[type-var]  # a generator, declared as an iterator
        while True:
            try:
                row = next(rows, None)
            except Exception as error:
                raise DataError(
                    f"the stream broke off: {_one_line(error)}: run the same command again to go on"
                ) from error
            if row is None:
                return
            if not isinstance(row["text"], str):
                raise DataError(f"expected text in every row of the stream, found {row['text']!r}: mend that file")
            yield row["text"], dataset.state_dict()


def find_files(inputs: Sequence[str | Path], suffixes: tuple[str, ...]) -> tuple[Path, ...]:
    """The files of these suffixes among `inputs`, folders searched through, sorted within each, none twice.

    Raises DataError naming an input that is missing, of another kind, or a folder without such files.
    """
    kinds = ", ".join(suffixes)
    found: list[Path] = []
    for given in map(Path, inputs):
        path = given.resolve()
        if path.is_dir():
            files = sorted(file for file in path.rglob("*") if file.suffix in suffixes and file.is_file())
            if not files:
                raise DataError(f"expected {kinds} files in folder {given}, found none: choose another with --input")
            found += files
        elif not path.exists():
            raise DataError(f"expected a file or folder at {given}, found nothing: look at --input")
        elif path.suffix not in suffixes:
            raise DataError(f"expected a file of kind {kinds}, found {given}: convert or rename it")
        else:
            found.append(path)
    return tuple(dict.fromkeys(found))


def describe_files(files: Sequence[Path]) -> dict[str, Any]:
    """How many files, how many bytes, and a hash over names and sizes, which tells other files apart."""
    sizes = [(str(file), file.stat().st_size) for file in files]
    return {
        "files": len(sizes),
        "bytes": sum(size for _, size in sizes),
        "names_and_sizes_sha256": hashlib.sha256(json.dumps(sizes).encode()).hexdigest(),
    }


def count_documents(file: Path) -> int:
    """The documents of one file, without decoding them."""
    if file.suffix == ".txt":
        return 1
    if file.suffix == ".parquet":
        with _open_parquet(file) as table:
            return table.metadata.num_rows
    with open(file, "rb") as lines:
        return sum(1 for line in lines if not line.isspace())


def read_documents(file: Path, start: int = 0) -> Iterator[str]:
    """The documents of one file from number `start` on. Raises DataError naming the file and the line or row."""
    if file.suffix == ".txt":
        yield from [_read_text(file)][start:]
    elif file.suffix == ".parquet":
        yield from _read_parquet(file, start)
    else:
        yield from _read_jsonl(file, start)


def _read_text(file: Path) -> str:
    try:
        return file.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: expected UTF-8, found a stray byte at {error.start}: convert the file") from error


def _read_jsonl(file: Path, start: int) -> Iterator[str]:
    document = 0
    with open(file, "rb") as lines:
        for number, line in enumerate(lines, 1):
            if line.isspace():
                continue
            document += 1
            if document > start:
                yield _text_field(line, f"{file}, line {number}")


def _text_field(line: bytes, where: str) -> str:
    try:
        record = parse_json(line.decode("utf-8-sig"))
    except ValueError as error:  # bad JSON, bad UTF-8
        raise DataError(f"{where}: expected a JSON object, found {_one_line(error)}: mend that line") from error
    text = record.get("text") if isinstance(record, dict) else None
    if not isinstance(text, str):
        found = f"the fields {', '.join(record) or 'none'}" if isinstance(record, dict) else type(record).__name__
        raise DataError(f"{where}: expected a JSON object with a string field 'text', found {found}: mend that line")
    return text


def _read_parquet(file: Path, start: int) -> Iterator[str]:
    row = 0
    try:
        with _open_parquet(file) as table:
            for batch in table.iter_batches(batch_size=1024, columns=["text"]):
                for value in batch.column(0).slice(max(0, start - row)):
                    if not isinstance(text := value.as_py(), str):
                        raise DataError(f"{file}: expected text in each row of column 'text', found {text!r}: mend it")
                    yield text
                row += len(batch)
    except (ValueError, OSError) as error:  # pyarrow's kinds for damaged pages
        raise DataError(
            f"{file} is damaged after row {row}: {_one_line(error)}: mend or leave out that file"
        ) from error


def _open_parquet(file: Path) -> Any:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise DataError(needs_package(str(file), "pyarrow")) from error
    try:
        table = parquet.ParquetFile(file)
    except pyarrow.ArrowException as error:
        raise DataError(
            f"{file}: expected a parquet file, found {_one_line(error)}: mend or leave out that file"
        ) from error
    if "text" not in table.schema_arrow.names:
        table.close()
        raise DataError(f"{file}: expected a column 'text', found {', '.join(table.schema_arrow.names)}: rename one")
    return table


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


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
