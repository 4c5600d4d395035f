"""`gptlab compare` and `gptlab dose_response`: verdicts on runs, and how many times the tokens a known error costs.

`compare` takes runs, an experiment or another trainer's log, or plans seeds; `dose_response` an experiment's folder.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gptlab.analysis.tables import Table, number
from gptlab.cli.arguments import Parser, add_paper, amount, figure_file
from gptlab.cli.console import show_result, write_tables
from gptlab.errors import ConfigError, DataError, UsageError

if TYPE_CHECKING:
    from gptlab.analysis.load import Outcomes


DECLARED = ("baseline", "delta", "looks", "seeds", "placebo", "metric", "higher_is_better", "unpaired")
"""Options that an experiment's file declares for its own runs."""


def main(argv: list[str]) -> int:
    """Print verdicts or a plan; raises ConfigError with the difference where runs differ in what nobody declared."""
    options = _parser().parse(argv)
    if options.plan:
        return _plan(options)
    if not options.sources:
        raise UsageError("expected runs, an experiment's folder or a log; see `gptlab compare --help`")
    from gptlab.analysis.tables import remarks, sentences, tables

    outcomes, result = _verdicts(options)
    _report(options, outcomes, result)
    shown, lines = list(tables(result)), remarks(result)
    write_tables(options, shown, lines)
    if options.figure:
        from gptlab.analysis.report.comparison import write_figures

        for path in write_figures(outcomes, result, options.figure):
            print(f"figure: {path}", file=sys.stderr)
    if options.json:
        print(json.dumps(result, indent=1, allow_nan=False))
    else:
        show_result(shown, lines, first=sentences(result))
    return 0


def _parser() -> Parser:
    parser = Parser(
        prog="gptlab compare",
        usage="%(prog)s [RUN|EXPERIMENT|LOG] [options]",
        description="Say of every arm whether it is better or worse than its baseline, no different, inactive or "
        "undecided, and why (docs/verdicts.md). An experiment's folder, or the file of a packed one, "
        "holds what was declared; single runs are sorted into arms by their options, the arm without a signal being "
        "the baseline; a log of another trainer is a table (CSV, TSV, JSON lines) with step, loss, arm and "
        "seed, or text logs (nanoGPT, llm.c, modded-nanogpt, build-nanogpt): files, folders of them, or "
        "ARM=either.",
    )
    parser.add_argument("sources", nargs="*", metavar="RUN|EXPERIMENT|LOG", help="run folders, or one of the others")
    parser.add_argument("--json", action="store_true", help="print JSON on standard output")
    parser.add_argument("--html", metavar="FILE", help="where to write the report [report.html of an experiment]")
    add_paper(parser, "draw the paired differences, and in NAME_losses the losses over training")
    parser.add_argument("--despite", action="store_true", help="compare runs that differ in what nobody declared")
    parser.add_argument("--step", type=int, metavar="N", help="compare at this step [the last that all have]")
    own = parser.add_argument_group("Runs and logs (an experiment file declares these)")
    own.add_argument("--baseline", metavar="ARM", help="an arm of a log, or one of the baseline's runs [baseline]")
    delta = "the largest difference that does not matter [none: only an exact 0 is no difference]"
    own.add_argument("--delta", type=amount, metavar="X", help=delta)
    own.add_argument("--looks", type=numbers, metavar="N,N,..", help="seeds at which looks were declared [none]")
    own.add_argument("--seeds", type=numbers, metavar="N,N,..", help="the seeds that count [all that any arm has]")
    own.add_argument("--placebo", action="append", default=[], metavar="ARM=PLACEBO", help="a log's placebo arms")
    own.add_argument("--unpaired", action="store_true", help="equal seeds mean nothing: Welch's t instead of pairs")
    own.add_argument("--metric", metavar="NAME", help="what is judged: a column, or a figure of val rows [loss]")
    own.add_argument("--higher_is_better", action="store_true", help="of it [known of the usual figures, else lower]")
    plan = parser.add_argument_group("Planning")
    plan.add_argument("--plan", action="store_true", help="how many seeds a question needs, instead of verdicts")
    plan.add_argument("--sigma", type=amount, metavar="X", help="spread of paired differences, nats [the sources']")
    plan.add_argument("--difference", type=amount, metavar="X", help="the true difference to find, nats [1 sigma]")
    plan.add_argument("--arms", type=int, default=1, metavar="N", help="arms without baseline and controls [1]")
    plan.add_argument("--power", type=amount, default=0.8, metavar="X", help="probability to find it [0.8]")
    return parser


