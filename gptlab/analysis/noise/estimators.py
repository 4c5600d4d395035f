"""Measures of noise, as pure functions of numbers: of group gradients' inner products, and of what readings say.

*Gradients*: unbiased, with delete-one-group jackknife intervals; training/gradient_noise.py makes the gradients. x_i is
the gradient of source x in group i of n: the true mean is G_x, the covariance between groups Σ_x. Everything is
built of two means: over pairs of different groups, which has the expectation <G_x, G_y> because their noise is
independent, and over the groups themselves, which has <G_x, G_y> + tr Σ_xy.

*Readings*: what a block's argmax m, with probability p_m, is worth as a label: how many tokens have p_m >= τ
(coverage), how many of these are right (precision), how far confidence is from accuracy (calibration); and
whether it collapses.

docs/noise.md says what each is for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from gptlab.analysis.noise import THRESHOLDS
from gptlab.analysis.statistics import Interval, jackknife
from gptlab.training.gradient_noise import InnerProducts, over_pairs


@dataclass(frozen=True)
class Estimate:
    """A figure, and the same figure with each of the n groups left out in turn, (n,)."""

    value: float
    left_out: np.ndarray

    @cached_property
    def interval(self) -> Interval:
        """The 95% jackknife interval, with t of n - 1 degrees of freedom."""
        return jackknife(self.value, self.left_out.tolist())


def combined(function: Callable[..., Any], *estimates: Estimate) -> Estimate:
    """A function of figures, left-out groups and all.

    >>> double = combined(lambda x: 2 * x, Estimate(1.0, np.array([0.9, 1.1])))
    >>> double.value, double.left_out.tolist()
    (2.0, [1.8, 2.2])
    """
    return Estimate(float(function(*(e.value for e in estimates))), function(*(e.left_out for e in estimates)))


def mean_product(products: InnerProducts, x: int, y: int) -> Estimate:
    """The mean of <x_i, y_k> over pairs i≠k: unbiased for <G_x, G_y>."""
    n = len(products.own)
    own, of_x, of_y = products.own[:, x, y], products.cross[:, x, y], products.cross[:, y, x]
    everything = of_x.sum()
    without = everything - of_x - of_y + own  # pairs that hold the group, which the sum over pairs must lose
    return Estimate(float(over_pairs(everything, own.sum(), n)), over_pairs(without, own.sum() - own, n - 1))


def covariance_trace(products: InnerProducts, x: int, y: int) -> Estimate:
    """The unbiased tr Σ_xy of the groups' gradients: what <x_i, y_i> has over <x_i, y_k>."""
    n, own = len(products.own), products.own[:, x, y]
    itself = Estimate(float(own.mean()), (own.sum() - own) / (n - 1))
    return combined(lambda same, other: same - other, itself, mean_product(products, x, y))


def noise_scale(products: InnerProducts, x: int) -> tuple[float, Interval] | None:
    """tr Σ/|G|² (McCandlish 2018, 1812.06162, eq. 2.9) in groups, and its interval.

    None where the interval of |G|² reaches 0; 0 where all groups agree. The interval is that of |G|²/tr Σ, turned over:
    it is |G|² that is hard to know, and as a divisor it would make the jackknife's straight line a bad one.
    """
    squared, trace = mean_product(products, x, x), covariance_trace(products, x, x)
    if squared.interval[0] <= 0:
        return None
    if _is_rounding(trace, products, x):
        return 0.0, (0.0, 0.0)
    inverse = combined(lambda length, spread: length / spread, squared, trace)
    low, high = inverse.interval
    return (1 / inverse.value, (1 / high, 1 / low)) if low > 0 else None


def _is_rounding(trace: Estimate, products: InnerProducts, x: int) -> bool:
    """Whether the groups of a source differ by no more than rounding does, with any one of them left out."""
    return min(trace.value, trace.left_out.min()) <= 1e-12 * products.own[:, x, x].mean()


@dataclass(frozen=True)
class Alignment:
    """The cosine between two mean gradients; estimate is None where one of them may well be 0.

    resolved: whether both norms are known to be above 0. Where one is not, the upper end of its interval is used, so
    that the cosine errs towards 0.
    """

    estimate: Estimate | None
    resolved: bool

    def as_json(self) -> dict[str, Any]:
        if self.estimate is None:
            return {"value": None, "interval": None, "resolved": False}
        return {"value": self.estimate.value, "interval": list(self.estimate.interval), "resolved": self.resolved}


def alignment(products: InnerProducts, x: int, y: int) -> Alignment:
    """N/sqrt(D_x·D_y), of N the mean of <x_i, y_k> and D the same of one source with itself, over pairs i≠k.

    It lies between -1 and 1 up to its own error: an unbiased norm may be too small.
    """
    norms, resolved = [], True
    for source in (x, y):
        squared = mean_product(products, source, source)
        low, high = squared.interval
        if high <= 0:
            return Alignment(None, False)
        norms.append(squared if low > 0 else Estimate(high, np.full_like(squared.left_out, high)))
        resolved = resolved and low > 0
    product = mean_product(products, x, y)
    return Alignment(combined(lambda n, a, b: n / np.sqrt(a * b), product, *norms), resolved)


def half_width(alignment: Mapping[str, Any]) -> float:
    """Of the interval of an alignment's `as_json`; infinite where a norm is not resolved: the cosine errs towards 0.

    >>> half_width({"value": 0.25, "interval": [0.125, 0.375], "resolved": True})
    0.125
    """
    if not alignment["resolved"]:
        return math.inf
    low, high = alignment["interval"]
    return (high - low) / 2


