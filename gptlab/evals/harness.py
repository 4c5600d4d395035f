"""Any task of EleutherAI's lm-evaluation-harness, its requests scored by ours: batches of like length, over all ranks.

Every rank goes through the whole task and asks for all of its scores; the scorer shares the batches between the ranks.
With every block scored, the task is gone through once a block, and all but the first time from memory.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from gptlab.data.tokenizers import Tokenizer
from gptlab.errors import DataError, GptlabError, needs_package
from gptlab.evals.scoring import Request, Scorer

Writer = Callable[[list[int], int, float], Iterator[int]]
"""(prompt, most new tokens, temperature) -> the tokens that the model writes."""
DEFAULT_NEW_TOKENS = 256


def _lm_eval(module: str = "lm_eval") -> Any:
    """A module of the package; raises DataError where it is not installed."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise DataError(needs_package(f"an lm_eval task ({error})", "lm-eval")) from None


def run_harness(
    name: str,
    scorer: Scorer,
    tokenizer: Tokenizer,
    write: Writer,
    *,
    limit: int | None = None,
    include_path: str | None = None,
) -> dict[str, list[dict[str, float]]]:
    """Every block's figures of a task, or of each task of a group, by name; raises DataError where it cannot run.

    include_path: a folder of one's own task files (YAML).
    """
    lm_eval, manager = _lm_eval(), _lm_eval("lm_eval.tasks").TaskManager
    model = language_model(scorer, tokenizer, write)
    found: dict[str, list[dict[str, float]]] = {}
    try:
        tasks = manager(include_path=include_path)
        for block in range(scorer.blocks):
            model.block = block
            results = lm_eval.simple_evaluate(
                model=model, tasks=[name], limit=limit, task_manager=tasks, bootstrap_iters=0, log_samples=False
            )
            for task, figures in results["results"].items():
                found.setdefault(task, []).append(_numbers(figures))
    except GptlabError:
        raise
    except Exception as error:  # a task may need anything: a data set, the network, another package
        reason = next(iter(str(error).splitlines()), "")
        raise DataError(f"lm_eval:{name} cannot be run: {type(error).__name__}: {reason[:200]}") from error
    return found


def _numbers(figures: dict[str, Any]) -> dict[str, float]:
    """Of what stands under `metric,filter` the numbers, by `metric` alone where nothing filters."""
    metrics = {key.removesuffix(",none"): value for key, value in figures.items() if "," in key}
    numbers = {key: value for key, value in metrics.items() if isinstance(value, int | float)}
    return {key: float(value) for key, value in numbers.items() if value == value}  # JSON holds no NaN


def language_model(scorer: Scorer, tokenizer: Tokenizer, write: Writer) -> Any:
    """The model as lm_eval knows one: a TemplateLM whose `block` says which block's scores it gives."""
    TemplateLM: Any = _lm_eval("lm_eval.api.model").TemplateLM

    class BlockLM(TemplateLM):
        block = scorer.blocks - 1
        eot_token_id = tokenizer.document_start

        def __init__(self) -> None:
            super().__init__()
            self._known: dict[Request, tuple[list[float], list[bool]]] = {}

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
            return tokenizer.encode(string).tolist()

        def _loglikelihood_tokens(
            self, requests: Sequence[tuple[Any, list[int], list[int]]], **kwargs: Any
        ) -> list[tuple[float, bool]]:
            return self._scored([Request(tuple(context), tuple(after)) for _, context, after in requests])

        def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
            start = (tokenizer.document_start,)
            texts = [Request(start, tuple(self.tok_encode(request.args[0]))) for request in requests]
            return [loss for loss, _ in self._scored(texts)]

        def _scored(self, requests: list[Request]) -> list[tuple[float, bool]]:
            if new := [r for r in dict.fromkeys(requests) if r not in self._known]:
                scores = scorer(new)
                figures = zip(scores.loss.tolist(), scores.greedy.tolist(), strict=True)
                self._known |= dict(zip(new, figures, strict=True))
            known = (self._known[request] for request in requests)
            return [(-loss[self.block], greedy[self.block]) for loss, greedy in known]

        def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
            if self.block != scorer.blocks - 1:
                raise DataError("this task has the model write text, which the last block does: leave out --blocks")
            return _written([request.args for request in requests], scorer, tokenizer, write)

    return BlockLM()


def _written(asked: list[tuple[str, dict[str, Any]]], scorer: Scorer, tokenizer: Tokenizer, write: Writer) -> list[str]:
    """What the model writes after each context, up to its stop; the contexts are shared by the ranks."""
    block_size, world = scorer.model.config.block_size, scorer.world
    most = max((int(how.get("max_gen_toks", DEFAULT_NEW_TOKENS)) for _, how in asked), default=0)
    tokens = torch.zeros(len(asked), most + 1, dtype=torch.int64, device=scorer.placement.device)
    for n in range(len(asked))[world.rank :: world.size]:
        context, how = asked[n]
        count = int(how.get("max_gen_toks", DEFAULT_NEW_TOKENS))
        prompt = tokenizer.prompt(context)[-max(1, block_size - count) :]
        temperature = float(how.get("temperature", 0.0)) if how.get("do_sample") else 0.0
        text: list[int] = []
        for token in write(prompt, count, temperature):
            text.append(token)
            if token == tokenizer.end_of_text or _stopped(tokenizer.decode(text), how) is not None:
                break
        tokens[n, 0] = len(text)
        tokens[n, 1 : 1 + len(text)] = torch.tensor(text, dtype=torch.int64)
    world.sum_([tokens])
    texts = []
    for (_, how), (length, *row) in zip(asked, tokens.tolist(), strict=True):
        kept = row[:length]
        if kept and kept[-1] == tokenizer.end_of_text:
            kept.pop()
        whole = tokenizer.decode(kept)
        texts.append(whole[: _stopped(whole, how)])
    return texts


def _stopped(text: str, how: dict[str, Any]) -> int | None:
    """Where the first of the stops begins, if one is there."""
    stops = how.get("until") or []
    places = [text.find(stop) for stop in ([stops] if isinstance(stops, str) else stops) if stop]
    return min((place for place in places if place >= 0), default=None)
