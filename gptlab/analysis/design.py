"""What was declared of an experiment before its runs, and which losses pair under it. No test is made here."""

from __future__ import annotations

import math
from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gptlab.analysis.statistics import (
    PairedT,
    check_looks,
    correlation,
    counts_p,
    last_look,
    look_level,
    outlier,
    paired_t,
)
from gptlab.errors import ConfigError, did_you_mean, shown
from gptlab.runs.experiment_spec import Metric

Seed = Hashable
Losses = Mapping[str, Mapping[Any, float | None]]
"""{arm: {seed: loss, or another metric}}; a run that ended without a finite one is None, NaN or infinite."""


@dataclass(frozen=True)
class Design:
    """baselines, groups: {arm: its baseline}, {arm: its group}, of arms that are no baseline; the rest is as given.

    delta: None where nobody declared one. seeds: those that every arm must have, in their order; None where any will
    do. planned: how many, where no more is known. controls: placebos too. signals: arms that must beat their placebo.
    """

    baselines: Mapping[str, str]
    groups: Mapping[str, str]
    delta: float | None
    looks: tuple[int, ...] | None
    seeds: tuple[Seed, ...] | None
    planned: int | None
    placebos: Mapping[str, str]
    controls: frozenset[str]
    signals: frozenset[str]
    doses: Mapping[str, float | None]
    metric: Metric

    def level(self, alpha: float, look: int | None) -> float:
        """a_k(alpha) at a look; at the first one where none is reached yet."""
        return look_level(alpha, self.looks, look or (self.looks[0] if self.looks else 0))


def declare(
    losses: Losses,
    *,
    baseline: str | None,
    delta: float | None,
    looks: Sequence[int] | None,
    seeds: Collection[Seed] | None,
    planned: int | None,
    placebos: Mapping[str, str] | None,
    controls: Collection[str],
    signals: Collection[str] | None,
    doses: Mapping[str, float | None] | None,
    groups: Mapping[str, Sequence[str]] | None,
    metric: Metric,
) -> Design:
    """Check `compare`'s arguments against the arms that there are; raises ConfigError for what does not fit."""
    if not isinstance(losses, Mapping) or not all(isinstance(of_arm, Mapping) for of_arm in losses.values()):
        raise ConfigError("losses: expected {arm: {seed: loss}}, found something else")
    placebos, doses, groups = placebos or {}, doses or {}, groups or {}
    named = {
        "baseline": [baseline] if baseline else [],
        "placebos": [*placebos, *placebos.values()],
        "controls": controls,
        "signals": signals or (),
        "doses": doses,
        "groups": [arm for members in groups.values() for arm in members],
    }
    for what, names in named.items():
        _known(what, names, losses)
    if looks:
        check_looks(looks)
    if delta is not None and not (isinstance(delta, int | float) and 0 <= delta < math.inf):
        raise ConfigError(f"delta: expected a number in the metric's unit, at least 0, found {shown(delta)}")
    baselines = _baselines(list(losses), baseline, groups)
    all_controls = frozenset(controls) | frozenset(placebos.values())
    carriers = frozenset([*doses, *placebos] if signals is None else signals)
    return Design(
        baselines=baselines,
        groups={arm: group for group, members in groups.items() for arm in members if arm in baselines},
        delta=None if delta is None else float(delta),
        looks=tuple(looks) if looks else None,
        seeds=None if seeds is None else tuple(sorted(seeds, key=order)),
        planned=planned,
        placebos=placebos,
        controls=all_controls & frozenset(baselines),
        signals=carriers - all_controls,
        doses=doses,
        metric=metric,
    )


def _known(what: str, names: Iterable[str], losses: Losses) -> None:
    for name in names:
        if name not in losses:
            raise ConfigError(f"{what}: no arm {name!r}{did_you_mean(name, losses)}; there are {', '.join(losses)}")


def _baselines(arms: list[str], baseline: str | None, groups: Mapping[str, Sequence[str]]) -> dict[str, str]:
    """{arm: its baseline} in the order of arms: the first of its group, or the one baseline of all."""
    if len(arms) < 2:
        raise ConfigError(f"expected a baseline and at least one other arm, found {', '.join(arms) or 'none'}")
    if not groups:
        of_all = baseline or ("baseline" if "baseline" in arms else arms[0])
        return {arm: of_all for arm in arms if arm != of_all}
    members = [arm for group in groups.values() for arm in group]
    for arm in arms:
        if members.count(arm) != 1:
            raise ConfigError(f"groups: expected every arm in one group, found {arm!r} in {members.count(arm)}")
    firsts = {arm: group[0] for group in groups.values() for arm in group}
    if baseline and firsts[baseline] != baseline:
        raise ConfigError(f"groups: expected the baseline {baseline!r} first in its group, found {firsts[baseline]!r}")
    return {arm: firsts[arm] for arm in arms if firsts[arm] != arm}