def progress(products: InnerProducts, true: int, signal: int) -> Estimate | None:
    """1 + <G_CE, w·G_sig>/|G_CE|²: the first-order progress in the true loss that is left, 1 = none lost.

    The signal's gradients come with their weight w. None where |G_CE|²'s interval reaches 0.
    """
    squared = mean_product(products, true, true)
    if squared.interval[0] <= 0:
        return None
    return combined(lambda n, d: 1 + n / d, mean_product(products, true, signal), squared)


def variance_ratio(products: InnerProducts, true: int, signal: int) -> Estimate | None:
    """tr Σ_total/tr Σ_CE of the gradients with the weighted signal and without; None where there is no variance."""
    own, added, both = (covariance_trace(products, x, y) for x, y in ((true, true), (signal, signal), (true, signal)))
    if _is_rounding(own, products, true):
        return None
    return combined(lambda a, b, ab: (a + b + 2 * ab) / a, own, added, both)


def dose(products: InnerProducts, true: int, signal: int) -> float | None:
    """|w·g_sig|/|g_CE| over the batch that all groups make: what training logs; None without a true gradient."""
    squares = [products.cross[:, source, source].sum() for source in (signal, true)]
    return math.sqrt(squares[0] / squares[1]) if squares[1] > 0 else None


def figures(products: InnerProducts, source: int, true: int = 0) -> dict[str, Any]:
    """All measures of one source against the true loss, as JSON values: a figure that means nothing is null.

    The true loss itself adds nothing to itself: its progress and variance are 1.
    """
    itself = source == true
    scale, scale_interval = noise_scale(products, source) or (None, None)
    left = None if itself else progress(products, true, source)
    ratio = None if itself else variance_ratio(products, true, source)
    return {
        "noise_scale": scale,
        "noise_scale_interval": scale_interval and list(scale_interval),
        "alignment": alignment(products, true, source).as_json(),
        "progress": 1.0 if itself else None if left is None else left.value,
        "progress_interval": None if left is None else list(left.interval),
        "variance": 1.0 if itself else None if ratio is None else ratio.value,
        "variance_interval": None if ratio is None else list(ratio.interval),
        "dose": None if itself else dose(products, true, source),
    }


BINS = 15
"""Equally wide bins of p_m, for the calibration error (Guo 2017, 1706.04599)."""
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


def token_figures(logits: Tensor, targets: Tensor, other: Tensor | None = None) -> Tensor:
    """(n, 6) of logits (n, V): CE, p_m, m, whether m = y, entropy in nats, mean squared logit. In float64."""
    log_p = F.log_softmax(logits, 1)
    top, argmax = log_p.max(1)
    loss, entropy = -log_p.gather(1, targets[:, None])[:, 0], -(log_p.exp() * log_p).sum(1)
    columns = (loss, top.exp(), argmax, argmax == targets, entropy, logits.square().mean(1))
    return torch.stack([column.double() for column in columns], 1)


@dataclass(frozen=True)
class Readings:
    """What one block's reading said of n tokens, (n,) each."""

    loss: np.ndarray
    top: np.ndarray
    argmax: np.ndarray
    right: np.ndarray
    entropy: np.ndarray
    squared_logit: np.ndarray

    @staticmethod
    def of(rows: Sequence[Tensor]) -> Readings:
        """Of `token_figures` (n, 6), in pieces."""
        return Readings(*torch.cat(list(rows)).cpu().numpy().T)


def quality(readings: Readings, thresholds: Sequence[float] = THRESHOLDS, bins: int = BINS) -> dict[str, Any]:
    """Coverage and precision (null without a token) at every τ, the calibration error and its bins, as JSON values."""
    covered = [readings.top >= threshold for threshold in thresholds]
    diagram = _reliability(readings, bins)
    gaps = [b["count"] * abs(b["confidence"] - b["accuracy"]) for b in diagram if b["count"]]
    return {
        "loss": float(readings.loss.mean()),
        "accuracy": float(readings.right.mean()),
        "confidence": float(readings.top.mean()),
        "coverage": [float(inside.mean()) for inside in covered],
        "precision": [float(readings.right[inside].mean()) if inside.any() else None for inside in covered],
        "calibration_error": sum(gaps) / len(readings.top),
        "reliability": diagram,
    }


def _reliability(readings: Readings, bins: int) -> list[dict[str, Any]]:
    """For every bin of p_m from 0 to 1: how many tokens, their mean p_m, the share that is right."""
    place = np.minimum((readings.top * bins).astype(np.int64), bins - 1)
    count = np.bincount(place, minlength=bins)
    sums = (np.bincount(place, weights=w, minlength=bins) for w in (readings.top, readings.right))
    return [
        {"count": int(n), "confidence": float(p / n) if n else None, "accuracy": float(r / n) if n else None}
        for n, p, r in zip(count, *sums, strict=True)
    ]


def collapse(readings: Readings) -> dict[str, Any]:
    """Signs of collapse: mean entropy (nats), quantiles of p_m, RMS of the logits, entropy of the argmax's marginal.

    A block that predicts the same token everywhere has an argmax entropy of 0. It is that of the frequencies as found,
    which is too low by about (values - 1)/(2·tokens).
    """
    frequency = np.unique(readings.argmax, return_counts=True)[1] / len(readings.argmax)
    return {
        "entropy": float(readings.entropy.mean()),
        "p_max": dict(zip(map(str, QUANTILES), np.quantile(readings.top, QUANTILES).tolist(), strict=True)),
        "logit_rms": float(np.sqrt(readings.squared_logit.mean())),
        "argmax_entropy": float(-(frequency * np.log(frequency)).sum()),
    }
