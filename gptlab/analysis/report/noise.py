"""The page of the measures of noise: the branch test, alignment by block, readings as labels, calibration, collapse."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from gptlab.analysis.noise import ALTERNATIVES, THRESHOLDS, TRUE_LOSS
from gptlab.analysis.report import theme
from gptlab.analysis.report.page import Panel, arm_class, render, stylesheet, write
from gptlab.analysis.report.plots import (
    Band,
    Line,
    Series,
    averages,
    curves,
    draw_averages,
    draw_over_blocks,
    over_blocks,
    shares,
)
from gptlab.analysis.report.run import block_legend
from gptlab.analysis.report.theme import Drawn
from gptlab.analysis.tables import (
    conversation_remarks,
    conversation_tables,
    noise_remarks,
    noise_sentences,
    noise_tables,
    number,
)

COSINE: dict[str, Any] = {"zero": True, "limits": (-1.05, 1.05)}
"""How a plot of cosines looks."""


def write_noise(result: Mapping[str, Any], path: Path) -> None:
    """Write the page of what `measure` found."""
    write(path, page(result))


def page(result: Mapping[str, Any]) -> str:
    """The page as HTML; the same bytes for the same figures."""
    name = Path(result["source"]).resolve().name
    sections: dict[str, Any] = dict.fromkeys(
        ("facts", "conversations", "branches", "alignment", "labels", "collapse"), ()
    )
    if "conversation" in result:
        sections["conversations"] = list(conversations(result))
        lead, shown = conversation_remarks(result), list(conversation_tables(result))
        return render("noise.html", title=f"Conversation: {name}", lead=lead, tables=shown, **sections)
    others = _others(result)
    sections |= {
        "facts": list(facts(result)),
        "branches": list(branches(others)),
        "alignment": list(alignment(result, others)),
        "labels": list(labels(result)),
        "collapse": list(collapse(result)),
    }
    lead, shown = [*noise_sentences(result), *noise_remarks(result)], list(noise_tables(result))
    return render("noise.html", title=f"Signal, bias or noise: {name}", lead=lead, tables=shown, **sections)


def write_figures(result: Mapping[str, Any], path: str | Path) -> list[Path]:
    """Write each signal's alignment by block into `path`, and into NAME_SIGNAL next to it the fit of its branch test.

    Of a conversation, `path` shows after what the shortest reply is surer. The file's ending says the format. Gives the
    paths; none where there is nothing to draw.
    """
    base = Path(path)
    drawn = dict[Path, Drawn]()
    if "conversation" in result:
        drawn[base] = _surer(result, result["conversation"]["replies"][0], named=True)
    else:
        others = _others(result)
        if series := _aligned(others, "alignment"):
            what, unit = "Alignment with the true loss", "cosine with the true loss’s gradient"
            more = {"unit": unit, "named": True, **COSINE}
            drawn[base] = draw_over_blocks(series, result["n_layer"], "alignment", what, **more)
        for k, name, branch in _fitted(others):
            file = base.with_stem(f"{base.stem}_{re.sub('[^0-9A-Za-z]+', '-', name)}")
            drawn[file] = draw_averages(branch, theme.arm(k), "branch", f"{name}: {branch['verdict']}")
    for file, figure in drawn.items():
        figure.save(file, stylesheet())
    return list(drawn)


def _others(result: Mapping[str, Any]) -> dict[str, Any]:
    """The signals without the true loss."""
    return {name: one for name, one in result["signals"].items() if name != TRUE_LOSS}


def conversations(result: Mapping[str, Any]) -> Iterator[Panel]:
    """How much surer each block's reading of the reply is after the text than after what is said in its place."""
    legend = [(arm_class(k), words) for k, words in enumerate(ALTERNATIVES.values(), 1)]
    for length in result["conversation"]["replies"]:
        figure = _surer(result, length)
        note = "with 95% intervals; 0.5: as sure after the one as after the other"
        yield Panel(figure.description.partition(":")[0], figure.inline(), legend, note)


def _surer(result: Mapping[str, Any], length: int, *, named: bool = False) -> Drawn:
    found, blocks = result["conversation"], result["n_layer"]
    series = []
    for k, (name, words) in enumerate(ALTERNATIVES.items(), 1):
        of_blocks = [block[str(length)] for block in found["against"][name]["blocks"]]
        areas, bounds = [one["auc"] for one in of_blocks], [tuple(one["interval"]) for one in of_blocks]
        series.append(Series(words, theme.arm(k), list(range(1, blocks + 1)), areas, bounds))
    title, unit = f"Reply of {length} token{'s' * (length > 1)}", "area under the curve"
    return draw_over_blocks(series, blocks, f"reply-{length}", title, unit=unit, limits=(0, 1), named=named)


