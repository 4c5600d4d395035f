"""Tasks of EleutherAI's lm-evaluation-harness, likelihoods scored by ours: batches of like length, over all ranks.

Every rank goes through the whole task and asks for all of its scores; the scorer shares the batches between the ranks.
With every block scored, the task is gone through once a block, and all but the first time from memory.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

from gptlab.data.tokenizers import Tokenizer
from gptlab.errors import DataError, GptlabError, needs_package, one_line
from gptlab.evals.scoring import Request, Scorer


def _lm_eval(module: str = "lm_eval") -> Any:
    """A module of the package; raises DataError where it is not installed."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise DataError(needs_package(f"an lm_eval task ({error})", "lm-eval")) from None


def run_harness(
    name: str, scorer: Scorer, tokenizer: Tokenizer, *, limit: int | None = None, include_path: str | None = None
) -> dict[str, list[dict[str, float]]]:
    """Every block's figures of a task, or of each task of a group, by name; raises DataError where it cannot run.

    include_path: a folder of one's own task files (YAML).
    """
    lm_eval, manager = _lm_eval(), _lm_eval("lm_eval.tasks").TaskManager
    model = language_model(scorer, tokenizer)
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
        raise DataError(f"lm_eval:{name} cannot be run: {type(error).__name__}: {one_line(error)}") from error
    return found


def _numbers(figures: dict[str, Any]) -> dict[str, float]:
    """Of what stands under `metric,filter` the numbers, by `metric` alone where nothing filters."""
    metrics = {key.removesuffix(",none"): value for key, value in figures.items() if "," in key}
    numbers = {key: value for key, value in metrics.items() if isinstance(value, int | float)}
    return {key: float(value) for key, value in numbers.items() if value == value}  # JSON holds no NaN


def language_model(scorer: Scorer, tokenizer: Tokenizer) -> Any:
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
            raise DataError(
                "the model has to write text there, which is not scored here: `gptlab export RUN FOLDER`, then "
                "`lm_eval run --model hf --model_args pretrained=FOLDER`"
            )

    return BlockLM()
