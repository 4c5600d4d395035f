"""Dose and response as one SVG that stands alone: multipliers over doses, a panel a series, theory's fit dashed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, Any

from gptlab.analysis.report.plots import shortened

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = ("#9ecbff", "#1f6feb", "#0b3d91", "#8250df", "#cf222e")
"""Of levels, early to late."""

STYLE: Any = {"svg.hashsalt": "gptlab", "svg.fonttype": "none", "text.parse_math": False, "font.size": 9.0,
              "axes.spines.top": False, "axes.spines.right": False, "path.simplify": False}  # fmt: skip
PANEL = (3.4, 2.7)
"""Inches."""
TITLE = 44
"""Characters of a line of a panel's title, of which there are two at most."""


def draw(result: Mapping[str, Any], path: str | Path) -> None:
    """Write the SVG of a result of series.dose_response: equal bytes for equal figures and matplotlib."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    series = result["series"]
    columns = min(3, len(series))
    rows = -(-len(series) // columns)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(PANEL[0] * columns, PANEL[1] * rows), layout="constrained")
        panels = figure.subplots(rows, columns, squeeze=False).ravel()
        for axes, one in zip(panels, series, strict=False):
            _panel(axes, one)
        for axes in panels[len(series) :]:
            axes.set_axis_off()
        panels[0].legend(frameon=False, title="level of the clean run", fontsize=8, title_fontsize=8)
        figure.savefig(path, metadata={"Date": None}, format="svg")


def _label(level: Mapping[str, Any]) -> str:
    return f"{level['level']:g}" if level["share"] is None else f"after {level['share']:g}"


def _panel(axes: Axes, series: Mapping[str, Any]) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

    axes.axhline(1.0, color="#8c959f", linewidth=0.6)
    for i, level in enumerate(series["levels"]):
        colour = COLOURS[i % len(COLOURS)]
        found = [row for row in level["doses"] if row["multiplier"] is not None]
        doses, ratios = [row["dose"] for row in found], [row["multiplier"] for row in found]
        axes.plot([0.0, *doses], [1.0, *ratios], color=colour, linewidth=1.3, label=_label(level))
        for row in found:
            marker = "^" if row["censored"] else "o"  # an arrow up: at least so much
            axes.plot([row["dose"]], [row["multiplier"]], marker, color=colour, markersize=4)
            if row["interval"]:
                axes.plot([row["dose"]] * 2, row["interval"], color=colour, linewidth=0.9)
        fitted = [(row["dose"], row["fitted"]) for row in found if row["fitted"] is not None]
        if fitted:
            axes.plot(*zip((0.0, 1.0), *fitted, strict=True), "--", color=colour, linewidth=0.8)
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}×"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_title(fill(shortened(series["name"], 2 * TITLE), TITLE), fontsize=9)
    axes.set_xlabel("dose")
