"""The matmul limit: how fast a step would be if it were nothing but its own matmuls, each measured alone.

Every product that a training step needs is listed with its shape, forward and both backward ones, in the dtype the
step computes in; attention's own products are not among them (they are a few percent of a step at T=256).
"""

from __future__ import annotations

import statistics
import time
from collections import Counter, defaultdict

import torch

from gptlab.device import ComputeConfig
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


class MatmulTimes:
    """Seconds of single products of one dtype, measured alone, once a call of `measure`."""

    def __init__(self, placement: ComputeConfig) -> None:
        self.placement, self.dtype = placement, placement.autocast or torch.float32
        self._times: dict[Product, list[float]] = defaultdict(list)

    def measure(self, needed: Counter[Product], repeats: int = 3) -> None:
        """Time every product of `needed` some times more."""
        device = self.placement.device
        for m, k, n in needed:
            a = torch.ones(m, k, dtype=self.dtype, device=device)
            b = torch.ones(n, k, dtype=self.dtype, device=device).t()
            out = a @ b  # warms up, and takes the memory that the system would else clear within the measurement
            for _ in range(repeats):
                _wait(device)
                start = time.perf_counter()
                torch.mm(a, b, out=out)
                _wait(device)
                self._times[m, k, n].append(time.perf_counter() - start)

    def seconds(self, needed: Counter[Product]) -> float:
        """The medians of the products of `needed`, summed."""
        return sum(count * statistics.median(self._times[product]) for product, count in needed.items())


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
