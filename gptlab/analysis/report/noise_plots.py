"""The plots of the measures of noise: any figure against blocks, thresholds or probabilities, as an <svg> element."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from gptlab.analysis.report import theme
from gptlab.analysis.report.plots import HEIGHT, WIDTH, blank, plain_scale
from gptlab.analysis.report.svg import TEXT, inline

TALL = 300
"""Height of a plot whose two axes are shares."""


@dataclass(frozen=True)
class Series:
    """Points (x, y) in a colour of theme.py. bounds: (low, high) of each, where there are any.

    hollow: which points are drawn as rings, since they are not to be trusted as the others are.
    """

    label: str
    colour: str
    x: Sequence[float]
    y: Sequence[float]
    bounds: Sequence[tuple[float, float]] = field(default_factory=list)
    hollow: Sequence[bool] = field(default_factory=list)
    dashed: bool = False


def over_blocks(
    series: Sequence[Series], blocks: int, name: str, what: str, *, unit: str, zero: bool = False,
    limits: tuple[float, float] | None = None,
) -> str:  # fmt: skip
    """A figure of every block, several series side by side; intervals as bars, cut at `limits`."""
    from matplotlib.ticker import MaxNLocator

    figure, axes = blank(HEIGHT)
    if zero:
        axes.axhline(0, color=theme.MUTED, linewidth=1)
    for k, one in enumerate(series):
        x = [block + (k - (len(series) - 1) / 2) * min(0.15, 0.6 / len(series)) for block in one.x]
        axes.plot(x, one.y, color=one.colour, linewidth=1.2, alpha=0.6, linestyle=_dashes(one.dashed))
        for i, (at, y) in enumerate(zip(x, one.y, strict=True)):
            face = "none" if one.hollow and one.hollow[i] else one.colour
            axes.plot([at], [y], "o", markersize=4.5, markeredgecolor=one.colour, markerfacecolor=face)
            if one.bounds:
                axes.plot([at, at], one.bounds[i], color=one.colour, linewidth=1.8, solid_capstyle="butt")
    if limits:
        axes.set_ylim(*limits)
    axes.set_xlim(0.5, blocks + 0.5)
    plain_scale(axes)
    axes.xaxis.set_major_locator(MaxNLocator(min(blocks, 12), integer=True))
    figure.text(4 / WIDTH, 1 - 14 / HEIGHT, unit, color=theme.MUTED, fontsize=TEXT)
    axes.set_xlabel("block", color=theme.MUTED)
    return inline(figure, name, _describe(what, series, "block"))


def shares(series: Sequence[Series], name: str, what: str, *, x: str, y: str, diagonal: bool = False) -> str:
    """Curves of one share over another, both from 0 to 1. diagonal: draw where they are equal."""
    figure, axes = blank(TALL)
    if diagonal:
        axes.plot([0, 1], [0, 1], color=theme.MUTED, linewidth=1)
    for one in series:
        axes.plot(
            one.x, one.y, color=one.colour, linewidth=1.6, marker="o", markersize=2.8, linestyle=_dashes(one.dashed)
        )
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_ticks([0, 0.25, 0.5, 0.75, 1], ["0%", "25%", "50%", "75%", "100%"])
    axes.set_xlim(-0.02, 1.02)
    axes.set_ylim(-0.03, 1.03)
    figure.text(4 / WIDTH, 1 - 14 / TALL, y, color=theme.MUTED, fontsize=TEXT)
    axes.set_xlabel(x, color=theme.MUTED)
    return inline(figure, name, _describe(what, series, x))


def averages(branch: Mapping[str, Any], colour: str, name: str, what: str) -> str:
    """The branch test's fit: the harm of each data seed at 1/M, their curve, and its ends with their intervals.

    branch: as `branch.as_json` gives it, with no branch that diverged.
    """
    figure, axes = blank(HEIGHT)
    axes.axhline(0, color=theme.MUTED, linewidth=1)
    for M, row in branch["differences"].items():
        axes.plot([1 / int(M)] * len(row), row, "o", color=theme.MUTED, alpha=0.7, markersize=3.6)
    x = [i / 50 for i in range(51)]
    axes.plot(x, [sum(c * at**k for k, c in enumerate(branch["fit"])) for at in x], color=colour, linewidth=1.8)
    bias = branch["bias"]
    axes.plot([0, 0], bias["interval"], color=colour, linewidth=2.6, solid_capstyle="butt")
    axes.plot([0], [bias["value"]], "D", color=colour, markersize=6)
    axes.set_xlim(-0.04, 1.04)
    plain_scale(axes)
    axes.set_xticks(
        [0, *(1 / int(M) for M in branch["differences"])], ["0", *(f"1/{M}" for M in branch["differences"])]
    )
    figure.text(4 / WIDTH, 1 - 14 / HEIGHT, "nats above the true loss alone", color=theme.MUTED, fontsize=TEXT)
    axes.set_xlabel("1/M: of so many batches the signal’s gradient is the mean", color=theme.MUTED)
    description = f"{what}: {bias['value']:+.4f} nats at 1/M = 0, {sum(branch['fit']):+.4f} at 1/M = 1"
    return inline(figure, name, description)


def _dashes(dashed: bool) -> str | tuple[int, tuple[int, int]]:
    return (0, (4, 2)) if dashed else "-"


def _describe(what: str, series: Sequence[Series], x: str) -> str:
    """The plot in words: where every series begins and ends."""
    ends = [
        f"{one.label} from {one.y[0]:.3g} at {x} {one.x[0]:.3g} to {one.y[-1]:.3g} at {one.x[-1]:.3g}"
        for one in series
        if one.x
    ]
    return f"{what}: {'; '.join(ends) or 'nothing to show'}"
