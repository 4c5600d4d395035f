"""Which losses of two arms belong together: by seed, and up to the last declared look. No test is made here."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gptlab.analysis.sequential import reached
from gptlab.analysis.statistics import PairedT, correlation, paired_t

Seed = Hashable
Losses = Mapping[str, Mapping[Any, float | None]]
"""{arm: {seed: loss in nats}}; a run that ended without a finite loss is None, NaN or infinite."""


@dataclass(frozen=True)
class Pairing:
    """The pairs a verdict may use, in the order of seeds.

    found: seeds that both arms have, used or not; look: how many of them count now (None before the first look);
    diverged: of those, the seeds where one of the two has no finite loss; own, other: the finite losses that are left.
    """

    found: int
    look: int | None
    seeds: tuple[Seed, ...]
    diverged: tuple[Seed, ...]
    own: tuple[float, ...]
    other: tuple[float, ...]

    @property
    def n(self) -> int:
        return len(self.own)

    @property
    def differences(self) -> list[float]:
        """Own minus other, nats, (n,)."""
        return [a - b for a, b in zip(self.own, self.other, strict=True)]

    @property
    def test(self) -> PairedT | None:
        """The paired t test; None below 2 pairs."""
        return paired_t(self.differences) if self.n > 1 else None

    @property
    def correlation(self) -> float | None:
        return correlation(self.own, self.other)


def pair(losses: Losses, arm: str, other: str, looks: Sequence[int] | None) -> Pairing:
    """Pair `arm` with `other`; with looks, only the first seeds count that make a whole look."""
    mine, theirs = losses[arm], losses[other]
    shared = sorted((seed for seed in mine if seed in theirs), key=order)
    look = reached(looks, len(shared)) if looks else len(shared)
    used = shared[: look or (0 if looks else None)]
    whole = [seed for seed in used if finite(mine[seed]) and finite(theirs[seed])]
    return Pairing(
        found=len(shared),
        look=look,
        seeds=tuple(used),
        diverged=tuple(seed for seed in used if seed not in whole),
        own=tuple(float(mine[seed]) for seed in whole),  # type: ignore[arg-type]
        other=tuple(float(theirs[seed]) for seed in whole),  # type: ignore[arg-type]
    )


def finite(loss: float | None) -> bool:
    return loss is not None and math.isfinite(loss)


def order(seed: Seed) -> tuple[float, str]:
    """Sorts 2 before 10, as numbers or as text."""
    text = str(seed)
    return (float(text) if text.lstrip("-").isdecimal() else math.inf, text)
