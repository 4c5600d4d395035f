"""The page of a lens, and the plot of early exit, made of what `gptlab lens --json` prints."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

from gptlab.analysis.report.page import render
from gptlab.analysis.report.svg import settings

TITLES = {"raw": "Raw reading", "tuned": "Tuned reading"}
COLOURS = {"raw": "#0b6fc2", "tuned": "#c2410c"}


def page(found: Mapping[str, Any]) -> str:
    """The lens as HTML: for each reader a heat map block by position, and every position's likeliest tokens."""
    readers = [(TITLES[name], lens) for name, lens in found["readers"].items()]
    return render("lens.html", title="Lens", source=found["checkpoint"], prompt=found["prompt"], readers=readers)


def exit_plot(found: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Loss and agreement against compute, a line for each reader and a mark for each confidence, as an SVG file."""
    from matplotlib.figure import Figure

    with settings({"svg.hashsalt": "gptlab"}):
        figure = Figure(figsize=(9, 3.6), layout="constrained")
        for axes, key, label in zip(
            figure.subplots(1, 2), ("loss", "agreement"), ("loss, nats a token", "agreement with the full model"),
            strict=True,
        ):  # fmt: skip
            for name, points in found.items():
                early = [point for point in points if point["confidence"] < 1]
                x, y = ([point[what] for point in early] for what in ("compute", key))
                axes.plot(x, y, "o-", color=COLOURS[name], markersize=4, linewidth=1.4, label=TITLES[name])
                for point in _apart(early, key):
                    axes.annotate(
                        f"{point['confidence']:g}", (point["compute"], point[key]), textcoords="offset points",
                        xytext=(4, 4), fontsize=8, color=COLOURS[name],
                    )  # fmt: skip
            full = next(iter(found.values()))[-1]
            axes.plot([full["compute"]], [full[key]], "s", color="#4a4d52", markersize=6, label="Full model")
            axes.axvline(1, color="#8c959f", linewidth=0.8)
            axes.set_xlabel("compute, full model = 1")
            axes.set_ylabel(label)
            axes.grid(color="#dcdddf", linewidth=0.6)
            axes.margins(0.08)
            if key == "loss":
                axes.legend(frameon=False)
        drawn = io.StringIO()
        figure.savefig(drawn, format="svg", metadata={"Date": None, "Creator": None})
    return drawn.getvalue()


def _apart(points: Sequence[Mapping[str, Any]], key: str, least: float = 0.06) -> list[Mapping[str, Any]]:
    """The points whose labels have room: each at least a share of both ranges from the one before it."""
    kept = list(points[:1])
    room = {what: least * (max(p[what] for p in points) - min(p[what] for p in points)) for what in ("compute", key)}
    for point in points[1:]:
        if any(abs(point[what] - kept[-1][what]) > room[what] for what in room):
            kept.append(point)
    return kept
