"""The tables and pictures of the findings, from the packed experiments next to them.

    python docs/findings.py     renews them all: in docs/findings/*.md and the README

What stands between <!-- compare: NAME --> and <!-- end of NAME --> is what `gptlab compare docs/findings/NAME.json.gz`
prints as Markdown; with <!-- verdicts: NAME --> it is the first of its tables, with <!-- dose_response: NAME -->
what `gptlab dose_response` finds there. Each pack gets a NAME.svg. With <!-- branches: NAME --> it is the branch
tests in NAME.json, which `gptlab noise --json` printed. A figure within a
sentence stands between <!-- = NAME PLACE FORM --> and <!-- . -->: the value at a place of the same results, such as
arms/confidence/difference, as Python formats it; NAME may be that of a file in benchmarks/results too.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from gptlab.analysis.outcomes import read
from gptlab.analysis.report.comparison import write_forest
from gptlab.analysis.report.response import draw
from gptlab.analysis.series import SHARES, Target, dose_response
from gptlab.analysis.tables import markdown, table_in_markdown
from gptlab.cli.dose_response import tables as response_tables
from gptlab.runs.archive import SUFFIX

ROOT = Path(__file__).parents[1]
FINDINGS = ROOT / "docs" / "findings"
RESPONSE = "dose_response"
LEVELS = {"dose_response_parity": (Target(level=0.594), Target(level=0.62))}
"""What is to be reached where that is no share of the clean arm's tokens: `gptlab dose_response --levels`."""

MARK = re.compile(r"<!-- (compare|verdicts|dose_response|branches): (\w+) -->\n.*?<!-- end of \2 -->", re.DOTALL)
FIGURE = re.compile(r"(<!-- = (\S+) (\S+) (\S+) -->)[^<]*(?=<!-- \. -->)")


def pages() -> Iterator[Path]:
    """The documents that hold tables."""
    yield ROOT / "README.md"
    yield from sorted(FINDINGS.glob("*.md"))


def renewed(text: str) -> str:
    """A document with its tables as the committed results give them now."""
    text = MARK.sub(lambda found: _filled(found[1], found[2]), text)
    return FIGURE.sub(lambda found: found[1] + _figure(*found.groups()[1:]), text)


def _filled(what: str, name: str) -> str:
    result = _result(name)
    if what == "branches":
        tables = _branches(result)
    elif what == "dose_response":
        tables = "\n\n".join(map(table_in_markdown, response_tables(result))) + "\n"
    else:
        tables = markdown(result)
    if what == "verdicts":
        tables = "\n\n".join(tables.split("\n\n")[:2]) + "\n"
    return f"<!-- {what}: {name} -->\n\n{tables}\n<!-- end of {name} -->"


@cache
def _result(name: str) -> dict[str, Any]:
    """What the command that belongs to the results of a name gives as JSON."""
    for folder in (FINDINGS, ROOT / "benchmarks" / "results"):
        if (file := folder / f"{name}.json").is_file():
            return json.loads(file.read_text(encoding="utf-8"))
    packed = FINDINGS / f"{name}{SUFFIX}"
    if name.startswith(RESPONSE):
        return dose_response(packed, LEVELS.get(name, tuple(map(Target, SHARES))))
    return read([packed]).verdicts()


def _figure(name: str, place: str, form: str) -> str:
    value: Any = _result(name)
    for key in place.split("/"):
        value = value[int(key)] if isinstance(value, (list, tuple)) else value[key]
    return format(value, form)


def _branches(measured: dict[str, Any]) -> str:
    """What the branch test said of each signal, as a table."""

    def told(part: dict[str, Any]) -> str:
        low, high = part["interval"]
        return f"{part['value']:+.4f} ({low:+.4f} to {high:+.4f})"

    lines = ["| signal | verdict | bias, nats | noise, nats | dose at the start |", "|---|---|---|---|---|"]
    for name, signal in measured["signals"].items():
        if branch := signal.get("branch"):
            parts = f"{told(branch['bias'])} | {told(branch['noise'])}"
            lines.append(f"| {name} | {branch['verdict']} | {parts} | {branch['dose']:.2f} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    from noise_pictures import draw as draw_noise

    for page in pages():
        page.write_text(renewed(page.read_text(encoding="utf-8")), encoding="utf-8")
    for name in (path.name.removesuffix(SUFFIX) for path in FINDINGS.glob(f"*{SUFFIX}")):
        picture = draw if name.startswith(RESPONSE) else write_forest
        picture(_result(name), FINDINGS / f"{name}.svg")
    draw_noise()


if __name__ == "__main__":
    main()
