"""The pictures of docs/findings/noise.md that no experiment's folder has, from what `gptlab noise --json` printed.

`python docs/findings.py` renews them with the others.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from gptlab.analysis.noise.labels import THRESHOLDS
from gptlab.analysis.report.response import PANEL, STYLE

FINDINGS = Path(__file__).parent / "findings"
GREY = "#8c959f"
BLOCKS = ("#9ecbff", "#54a0ff", "#1f6feb", "#0b3d91")
"""Of four blocks, first to last."""

SIGNALS = ("#1f6feb", "#cf222e", "#8250df", "#bf8700", "#1a7f37", "#57606a")
STEPS = (25, 50, 100, 400)
SHOWN = (0.5, 0.9)
"""Thresholds that are written beside their points."""


def read(name: str) -> dict[str, Any]:
    """A committed result by its name."""
    return json.loads((FINDINGS / f"{name}.json").read_text(encoding="utf-8"))


def labels(axes: Axes, _: int) -> None:
    """Precision of verdicts against the share of tokens that pass, a point a threshold, a curve a block (N2)."""
    blocks = read("1_noise_bias_or_noise")["label_quality"]["blocks"]
    for number, block in enumerate(blocks, 1):
        points = [p for p in zip(block["raw"]["coverage"], block["raw"]["precision"], THRESHOLDS, strict=True) if p[1]]
        x, y = [p[0] for p in points], [p[1] for p in points]
        axes.plot(x, y, ".-", color=BLOCKS[number - 1], label=f"block {number}", lw=1.1)
        for share, right, threshold in points:
            if number == len(blocks) and any(abs(threshold - one) < 1e-9 for one in SHOWN):
                axes.annotate(
                    f"τ = {threshold:g}", (share, right), xytext=(6, 4), textcoords="offset points", fontsize=8
                )
    axes.set_xlabel("tokens that pass")
    axes.set_ylabel("right of these")
    axes.legend(frameon=False, fontsize=8)


def alignment(axes: Axes, _: int) -> None:
    """The cosine of each signal's mean gradient with the true loss's, at four steps of one run (N3)."""
    at = [read(f"alignment_{step}")["signals"] for step in STEPS]
    axes.axhline(0.0, color=GREY, linewidth=0.6)
    for k, name in enumerate([name for name in at[0] if name != "true_loss"]):
        cosines = [(i + (k - 2.5) / 20, one[name]["total"]["alignment"]) for i, one in enumerate(at)]
        found = [(x, one) for x, one in cosines if one["value"] is not None]
        axes.plot([x for x, _ in found], [one["value"] for _, one in found], ".-", color=SIGNALS[k], label=name, lw=1.1)
        for x, one in found:
            axes.plot([x, x], one["interval"], color=SIGNALS[k], linewidth=1.6)
    axes.set_xticks(range(len(STEPS)), [f"step {step}" for step in STEPS])
    axes.set_ylabel("cosine with the true loss")
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))


def averages(axes: Axes, which: int) -> None:
    """The branch test of one of N4's and N5's signals: validation loss against 1/M, what is left at 0 is bias."""
    signals = read("1_noise_bias_or_noise")["signals"]
    name = [name for name in signals if name != "true_loss"][which]
    branch: Mapping[str, Any] = signals[name]["branch"]
    axes.axhline(0.0, color=GREY, linewidth=0.6)
    for averaged, row in branch["differences"].items():
        axes.plot([1 / int(averaged)] * len(row), row, ".", color=GREY, markersize=4)
    grid = [i / 50 for i in range(51)]
    curve = [sum(c * x**k for k, c in enumerate(branch["fit"])) for x in grid]
    axes.plot(grid, curve, color=SIGNALS[0], linewidth=1.2)
    axes.plot([0, 0], branch["bias"]["interval"], color="black", linewidth=1.6)
    axes.plot([0], [branch["bias"]["value"]], "D", color="black", markersize=4)
    axes.set_title(f"{name}: {branch['verdict']}", fontsize=9)
    axes.set_xlabel("1/M, of M batches averaged")
    axes.set_ylabel("nats more than without")


PICTURES: dict[str, tuple[Callable[[Axes, int], None], int]] = {
    "noise_labels": (labels, 1),
    "noise_alignment": (alignment, 1),
    "noise_averages": (averages, 4),
}
"""name of the SVG -> what draws one panel, and how many."""


def draw(folder: Path = FINDINGS) -> None:
    """Write all of them: equal bytes for equal results and matplotlib."""
    for name, (panel, count) in PICTURES.items():
        with mpl.rc_context(STYLE):
            columns = min(count, 2)
            rows = -(-count // columns)
            width = PANEL[0] * (columns if count > 1 else 1.7)
            figure = Figure(figsize=(width, PANEL[1] * (rows if count > 1 else 1.1)), layout="constrained")
            for number, axes in enumerate(figure.subplots(rows, columns, squeeze=False).ravel()):
                panel(axes, number)
            figure.savefig(folder / f"{name}.svg", metadata={"Date": None}, format="svg")