def numbers(text: str) -> list[int]:
    return sorted({int(part) for part in text.split(",")})


def _verdicts(options: argparse.Namespace) -> tuple[Outcomes, dict[str, Any]]:
    from gptlab.analysis.load import EXPERIMENT, is_experiment, read, refuse_undeclared
    from gptlab.runs.experiment_spec import Metric

    given = [name for name in DECLARED if getattr(options, name) not in (None, [], False)]
    if given and is_experiment(Path(options.sources[0])):
        raise UsageError(
            f"{options.sources[0]} declares its {given[0]} in its {EXPERIMENT}; after the runs it stands: leave "
            f"--{given[0]} out"
        )
    metric = Metric.of(options.metric or "loss", "higher" if options.higher_is_better else None, "lower")
    outcomes = read(options.sources, step=options.step, baseline=options.baseline, seeds=options.seeds, metric=metric)
    refuse_undeclared(outcomes, despite=options.despite)
    given = {"delta": options.delta, "looks": options.looks, "placebos": _placebos(options.placebo)}
    result = outcomes.verdicts(**given, unpaired=options.unpaired or None)
    return outcomes, result


def _report(options: argparse.Namespace, outcomes: Outcomes, result: dict[str, Any]) -> None:
    """Write report.html where --html says, or into the experiment's folder, where a failure is only reported."""
    from gptlab.analysis.load import EXPERIMENT
    from gptlab.analysis.report import FILE

    folder = Path(options.sources[0])
    if not options.html and not (folder / EXPERIMENT).is_file():
        return
    from gptlab.analysis.report.comparison import write_comparison

    path = Path(options.html or folder / FILE)
    try:
        write_comparison(outcomes, result, path)
    except (OSError, DataError) as error:
        problem = f"could not write {path}: {error.strerror if isinstance(error, OSError) else error}"
        if options.html:
            raise ConfigError(f"--html: {problem}") from None
        print(problem, file=sys.stderr)
    else:
        print(f"report: {path}", file=sys.stderr)


def _placebos(given: list[str]) -> dict[str, str] | None:
    pairs = [text.partition("=") for text in given]
    if wrong := [text for text, pair in zip(given, pairs, strict=True) if not pair[2]]:
        raise UsageError(f"--placebo: expected ARM=PLACEBO, found {wrong[0]!r}")
    return {arm: placebo for arm, _, placebo in pairs} or None


def _plan(options: argparse.Namespace) -> int:
    from gptlab.analysis.design import plan, pooled_sigma

    sigma = options.sigma
    if sigma is None:
        if not options.sources:
            raise UsageError("--plan: expected --sigma X, or runs to take it from; see `gptlab compare --help`")
        sigma = pooled_sigma(_verdicts(options)[1]["arms"])
        if sigma is None:
            raise UsageError("--plan: expected at least 2 seeds of an arm and its baseline, found fewer; give --sigma")
    if not 0 < options.power < 1 or options.arms < 1 or sigma == 0:
        raise UsageError("--plan: expected a power between 0 and 1, at least 1 arm and a sigma above 0")

    wanted = sigma if options.difference is None else options.difference
    found = plan(sigma, wanted, delta=options.delta, arms=options.arms, power=options.power, looks=options.looks)
    if options.json:
        print(json.dumps(found, indent=1, allow_nan=False))
        return 0
    many = "more than 10,000"
    print(f"paired differences with a spread of {sigma:.4g} nats, {options.arms} arm(s), power {options.power:.0%}:")
    print(f"  to show a difference of {wanted:.4g}: {found['seeds_for_difference'] or many} seeds")
    if options.delta is not None:
        print(f"  to show that it lies within ±{options.delta:g}: {found['seeds_for_no_difference'] or many} seeds")
    for row in found["seeds"]:
        print(f"  {row['n']:>3} seeds show a difference of {row['smallest_difference']:.4g}")
    return 0


def dose_response(argv: list[str]) -> int:
    """Print multipliers, fits and compounding; raises ConfigError or DataError where the folder has none."""
    options = _dose_parser().parse(argv)
    from gptlab.analysis.dose_response import SHARES, Target
    from gptlab.analysis.dose_response import dose_response as measured

    levels = [Target(level=level) for level in options.levels or ()]
    result = measured(options.experiment, levels or [Target(share) for share in options.shares or SHARES])
    if options.figure:
        from gptlab.analysis.report.standalone import draw

        draw(result, options.figure)
        print(f"figure: {options.figure}", file=sys.stderr)
    if options.json:
        print(json.dumps(result, indent=1, allow_nan=False))
    else:
        show_result(response_tables(result), (f"left out: {note}" for note in result["notes"]))
    return 0