def facts(result: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """(name, figure, unit) of what one asks first."""
    signals = result["signals"]
    scale = signals[TRUE_LOSS]["total"]["noise_scale_tokens"]
    yield "noise scale", number(scale, ",.0f"), "tokens, of the true loss"
    for name, total in ((name, signal["total"]) for name, signal in signals.items() if name != TRUE_LOSS):
        left, times = number(total["progress"], ".2f"), number(total["variance"], ".2f")
        value = number(total["alignment"]["value"], "+.3f")
        yield f"alignment of {name}", value, f"with it, progress left {left}, variance × {times}"


def branches(others: Mapping[str, Any]) -> Iterator[Panel]:
    """The fit in 1/M of every signal that the branch test judged."""
    for k, name, branch in _fitted(others):
        title = f"{name}: {branch['verdict']}"
        svg = averages(branch, theme.arm(k), f"branch-{k}", title)
        note = "a dot a data seed; the diamond, with its 95% interval, is the bias; what the curve adds is noise"
        yield Panel(title, svg, [], note)


def _fitted(others: Mapping[str, Any]) -> Iterator[tuple[int, str, Mapping[str, Any]]]:
    """(shade, signal, branch test) of each signal whose test was fitted."""
    for k, (name, signal) in enumerate(others.items(), 1):
        if (branch := signal.get("branch")) and branch["fit"]:
            yield k, name, branch


def alignment(result: Mapping[str, Any], others: Mapping[str, Any]) -> Iterator[Panel]:
    """Alignment of each signal by block, plain and under Adam, and over training where it was logged."""
    blocks = result["n_layer"]
    legend = [(arm_class(k), name) for k, name in enumerate(others, 1)]
    note = "with 95% intervals; a ring: a norm is not resolved"
    for key, title in (("alignment", "As they are"), ("preconditioned_alignment", "Under Adam’s second moment")):
        if series := _aligned(others, key):
            yield Panel(title, over_blocks(series, blocks, key, title, unit="cosine", **COSINE), legend, note)
    for k, signal in enumerate((result["history"] or {"signals": []})["signals"], 1):
        lines = []
        for j, values in enumerate(signal["blocks"], 1):
            known = {step: x for step, x in zip(result["history"]["steps"], values, strict=True) if x is not None}
            lines += [Line(Band.of(known), theme.block(j, blocks), f"block {j}")] if known else []
        if lines:
            title = f"Over training, signal {k} of the run"
            svg = curves(lines, f"history-{k}", title, unit="cosine", zero=True)
            yield Panel(title, svg, block_legend(blocks), "as logged, without intervals")


def _aligned(others: Mapping[str, Any], key: str) -> list[Series]:
    """The cosines by block of each signal that has any."""
    series = []
    for k, (name, signal) in enumerate(others.items(), 1):
        blocks = {j: block[key] for j, block in enumerate(signal["blocks"], 1)}
        found = {j: one for j, one in blocks.items() if one and one["value"] is not None}
        values, bounds = [one["value"] for one in found.values()], [tuple(one["interval"]) for one in found.values()]
        hollow = [not one["resolved"] for one in found.values()]
        series += [Series(name, theme.arm(k), list(found), values, bounds, hollow)] if found else []
    return series


def labels(result: Mapping[str, Any]) -> Iterator[Panel]:
    """Precision against coverage for τ, and reliability, raw and by the tuned readers."""
    qualities, blocks = result["label_quality"]["blocks"], result["n_layer"]
    legend = block_legend(blocks)
    for kind, words in (("raw", "as the head reads it"), ("tuned", "by a tuned affine reader")):
        found = [(j, block[kind]) for j, block in enumerate(qualities, 1) if block[kind]]
        if not found:
            continue
        series = []
        for j, one in found:
            both = zip(one["coverage"], one["precision"], strict=True)
            x, y = zip(*((c, p) for c, p in both if p is not None), strict=True)
            series.append(Series(f"block {j}", theme.block(j, blocks), x, y))
        title = f"Precision against coverage, {words}"
        note = f"a dot a threshold τ from {THRESHOLDS[0]:g} (right) to {THRESHOLDS[-1]:g}"
        svg = shares(series, f"precision-{kind}", title, x="tokens with p_m of at least τ", y="precision")
        yield Panel(title, svg, legend, note)
        series = []
        for j, one in found:
            x, y = zip(*((b["confidence"], b["accuracy"]) for b in one["reliability"] if b["count"]), strict=True)
            series.append(Series(f"block {j}", theme.block(j, blocks), x, y))
        title = f"Reliability, {words}"
        svg = shares(series, f"reliability-{kind}", title, x="p_m, by bins", y="accuracy", diagonal=True)
        yield Panel(title, svg, legend, "on the line: calibrated")


def collapse(result: Mapping[str, Any]) -> Iterator[Panel]:
    """Each monitor over the blocks."""
    found, blocks = result["collapse"], result["n_layer"]
    x = list(range(1, blocks + 1))

    def series(label: str, shade: int, key: str) -> Series:
        return Series(label, theme.arm(shade), x, [one[key] for one in found])

    entropies = [series("of a reading", 1, "entropy"), series("of the argmax’s marginal", 2, "argmax_entropy")]
    legend = [(arm_class(k), one.label) for k, one in enumerate(entropies, 1)]
    yield Panel("Entropy", over_blocks(entropies, blocks, "entropy", "Entropy", unit="nats", zero=True), legend)
    quantiles = [one["p_max"] for one in found]
    bounds = [(one["0.05"], one["0.95"]) for one in quantiles]
    median, title = Series("p_m", theme.arm(3), x, [one["0.5"] for one in quantiles], bounds), "Confidence p_m"
    svg = over_blocks([median], blocks, "confidence", title, unit="probability", limits=(-0.03, 1.03))
    yield Panel(title, svg, [], "median, and from the 5th to the 95th of a hundred tokens")
    sizes, title = series("logits", 4, "logit_rms"), "Size of the logits"
    yield Panel(title, over_blocks([sizes], blocks, "logits", title, unit="root mean square", zero=True))