@dataclass(frozen=True)
class Pairing:
    """The pairs a verdict may use, in the order of seeds.

    found: seeds that both arms have, used or not; look: how many of them count now (None before the first look);
    missing: of the declared seeds up to the look, those that the arm lacks and those that the other one lacks;
    diverged: of those in use, the seeds where one of the two has no finite loss, and failures: how many of the arm and
    of the other one; own, other: the finite losses left.
    """

    found: int
    look: int | None
    seeds: tuple[Seed, ...]
    missing: tuple[tuple[Seed, ...], tuple[Seed, ...]]
    diverged: tuple[Seed, ...]
    failures: tuple[int, int]
    own: tuple[float, ...]
    other: tuple[float, ...]

    @property
    def n(self) -> int:
        return len(self.own)

    @property
    def outlier(self) -> Seed | None:
        """The seed whose difference stands apart from the others'."""
        index = outlier(self.differences)
        return None if index is None else [seed for seed in self.seeds if seed not in self.diverged][index]

    @property
    def whole(self) -> bool:
        """Whether no declared seed is missing."""
        return not any(self.missing)

    @property
    def differences(self) -> list[float]:
        """Own minus other, (n,)."""
        return [a - b for a, b in zip(self.own, self.other, strict=True)]

    @property
    def test(self) -> PairedT | None:
        """The paired t test; None below 2 pairs."""
        return paired_t(self.differences) if self.n > 1 else None

    @property
    def p(self) -> float | None:
        """Of the counts of runs that diverged, where one did, else of the paired t test; None below 2 pairs."""
        if self.diverged:
            return counts_p(self.failures[0], len(self.seeds), self.failures[1], len(self.seeds))
        return self.test.p if self.test else None

    @property
    def effect(self) -> dict[str, Any]:
        """JSON-ready: the mean difference, its 95% interval and n, None where there are too few pairs."""
        mean = sum(self.differences) / self.n if self.n else None
        return {"difference": mean, "interval": list(self.test.interval()) if self.test else [None, None], "n": self.n}

    @property
    def correlation(self) -> float | None:
        return correlation(self.own, self.other)


def pair(
    losses: Losses, arm: str, other: str, looks: Sequence[int] | None, seeds: Sequence[Seed] | None = None
) -> Pairing:
    """Pair `arm` with `other`; with looks, only the first seeds count that make a whole look.

    seeds: the declared ones, in their order; a look is reached once all of its first seeds are there. Without them
    those that both arms have are taken.
    """
    mine, theirs = losses[arm], losses[other]
    wanted = sorted((s for s in mine if s in theirs), key=order) if seeds is None else list(seeds)
    shared = [seed for seed in wanted if seed in mine and seed in theirs]
    leading = next((k for k, seed in enumerate(wanted) if seed not in shared), len(wanted))
    look = last_look(looks, leading) if looks else len(shared)
    used = shared[: look or (0 if looks else None)]
    next_look = wanted if not looks else wanted[:look] if look else wanted[: looks[0]]
    whole = [seed for seed in used if finite(mine[seed]) and finite(theirs[seed])]
    return Pairing(
        found=len(shared),
        look=look,
        seeds=tuple(used),
        missing=(tuple(s for s in next_look if s not in mine), tuple(s for s in next_look if s not in theirs)),
        diverged=tuple(seed for seed in used if seed not in whole),
        failures=(sum(not finite(mine[seed]) for seed in used), sum(not finite(theirs[seed]) for seed in used)),
        own=tuple(float(mine[seed]) for seed in whole),  # type: ignore[arg-type]
        other=tuple(float(theirs[seed]) for seed in whole),  # type: ignore[arg-type]
    )


def finite(loss: float | None) -> bool:
    return loss is not None and math.isfinite(loss)


def order(seed: Seed) -> tuple[float, str]:
    """Sorts 2 before 10, as numbers or as text."""
    text = str(seed)
    return (float(text) if text.lstrip("-").isdecimal() else math.inf, text)
