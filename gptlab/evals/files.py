"""Rows of a test: from a local file, JSON lines or parquet as its content tells, or through the package datasets."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gptlab.errors import DataError, needs_package, shown
from gptlab.files import MB, read_bytes, size
from gptlab.parsing import parse_json

PARQUET = b"PAR1"
LARGEST = 256 * MB
"""Bytes of a file of rows, and of what a parquet file unpacks to; HellaSwag's largest has 47 MB."""


@dataclass(frozen=True)
class Rows:
    """rows: as they stand in the source; source: where that is; sha256: of all rows, so that a resume knows them."""

    rows: list[dict[str, Any]]
    source: str
    sha256: str


def read_rows(file: str | None, dataset: str, split: str, option: str) -> Rows:
    """The rows of `file`, or of a dataset's split; raises DataError where there are none. option: what names a file."""
    if file is None:
        source, rows = f"{dataset} ({split})", _from_hub(dataset, split, option)
    else:
        source, rows = file, _from_file(Path(file))
    if not rows:
        raise DataError(f"{source}: expected rows, found none")
    text = json.dumps(rows, sort_keys=True, ensure_ascii=False, default=str)
    return Rows(rows, source, hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest())


def _from_file(path: Path) -> list[dict[str, Any]]:
    try:
        content = read_bytes(path, limit=LARGEST)
    except FileNotFoundError as error:
        raise DataError(f"cannot read {path}: {error.strerror}; check the path") from None
    return _from_parquet(content, path) if content.startswith(PARQUET) else _from_lines(content, path)


def _from_lines(content: bytes, path: Path) -> list[dict[str, Any]]:
    rows = []
    for number, line in enumerate(content.split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            row = parse_json(line)
        except ValueError:
            row = None
        if not isinstance(row, dict):
            raise DataError(f"{path}, line {number}: expected a JSON object, found {shown(line)}")
        rows.append(row)
    return rows


def _from_parquet(content: bytes, path: Path) -> list[dict[str, Any]]:
    try:
        from pyarrow import ArrowException, BufferReader, parquet
    except ImportError:
        raise DataError(needs_package(str(path), "pyarrow")) from None
    rows, held = [], 0
    try:
        for batch in parquet.ParquetFile(BufferReader(content)).iter_batches(64):
            held += batch.nbytes + batch.num_rows  # a few bytes may stand for any number of equal rows
            if held > LARGEST:
                raise DataError(f"{path}: expected rows of at most {size(LARGEST)}, found more; is it the test's file?")
            rows += batch.to_pylist()
    except (ArrowException, OSError, ValueError) as error:
        raise DataError(f"{path} is no parquet file that can be read: {str(error).splitlines()[0]}") from None
    return rows


def _from_hub(dataset: str, split: str, option: str) -> list[dict[str, Any]]:
    try:
        import datasets
    except ImportError:
        raise DataError(f"{needs_package(dataset, 'datasets')}, or give {option} FILE") from None
    try:
        return [dict(row) for row in datasets.load_dataset(dataset, split=split)]
    except Exception as error:  # datasets, its hub client and the network have no common kind
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise DataError(f"cannot load {dataset} ({split}): {reason[:160]}; give a file with {option} FILE") from None
