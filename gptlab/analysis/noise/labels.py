"""What a block's reading is worth as a label, and whether it collapses: figures of p_m, of who is right, of entropy.

A reading's verdict is its argmax m with probability p_m. As if it were a label: how many tokens have p_m >= τ
(coverage), how many of these are right (precision), and how far confidence is from being right (calibration). Pure
functions of what `token_figures` says of every token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

THRESHOLDS = (*(round(0.05 * k, 2) for k in range(20)), 0.99)
"""The τ at which coverage and precision are given."""

BINS = 15
"""Equally wide bins of p_m, for the calibration error (Guo 2017, 1706.04599)."""

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


def token_figures(logits: Tensor, targets: Tensor, other: Tensor | None = None) -> Tensor:
    """(n, 6) of logits (n, V): CE, p_m, m, whether m = y, entropy in nats, mean squared logit. In float64."""
    log_p = F.log_softmax(logits, 1)
    top, argmax = log_p.max(1)
    columns = (
        -log_p.gather(1, targets[:, None])[:, 0],
        top.exp(),
        argmax,
        argmax == targets,
        -(log_p.exp() * log_p).sum(1),
        logits.square().mean(1),
    )
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
    """Coverage and precision at every τ, the calibration error and the bins it is made of, as JSON values.

    precision is null where no token is covered, and so are the means of an empty bin.
    """
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
    """What tells of collapse: mean entropy, quantiles of p_m, RMS of the logits, entropy of the argmax's marginal.

    A block that says the same of every token has an argmax entropy of 0; entropies are in nats. The last one is of the
    frequencies as found, which is too low by about (values - 1)/(2·tokens).
    """
    frequency = np.unique(readings.argmax, return_counts=True)[1] / len(readings.argmax)
    return {
        "entropy": float(readings.entropy.mean()),
        "p_max": dict(zip(map(str, QUANTILES), np.quantile(readings.top, QUANTILES).tolist(), strict=True)),
        "logit_rms": float(np.sqrt(readings.squared_logit.mean())),
        "argmax_entropy": float(-(frequency * np.log(frequency)).sum()),
    }
