"""The plots of a report, each an <svg> element: curves over steps, differences of arms as a forest, measures of noise.

Words around them (titles, legends) are the page's, so that they wrap on a phone.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from gptlab.analysis.report import theme
from gptlab.analysis.report.theme import TEXT, Drawn, inline, settings
from gptlab.analysis.tables import plateau

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH, HEIGHT, TALL = 440, 260, 300
"""Of a plot, in the units of its view box, of which a phone shows about 350; tall where both axes are shares."""
QUARTERS = [0, 0.25, 0.5, 0.75, 1], ["0%", "25%", "50%", "75%", "100%"]
"""The ticks of a share."""
LEFT, RIGHT, TOP, BOTTOM = 48, 14, 26, 38
"""Room around the axes; fixed, so that plots in a column line up (and no layout has to be solved)."""
LINE, NARROW, WIDE = 16, frozenset("ijltfrI.,;:'|!()[] -/"), frozenset("mwMW@%=+<>~#&")
"""A line's height; characters of less than the usual width, and of more."""
MOST_MARKED_POINTS, MOST_DARK_BANDS = 25, 5
"""A curve of at most so many points shows where they are; bands of more lines than these are paler."""


Curve = Mapping[int, float]
"""{step: value}"""


@dataclass(frozen=True)
class Band:
    """A curve with what lies around it; low and high are equal to mean where there is no spread to show."""

    steps: list[int]
    mean: list[float]
    low: list[float]
    high: list[float]

    @staticmethod
    def of(curve: Curve) -> Band:
        return Band(list(curve), *[list(curve.values())] * 3)

    def without_spread(self) -> Band:
        return Band(self.steps, self.mean, self.mean, self.mean)


@dataclass(frozen=True)
class Line:
    """A curve in a colour of theme.py, with a name for who cannot see it. faint: it is the background of another."""

    band: Band
    colour: str
    label: str = ""
    faint: bool = False
    dashed: bool = False


def curves(lines: Sequence[Line], name: str, what: str, **options: Any) -> str:
    """`draw_curves` as an <svg> element of a page, which has the legend."""
    return draw_curves(lines, name, what, **options).inline()


def draw_curves(
    lines: Sequence[Line], name: str, what: str, *, unit: str, zero: bool = False, within: float | None = None,
    share: bool = False, limits: tuple[float, float] | None = None, named: bool = False,
) -> Drawn:  # fmt: skip
    """Lines over steps.

    zero: draw the line of 0; within: shade ± so much; share: of 1, shown in per cent; limits: of the y axis; named: the
    lines' names next to their ends, for a figure without a legend around it.
    """
    from matplotlib.ticker import MaxNLocator, StrMethodFormatter

    room = _name_room(line.label for line in lines) if named else 0
    figure, axes = blank(HEIGHT, right=RIGHT + room, width=WIDTH + room)
    if zero:
        axes.axhline(0, color=theme.MUTED, linewidth=1)
    if within:
        axes.axhspan(-within, within, color=theme.MUTED, alpha=0.15, linewidth=0)
    shade = 0.18 if len(lines) <= MOST_DARK_BANDS else 0.07
    for line in lines:
        band, width = line.band, 1.0 if line.faint else 1.8
        if band.low != band.mean:
            axes.fill_between(band.steps, band.low, band.high, color=line.colour, alpha=shade, linewidth=0)
        marker, dashes = "o" if len(band.steps) <= MOST_MARKED_POINTS else "", (0, (4, 2)) if line.dashed else "-"
        look: dict[str, Any] = {"color": line.colour, "linewidth": width, "alpha": 0.45 if line.faint else 1}
        axes.plot(band.steps, band.mean, linestyle=dashes, marker=marker, markersize=3.2, **look)
    plain_scale(axes)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    if limits:
        axes.set_ylim(*limits)
    if share:
        axes.set_ylim(-0.03, 1.03)
        axes.set_yticks(*QUARTERS)
    name_axes(figure, axes, "step", unit)
    drawn = [(line.label or "it", line.band.steps, line.band.mean) for line in lines]
    texts = _name_ends(axes, [(line.label, line.colour, line.band.mean[-1]) for line in lines]) if named else {}
    return Drawn(figure, name, _describe(what, drawn, "step", ".0%" if share else ".4g"), texts)


def _name_room(labels: Iterable[str]) -> float:
    """The width that names next to the ends of lines take."""
    return max((text_width(shortened(label)) for label in labels), default=0) + 12


