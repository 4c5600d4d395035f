"""HellaSwag (Zellers et al. 2019, 1905.07830): which of four endings goes on from a context.

Scored as build-nanogpt does, as a completion: each ending, a space before it, is read after the context; `acc` takes
the ending with the smallest summed loss over its tokens, `acc_norm` the one with the smallest mean loss.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gptlab.data.tokenizers import Tokenizer
from gptlab.errors import DataError
from gptlab.evals.files import read_rows
from gptlab.evals.rows import Row, Task
from gptlab.evals.scoring import Request, Scores

DATASET, SPLIT = "Rowan/hellaswag", "validation"
ENDINGS = 4


def hellaswag(file: str | None, tokenizer: Tokenizer, limit: int | None = None) -> Task:
    """The test from a local file (JSON lines, or the dataset's parquet) or the dataset; raises DataError."""
    found = read_rows(file, DATASET, SPLIT, "--hellaswag")
    rows = [_row(raw, tokenizer, f"{found.source}, row {n}") for n, raw in enumerate(found.rows[:limit])]
    return Task("hellaswag", rows, found.source, found.sha256, _outcome, _figures)


def _row(raw: dict[str, Any], tokenizer: Tokenizer, where: str) -> Row:
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


def _outcome(row: Row, scores: Scores) -> Tensor:
    """Whether each block is right, by the sum and by the mean (J, 2)."""
    lengths = torch.tensor([len(r.continuation) for r in row.requests])[:, None]
    chosen = torch.stack([scores.loss.argmin(0), (scores.loss / lengths).argmin(0)], 1)
    return (chosen == row.label).long()


def _figures(outcomes: Tensor) -> dict[str, float]:
    acc, acc_norm = outcomes.mean(0).tolist()
    return {"acc": acc, "acc_norm": acc_norm}
