"""The tables and pictures of the findings, from the packed experiments next to them.

    python tools/findings.py                    renews them all: in the README and every page of docs/
    python tools/findings.py --add NAME=FILE    keeps JSON that a command printed in docs/findings/measured.json
    python tools/findings.py --unigram          measures what a model has that only counts bytes, from the corpus
    python tools/findings.py --likeliest DIR    measures which bytes the models of an experiment would say

What is not a pack is in measured.json, by name: what `gptlab noise --json`, `gptlab falsify --json` and `gptlab
experiment ladder --json` printed.

Between <!-- WHAT: NAME --> and <!-- end of NAME --> stands a table of the results of a name. WHAT is one of TABLES, or:
compare, all that `gptlab compare docs/findings/NAME.json.gz` prints as Markdown; verdicts, its first table. A pack
whose NAME.svg a page shows is drawn. A figure within a sentence
stands between <!-- = NAME PLACE FORM --> and <!-- . -->: the value at a place of the same results, such as
arms/confidence/difference, as Python formats it; * in a place adds up all that is there. NAME may be that of a file in
benchmarks/results too. An experiment's result also has `blocks`: the last validation of every block, mean over seeds. A
comment must not begin a line within a paragraph, which Markdown would end there.
"""

from __future__ import annotations

import json
import math
import re
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import speedrun_audit
import torch
from matplotlib.axes import Axes

import gptlab
from gptlab.analysis.dose_response import SHARES, Target, dose_response
from gptlab.analysis.load import Outcomes, read
from gptlab.analysis.noise import ALTERNATIVES, THRESHOLDS
from gptlab.analysis.report.comparison import write_figures
from gptlab.analysis.report.standalone import PANEL, draw
from gptlab.analysis.report.theme import (
    AMBER,
    DARK,
    FILE_SETTINGS,
    GREEN,
    GREY,
    RED,
    SERIES,
    SHADES,
    panels,
    save,
    settings,
)
from gptlab.analysis.run import Run, read_run
from gptlab.analysis.statistics import paired_t
from gptlab.analysis.tables import markdown, table_in_markdown
from gptlab.analysis.verdict import compare
from gptlab.cli.compare import response_tables
from gptlab.cli.falsify import changes_table, rungs_table
from gptlab.data.corpora import Shakespeare
from gptlab.runs.archive import SUFFIX, read_pack
from gptlab.runs.records import read_rows

ROOT = Path(__file__).parents[1]
FINDINGS = ROOT / "docs" / "findings"
MEASURED = FINDINGS / "measured.json"
RESPONSES, TUNING, AUDIT = ("dose_response", "likely_errors"), "tune_", "speedrun_audit"
LEVELS = {"dose_response_parity": (Target(level=0.594), Target(level=0.62))}
"""What is to be reached where that is no share of the clean arm's tokens: `gptlab dose_response --levels`."""

RECIPE = ("optimizer", "block_size", "total_batch_tokens", "n_embd", "beta2", "learning_rate", "steps")
"""Options in which the arms of tune_* differ."""

FIGURE = re.compile(r"(<!-- = (\S+) (\S+) (\S+) -->)[^<]*(?=<!-- \. -->)")


def pages() -> Iterator[Path]:
    """The documents that hold tables."""
    yield ROOT / "README.md"
    yield from sorted((ROOT / "docs").rglob("*.md"))


def renewed(text: str) -> str:
    """A document with its tables as the committed results give them now."""
    text = MARK.sub(lambda found: _filled(found[1], found[2]), text)
    return FIGURE.sub(lambda found: found[1] + _figure(*found.groups()[1:]), text)


def _filled(what: str, name: str) -> str:
    if what in TABLES:
        tables = TABLES[what](_result(name))
    else:
        tables = markdown(_result(name))
        if what == "verdicts":
            tables = "\n\n".join(tables.split("\n\n")[:2]) + "\n"
    return f"<!-- {what}: {name} -->\n\n{tables}\n<!-- end of {name} -->"


@cache
def _loaded(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text(encoding="utf-8"))


def measured() -> dict[str, Any]:
    """What commands printed as JSON, by the name that pages give it."""
    return _loaded(MEASURED)


def keep(name: str, result: Mapping[str, Any]) -> None:
    """Write a result to measured.json, a line each."""
    results = {**measured(), name: result}
    lines = ",\n".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in sorted(results.items()))
    MEASURED.write_text(f"{{\n{lines}\n}}\n", encoding="utf-8")
    _loaded.cache_clear()