def _name_ends(axes: Axes, ends: Sequence[tuple[str, str, float]]) -> dict[str, str]:
    """Names right of the axes, moved apart where they would cover each other; the texts for `inline`.

    ends: (name, colour, y of its line's end).
    """
    height = HEIGHT - TOP - BOTTOM
    at = [height * axes.transAxes.inverted().transform(axes.transData.transform((0, y)))[1] for _, _, y in ends]
    texts, above = {}, float("inf")
    least = [LINE * k for k in range(len(ends))]  # room for the names that are still to come
    for left, i in zip(reversed(least), sorted(range(len(ends)), key=lambda i: -at[i]), strict=True):
        above = max(min(at[i], above - LINE), left)
        texts[f"name {i}"] = shortened(ends[i][0])
        place: dict[str, Any] = {"transform": axes.transAxes, "va": "center", "fontsize": TEXT}
        axes.text(1.02, above / height, f"name {i}", color=ends[i][1], **place)
    return texts


def draw_forest(arms: Mapping[str, Mapping[str, Any]], delta: float | None, name: str, what: str) -> Drawn:
    """Paired differences of `compare`'s arms: a dot a seed, their mean with its interval, the band of ±delta if any.

    Names and verdicts stand left of the axes, whole. what: is different, with its unit.
    """
    names = [name_lines(arm + " (control)" * found["control"]) for arm, found in arms.items()]
    verdicts = [", ".join(filter(None, (found["verdict"], plateau(found)))) for found in arms.values()]
    labels = [[*lines, *name_lines(verdict, most=4)] for lines, verdict in zip(names, verdicts, strict=True)]
    left = max((text_width(line) for lines in labels for line in lines), default=0) + 16
    heights = [LINE * len(lines) + 14 for lines in labels]
    figure, axes = blank(sum(heights) + BOTTOM + 8, left=left, top=8)
    if delta is not None:
        axes.axvspan(-delta, delta, color=theme.MUTED, alpha=0.15, linewidth=0)
    axes.axvline(0, color=theme.MUTED, linewidth=1)
    texts, words, top = {}, [], 0.0
    for i, (arm, label, height) in enumerate(zip(arms, labels, heights, strict=True)):
        found = arms[arm]
        middle, top = top + height / 2, top + height
        mean, (low, high), colour = found["difference"], found["interval"], theme.VERDICTS[found["verdict"]]
        points = found["differences"]
        axes.plot(points, [middle + 8] * len(points), "o", color=theme.MUTED, alpha=0.7, markersize=3.6)
        if low is not None:
            axes.plot([low, high], [middle - 4] * 2, color=colour, linewidth=2.6, solid_capstyle="butt")
        if mean is not None:
            axes.plot([mean], [middle - 4], "D", color=colour, markersize=6)
        for k, line in enumerate(label):
            texts[f"arm {i} line {k}"] = line
            ink = colour if k >= len(names[i]) else theme.INK
            at = (-left + 4, middle + LINE * (k - (len(label) - 1) / 2))
            axes.annotate(
                f"arm {i} line {k}", (0, at[1]), (at[0], 0), xycoords=axes.get_yaxis_transform(), va="center",
                textcoords="offset points", color=ink, fontsize=TEXT,
            )  # fmt: skip
        difference = "no difference measured" if mean is None else f"difference {mean:+.4f}"
        interval = "" if low is None else f", 95% interval {low:+.4f} to {high:+.4f}"
        words.append(f"{arm}{' (control)' * found['control']}, {verdicts[i]}: {difference}{interval}")
    axes.set_ylim(max(top, 1), 0)
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    axes.grid(visible=False, axis="y")
    axes.set_xlabel(what, color=theme.MUTED, loc="right")
    plain_scale(axes, ticks=4)
    band = "" if delta is None else f", with a band of ±{delta:g}"
    return Drawn(figure, name, f"Paired differences, {what}{band}: {'; '.join(words)}", texts)


def text_width(text: str) -> float:
    """At most how wide a text of size TEXT is, in a font that has all its characters."""
    return sum(5.0 if c in NARROW else 12.0 if c in WIDE or ord(c) > 0x2E80 else 8.0 for c in text)


def name_lines(name: str, width: int = 24, most: int = 3) -> list[str]:
    """A name in lines of a plot; one of more lines ends in "…", as the page around it has it whole.

    >>> name_lines("negative_self_cross_entropy, placebo")
    ['negative_self_cross_', 'entropy, placebo']
    """
    found = [line.replace("_ ", "_") for line in textwrap.wrap(name.replace("_", "_ "), width)] or [""]
    return found if len(found) <= most else [*found[: most - 1], found[most - 1][: width - 1] + "…"]


def shortened(label: str, most: int = 40) -> str:
    """A name that has room in a plot.

    >>> shortened("a" * 50, most=5)
    'aaaa…'
    """
    return label if len(label) <= most else label[: most - 1] + "…"


