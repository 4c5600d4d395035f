"""Inner products between the gradients of groups: all that measures of noise need, so that no gradient is kept.

A *source* is a loss whose gradient is taken (the true loss, a signal), a *group* a fixed set of sequences, a *part* a
set of parameters that is looked at alone (a block, the rest). Sums over pairs of different groups, which make unbiased
estimates, come from sums over all: Σ_{i≠k} <a_i, b_k> = <A, B> - Σ_i <a_i, b_i>. What is estimated from them is in
analysis/noise/estimators.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

Gradients = list[Tensor]
"""One gradient for each of the model's parameters, in their order."""

Gather = Callable[[int], Sequence[Gradients]]
"""The gradients that a group gives, one for each source; equal for equal groups, as it may be asked twice."""

KEPT_BYTES = 2 * 2**30
"""Gradients that are kept between the two passes; those of further groups are made again."""


@dataclass(frozen=True)
class InnerProducts:
    """Between n groups' gradients of K sources, over some of the parameters; float64.

    own (n, K, K): <x_i, y_i> of sources x and y in group i. cross (n, K, K): <x_i, Σ_k y_k>, over all groups k.

    >>> x = np.array([[[1.0, 0.0]], [[2.0, 3.0]]])  # two groups, one source, two parameters
    >>> InnerProducts.of(x).cross.ravel().tolist()  # with their sum (3, 3)
    [3.0, 15.0]
    """

    own: np.ndarray
    cross: np.ndarray

    @staticmethod
    def of(gradients: np.ndarray) -> InnerProducts:
        """Of gradients (n, K, P) that are there as a whole."""
        return InnerProducts(
            np.einsum("ixp,iyp->ixy", gradients, gradients),
            np.einsum("ixp,yp->ixy", gradients, gradients.sum(0)),
        )

    def __add__(self, other: InnerProducts) -> InnerProducts:
        """Over the parameters of both."""
        return InnerProducts(self.own + other.own, self.cross + other.cross)

    def scaled(self, factors: Sequence[float]) -> InnerProducts:
        """With source x multiplied by factors[x]; sources after the last factor are left out."""
        kept, f = len(factors), np.asarray(factors)
        both = f[:, None] * f[None, :]
        return InnerProducts(self.own[:, :kept, :kept] * both, self.cross[:, :kept, :kept] * both)


def inner_products(
    gather: Gather,
    groups: int,
    parts: Sequence[int],
    metrics: Sequence[Gradients | None] = (None,),
    *,
    kept_bytes: int = KEPT_BYTES,
    progress: Callable[[int], None] = lambda done: None,
) -> list[list[InnerProducts]]:
    """For every metric, the inner products over every part, in two passes over the groups.

    parts: for each parameter, the number (from 0) of the part that it belongs to. metrics: None is the plain inner
    product, otherwise Σ metric·a·b. progress: told after each of 2·groups rounds.
    """
    kept: dict[int, Sequence[Gradients]] = {}
    sums: list[Gradients] = []
    size = 0
    for i in range(groups):
        gradients = gather(i)
        sums = _added(sums, gradients)
        size += sum(g.numel() * g.element_size() for source in gradients for g in source)
        if size <= kept_bytes:
            kept[i] = gradients
        progress(i + 1)
    shape = (len(metrics), max(parts) + 1, groups, len(sums), len(sums))
    own, cross = np.zeros(shape), np.zeros(shape)
    for i in range(groups):
        gradients = kept.pop(i) if i in kept else gather(i)
        for m, metric in enumerate(metrics):
            own[m, :, i] = products(gradients, gradients, parts, metric)
            cross[m, :, i] = products(gradients, sums, parts, metric)
        progress(groups + i + 1)
    return [[InnerProducts(o, c) for o, c in zip(*both, strict=True)] for both in zip(own, cross, strict=True)]


def products(
    a: Sequence[Gradients], b: Sequence[Gradients], parts: Sequence[int], metric: Gradients | None = None
) -> np.ndarray:
    """<a_x, b_y> over every part, (parts, K, K) float64."""
    found = torch.zeros(max(parts) + 1, len(a), len(b), dtype=torch.float64)
    for p, part in enumerate(parts):
        left = torch.stack([source[p].flatten() for source in a]).double()
        right = torch.stack([source[p].flatten() for source in b]).double()
        if metric is not None:
            left *= metric[p].flatten()
        found[part] += (left @ right.T).cpu()
    return found.numpy()


def sums_over(
    gather: Gather, groups: Iterable[int], parts: Sequence[int], sums: list[Gradients]
) -> tuple[list[Gradients], np.ndarray]:
    """One pass: each source's sum over the groups, added to `sums`; and Σ_i <x_i, y_i> over every part, (parts, K, K).

    With them goes an estimate, but no interval: that takes what every group has in common with the sum.
    """
    own = np.zeros((max(parts) + 1, len(sums), len(sums)))
    for i in groups:
        gradients = gather(i)
        sums = _added(sums, gradients)
        own += products(gradients, gradients, parts)
    return sums, own


def over_pairs(of_sums: np.ndarray | float, own: np.ndarray | float, groups: int) -> np.ndarray:
    """The mean of <x_i, y_k> over pairs i≠k of groups, of <X, Y> and Σ_i <x_i, y_i>: unbiased for <E x, E y>."""
    return np.asarray((of_sums - own) / (groups * (groups - 1)))


def _added(sums: list[Gradients], gradients: Sequence[Gradients]) -> list[Gradients]:
    if not sums:
        return [[g.clone() for g in source] for source in gradients]
    for total, source in zip(sums, gradients, strict=True):
        torch._foreach_add_(total, source)
    return sums
