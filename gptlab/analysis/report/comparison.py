"""report.html of a comparison: the verdicts first, then what they rest on.

Verdicts, differences and passports are those of `compare`, unchanged.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from gptlab.analysis.load import Outcomes
from gptlab.analysis.report import theme
from gptlab.analysis.report.page import Panel, arm_class, render, sample, stylesheet, write
from gptlab.analysis.report.plots import Line, curves, draw_curves, draw_forest
from gptlab.analysis.report.run import (
    COARSE,
    Band,
    History,
    binned,
    block_legend,
    blocks_shown,
    changes,
    duration,
    flat,
    over_seeds,
    read_history,
)
from gptlab.analysis.report.theme import Drawn
from gptlab.analysis.statistics import paired_t
from gptlab.analysis.tables import NO_DELTA, interval, number, paired, plateau, tables
from gptlab.runs.experiment_spec import Metric

Histories = Mapping[str, Sequence[History]]
"""{arm: its runs' histories, in the order of seeds}; empty for a log."""


def write_comparison(outcomes: Outcomes, result: Mapping[str, Any], path: str | Path) -> Path:
    """Write the report of `result`, the verdicts on `outcomes`, and give its path; raises OSError."""
    histories = {arm: [read_history(run.source) for run in runs] for arm, runs in outcomes.runs.items()}
    return write(path, page(outcomes, result, histories))


def write_figures(outcomes: Outcomes | None, result: Mapping[str, Any], path: str | Path) -> list[Path]:
    """Write the paired differences of `result` into `path`, and into NAME_losses next to it the losses over training.

    The file's ending says the format. Gives the paths.
    """
    drawn = {Path(path): _forest(result)}
    if outcomes and (lines := _loss_lines(outcomes, _in_order(outcomes, result))):
        metric, unit = _metric(result)
        unit = f"validation {metric.label}" + f", {unit}" * bool(unit)
        curves_path = Path(path).with_stem(f"{Path(path).stem}_losses")
        drawn[curves_path] = draw_curves(lines, "losses", unit, unit=unit, named=True)
    for file, figure in drawn.items():
        figure.save(file, stylesheet())
    return list(drawn)


def _loss_lines(outcomes: Outcomes, arms: list[str]) -> list[Line]:
    return _drawn(_line(over_seeds(outcomes.curves.get(arm, {}).values()), arms, arm) for arm in arms)


def _forest(result: Mapping[str, Any]) -> Drawn:
    metric, unit = _metric(result)
    what = f"{metric.label} minus the baseline's" + f", {unit}" * bool(unit)
    return draw_forest(result["arms"], result["delta"], "forest", what)


def _metric(result: Mapping[str, Any]) -> tuple[Metric, str]:
    """What is judged, and its unit on an axis."""
    metric = Metric(result["metric"], result["better"])
    return metric, "nats a token" if metric.unit == "nats" else metric.unit


def page(outcomes: Outcomes, result: Mapping[str, Any], histories: Histories) -> str:
    """The report as HTML; the same bytes for the same runs."""
    return render("comparison.html", **content(outcomes, result, histories))


def content(outcomes: Outcomes, result: Mapping[str, Any], histories: Histories) -> dict[str, Any]:
    """What the template comparison.html is filled with."""
    arms = _in_order(outcomes, result)
    first = next((runs[0] for arm in arms if (runs := outcomes.runs.get(arm))), None)
    shown = ("step", "metric", "better", "unit", "baseline", "delta", "looks", "noise_floor", "undeclared", "notes")
    return {
        "title": result["experiment"],
        **{key: result[key] for key in shown},
        "no_delta": NO_DELTA,
        "paired": paired(result["arms"]),
        "verdicts": [
            {
                **found,
                "name": arm,
                "plateau": plateau(found),
                "swatch": arm_class(arms.index(arm)),
                "shown_difference": number(found["difference"], "+z.4f"),
                "shown_interval": interval(found["interval"]),
            }
            for arm, found in result["arms"].items()
        ],
        "forest": Panel("Paired differences", _forest(result).inline()),
        "tables": [table for table in tables(result) if table.title != "Why"],
        "losses": list(_losses(outcomes, result, arms)),
        "blocks": [(arm, arm_class(arms.index(arm)), found) for arm, found in _blocks(arms, histories)],
        "doses": list(_doses(arms, histories)),
        "costs": list(_costs(result, arms, histories)),
        "changes": list(_changes(outcomes, result)),
        "preset": first.options.get("preset") if first else None,
        "common": changes(of[0].options) if (of := outcomes.runs.get(result["baseline"])) else [],
        "samples": [
            sample(of[0].samples[-1], f"{arm}, seed {outcomes.runs[arm][0].seed}")
            for arm in arms
            if (of := histories.get(arm)) and of[0].samples
        ],
        "environment": flat(first.environment) if first else [],
    }


def _in_order(outcomes: Outcomes, result: Mapping[str, Any]) -> list[str]:
    """The arms, the baseline first: their places are their colours."""
    return sorted(outcomes.losses, key=lambda arm: arm != result["baseline"])


def _losses(outcomes: Outcomes, result: Mapping[str, Any], arms: list[str]) -> Iterator[Panel]:
    """For every baseline the losses of its arms over training, and their paired differences from it."""
    (metric, unit), families = _metric(result), dict[str, list[str]]()
    for arm, found in result["arms"].items():
        families.setdefault(found["baseline"], []).append(arm)
    for i, (baseline, members) in enumerate(families.items()):
        which = f", against {baseline}" if len(families) > 1 else ""
        shown = [arm for arm in (baseline, *members) if outcomes.curves.get(arm)]
        lines = [_line(over_seeds(outcomes.curves[arm].values()), arms, arm) for arm in shown]
        legend = [(arm_class(arms.index(arm)), arm) for arm in shown]
        if drawn := _drawn(lines):
            svg = curves(drawn, f"losses-{i}", f"Validation {metric.label}", unit=unit)
            yield Panel(f"Validation {metric.label}{which}", svg, legend, "mean ± one standard deviation over seeds")
        bands = {arm: _differences(outcomes, result, arm, baseline) for arm in members if arm in shown}
        if drawn := _drawn(_line(band, arms, arm) for arm, band in bands.items()):
            what, delta = f"{metric.label.capitalize()} minus the baseline", result["delta"]
            svg = curves(drawn, f"differences-{i}", f"{what}'s, paired by seed", unit=unit, zero=True, within=delta)
            note = "mean with its 95% interval at each step by itself" + (f"; grey: ±{delta:g}" if delta else "")
            yield Panel(f"{what}’s{which}", svg, legend[1:], note)


def _differences(outcomes: Outcomes, result: Mapping[str, Any], arm: str, baseline: str) -> Band:
    """Paired differences over training, of the seeds that the verdict is on."""
    own, other = outcomes.curves[arm], outcomes.curves.get(baseline, {})
    seeds = [seed for seed in result["arms"][arm]["seeds"] if seed in own and seed in other]
    if not seeds:
        return Band.of({})
    steps = sorted(set.intersection(*(own[seed].keys() & other[seed].keys() for seed in seeds)))
    found = [[own[seed][step] - other[seed][step] for seed in seeds] for step in steps]
    means = [sum(x) / len(x) for x in found]
    bounds = [paired_t(x).interval() if len(x) > 1 else (x[0], x[0]) for x in found]
    return Band(steps, means, [low for low, _ in bounds], [high for _, high in bounds])


def _blocks(arms: list[str], histories: Histories) -> Iterator[tuple[str, list[Panel]]]:
    """Each arm's block losses and confidences over training, means over seeds, all on equal axes."""
    figures = (("block_loss", "Loss", "nats a token"), ("block_confidence", "Confidence", "mean p_max"))
    bands: dict[tuple[str, str], dict[int, Band]] = {}
    counts: dict[str, int] = {}
    for arm in arms:
        of = histories.get(arm, [])
        blocks = counts[arm] = min((history.n_blocks for history in of), default=0)
        for name, _, _ in figures:
            found = {j: over_seeds(history.of_block(name, j) for history in of) for j in blocks_shown(blocks)}
            bands[arm, name] = {j: band for j, band in found.items() if band.steps}
    limits = {name: _limits(bands[arm, name].values() for arm in arms) for name, _, _ in figures}
    for i, arm in enumerate(arms):
        panels = []
        for name, what, unit in figures:
            lines = [
                Line(band.without_spread(), theme.block(j, counts[arm]), f"block {j}")
                for j, band in bands[arm, name].items()
            ]
            if lines:
                svg = curves(lines, f"{name}-{i}", f"{arm}: {what}", unit=unit, limits=limits[name])
                panels.append(Panel(f"{what} of every block’s reading", svg, block_legend(counts[arm])))
        if panels:
            yield arm, panels


def _doses(arms: list[str], histories: Histories) -> Iterator[Panel]:
    """Dose and share of clipped updates over training, where they were measured."""
    note = "the signal’s gradient as a share of the true loss’s, mean ± one standard deviation over seeds"
    for title, figure, bins, unit, words in (
        ("Dose", "dose", 2 * COARSE, "ratio", note),
        ("Clipped updates", "clipped", COARSE, "share", "mean over seeds"),
    ):
        found = {arm: [binned(h.updates[figure], bins) for h in histories.get(arm, [])] for arm in arms}
        bands = {arm: over_seeds(curve) for arm, curve in found.items() if any(curve)}
        share = unit == "share"
        lines = [_line(band.without_spread() if share else band, arms, arm) for arm, band in bands.items()]
        if drawn := _drawn(lines):
            legend = [(arm_class(arms.index(arm)), arm) for arm in bands]
            yield Panel(title, curves(drawn, title.lower(), title, unit=unit, share=share), legend, words)


def _costs(result: Mapping[str, Any], arms: list[str], histories: Histories) -> Iterator[dict[str, Any]]:
    """What an arm's runs took; ratio: of its time to its baseline's."""
    seconds = {arm: sum(history.seconds for history in of) / len(of) for arm, of in histories.items() if of}
    for arm in (arm for arm in arms if arm in seconds):
        speeds = [speed for history in histories[arm] if (speed := history.tokens_per_second)]
        theirs = seconds.get(result["arms"].get(arm, {}).get("baseline", arm))
        yield {
            "arm": arm,
            "runs": len(histories[arm]),
            "tokens_per_second": sum(speeds) / len(speeds) if speeds else None,
            "time": duration(seconds[arm]),
            "ratio": seconds[arm] / theirs if theirs else None,
        }


def _changes(outcomes: Outcomes, result: Mapping[str, Any]) -> Iterator[tuple[str, str, Any, Any]]:
    """(arm, option, its baseline's value, its own) of all that an arm's runs were made to differ in."""
    for arm, found in result["arms"].items():
        yield from ((arm, key, theirs, own) for key, (theirs, own) in found["changes"].items())
        mine, theirs = (outcomes.runs.get(name) for name in (arm, found["baseline"]))
        if mine and theirs and mine[0].config.get("patch") != theirs[0].config.get("patch"):
            yield arm, "patch (SHA-256)", theirs[0].config.get("patch"), mine[0].config.get("patch")


def _line(band: Band, arms: list[str], arm: str) -> Line:
    """An arm's curve; dashed where its colour had another arm before."""
    index = arms.index(arm)
    return Line(band, theme.arm(index), arm, dashed=index >= theme.ARMS)


def _drawn(lines: Iterable[Line]) -> list[Line]:
    return [line for line in lines if line.band.steps]


def _limits(bands: Iterable[Iterable[Band]]) -> tuple[float, float] | None:
    """The range of all their means, with a little room; None where there are none."""
    values = [value for found in bands for band in found for value in band.mean]
    if not values:
        return None
    room = 0.04 * (max(values) - min(values)) or 0.1
    return min(values) - room, max(values) + room