@cache
def _result(name: str) -> dict[str, Any]:
    """What the command that belongs to the results of a name gives as JSON."""
    if name == AUDIT:
        return speedrun_audit.audit()
    if name in measured():
        return measured()[name]
    benchmarks = ROOT / "benchmarks" / "results"
    if name in (small := _loaded(benchmarks / "measured.json")):
        return small[name]
    if (file := benchmarks / f"{name}.json").is_file():
        result = _loaded(file)
        return {**result, "against_best_peer": _against_best_peer(result["124m"])} if name == "speed" else result
    packed = FINDINGS / f"{name}{SUFFIX}"
    if name.startswith(TUNING):
        return _last_losses(packed)
    outcomes = read([packed])
    hours = sum(run.seconds for runs in outcomes.runs.values() for run in runs) / 3600  # in updates, a core each
    if name.startswith(RESPONSES):
        response = dose_response(packed, LEVELS.get(name, tuple(map(Target, SHARES))))
        return {**response, "arms": outcomes.verdicts()["arms"], "hours": hours}
    blocks = {arm: _blocks(runs) for arm, runs in outcomes.runs.items()}
    result = {**outcomes.verdicts(), "blocks": blocks, "hours": hours}
    if name == HALF_BATCH:
        result["agreement"] = _agreement(packed)
    if name == RIGHT_WRONG:
        result["shares"] = {name: _shares(result["arms"], gate) for name, gate in (("all", ""), ("gate", "-gate"))}
    if name.startswith(KNOWN):
        result["expected"] = _signs(read_pack(packed).text, result["arms"])
        result["counts"] = _counts(result)
    if name == TRUTHS:
        result["groups"] = _by_fives(outcomes)
        result["predicted"] = _guesses(read_pack(packed).text, result["arms"])
    if name == f"{CONVERSATION}_seeds":
        result["pairs"] = _pairs(result["arms"])
    return result | _worlds(packed) if name == CONVERSATION else result


PAIRS = {"gated": ("self", "shuffled", "gated_placebo"), "gated_16": ("gated", "exact", "self", "shuffled")}
"""Arms of conversation_seeds that are compared with others than their baseline."""


def _pairs(arms: Mapping[str, Any]) -> dict[str, Any]:
    """{"arm-other": its differences by seed, their mean and 95% interval}, in the metric's unit."""
    found = {}
    for arm, others in PAIRS.items():
        for other in others:
            apart = [a - b for a, b in zip(arms[arm]["differences"], arms[other]["differences"], strict=True)]
            test = paired_t(apart)
            found[f"{arm}-{other}"] = {"differences": apart, "difference": test.mean, "interval": list(test.interval())}
    return found


HALF_BATCH = "half_batch"


def _agreement(packed: Path) -> dict[str, Any]:
    """Half the batch against batch-shaped noise of the s that makes up for it, of experiments/half_batch.toml.

    s: root mean square of `batch_noise` in the two arms around it, at which their losses are read, linear in s²; half,
    noise, isotropic: losses in nats, one a seed; difference: half less noise, with its paired interval.
    """
    cells = {(cell.arm, cell.seed): cell.run for cell in read_pack(packed).cells}
    seeds = sorted({seed for _, seed in cells})
    loss = {key: (run := read_run(path)).losses[run.last_step] for key, path in cells.items()}
    squares = [row["batch_noise"] ** 2 for (arm, _), path in cells.items() if arm in ("batch-80", "batch-110")
               for row in read_rows(path) if row.get("batch_noise") is not None]  # fmt: skip
    square = statistics.fmean(squares)
    share = (square - 0.8**2) / (1.1**2 - 0.8**2)
    noise = [(1 - share) * loss["batch-80", seed] + share * loss["batch-110", seed] for seed in seeds]
    half, isotropic = ([loss[arm, seed] for seed in seeds] for arm in ("half", "isotropic-110"))
    test = paired_t([a - b for a, b in zip(half, noise, strict=True)])
    return {
        "s": math.sqrt(square), "half": half, "noise": noise, "isotropic": isotropic, "difference": test.mean,
        "interval": list(test.interval()),
    }  # fmt: skip


KNOWN = "known_answers"


def _signs(text: str, arms: Mapping[str, Any]) -> dict[str, str]:
    """arm -> better, worse or open, as the head of experiments/known_answers.toml expects it."""
    head = re.findall(r"^#   (better|worse|open) ((?:.*\n)(?:#    .*\n)*)", text, re.MULTILINE)
    return {arm: sign for sign, names in head for arm in re.findall(r"\w+", names) if arm in arms}


def _counts(result: Mapping[str, Any]) -> dict[str, int]:
    """Of the arms with an expected sign: how many verdicts have it, have the opposite one, or none."""
    pairs = [(sign, result["arms"][arm]["verdict"]) for arm, sign in result["expected"].items() if sign != "open"]
    decided = [(sign, verdict) for sign, verdict in pairs if verdict in ("better", "worse")]
    hits = sum(sign == verdict for sign, verdict in decided)
    return {"expected": len(pairs), "hits": hits, "opposite": len(decided) - hits, "open": len(pairs) - len(decided)}


def _expected(result: Mapping[str, Any]) -> str:
    """Expected sign and verdict of every arm, by what was expected."""
    lines = ["| arm | expected | verdict | difference, nats | 95% interval | seeds | |", "|---" * 7 + "|"]
    words = {("better", "better"): "hit", ("worse", "worse"): "hit",
             ("better", "worse"): "**opposite**", ("worse", "better"): "**opposite**"}  # fmt: skip
    for arm, sign in sorted(result["expected"].items(), key=lambda item: ("better", "worse", "open").index(item[1])):
        found = result["arms"][arm]
        numbers = [*(found["interval"] or (None, None)), found["difference"]]
        low, high, difference = ("–" if one is None else f"{one:+.4f}" for one in numbers)
        outcome = "" if sign == "open" else words.get((sign, found["verdict"]), "miss")
        row = (arm, sign, found["verdict"], difference, f"{low} to {high}", str(found["n"]), outcome)
        lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines) + "\n"


