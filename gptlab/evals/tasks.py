"""HellaSwag and LAMBADA, run so that they can be stopped at any moment: finished rows are kept in a small JSON file.

Rows are taken in portions of like length that depend on the test alone. A portion is scored whole, its outcomes are
written, and a later run begins with the first portion that is not there; the figures are those of an unbroken run.
The rows of a test come from a local file, JSON lines or parquet by its content, or through the package datasets.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gptlab.data.tokenizers import Tokenizer
from gptlab.errors import DataError, needs_package, one_line, shown
from gptlab.evals.scoring import Request, Scorer, Scores
from gptlab.files import MB, parse_json, read_bytes, read_json, size, write_whole

HELLASWAG, LAMBADA = ("Rowan/hellaswag", "validation"), ("EleutherAI/lambada_openai", "test")
"""Where the package datasets finds them, and the split."""
ENDINGS = 4
PORTION = 64
"""Rows of a portion."""
PARQUET = b"PAR1"
LARGEST = 256 * MB
"""Bytes of a file of rows, and of what a parquet file unpacks to; HellaSwag's largest has 47 MB."""


@dataclass(frozen=True)
class Row:
    """The requests that one row asks, and its right answer where it has one."""

    requests: tuple[Request, ...]
    label: int = 0


@dataclass(frozen=True)
class Task:
    """A test. outcome: a row and its scores -> two numbers for every block (J, 2); figures: those of all rows
    (n, 2) of one block -> what is reported."""

    name: str
    rows: Sequence[Row]
    source: str
    sha256: str
    outcome: Callable[[Row, Scores], Tensor]
    figures: Callable[[Tensor], dict[str, float]]


class Record:
    """The outcomes of finished rows in a JSON file, for one identity: model, rows and settings."""

    def __init__(self, path: Path | None, identity: Mapping[str, Any]) -> None:
        self.path, self.identity = path, dict(identity)
        self.done: dict[int, list[list[float]]] = self._read() if path else {}

    def _read(self) -> dict[int, list[list[float]]]:
        """What the file holds, where it is of the same identity; a file that cannot be read counts for nothing."""
        assert self.path
        try:
            content = read_json(self.path)
            if content["identity"] != self.identity:
                return {}
            done = {int(row): torch.tensor(pairs, dtype=torch.float64) for row, pairs in content["done"].items()}
            return {row: pairs.view(-1, 2).tolist() for row, pairs in done.items()}
        except (DataError, OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError):
            return {}

    def write(self) -> None:
        """Write the file, whole or not at all."""
        if self.path is None:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(self.path, json.dumps({"identity": self.identity, "done": self.done}))
        except OSError as error:
            raise DataError(f"could not write {self.path}: {error.strerror}; give another folder with --out") from None


def portions(rows: Sequence[Row]) -> list[list[int]]:
    """Numbers of rows, longest first: a batch's rows are of like length, and too little memory shows at once."""
    length = [max(len(r.context) + len(r.continuation) for r in row.requests) for row in rows]
    order = sorted(range(len(rows)), key=lambda n: (-length[n], n))
    return [order[at : at + PORTION] for at in range(0, len(order), PORTION)]


def run_task(
    task: Task, scorer: Scorer, record: Record, progress: Callable[[int, dict[str, float]], None]
) -> list[dict[str, float]]:
    """Every block's figures, the last block's last. progress: rows that are done and the last block's figures so far.

    Every rank calls it alike; the one that writes has a record with a path, and `record.done` is the same on all.
    """
    for portion in portions(task.rows):
        if all(len(record.done.get(n, ())) == scorer.blocks for n in portion):
            continue
        asked = [request for n in portion for request in task.rows[n].requests]
        scores, at = scorer(asked), 0
        for n in portion:
            row = task.rows[n]
            part = slice(at, at := at + len(row.requests))
            record.done[n] = task.outcome(row, Scores(scores.loss[part], scores.greedy[part])).tolist()
        record.write()
        done = torch.tensor([record.done[n] for n in sorted(record.done)], dtype=torch.float64)
        progress(len(record.done), task.figures(done[:, -1]))
    done = torch.tensor([record.done[n] for n in range(len(task.rows))], dtype=torch.float64)  # (n, J, 2)
    return [task.figures(done[:, j]) for j in range(scorer.blocks)]


def hellaswag(file: str | None, tokenizer: Tokenizer, limit: int | None = None) -> Task:
    """HellaSwag (Zellers et al. 2019, 1905.07830): which of four endings continues a context.

    Scored as build-nanogpt does, as a completion: each ending, a space before it, is read after the context; `acc`
    takes the ending with the smallest summed loss over its tokens, `acc_norm` the one with the smallest mean loss. From
    a local file (JSON lines, or the dataset's parquet) or the dataset; raises DataError.
    """
    found = read_rows(file, *HELLASWAG, "--hellaswag")
    rows = [_choice(raw, tokenizer, f"{found.source}, row {n}") for n, raw in enumerate(found.rows[:limit])]
    return Task("hellaswag", rows, found.source, found.sha256, _right, _accuracies)


