"""What was declared of an experiment before its runs, checked: `compare`'s arguments as one value."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from gptlab.analysis.pairing import Losses
from gptlab.analysis.sequential import check, level
from gptlab.errors import ConfigError, did_you_mean


@dataclass(frozen=True)
class Declared:
    """baselines, groups: {arm: its baseline}, {arm: its group}, of arms that are no baseline; the rest is as given.

    controls: placebos too. signals: arms that must beat their placebo.
    """

    baselines: Mapping[str, str]
    groups: Mapping[str, str]
    delta: float
    looks: tuple[int, ...] | None
    planned: int | None
    placebos: Mapping[str, str]
    controls: frozenset[str]
    signals: frozenset[str]
    doses: Mapping[str, float | None]

    def level(self, alpha: float, look: int | None) -> float:
        """a_k(alpha) at a look; at the first one where none is reached yet."""
        return level(alpha, self.looks, look or (self.looks[0] if self.looks else 0))


def declare(
    losses: Losses,
    *,
    baseline: str | None,
    delta: float,
    looks: Sequence[int] | None,
    planned: int | None,
    placebos: Mapping[str, str] | None,
    controls: Collection[str],
    signals: Collection[str] | None,
    doses: Mapping[str, float | None] | None,
    groups: Mapping[str, Sequence[str]] | None,
) -> Declared:
    """Check `compare`'s arguments against the arms that there are; raises ConfigError for what does not fit."""
    if not isinstance(losses, Mapping) or not all(isinstance(seeds, Mapping) for seeds in losses.values()):
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
        check(looks)
    if not (isinstance(delta, int | float) and 0 <= delta < math.inf):
        raise ConfigError(f"delta: expected nats, at least 0, found {delta!r}")
    baselines = _baselines(list(losses), baseline, groups)
    all_controls = frozenset(controls) | frozenset(placebos.values())
    carriers = frozenset([*doses, *placebos] if signals is None else signals)
    return Declared(
        baselines=baselines,
        groups={arm: group for group, members in groups.items() for arm in members if arm in baselines},
        delta=float(delta),
        looks=tuple(looks) if looks else None,
        planned=planned,
        placebos=placebos,
        controls=all_controls & frozenset(baselines),
        signals=carriers - all_controls,
        doses=doses,
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
