"""LAMBADA (Paperno et al. 2016, 1606.06031): the last word of a passage, which only the whole passage tells.

As OpenAI prepared it for GPT-2, a text a row. `acc`: every token of the last word is the likeliest one; `perplexity`:
exp of the mean loss of the last words.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from gptlab.data.tokenizers import Tokenizer
from gptlab.errors import DataError
from gptlab.evals.files import read_rows
from gptlab.evals.rows import Row, Task
from gptlab.evals.scoring import Request, Scores

DATASET, SPLIT = "EleutherAI/lambada_openai", "test"


def lambada(file: str | None, tokenizer: Tokenizer, limit: int | None = None) -> Task:
    """The test from a local file (JSON lines or parquet with `text`) or the dataset; raises DataError."""
    found = read_rows(file, DATASET, SPLIT, "--lambada")
    rows = [_row(raw, tokenizer, f"{found.source}, row {n}") for n, raw in enumerate(found.rows[:limit])]
    return Task("lambada", rows, found.source, found.sha256, _outcome, _figures)


def _row(raw: dict[str, Any], tokenizer: Tokenizer, where: str) -> Row:
    text = raw.get("text")
    before, space, word = text.rpartition(" ") if isinstance(text, str) else ("", "", "")
    if not before or not word:
        raise DataError(f"{where}: expected a text of several words that ends with one, found {text!r:.60}")
    context, last = tokenizer.prompt(before), tokenizer.encode(space + word)
    return Row((Request(tuple(context), tuple(last.tolist())),))


def _outcome(row: Row, scores: Scores) -> Tensor:
    """The last word's loss, and whether it was guessed, for each block (J, 2)."""
    return torch.stack([scores.loss[0], scores.greedy[0].double()], 1)


def _figures(outcomes: Tensor) -> dict[str, float]:
    loss, acc = outcomes.mean(0).tolist()
    return {"acc": acc, "perplexity": math.exp(min(loss, 700.0))}
