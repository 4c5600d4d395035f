"""`gptlab.analysis.probe`: the measures of noise for anybody's torch model and losses."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from gptlab.analysis.noise.measure import entry
from gptlab.errors import ConfigError
from gptlab.training.gradient_noise import Gradients, inner_products
from gptlab.training.optimizer import adam_metric

_BLOCK = re.compile(r"(?:.*\.)?(?:h|layers|blocks|layer)\.(\d+)\.")
"""Names of parameters that belong to a numbered block, as GPT-2, Llama, BERT and most others write them."""


def probe(
    model: nn.Module,
    losses: Mapping[str, Callable[[Any, Any], Tensor]],
    batches: Iterable[Any],
    *,
    optimizer: torch.optim.Optimizer | None = None,
) -> dict[str, Any]:
    """How each loss's gradient stands to the first one's, the true loss: noise, alignment, progress, variance.

    losses: name -> function of (model, batch) that gives a scalar, auxiliary ones times their weight. batches: groups,
    each a batch of what the functions take; at least 3, and 32 or more for intervals to be trusted. optimizer: an Adam
    after some steps, for the preconditioned alignment. Gives {"signals": {name: {"total", "blocks"}}} as `gptlab noise
    --json` does (docs/noise.md); blocks are the model's numbered ones by its parameters' names. The model is put into
    evaluation mode meanwhile; weights and `.grad` stay as they are. Raises ConfigError for what cannot be measured.

    >>> point = nn.Linear(2, 1, bias=False)
    >>> data = [torch.tensor([[1.0, 0.1 * k]]) for k in range(32)]
    >>> def true(model, x):
    ...     return model(x).mean()
    >>> def against(model, x):
    ...     return -0.5 * model(x).mean()
    >>> found = probe(point, {"true": true, "against": against}, data)["signals"]["against"]["total"]
    >>> round(found["alignment"]["value"], 6), round(found["progress"], 6), round(found["variance"], 6)
    (-1.0, 0.5, 0.25)
    """
    groups = list(batches)
    if len(groups) < 3 or not losses:
        raise ConfigError(
            f"probe needs a loss and at least 3 groups, better 32; found {len(losses)} and {len(groups)}; "
            "cut the batch into smaller ones"
        )
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    parameters = [p for _, p in named]
    if not parameters:
        raise ConfigError("probe needs a model with parameters that take gradient, found none; see requires_grad_")
    parts, blocks = _parts([name for name, _ in named])
    metric = None if optimizer is None else adam_metric(parameters, optimizer)

    def gather(i: int) -> list[Gradients]:
        return [_gradient(name, loss, model, groups[i], parameters) for name, loss in losses.items()]

    with _evaluating(model):
        measured = inner_products(gather, len(groups), parts, [None] if metric is None else [None, metric])
    return {
        "groups": len(groups),
        "preconditioned": metric is not None,
        "signals": {name: entry(measured, blocks, source, name) for source, name in enumerate(losses)},
    }


def _gradient(
    name: str, loss: Callable[[Any, Any], Tensor], model: nn.Module, batch: Any, parameters: Sequence[Tensor]
) -> Gradients:
    with torch.enable_grad():
        value = loss(model, batch)
        if not isinstance(value, Tensor) or value.numel() != 1:
            found = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ConfigError(f"the loss {name!r} must give a scalar tensor, found {found}; take its mean")
        if not value.requires_grad:  # a gate that let nothing by
            return [torch.zeros_like(p) for p in parameters]
        found = torch.autograd.grad(value.sum(), parameters, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]


def _parts(names: Sequence[str]) -> tuple[list[int], list[int]]:
    """(for each parameter its part, for each block its part): the numbered blocks, and one more part for the rest."""
    numbers = [int(match[1]) if (match := _BLOCK.match(name)) else None for name in names]
    known = sorted({number for number in numbers if number is not None})
    part = {number: index for index, number in enumerate(known)}
    return [len(known) if number is None else part[number] for number in numbers], list(range(len(known)))


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Inside, no module draws (dropout) or counts: a group's gradient is the same whenever it is asked for."""
    before = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in before.items():
            module.training = training