TRUTHS = "known_truths"


def _by_fives(outcomes: Outcomes) -> list[dict[str, Any]]:
    """The verdicts on every arm of each five seeds that follow each other, as if there were no others."""
    seeds = sorted(outcomes.losses["baseline"])
    fives = [seeds[k : k + 5] for k in range(0, len(seeds) - 4, 5)]
    given = {key: outcomes.arguments[key] for key in ("baseline", "delta")}
    return [
        compare({arm: {seed: row[seed] for seed in five} for arm, row in outcomes.losses.items()}, **given)["arms"]
        for five in fives
    ]


def _guesses(text: str, arms: Mapping[str, Any]) -> dict[str, str]:
    """arm -> what the head of experiments/known_truths.toml predicts: its difference, and of how many groups."""
    cells = [cell for line in re.findall(r"^#   (.*)$", text, re.MULTILINE) for cell in re.split(r" {2,}", line)]
    return {arm: guess for arm, guess in zip(cells[::2], cells[1::2], strict=True) if arm in arms}


def _truths(result: Mapping[str, Any]) -> str:
    """What all seeds say of every arm, and of how many groups of five seeds each verdict is."""
    said = ("better", "no difference", "undecided", "worse")
    head = ["arm", "predicted", "verdict of all", "difference, nats", "95% interval", *(f"fives: {w}" for w in said)]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for arm, found in result["arms"].items():
        low, high = found["interval"]
        counts = [sum(group[arm]["verdict"] == word for group in result["groups"]) for word in said]
        row = [arm, result["predicted"][arm], found["verdict"], f"{found['difference']:+.4f}"]
        lines.append(f"| {' | '.join([*row, f'{low:+.4f} to {high:+.4f}', *map(str, counts)])} |")
    return "\n".join(lines) + "\n"


CONVERSATION = "conversation"
WORLDS = {"1": "", "0": "_0", "-1": "_errors"}
"""kappa -> what the names of its arms end with in experiments/conversation.toml."""


def _worlds(packed: Path) -> dict[str, Any]:
    """Of the conversation's experiment: how many cells have ended, what its file predicts, and where arms collapse.

    worlds: kappa, or the trap -> [what it is called there, the arm, its prediction]. An arm has collapsed from the
    update on at which the entropy of the likeliest answer, as logged with the dose, stays below half of what it was
    when the signal began; None where it does not.
    """
    found = read_pack(packed)
    lines = [line.removeprefix("#").split() for line in found.text.splitlines() if line.startswith("#   ")]
    (names,) = (line[1:-2] for line in lines if line[:1] == ["kappa"])
    rows = {line[0]: map(float, line[1:]) for line in lines if line[:1] and line[0] in WORLDS}
    worlds = {
        f"kappa {k}": [[name, f"{name}{WORLDS[k]}", value] for name, value in zip(names, row, strict=False)]
        for k, row in rows.items()
    }
    (trap,) = re.findall(r"\((\S+) and (\S+)\)", found.text)
    arms = zip(("trap_gated_0", "trap_gated"), trap, strict=True)
    worlds["trap"] = [[f"gated, kappa {int(not arm.endswith('_0'))}", arm, float(value)] for arm, value in arms]
    collapsed = [_collapse(_entropies(cell.run)) for cell in found.cells if cell.arm == "long_raw"]
    return {"cells": len(found.cells), "worlds": worlds, "collapsed": collapsed}


def _entropies(run: Any) -> list[tuple[int, float]]:
    return [(r["step"], r["argmax_entropy"]) for r in read_rows(run) if r.get("argmax_entropy") is not None]


def _collapse(entropies: Sequence[tuple[int, float]]) -> int | None:
    above = [step for step, entropy in entropies if entropy >= entropies[0][1] / 2]
    return next((step for step, _ in entropies if step > above[-1]), None)


def _predicted(result: Mapping[str, Any]) -> str:
    """What was predicted of the truth's probability and what was found, by world and arm."""
    lines = ["| world | arm | predicted | found | 95% interval | seeds |", "|---|---|---|---|---|---|"]
    for world, arms in result["worlds"].items():
        for name, arm, predicted in arms:
            seen = result["arms"][arm]
            found = "–" if seen["difference"] is None else f"{seen['difference']:+.3f}"
            low, high = seen["interval"]
            interval = "–" if low is None else f"{low:+.3f} to {high:+.3f}"
            lines.append(f"| {world} | {name} | {predicted:+.3f} | {found} | {interval} | {seen['n']} |")
    return "\n".join(lines) + "\n"