def _dose_parser() -> Parser:
    parser = Parser(
        prog="gptlab dose_response",
        description="How many times the tokens an arm with a known error (flipped targets, gradient noise) needs to "
        "get where its clean arm got, paired by seed, with 95% intervals; fitted against theory; and whether errors "
        "at every block multiply or add up. docs/dose_response.md says how each figure is made.",
    )
    parser.add_argument(
        "experiment", metavar="EXPERIMENT", help="the folder or the pack of an experiment such as dose_response"
    )
    shares = "levels: what the clean arm has after these shares of its tokens [0.125,0.25,0.5]"
    parser.add_argument("--shares", type=_numbers, metavar="X,X,..", help=shares)
    parser.add_argument("--levels", type=_numbers, metavar="X,X,..", help="these values of the figure, instead")
    parser.add_argument(
        "--figure", "--svg", metavar="FILE", type=figure_file, help="draw multipliers over doses: .pdf, .svg or .png"
    )
    parser.add_argument("--json", action="store_true", help="print JSON on standard output")
    return parser


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected numbers such as 0.25,0.5, found {text!r}") from None


def response_tables(result: Mapping[str, Any]) -> Iterator[Table]:
    """A table a series: a row a dose, its multipliers early to late; then the fits, and compounding where it is."""
    for series in result["series"]:
        header = ("arm", "dose", *(_place(level) for level in series["levels"]), "grows")
        rows = []
        for i, first in enumerate(series["levels"][0]["doses"]):
            cells = [multiple(level["doses"][i]) for level in series["levels"]]
            grown = series["growth"].get(first["arm"])
            rows.append((first["arm"], f"{first['dose']:g}", *cells, factor(grown["ratio"], grown["interval"])
                         if grown else "–"))  # fmt: skip
        levels = (f"{number(level['level'], '.4f')}" for level in series["levels"])
        rows.append(("(level)", series["figure"], *levels, ""))
        fits = (factor(level["fit"]["exponent"], level["fit"]["interval"]) if level["fit"] else "–"
                for level in series["levels"])  # fmt: skip
        rows.append(("(exponent a)", series["theory"], *fits, ""))
        yield Table(f"{series['name']}: times the tokens of {series['reference']}", header, rows)
    if result["compounding"]:
        rows = [_compounded(one) for one in result["compounding"]]
        header = ("error", "at", "each block alone", "every block", "their product", "their sum", "so it is")
        yield Table("Does it compound?", header, rows)


def _compounded(one: Mapping[str, Any]) -> tuple[str, ...]:
    singles = ", ".join(number(ratio, ".3f") for ratio in one["singles"])
    bounded = {"singles": ("product", "sum"), "everywhere": ("everywhere",), "all": ("everywhere", "product", "sum")}
    atleast = bounded.get(one.get("bounds", ""), ())
    means = (("≥ " if key in atleast else "") + number(one.get(key), ".3f") for key in ("everywhere", "product", "sum"))
    return (f"{one['kind']}, {one['dose']:g}", _place(one), singles, *means, _compounding_verdict(one))


def _compounding_verdict(one: Mapping[str, Any]) -> str:
    """The verdict; of `neither` on which side of both."""
    if one["verdict"] == "neither":
        intervals = one["against_product"], one["against_sum"]
        if all(high < 1 for _, high in intervals):
            return "neither: less than both"
        if all(low > 1 for low, _ in intervals):
            return "neither: more than both"
    return one["verdict"]


def _place(level: Mapping[str, Any]) -> str:
    return f"at {level['level']:g}" if level["share"] is None else f"at {level['share']:g} of its tokens"


def multiple(row: Mapping[str, Any]) -> str:
    """A multiplier with its interval; "≥" where some seed never arrived, with how many did not."""
    if row["multiplier"] is None:
        return "–"
    if row["censored"]:
        return f"≥ {row['multiplier']:.3f} ({row['censored']} of {row['n']} never)"
    return factor(row["multiplier"], row["interval"])


def factor(ratio: float, interval: tuple[float, float] | None) -> str:
    return f"{ratio:.3f}" + (f" ({interval[0]:.3f} to {interval[1]:.3f})" if interval else "")
