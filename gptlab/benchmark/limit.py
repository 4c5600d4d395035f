"""The matmul limit: how fast a step would be if it were nothing but its own matmuls, each measured alone.

Every product that a training step needs is listed with its shape, forward and both backward ones, in the dtype the
step computes in; attention's own products are not among them (they are a few percent of a step at T=256).
"""

from __future__ import annotations

import time
from collections import Counter

import torch

from gptlab.device import Placement
from gptlab.model.gpt import GPTConfig
from gptlab.signals.config import SignalConfig

Product = tuple[int, int, int]
"""(m, k, n): an (m, k) by (k, n) product."""


def products(config: GPTConfig, tokens: int, signal: SignalConfig | None = None) -> Counter[Product]:
    """The matmuls of one step over `tokens` tokens, with how often each is needed.

    A judged block costs, beside its reading (forward and to its input, no weight gradient), the input-gradients of its
    four linear layers; `rotate` judges one block, `positions` read a share of the tokens.
    """
    C, V = config.n_embd, config.vocab_size
    layers = [(C, 3 * C), (C, C), (C, 4 * C), (4 * C, C)]
    needed: Counter[Product] = Counter()
    for k, n in layers:
        needed[tokens, k, n] += config.n_layer
        needed[tokens, n, k] += config.n_layer
        needed[k, tokens, n] += config.n_layer
    for product in ((tokens, C, V), (tokens, V, C), (C, tokens, V)):
        needed[product] += 1
    if signal is not None and signal.name != "none":
        judges = len(signal.judges_at(0, config.n_layer, 0)[0])
        read = round(tokens * signal.positions)
        needed[read, C, V] += judges
        needed[read, V, C] += judges
        for k, n in layers:
            needed[tokens, n, k] += judges
    return needed


def seconds(needed: Counter[Product], placement: Placement, repeats: int = 5) -> float:
    """The time of all products one after another: the median of each measured alone, summed."""
    total = 0.0
    dtype = placement.autocast or torch.float32
    for (m, k, n), count in needed.items():
        a = torch.randn(m, k, dtype=dtype, device=placement.device, generator=_generator(placement))
        b = torch.randn(n, k, dtype=dtype, device=placement.device, generator=_generator(placement)).t()
        times = []
        for _ in range(repeats):
            _wait(placement)
            start = time.perf_counter()
            torch.matmul(a, b)
            _wait(placement)
            times.append(time.perf_counter() - start)
        total += count * sorted(times)[len(times) // 2]
    return total


def _generator(placement: Placement) -> torch.Generator:
    return torch.Generator(device=placement.device).manual_seed(0)


def _wait(placement: Placement) -> None:
    if placement.device.type == "cuda":
        torch.cuda.synchronize(placement.device)