def _last_losses(packed: Path) -> dict[str, Any]:
    """{arm: its recipe and the last validation losses of its seeds} of arms that end at other steps."""
    found: dict[str, Any] = {}
    for cell in read_pack(packed).cells:
        run = read_run(cell.run)
        recipe = {key: run.options.get(key, 0.95) for key in RECIPE}  # beta2 was no option, and 0.95, once
        arm = found.setdefault(cell.arm, {**recipe, "tokens": run.last_step * recipe["total_batch_tokens"], "loss": []})
        arm["loss"].append(run.losses[run.last_step])
    return found


def _losses(result: Mapping[str, Any]) -> str:
    head = "arm optimizer window batch,&tokens width beta2 rate updates tokens loss,&nats&a&byte seeds".split()
    lines = [f"| {' | '.join(head).replace('&', ' ')} |", "|---" * len(head) + "|"]
    for name, arm in result.items():
        recipe = " | ".join(f"{arm[key]:,}" if isinstance(arm[key], int) else str(arm[key]) for key in RECIPE)
        spread = f" ± {statistics.stdev(arm['loss']):.3f}" if len(arm["loss"]) > 1 else ""
        loss = f"{statistics.fmean(arm['loss']):.3f}{spread}"
        lines.append(f"| {name} | {recipe} | {arm['tokens']:,} | {loss} | {len(arm['loss'])} |")
    return "\n".join(lines) + "\n"


def _blocks(runs: Sequence[Run]) -> dict[str, list[list[float]]]:
    """For each block, from the first, its figures at the last validation, one a seed."""
    last = [[row for row in read_rows(run.source) if row["kind"] == "val"][-1] for run in runs]
    figures = ("block_loss", "block_confidence")
    return {name: [list(block) for block in zip(*(row[name] for row in last), strict=True)] for name in figures}


def _against_best_peer(result: Mapping[str, Any]) -> float:
    """The baseline's speed over that of the fastest peer in any dtype."""
    speeds = {row["name"]: row["tokens_per_second"] for row in result["rows"]}
    peers = [speed for name, speed in speeds.items() if name.endswith((" fp32", " bf16"))]
    return speeds["baseline"] / max(peers, default=math.nan)


def _figure(name: str, place: str, form: str) -> str:
    value = _at(_result(name), place.split("/"))
    return format(statistics.fmean(value) if isinstance(value, list) else value, form)


def _at(value: Any, keys: Sequence[str]) -> Any:
    if not keys:
        return value
    if keys[0] == "*":
        return sum(_at(one, keys[1:]) for one in (value.values() if isinstance(value, dict) else value))
    return _at(value[int(keys[0])] if isinstance(value, (list, tuple)) else value[keys[0]], keys[1:])


def _branches(measured: dict[str, Any]) -> str:
    """What the branch test said of each signal, as a table."""

    def with_interval(part: dict[str, Any]) -> str:
        low, high = part["interval"]
        return f"{part['value']:+.4f} ({low:+.4f} to {high:+.4f})"

    lines = ["| signal | verdict | bias, nats | noise, nats | dose at the start |", "|---|---|---|---|---|"]
    for name, signal in measured["signals"].items():
        if branch := signal.get("branch"):
            parts = f"{with_interval(branch['bias'])} | {with_interval(branch['noise'])}"
            lines.append(f"| {name} | {branch['verdict']} | {parts} | {branch['dose']:.2f} |")
    return "\n".join(lines) + "\n"


