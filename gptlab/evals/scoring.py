"""How likely a model, or each of its blocks, finds given tokens after given others: what every test here is made of.

Requests are read in batches of like length, and only the positions that count are read out. The batches are shared by
all ranks and do not depend on how many there are, so that any number of them gives the same figures.

Tasks of EleutherAI's lm-evaluation-harness have their likelihoods scored so too. Every rank goes through the whole task
and asks for all of its scores. With every block scored, the task is gone through once a block, and all but the first
time from memory.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from gptlab.data.tokenizers import Tokenizer
from gptlab.device import ComputeConfig
from gptlab.distributed import World
from gptlab.errors import DataError, GptlabError, needs_package, one_line
from gptlab.model.gpt import GPT
from gptlab.model.weights import refuse_not_finite
from gptlab.signals.readout import Readout
from gptlab.training.evaluate import hidden_states


@dataclass(frozen=True)
class Request:
    """What is given, at least one token, and what is scored after it."""

    context: tuple[int, ...]
    continuation: tuple[int, ...]


@dataclass(frozen=True)
class Scores:
    """Of n requests and J blocks, the last one last. loss: Σ -log p of the continuation, nats (n, J) float64;
    greedy: whether each of its tokens was the likeliest (n, J) bool."""

    loss: Tensor
    greedy: Tensor


@dataclass(frozen=True)
class _Window:
    """A stretch of a request that the model can read at once: tokens in, the last `count` of `targets` scored."""

    request: int
    tokens: tuple[int, ...]
    targets: tuple[int, ...]


class Scorer:
    """A model set up for scoring. every_block: score all blocks, else the last alone; batch_size: rows at once."""

    def __init__(
        self, model: GPT, placement: ComputeConfig, world: World, *, batch_size: int = 16, every_block: bool = False
    ) -> None:
        self.model, self.placement, self.world, self.batch_size = model, placement, world, batch_size
        self.blocks = model.config.n_layer if every_block else 1
        self._reader = Readout(model, placement.autocast)

    @torch.no_grad()
    def __call__(self, requests: Sequence[Request], progress: Callable[[int], None] = lambda done: None) -> Scores:
        """The scores of requests, in their order; every rank calls it with the same ones and gets all of them.

        A continuation that is longer than the model reads at once is scored in stretches, as a text is in validation;
        a context is cut at its beginning. progress: called with how many batches this rank has finished.
        """
        block_size = self.model.config.block_size
        windows = [w for n, request in enumerate(requests) for w in _windows(n, request, block_size)]
        windows.sort(key=lambda w: (-len(w.tokens), w.request))
        batches = [windows[at : at + self.batch_size] for at in range(0, len(windows), self.batch_size)]
        device = self.placement.device
        loss = torch.zeros(len(requests), self.blocks, dtype=torch.float64, device=device)
        wrong = torch.zeros_like(loss)
        for done, batch in enumerate(batches[self.world.rank :: self.world.size], 1):
            self._score(batch, loss, wrong)
            progress(done)
        self.world.sum_([loss, wrong])
        refuse_not_finite(loss)
        return Scores(loss.cpu(), (wrong == 0).cpu())

    def _score(self, batch: list[_Window], loss: Tensor, wrong: Tensor) -> None:
        """Add the batch's losses and wrong guesses to the rows of its requests."""
        device, longest = self.placement.device, max(len(w.tokens) for w in batch)
        # What stands behind a row's end cannot be seen from within it: the model is causal.
        tokens = torch.tensor([w.tokens + (0,) * (longest - len(w.tokens)) for w in batch], device=device)
        row = torch.tensor([r for r, w in enumerate(batch) for _ in w.targets], device=device)
        ends = [range(len(w.tokens) - len(w.targets), len(w.tokens)) for w in batch]
        place = torch.tensor([t for positions in ends for t in positions], device=device)
        request = torch.tensor([w.request for w in batch for _ in w.targets], device=device)
        targets = torch.tensor([y for w in batch for y in w.targets], device=device)
        for j, h in enumerate(hidden_states(self.model, tokens, self.placement)[-self.blocks :]):
            found = self._reader.values(h[row, place], targets, _loss_and_miss).double()  # (N, 2)
            loss[:, j].index_add_(0, request, found[:, 0])
            wrong[:, j].index_add_(0, request, found[:, 1])


def _windows(number: int, request: Request, block_size: int) -> list[_Window]:
    """The stretches of a request: disjoint targets, each with as much before it as the model can read."""
    sequence, found = request.context + request.continuation, []
    for start in range(len(request.context), len(sequence), block_size):
        stop = min(start + block_size, len(sequence))
        tokens = sequence[max(0, stop - 1 - block_size) : stop - 1]
        found.append(_Window(number, tokens, sequence[start:stop]))
    return found


def _loss_and_miss(logits: Tensor, targets: Tensor, other: Tensor | None = None) -> Tensor:
    """(n, 2): the cross-entropy of every token, and 1 where another token was likelier."""
    return torch.stack([F.cross_entropy(logits, targets, reduction="none"), (logits.argmax(1) != targets).float()], 1)


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
