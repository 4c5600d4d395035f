"""What a lab came to: its status, report.html with the night as a picture, and the ledger as CSV. Decides nothing."""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gptlab.judge.evidence import level_left, next_level
from gptlab.judge.lab import Line
from gptlab.judge.procedure import EXIT, failures

if TYPE_CHECKING:
    from gptlab.judge.procedure import Judge

COLUMNS = (
    "line", "time", "name", "verdict", "reason", "difference", "interval", "n", "seeds", "second", "level",
    "level_spent", "level_left", "seconds", "lines", "noise_floor", "idea", "baseline", "machine", "hash",
)  # fmt: skip


def status(judge: Judge) -> dict[str, Any]:
    """What `--status --json` prints; raises DataError where the ledger was edited."""
    tries, journal = judge.ledger.read()
    rate, failed = judge.plan.error_rate, failures(tries, journal)
    return {
        "lab": str(judge.lab.folder),
        "tries": len(tries),
        "verdicts": {name: count for name in EXIT if (count := Counter(line["verdict"] for line in tries)[name])},
        "error_rate": rate,
        "failed_confirmations": failed,
        "next_level": next_level(rate, failed),
        "level_left": level_left(rate, failed),
        "adopted": [line["name"] for line in journal if line["kind"] == "adopted"],
        "stack": next((dict(line) for line in reversed(journal) if line["kind"] == "stack"), None),
        "seconds": sum(line["seconds"] for line in tries),
        "ledger_verified": True,
    }


def as_csv(judge: Judge) -> str:
    """The ledger as CSV, a row a try."""
    out = io.StringIO()
    writer = csv.writer(out)
    writer.writerow(COLUMNS)
    for line in judge.ledger.read()[0]:
        writer.writerow([_cell(line[name]) for name in COLUMNS])
    return out.getvalue()


def _cell(value: Any) -> Any:
    """A cell; text that a spreadsheet would take for a formula is marked as text."""
    if isinstance(value, list):
        return " to ".join(map(str, value)) if value[0] is not None else ""
    return f"'{value}" if isinstance(value, str) and value[:1] in ("=", "+", "-", "@") else value


def write_report(judge: Judge) -> Path:
    """Write report.html into the lab's folder and give its path."""
    from gptlab.analysis.report.page import Panel, render, write

    tries, journal = judge.ledger.read()
    rows = [
        (
            line["line"], line["name"], line["verdict"], line["reason"], _figure(line["difference"], "+.4g"),
            " to ".join(_figure(end, "+.4g") for end in line["interval"]) if line["n"] else "–", line["n"],
            _figure(line["level_spent"], ".2g"), _figure(line["level_left"], ".3g"), _figure(line["seconds"], ",.0f"),
        )
        for line in tries
    ]  # fmt: skip
    panels = []
    if tries:
        legend = [(_CLASSES[name], name) for name in EXIT if any(line["verdict"] == name for line in tries)]
        note = "A mark an idea with its 95% interval: of fresh seeds where it was confirmed, else of screening."
        left = [(line["line"], line["level_left"]) for line in tries]
        course = [(line["line"], line["baseline_metric"]) for line in tries if line["baseline_metric"] is not None]
        panels = [
            Panel("Every idea", _night(tries, judge.metric.better), legend, note),
            Panel("Error rate", _course("left", "error rate that is left", [(0, judge.plan.error_rate), *left])),
            Panel(
                "Baseline",
                _course("baseline", "its metric, mean over the seeds of screening", course),
                note="Adoptions move it.",
            ),
        ]
    stack = [line for line in journal if line["kind"] == "stack"]
    about = {"title": "Ideas judged", "found": status(judge), "better": judge.metric.better, "stack": stack}
    return write(judge.lab.folder / "report.html", render("judge.html", panels=panels, rows=rows, **about))


_CLASSES = {
    "keep": "better", "discard": "no-difference", "undecided": "undecided", "inactive": "inactive",
    "broken": "worse", "diverged": "worse",
}  # fmt: skip


def _figure(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def _night(tries: Sequence[Line], better: str) -> str:
    """Every idea's difference with its interval, in the order in which they were tried."""
    from gptlab.analysis.report import theme

    shown = [line for line in tries if line["difference"] is not None]
    ends = sorted(abs(line["difference"]) for line in shown) or [1.0]
    kept = [abs(end) for line in tries if line["verdict"] == "keep" for end in line["interval"]]
    usual = 2.5 * max(ends[int(0.9 * (len(ends) - 1))], *(line["noise_floor"] for line in tries), 1e-12)
    reach = max(usual, *kept) if kept else usual  # an interval of two seeds may be a hundred times as wide
    figure, axes = _axes(f"difference of the metric; {better} is better")
    axes.axhline(0, color=theme.MUTED, linewidth=1)
    for line in tries:
        colour, strong = theme.VERDICTS[_CLASSES[line["verdict"]].replace("-", " ")], line["verdict"] == "keep"
        marker = "D" if strong else "o" if line in shown else "x"
        low, middle, high = (
            max(-reach, min(reach, value or 0.0))
            for value in (line["interval"][0], line["difference"], line["interval"][1])
        )
        axes.plot([line["line"]] * 2, [low, high], color=colour, linewidth=2.4 if strong else 1.2)
        axes.plot([line["line"]], [middle], marker, color=colour, markersize=7 if strong else 4)
    words = "; ".join(f"{line['name']}: {line['verdict']}, {_figure(line['difference'], '+.4g')}" for line in tries)
    return theme.inline(figure, "night", f"every idea: {words}")


def _course(name: str, what: str, points: Sequence[tuple[int, float]]) -> str:
    """A figure that steps from try to try."""
    from gptlab.analysis.report import theme
    from gptlab.analysis.report.plots import plain_scale

    figure, axes = _axes(what)
    axes.step(*zip(*points or [(0, 0.0)], strict=True), where="post", color=theme.arm(1), linewidth=1.8)
    plain_scale(axes)
    _whole_numbers(axes)
    words = f"goes from {points[0][1]:.4g} to {points[-1][1]:.4g}" if points else "has no value"
    return theme.inline(figure, name, f"{what} {words}")


def _axes(what: str) -> tuple[Any, Any]:
    from gptlab.analysis.report.plots import HEIGHT, blank, name_axes

    figure, axes = blank(HEIGHT)
    _whole_numbers(axes)
    name_axes(figure, axes, "idea, in the order of trying", what)
    return figure, axes


def _whole_numbers(axes: Any) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