def _premise(measured: Mapping[str, Any]) -> str:
    """Areas under the curve of a reply's sureness after the text, against each alternative, by step and length."""
    names = list(ALTERNATIVES)
    lines = [f"| step | reply, tokens | {' | '.join(map(ALTERNATIVES.__getitem__, names))} |", "|---" * 6 + "|"]
    for step, found in measured.items():
        for length in map(str, found["conversation"]["replies"]):
            areas = (found["conversation"]["against"][name]["total"][length] for name in names)
            cells = (f"{one['auc']:.2f} ({one['interval'][0]:.2f} to {one['interval'][1]:.2f})" for one in areas)
            lines.append(f"| {step} | {length} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _ideas(result: Mapping[str, Any]) -> str:
    """What a judge said of each idea, next to what was predicted or expected of it."""
    first = next(key for key in ("predicted", "expected") if key in next(iter(result["answers"].values())))
    lines = [f"| idea | {first} | verdict | difference, nats | 95% interval | seeds | reason |", "|---" * 7 + "|"]
    answers = sorted(result["answers"].items(), key=lambda one: (PREDICTED.get(one[1][first], 0), one[0]))
    for name, one in answers:
        low, high = one["interval"]
        cells = [
            name, one[first], one["verdict"], "–" if one["difference"] is None else f"{one['difference']:+.4f}",
            "–" if low is None else f"{low:+.4f} to {high:+.4f}", str(one["n"]), one["why"],
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


PREDICTED = {"better": 0, "worse": 1, "null": 2}
"""The order of ideas by what was predicted of them."""

EVALUATED, LIKELIEST = 131_072, 32_768
"""Validation bytes that a run of shakespeare-tiny reads, and on which its likeliest bytes are counted."""

STEPS = (25, 50, 100, 400)
SHOWN = (0.5, 0.9)
"""Thresholds that are written next to their points."""


def labels(axes: Axes, _: int) -> None:
    """Precision of verdicts against the share of tokens that pass, a point a threshold, a curve a block (N2)."""
    blocks = _result("1_noise_bias_or_noise")["label_quality"]["blocks"]
    for number, block in enumerate(blocks, 1):
        points = [p for p in zip(block["raw"]["coverage"], block["raw"]["precision"], THRESHOLDS, strict=True) if p[1]]
        x, y = [p[0] for p in points], [p[1] for p in points]
        axes.plot(x, y, ".-", color=SHADES[number - 1], label=f"block {number}", lw=1.1)
        for share, right, threshold in points:
            if number == len(blocks) and any(abs(threshold - one) < 1e-9 for one in SHOWN):
                axes.annotate(
                    f"τ = {threshold:g}", (share, right), xytext=(6, 4), textcoords="offset points", fontsize=8
                )
    axes.set_ylim(0, 1.05)
    axes.set_xlabel("coverage: share of tokens with p_max of at least τ")
    axes.set_ylabel("precision: share of these that is right")
    axes.legend(frameon=False, fontsize=8)


def alignment(axes: Axes, _: int) -> None:
    """The cosine of each signal's mean gradient with the true loss's, at four steps of one run (N3)."""
    at = [_result(f"alignment_{step}")["signals"] for step in STEPS]
    axes.axhline(0.0, color=GREY, linewidth=0.6)
    for k, name in enumerate([name for name in at[0] if name != "true_loss"]):
        cosines = [(step * 1.02 ** (k - 2.5), one[name]["total"]["alignment"])
                   for step, one in zip(STEPS, at, strict=True)]  # fmt: skip
        found = [(x, one) for x, one in cosines if one["value"] is not None]
        axes.plot([x for x, _ in found], [one["value"] for _, one in found], ".-", color=SERIES[k], label=name, lw=1.1)
        for x, one in found:
            axes.plot([x, x], one["interval"], color=SERIES[k], linewidth=1.6)
    axes.set_xscale("log")
    axes.set_xticks(STEPS, [f"{step}" for step in STEPS])
    axes.set_xticks([], minor=True)
    axes.set_xlabel("step (log scale; points of a step are moved apart)")
    axes.set_ylabel("cosine with the true gradient")
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))


def averages(axes: Axes, which: int) -> None:
    """The branch test of one of N4's and N5's signals: validation loss against 1/M, what is left at 0 is bias."""
    signals = _result("1_noise_bias_or_noise")["signals"]
    name = [name for name in signals if name != "true_loss"][which]
    branch: Mapping[str, Any] = signals[name]["branch"]
    axes.axhline(0.0, color=GREY, linewidth=0.6)
    for averaged, row in branch["differences"].items():
        axes.plot([1 / int(averaged)] * len(row), row, ".", color=GREY, markersize=4)
    grid = [i / 50 for i in range(51)]
    curve = [sum(c * x**k for k, c in enumerate(branch["fit"])) for x in grid]
    axes.plot(grid, curve, color=SERIES[0], linewidth=1.2)
    axes.plot([0, 0], branch["bias"]["interval"], color="black", linewidth=1.6)
    axes.plot([0], [branch["bias"]["value"]], "D", color="black", markersize=4)
    axes.set_title(f"{name}: {branch['verdict']}", fontsize=9)
    axes.set_xlabel("1/M, of M batches averaged")
    axes.set_ylabel("nats more than without")


SHOWN_ARMS: tuple[tuple[str, str, str, str, tuple[tuple[float, float], tuple[float, float]]], ...] = (
    ("baseline", "baseline", GREY, "-", ((3.05, 0.31), (2.05, 2.8))),
    ("confidence", "confidence", RED, "-", ((3.28, 0.76), (3.4, 4.7))),
    ("confidence-placebo", "its placebo", GREY, ":", ((3.05, 0.05), (2.15, 4.35))),
)
"""Arm, its label, colour and line, and where the label stands in either panel."""


def sure_and_wrong(axes: Axes, which: int) -> None:
    """What `confidence` makes of each block: how sure it is, and how wrong (N4); a dot a seed, lines through means."""
    name = ("block_confidence", "block_loss")[which]
    for arm, label, colour, dashes, at in SHOWN_ARMS:
        blocks = _result("1_noise")["blocks"][arm][name]
        numbers, means = range(1, len(blocks) + 1), [statistics.fmean(values) for values in blocks]
        axes.plot(numbers, means, dashes, color=colour, linewidth=1.5)
        for number, values in zip(numbers, blocks, strict=True):
            axes.plot([number] * len(values), values, ".", color=colour, markersize=3)
        axes.annotate(label, at[which], color=colour if colour != GREY else DARK, fontsize=9)
    axes.set_xticks(range(1, 5), [f"block {number}" for number in range(1, 5)])
    if which:
        axes.axhline(math.log(256), color="black", linewidth=0.8, linestyle="--")
        axes.annotate("uniform guess", (4.15, math.log(256) + 0.08), fontsize=8, ha="right")
        axes.set_ylim(2.5, 6.5)
        axes.set_ylabel("cross-entropy with the truth, nats")
        axes.set_title("... and how wrong it is", fontsize=10)
    else:
        axes.set_ylim(0, 1)
        axes.set_ylabel("mean probability of its best guess")
        axes.set_title("How sure each block is of the next byte ...", fontsize=10)