def blank(
    height: float, left: float = LEFT, top: float = TOP, right: float = RIGHT, width: float = WIDTH
) -> tuple[Figure, Axes]:
    """A figure, and its axes in the style of all."""
    from matplotlib.figure import Figure

    with settings():
        figure = Figure(figsize=(width / 72, height / 72))
        room = (left / width, BOTTOM / height, 1 - (left + right) / width, 1 - (top + BOTTOM) / height)
        axes = figure.add_axes(room)
    axes.grid(color=theme.GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(color=theme.GRID, labelcolor=theme.MUTED, length=3)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(theme.GRID)
    axes.margins(x=0.02)
    return figure, axes


def plain_scale(axes: Axes, ticks: int = 6) -> None:
    """Few ticks in plain figures; thousands where figures are large."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    low, high = axes.get_ylim()
    if abs(high - low) < 1e-6 * max(abs(low), abs(high)):  # rounding is not to be looked at
        axes.set_ylim(low - 0.05 * abs(low), high + 0.05 * abs(high))
    axes.xaxis.set_major_locator(MaxNLocator(ticks))
    axes.ticklabel_format(useOffset=False, style="plain")
    if max(map(abs, axes.get_ylim())) >= 10_000:
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value / 1000:g}k"))


def name_axes(figure: Figure, axes: Axes, x: str, y: str, height: float = HEIGHT) -> None:
    figure.text(4 / WIDTH, 1 - 14 / height, y, color=theme.MUTED, fontsize=TEXT)
    axes.set_xlabel(x, color=theme.MUTED)


def _describe(what: str, lines: Sequence[tuple[str, Sequence[float], Sequence[float]]], x: str, form: str) -> str:
    """The plot in words: where every line (label, x, y) begins and ends."""
    ends = [
        f"{label} goes from {ys[0]:{form}} at {x} {round(xs[0], 3)} to {ys[-1]:{form}} at {x} {round(xs[-1], 3)}"
        for label, xs, ys in lines
        if xs
    ]
    return f"{what}: {'; '.join(ends) or 'nothing to show'}"


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


def over_blocks(series: Sequence[Series], blocks: int, name: str, what: str, **options: Any) -> str:
    """`draw_over_blocks` as an <svg> element of a page, which has the legend."""
    return draw_over_blocks(series, blocks, name, what, **options).inline()


def draw_over_blocks(
    series: Sequence[Series], blocks: int, name: str, what: str, *, unit: str, zero: bool = False,
    limits: tuple[float, float] | None = None, named: bool = False,
) -> Drawn:  # fmt: skip
    """A figure of every block, several series side by side; intervals as bars, cut at `limits`.

    named: the series' names next to their ends, for a figure without a legend around it.
    """
    from matplotlib.ticker import MaxNLocator

    room = _name_room(one.label for one in series) if named else 0
    figure, axes = blank(HEIGHT, right=RIGHT + room, width=WIDTH + room)
    if zero:
        axes.axhline(0, color=theme.MUTED, linewidth=1)
    for k, one in enumerate(series):
        x = [block + (k - (len(series) - 1) / 2) * min(0.15, 0.6 / len(series)) for block in one.x]
        axes.plot(x, one.y, color=one.colour, linewidth=1.2, alpha=0.6)
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
    name_axes(figure, axes, "block", unit)
    texts = _name_ends(axes, [(one.label, one.colour, one.y[-1]) for one in series]) if named else {}
    described = _describe(what, [(one.label, one.x, one.y) for one in series], "block", ".3g")
    return Drawn(figure, name, described, texts)


def shares(series: Sequence[Series], name: str, what: str, *, x: str, y: str, diagonal: bool = False) -> str:
    """Curves of one share over another, both from 0 to 1. diagonal: draw where they are equal."""
    figure, axes = blank(TALL)
    if diagonal:
        axes.plot([0, 1], [0, 1], color=theme.MUTED, linewidth=1)
    for one in series:
        axes.plot(one.x, one.y, color=one.colour, linewidth=1.6, marker="o", markersize=2.8)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_ticks(*QUARTERS)
    axes.axis((-0.02, 1.02, -0.03, 1.03))
    name_axes(figure, axes, x, y, TALL)
    return inline(figure, name, _describe(what, [(one.label, one.x, one.y) for one in series], x, ".3g"))


def averages(branch: Mapping[str, Any], colour: str, name: str, what: str) -> str:
    """`draw_averages` as an <svg> element of a page."""
    return draw_averages(branch, colour, name, what).inline()


def draw_averages(branch: Mapping[str, Any], colour: str, name: str, what: str) -> Drawn:
    """The branch test's fit (`branch.as_json`): each data seed's harm at 1/M, their curve, and the bias's interval."""
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
    each = branch["differences"]
    axes.set_xticks([0, *(1 / int(M) for M in each)], ["0", *(f"1/{M}" for M in each)])
    x_label = "1/M: of so many batches the signal’s gradient is the mean"
    name_axes(figure, axes, x_label, "nats above the true loss alone")
    description = f"{what}: {bias['value']:+.4f} nats at 1/M = 0, {sum(branch['fit']):+.4f} at 1/M = 1"
    return Drawn(figure, name, description)
