"""`gptlab dose_response`: how many times the tokens a known error costs, against theory; an experiment's folder in."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from gptlab.analysis.tables import Table, number
from gptlab.cli.arguments import Parser, figure_file
from gptlab.cli.console import show_result


def main(argv: list[str]) -> int:
    """Print multipliers, fits and compounding; raises ConfigError or DataError where the folder has none."""
    options = _parser().parse(argv)
    from gptlab.analysis.dose_response_runs import SHARES, Target, dose_response

    levels = [Target(level=level) for level in options.levels or ()]
    result = dose_response(options.experiment, levels or [Target(share) for share in options.shares or SHARES])
    if options.figure:
        from gptlab.analysis.report.standalone import draw

        draw(result, options.figure)
        print(f"figure: {options.figure}", file=sys.stderr)
    if options.json:
        print(json.dumps(result, indent=1, allow_nan=False))
    else:
        show_result(tables(result), (f"left out: {note}" for note in result["notes"]))
    return 0


def _parser() -> Parser:
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


def tables(result: Mapping[str, Any]) -> Iterator[Table]:
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
    return (f"{one['kind']}, {one['dose']:g}", _place(one), singles, *means, _verdict(one))


def _verdict(one: Mapping[str, Any]) -> str:
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