def worlds(axes: Axes, which: int) -> None:
    """What each arm of the conversation changes of the truth's probability in a world, and what was predicted (N3)."""
    result = _result(CONVERSATION)
    world, arms = list(result["worlds"].items())[which]
    axes.axvline(0.0, color=GREY, linewidth=0.6)
    for y, (_, arm, predicted) in enumerate(reversed(arms)):
        seen = result["arms"][arm]
        axes.plot([predicted], [y], "D", color=DARK, markerfacecolor="none", markersize=6)
        axes.plot(seen["differences"], [y - 0.2] * seen["n"], "|", color=SERIES[0], markersize=5)
        if seen["difference"] is not None:
            axes.plot([seen["difference"]], [y], "o", color=SERIES[0], markersize=5)
        if seen["interval"][0] is not None:
            axes.plot(seen["interval"], [y, y], color=SERIES[0], linewidth=1.6)
    axes.set_yticks(range(len(arms)), [name for name, *_ in reversed(arms)])
    axes.set_ylim(-0.6, len(arms) - 0.4)
    axes.set_xlim(-0.15, 0.17)
    axes.set_xlabel("change of the true answer's probability")
    after = {"kappa 1": "the truth alone", "kappa 0": "any answer", "kappa -1": "errors alone"}
    where = f"sure replies after {after[world]}" if world in after else "the truth is the commonest answer"
    axes.set_title(f"{world}: {where}", fontsize=9)
    if world == "trap":
        axes.plot([], [], "D", color=DARK, markerfacecolor="none", label="predicted")
        axes.plot([], [], "o-", color=SERIES[0], markersize=5, label="found, with 95% interval")
        axes.plot([], [], "|", color=SERIES[0], label="a seed")
        figure = axes.get_figure(root=True)
        assert figure is not None
        figure.legend(*axes.get_legend_handles_labels(), frameon=False, fontsize=8, loc="outside lower center", ncols=3)


CLOSE = (-0.18, 0.06)
"""Differences that known_answers' picture shows, in nats; an arm beyond them is named with its difference."""

FOUND_COLOURS = {"better": GREEN, "worse": RED}


def known(axes: Axes, _: int) -> None:
    """Every arm of known_answers with its interval, under what was expected of it; a tick a seed."""
    result = _result(KNOWN)
    order = [arm for sign in ("better", "worse", "open") for arm, one in result["expected"].items() if one == sign]
    axes.axvline(0.0, color=GREY, linewidth=0.6)
    names = []
    for y, arm in enumerate(reversed(order)):
        seen, colour = result["arms"][arm], FOUND_COLOURS.get(result["arms"][arm]["verdict"], DARK)
        expected = result["expected"][arm]
        names.append(arm if expected == "open" else f"{arm} (expected {expected})")
        if seen["difference"] > CLOSE[1]:
            text = f"{seen['verdict']}, {seen['difference']:+.2f} →"
            axes.annotate(text, (CLOSE[1], y), ha="right", va="center", color=colour, fontsize=9)
            continue
        axes.plot(seen["differences"], [y - 0.25] * seen["n"], "|", color=colour, markersize=5)
        axes.plot(seen["interval"], [y, y], color=colour, linewidth=1.8)
        axes.plot([seen["difference"]], [y], "o", color=colour, markersize=5)
        left = seen["difference"] < -0.05  # its text would stand on the axis otherwise
        ends = (*seen["interval"], *seen["differences"])
        at = max(ends) + 0.004 if left else min(ends) - 0.004
        axes.annotate(seen["verdict"], (at, y), ha="left" if left else "right", va="center", color=colour, fontsize=9)
    axes.set_yticks(range(len(order)), names, fontsize=8)
    axes.set_xlim(*CLOSE)
    axes.set_ylim(-0.6, len(order) - 0.4)
    axes.set_xlabel("loss minus the baseline's, nats a byte")


LIKELY = "likely_errors"
JUDGES = (
    ("frozen", LIKELY, "true targets", DARK),
    ("frozen_10", LIKELY, "1 in 10 from another place", GREEN),
    ("uniform-10", "dose_response_auxiliary", "1 in 10 any of 256 characters", RED),
)
"""Arms of judges with wrong targets: name, experiment, label and colour."""
NOISES = (
    ("baseline", LIKELY, "no noise", DARK),
    ("isotropic_noise", LIKELY, "isotropic noise", AMBER),
    ("batch_noise", LIKELY, "noise shaped like a batch's", RED),
)


