"""Figures that stand alone as files: multipliers over doses, and early exit; and the page of a lens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, Any

from gptlab.analysis.report.page import render
from gptlab.analysis.report.plots import shortened
from gptlab.analysis.report.theme import BLUE, DARK, FILE_SETTINGS, GREY, RED, SERIES, panels, save, settings

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = ("#9ecbff", BLUE, "#0b3d91", "#8250df", RED)
"""Of levels, early to late."""
PANEL, TITLE = (3.4, 2.7), 44
"""A panel's size in inches; characters of a line of its title, of which there are two at most."""


def draw(result: Mapping[str, Any], path: str | Path) -> None:
    """Write the figure of a result of `dose_response`, in the format that the file's ending says."""
    from matplotlib.lines import Line2D

    series = result["series"]
    columns = min(3, len(series))
    rows = -(-len(series) // columns)
    with settings(FILE_SETTINGS):
        figure, all_axes = panels(rows, columns, (PANEL[0] * columns, PANEL[1] * rows))
        for axes, one in zip(all_axes, series, strict=False):
            _panel(axes, one)
        for axes in all_axes[len(series) :]:
            axes.set_axis_off()
        figure.supylabel("tokens needed, times the clean run’s", fontsize=9)
        grey: Any = {"color": DARK, "linewidth": 0.9}
        key = [
            Line2D([], [], marker="o", markersize=4, label="measured, with its 95% interval", **grey),
            Line2D([], [], marker="^", markersize=4, linestyle="", label="at least so many: some runs never got there",
                   **grey),
            Line2D([], [], linestyle="--", label="fit", **grey),
        ]  # fmt: skip
        levels = all_axes[0].get_legend_handles_labels()[0]
        for line in levels:
            line.set_label(f"to the clean run’s level {line.get_label()}")
        handles = [*levels, *key]
        figure.legend(handles=handles, loc="outside lower center", ncols=2, frameon=False, fontsize=8)
    save(figure, path, FILE_SETTINGS)


def _panel(axes: Axes, series: Mapping[str, Any]) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

    axes.axhline(1.0, color=GREY, linewidth=0.6)
    for i, level in enumerate(series["levels"]):
        colour = COLOURS[i % len(COLOURS)]
        found = [row for row in level["doses"] if row["multiplier"] is not None]
        doses, ratios = [row["dose"] for row in found], [row["multiplier"] for row in found]
        label = f"{level['level']:g}" if level["share"] is None else f"after {level['share']:g}"
        axes.plot([0.0, *doses], [1.0, *ratios], color=colour, linewidth=1.3, label=label)
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
    axes.set_xlabel("dose of the known error")


LENS_TITLES = {"raw": "Raw reading", "tuned": "Tuned reading"}
LENS_COLOURS = {"raw": SERIES[0], "tuned": SERIES[1]}


def lens_page(found: Mapping[str, Any]) -> str:
    """The lens as HTML: for each reader a heat map block by position, and every position's likeliest tokens."""
    readers = [(LENS_TITLES[name], lens) for name, lens in found["readers"].items()]
    return render("lens.html", title="Lens", source=found["checkpoint"], prompt=found["prompt"], readers=readers)


def write_exit_plot(found: Mapping[str, Sequence[Mapping[str, Any]]], path: str | Path) -> None:
    """Draw loss and agreement against compute, a line for each reader and a mark for each confidence."""
    with settings(FILE_SETTINGS):
        figure, all_axes = panels(1, 2, (9, 3.6))
        labels = {"loss": "loss, nats a token", "agreement": "agreement with the full model"}
        for axes, (key, label) in zip(all_axes, labels.items(), strict=True):
            for name, points in found.items():
                early = [point for point in points if point["confidence"] < 1]
                x, y = ([point[what] for point in early] for what in ("compute", key))
                axes.plot(x, y, "o-", color=LENS_COLOURS[name], markersize=4, linewidth=1.4, label=LENS_TITLES[name])
                for point in _apart(early, key):
                    axes.annotate(
                        f"{point['confidence']:g}", (point["compute"], point[key]), textcoords="offset points",
                        xytext=(4, 4), fontsize=8, color=LENS_COLOURS[name],
                    )  # fmt: skip
            full = next(iter(found.values()))[-1]
            axes.plot([full["compute"]], [full[key]], "s", color=DARK, markersize=6, label="Full model")
            axes.axvline(1, color=GREY, linewidth=0.8)
            axes.set_xlabel("compute, full model = 1")
            axes.set_ylabel(label)
            axes.grid(color="#dcdddf", linewidth=0.6)
            axes.margins(0.08)
        figure.legend(*all_axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    save(figure, path, FILE_SETTINGS)


def _apart(points: Sequence[Mapping[str, Any]], key: str, least: float = 0.06) -> list[Mapping[str, Any]]:
    """The points whose labels have room: each at least a share of both ranges from the one before it."""
    kept = list(points[:1])
    room = {what: least * (max(p[what] for p in points) - min(p[what] for p in points)) for what in ("compute", key)}
    for point in points[1:]:
        if any(abs(point[what] - kept[-1][what]) > room[what] for what in room):
            kept.append(point)
    return kept
