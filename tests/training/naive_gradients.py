"""A naive reference of the gradient, which takes 'Judging' and 'Controls' of docs/signals.md at their word.

It knows nothing of cutting a forward pass: every judge is a second forward through detached copies of its weights, all
logits are kept, and autograd does the rest. No tests here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from gptlab.model import GPT, GPTConfig
from gptlab.signals import SignalConfig
from gptlab.training import Losses, backward
from gptlab.training.controls import flipped, named, permuted, rotation, shuffled

B, T, V, L = 3, 5, 17, 4
SIZE = GPTConfig(block_size=T + 1, vocab_size=V, n_layer=L, n_head=2, n_embd=8)

Gradients = dict[str, Tensor]
Rows = Mapping[int, Tensor]
"""judge -> the positions (n,) it reads, of the flattened batch."""


def build(share_blocks: bool = False, dtype: torch.dtype = torch.float64, size: GPTConfig = SIZE) -> GPT:
    """A model with every parameter drawn at random, wide enough apart that its blocks are sure of something."""
    model = GPT(replace(size, share_blocks=share_blocks))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            norm = "ln_" in name and name.endswith("weight")
            p.normal_(1.0 if norm else 0.0, 0.4, generator=generator)
    return model.to(dtype)


def text() -> tuple[Tensor, Tensor]:
    """Tokens and targets (B, T); no target comes twice, so that a target tells its position."""
    generator = torch.Generator().manual_seed(9)
    targets = torch.randperm(V, generator=generator)[: B * T].view(B, T)
    return torch.randint(V, (B, T), generator=generator), targets


def foreseen(share_blocks: bool) -> tuple[Tensor, Tensor]:
    """The same tokens with targets that one judge or another has right in each sequence."""
    tokens, targets = text()
    with torch.no_grad():
        states = [build(share_blocks).read(h).argmax(2) for h in build(share_blocks).hidden_states(tokens)]
    for j in range(1, L):
        targets[:, j] = states[j][:, j]
    return tokens, targets


def gradients(model: nn.Module) -> Gradients:
    return {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in model.named_parameters()}


def found(
    config: SignalConfig | None, share_blocks: bool = False, data: tuple[Tensor, Tensor] | None = None, **keys: Any
) -> tuple[Gradients, Losses]:
    """What gptlab computes on the text, in float64."""
    model = build(share_blocks)
    losses = backward(model, *(data or text()), config, **keys)
    return gradients(model), losses


def furthest(a: Gradients, b: Gradients) -> float:
    """The greatest difference of any parameter's gradient, relative to the longest of b."""
    longest = max(g.abs().max().item() for g in b.values())
    return max((a[name] - b[name]).abs().max().item() for name in b) / longest


def frozen(module: nn.Module, x: Tensor) -> Tensor:
    """The module with detached copies of its weights."""
    return functional_call(module, {name: p.detach().clone() for name, p in module.named_parameters()}, (x,))


def said(
    model: GPT,
    config: SignalConfig,
    data: tuple[Tensor, Tensor],
    rows: Rows | None,
    step: int,
    seed: int,
    *,
    own: bool,
    taught: bool,
    control: str = "none",
) -> Tensor:
    """The weighted sum of the signal's means over its judges, a graph of what is asked for.

    own: the judges' own weights are in it, as they are for live ones; taught: what they teach is, through h_{j-1}
    """
    (tokens, targets), L = data, model.config.n_layer
    seen = targets
    if config.control == "flipped":
        names = [(0, b) for b in range(len(tokens))]
        seen = flipped(targets, config.flip, config.flip_to, model.config.vocab_size, seed, names, "flip")
    needs = config.signal.needs
    logits = [model.read(h).detach().flatten(0, 1) for h in model.hidden_states(tokens)] if needs else []

    def apply(module: nn.Module, x: Tensor) -> Tensor:
        return module(x) if own else frozen(module, x)

    judges, factor = config.judges_at(step, L, seed)
    total = torch.zeros((), dtype=torch.float64)
    for j in judges:
        h = model.embed(tokens)
        if not config.embeddings:
            h = h.detach()
        for i, block in enumerate(model.blocks[: j - 1], start=1):
            h = block(h.detach() if config.reach == "local" and i == j - 1 else h)
        if not taught:
            h = h.detach()
        elif h.requires_grad:
            if control == "placebo":
                h.register_hook(lambda g, j=j: g @ rotation(g.shape[-1], seed, j))
            elif control == "shuffled":
                h.register_hook(lambda g, j=j: shuffled(g, seed, step, 0, j))
        z = apply(model.lm_head, apply(model.ln_f, apply(model.blocks[j - 1], h))).flatten(0, 1)
        chosen = torch.arange(tokens.numel()) if rows is None else rows[j]
        other = logits[{"previous": j - 1, "next": j + 1, "final": L}[needs]][chosen] if needs else None
        shown = named(z, seen.flatten())[chosen]
        total = total + factor * config.signal(z[chosen], shown, other=other, threshold=config.threshold).mean()
    return config.weight_at(step, L) * total


def naive(
    config: SignalConfig,
    share_blocks: bool,
    rows: Rows | None = None,
    step: int = 0,
    seed: int = 0,
    data: tuple[Tensor, Tensor] | None = None,
    make: Callable[[], GPT] | None = None,
) -> tuple[Gradients, float, float]:
    """(gradients, true loss, signal loss) of the text by autograd; make: builds the same float64 model every time."""
    data, make = data or text(), make or partial(build, share_blocks)

    def part(control: str = "none", *, own: bool = False, taught: bool = False) -> tuple[Gradients, float]:
        model = make()
        value = said(model, config, data, rows, step, seed, own=own, taught=taught, control=control)
        if value.requires_grad:
            value.backward()
        return gradients(model), value.item()

    model, (tokens, targets) = make(), data
    true = cross_entropy(model(tokens).flatten(0, 1), targets.flatten())
    true.backward()
    taught, value = part(config.control, taught=True)
    own = part(own=True)[0] if config.evaluator == "live" else {n: torch.zeros_like(g) for n, g in taught.items()}
    scale = 1.0
    if config.control == "placebo":
        signal, plain = part(taught=True)[0], own
        own = {name: permuted(g, seed, name) for name, g in own.items()}
        scale = length({n: signal[n] + plain[n] for n in plain}) / length({n: taught[n] + own[n] for n in own})
    summed = {n: g + scale * (taught[n] + own[n]) for n, g in gradients(model).items()}
    return summed, true.item(), value


def length(gradients: Gradients) -> float:
    """The Euclidean length over all parameters."""
    return float(torch.stack([g.square().sum() for g in gradients.values()]).sum() ** 0.5)