def likely_errors(axes: Axes, which: int) -> None:
    """Validation loss over tokens, a line a seed: judges with wrong targets of two kinds, and noise of two shapes."""
    for arm, experiment, label, colour in (JUDGES, NOISES)[which]:
        for k, curve in enumerate(read([FINDINGS / f"{experiment}{SUFFIX}"]).curves[arm].values()):
            tokens = [step * 2048 / 1e6 for step in curve]
            axes.plot(tokens, list(curve.values()), color=colour, linewidth=0.9, label=None if k else label)
    axes.set_xlabel("million tokens")
    axes.set_ylabel("validation loss, nats a character")
    axes.set_ylim(1.4, 3.0)
    axes.set_title(("Wrong targets for frozen judges", "Gradient noise as large as the gradient")[which],
                   fontsize=10)  # fmt: skip
    axes.legend(frameon=False, fontsize=8, loc="lower left")


RIGHT_WRONG, DOSES = "right_wrong", (0.03, 0.1, 0.2, 0.4, 0.8)
"""The experiment of right against wrong, and its doses."""
KINDS = {"both": DARK, "wrong": RED, "right": GREEN}


def right_against_wrong(axes: Axes, which: int) -> None:
    """Harm against dose where confidence counts on all tokens, on wrong or right guesses; without and with a gate."""
    arms, gate = _result(RIGHT_WRONG)["arms"], ("", "-gate")[which]
    axes.axhline(0.0, color=GREY, linewidth=0.6)
    for k, (kind, colour) in enumerate(KINDS.items()):
        found = [(dose * 1.04 ** (k - 1), arms.get(f"{kind}{gate}-{dose:g}")) for dose in DOSES]
        seen = [(x, one) for x, one in found if one and one["difference"] is not None]
        axes.plot([x for x, _ in seen], [one["difference"] for _, one in seen], ".-", color=colour, lw=1.2, label=kind)
        for x, one in seen:
            if one["interval"][0] is not None:
                axes.plot([x, x], one["interval"], color=colour, linewidth=1.6)
    axes.set_xscale("log")
    axes.set_xticks(DOSES, [f"{dose:g}" for dose in DOSES])
    axes.set_xticks([], minor=True)
    axes.set_xlabel("dose, in norms of the true gradient")
    axes.set_ylabel("nats above the baseline")
    axes.set_ylim(-0.4, 2.1)  # one interval, of two ends that lie far apart, is cut
    axes.set_title(("every token counts", "only where p_max is at least 0.5")[which], fontsize=10)
    axes.legend(frameon=False, fontsize=8, loc="upper left")


def _shares(arms: Mapping[str, Any], gate: str) -> dict[str, float]:
    """Of the harm of confidence on all tokens, the share that is done at the same dose by one kind of them alone."""
    harm = {name: one["difference"] for name, one in arms.items()}
    return {
        f"{kind}-{dose:g}": harm[f"{kind}{gate}-{dose:g}"] / harm[f"both{gate}-{dose:g}"]
        for kind in ("wrong", "right")
        for dose in DOSES
    }


NIGHT, REACH = "judge_night", 0.12
"""The judge's night, and the differences that its picture shows, in nats; beyond them is an arrow."""
MARKS = {"keep": GREEN, "discard": GREY, "undecided": AMBER, "inactive": GREY, "broken": RED, "diverged": RED}


def ideas(axes: Axes, _: int) -> None:
    """Every idea of the night with its interval, by what was predicted of it."""
    answers = _result(NIGHT)["answers"]
    order = sorted(answers, key=lambda name: (PREDICTED[answers[name]["predicted"]], name), reverse=True)
    axes.axvline(0.0, color=GREY, linewidth=0.6)
    for y, name in enumerate(order):
        one = answers[name]
        colour, kept = MARKS[one["verdict"]], one["verdict"] == "keep"
        middle, ends = one["difference"] or 0.0, [max(-REACH, min(REACH, end or 0.0)) for end in one["interval"]]
        axes.plot(ends, [y, y], color=colour, linewidth=2.0 if kept else 1.2)
        marker = ">" if middle > REACH else "<" if middle < -REACH else "D" if kept else "o"
        axes.plot([max(-REACH, min(REACH, middle))], [y], marker, color=colour, markersize=5 if kept else 4)
        axes.annotate(one["verdict"], (REACH * 1.06, y), va="center", color=colour, fontsize=8, annotation_clip=False)
    axes.set_yticks(range(len(order)), [f"{name} ({answers[name]['predicted']})" for name in order], fontsize=8)
    axes.set_xlim(-REACH * 1.03, REACH * 1.03)
    axes.set_ylim(-0.7, len(order) - 0.3)
    axes.set_xlabel("loss minus the baseline's, nats a byte")
    figure = axes.get_figure(root=True)
    assert figure is not None
    figure.set_size_inches(7.2, 6.4)


PICTURES: dict[str, tuple[Callable[[Axes, int], None], int]] = {
    "noise_labels": (labels, 1),
    "noise_alignment": (alignment, 1),
    "noise_averages": (averages, 4),
    "1_noise_blocks": (sure_and_wrong, 2),
    CONVERSATION: (worlds, 4),
    "known_answers_close": (known, 1),
    AUDIT: (speedrun_audit.forest, 1),
    NIGHT: (ideas, 1),
    RIGHT_WRONG: (right_against_wrong, 2),
    LIKELY: (likely_errors, 2),
}
"""name of the SVG -> what draws one panel, and how many."""