def _choice(raw: dict[str, Any], tokenizer: Tokenizer, where: str) -> Row:
    context, endings = raw.get("ctx"), raw.get("endings")
    if not isinstance(context, str) or not isinstance(endings, list) or len(endings) != ENDINGS:
        raise DataError(f"{where}: expected ctx and {ENDINGS} endings, found {', '.join(raw) or 'nothing'}")
    if not all(isinstance(ending, str) for ending in endings):
        raise DataError(f"{where}: expected endings that are text, found {endings!r}")
    label = str(raw.get("label"))  # a number in the authors' files, text in the dataset, empty in its test split
    if label not in map(str, range(ENDINGS)):
        raise DataError(f"{where}: expected a label of 0 to {ENDINGS - 1}, found {raw.get('label')!r}")
    given = tuple(tokenizer.prompt(context))
    asked = tuple(Request(given, tuple(tokenizer.encode(" " + ending).tolist())) for ending in endings)
    return Row(asked, int(label))


def _right(row: Row, scores: Scores) -> Tensor:
    """Whether each block is right, by the sum and by the mean (J, 2)."""
    lengths = torch.tensor([len(r.continuation) for r in row.requests])[:, None]
    chosen = torch.stack([scores.loss.argmin(0), (scores.loss / lengths).argmin(0)], 1)
    return (chosen == row.label).long()


def _accuracies(outcomes: Tensor) -> dict[str, float]:
    acc, acc_norm = outcomes.mean(0).tolist()
    return {"acc": acc, "acc_norm": acc_norm}


def lambada(file: str | None, tokenizer: Tokenizer, limit: int | None = None) -> Task:
    """LAMBADA (Paperno et al. 2016, 1606.06031): a passage's last word, which only the whole passage decides.

    As OpenAI prepared it for GPT-2, a text a row. `acc`: every token of the last word is the likeliest one;
    `perplexity`: exp of the mean loss of the last words. From a local file (JSON lines or parquet with `text`) or the
    dataset; raises DataError.
    """
    found = read_rows(file, *LAMBADA, "--lambada")
    rows = [_last_word(raw, tokenizer, f"{found.source}, row {n}") for n, raw in enumerate(found.rows[:limit])]
    return Task("lambada", rows, found.source, found.sha256, _loss_and_guess, _accuracy_and_perplexity)


def _last_word(raw: dict[str, Any], tokenizer: Tokenizer, where: str) -> Row:
    text = raw.get("text")
    before, space, word = text.rpartition(" ") if isinstance(text, str) else ("", "", "")
    if not before or not word:
        raise DataError(f"{where}: expected a text of several words that ends with one, found {text!r:.60}")
    context, last = tokenizer.prompt(before), tokenizer.encode(space + word)
    return Row((Request(tuple(context), tuple(last.tolist())),))


def _loss_and_guess(row: Row, scores: Scores) -> Tensor:
    """The last word's loss, and whether it was guessed, for each block (J, 2)."""
    return torch.stack([scores.loss[0], scores.greedy[0].double()], 1)


def _accuracy_and_perplexity(outcomes: Tensor) -> dict[str, float]:
    loss, acc = outcomes.mean(0).tolist()
    return {"acc": acc, "perplexity": math.exp(min(loss, 700.0))}


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
    if content.startswith(PARQUET):
        return _from_parquet(content, path)
    lines = ((number, line) for number, line in enumerate(content.split(b"\n"), 1) if line.strip())
    return [_object(line, f"{path}, line {number}") for number, line in lines]


def _object(line: bytes, where: str) -> dict[str, Any]:
    with contextlib.suppress(ValueError):
        if isinstance(row := parse_json(line), dict):
            return row
    raise DataError(f"{where}: expected a JSON object, found {shown(line)}")


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
        raise DataError(f"{path} is no parquet file that can be read: {one_line(error)}") from None
    return rows


def _from_hub(dataset: str, split: str, option: str) -> list[dict[str, Any]]:
    try:
        import datasets
    except ImportError:
        raise DataError(f"{needs_package(dataset, 'datasets')}, or give {option} FILE") from None
    try:
        return [dict(row) for row in datasets.load_dataset(dataset, split=split)]
    except Exception as error:  # datasets, its hub client and the network have no common kind
        raise DataError(f"cannot load {dataset} ({split}): {one_line(error)}; give a file with {option} FILE") from None