TABLES: dict[str, Callable[[Any], str]] = {
    "audit": speedrun_audit.table,
    "branches": _branches,  # the branch tests that `gptlab noise` made
    "dose_response": lambda result: "\n\n".join(map(table_in_markdown, response_tables(result))) + "\n",
    "expected": _expected,  # verdicts next to the signs that the experiment's file expects
    "falsify": lambda result: table_in_markdown(changes_table(result)) + "\n",
    "ideas": _ideas,  # what `gptlab judge` said of every idea of benchmarks/results/NAME.json
    "ladder": lambda result: table_in_markdown(rungs_table(result)) + "\n",
    "losses": _losses,  # the last validation losses, by arm
    "predicted": _predicted,  # what experiments/conversation.toml predicts next to what was found
    "premise": _premise,  # what `gptlab noise --conversation` printed, by step
    "truths": _truths,  # all seeds of known_truths, and each five of them
}
"""WHAT is shown of a result -> its Markdown."""
MARK = re.compile(
    rf"<!-- (compare|verdicts|{'|'.join(TABLES)}): (\w+) -->\n.*?<!-- end of \2 -->",
    re.DOTALL,
)


def draw_pictures(folder: Path = FINDINGS) -> None:
    """Write all of PICTURES: equal bytes for equal results and matplotlib."""
    for name, (panel, count) in PICTURES.items():
        with settings(FILE_SETTINGS):
            columns = min(count, 2)
            rows = -(-count // columns)
            width = PANEL[0] * (columns if count > 1 else 1.7)
            figure, all_axes = panels(rows, columns, (width, PANEL[1] * (rows if count > 1 else 1.1)))
            for number, axes in enumerate(all_axes):
                panel(axes, number)
        save(figure, folder / f"{name}.svg", FILE_SETTINGS)


def measure_unigram() -> None:
    """Write the cross-entropy of Shakespeare's first validation bytes under the training bytes' frequencies."""
    train, validation = (
        np.concatenate([np.frombuffer(b"\0" + text.encode(), np.uint8) for text, _ in Shakespeare().documents(stream)])
        for stream in ("train", "val")
    )
    counts, read = np.bincount(train, minlength=256), validation[1 : 1 + EVALUATED]
    nats = -np.log(np.maximum(counts[read], 0.5) / counts.sum()).mean()
    result = {"nats": float(nats), "training_bytes": len(train), "validation_bytes": len(read)}
    keep("shakespeare_unigram", result)


def measure_likeliest(experiment: Path) -> None:
    """Write the entropy, in nats, of how often each byte is the likeliest, of the last model of every cell.

    Over Shakespeare's first validation bytes: it is low where a model has few bytes that it would say.
    """
    text = "".join(text for text, _ in Shakespeare().documents("val")).encode()[: LIKELIEST + 1]
    arms: dict[str, dict[str, list[float]]] = {}
    for folder in sorted(experiment.glob("*/seed_*")):
        model = gptlab.load(folder, device="cpu")
        size = model.config.block_size
        windows = torch.tensor(list(text[:LIKELIEST])).view(-1, size)
        with torch.no_grad():
            logits = torch.cat([model(rows) for rows in windows.split(64)]).flatten(0, 1)
        shares = torch.bincount(logits.argmax(-1), minlength=256) / LIKELIEST
        found = arms.setdefault(folder.parent.name, {"entropy": [], "most": []})
        found["entropy"].append(float(torch.special.entr(shares).sum()))
        found["most"].append(float(shares.max()))
    shares = torch.bincount(torch.tensor(list(text[1:])), minlength=256) / LIKELIEST
    keep("likeliest_bytes", {"arms": arms, "bytes": LIKELIEST, "text": float(torch.special.entr(shares).sum())})


def main() -> None:
    if "--unigram" in sys.argv:
        measure_unigram()
    if "--likeliest" in sys.argv:
        measure_likeliest(Path(sys.argv[sys.argv.index("--likeliest") + 1]))
    if "--add" in sys.argv:
        name, _, path = sys.argv[sys.argv.index("--add") + 1].partition("=")
        keep(name, json.loads(Path(path).read_text(encoding="utf-8")))
    for page in pages():
        page.write_text(renewed(page.read_text(encoding="utf-8")), encoding="utf-8")
    shown = "".join(page.read_text(encoding="utf-8") for page in pages())
    for name in (path.name.removesuffix(SUFFIX) for path in FINDINGS.glob(f"*{SUFFIX}")):
        if f"{name}.svg)" not in shown or name in PICTURES:
            continue
        if name.startswith(RESPONSES):
            draw(_result(name), FINDINGS / f"{name}.svg")
        else:
            write_figures(None, _result(name), FINDINGS / f"{name}.svg")
    draw_pictures()


if __name__ == "__main__":
    main()
