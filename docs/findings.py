"""The tables and pictures of the findings, from the packed experiments beside them.

    python docs/findings.py     renews them all: in docs/findings/*.md and the README

What stands between <!-- compare: FOLDER --> and <!-- end of FOLDER --> is what `gptlab compare docs/findings/FOLDER`
prints as Markdown; with <!-- verdicts: FOLDER --> it is the first of its tables. Each folder gets a FOLDER.svg. With
<!-- branches: NAME --> it is the branch tests in NAME.json, which `gptlab noise --json` printed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gptlab.analysis.outcomes import read
from gptlab.analysis.report.comparison import write_forest
from gptlab.analysis.tables import markdown

ROOT = Path(__file__).parents[1]
FINDINGS = ROOT / "docs" / "findings"
MARK = re.compile(r"<!-- (compare|verdicts|branches): (\w+) -->\n.*?<!-- end of \2 -->", re.DOTALL)


def pages() -> Iterator[Path]:
    """The documents that hold tables."""
    yield ROOT / "README.md"
    yield from sorted(FINDINGS.glob("*.md"))


def renewed(text: str) -> str:
    """A document with its tables as the committed results give them now."""
    return MARK.sub(lambda found: _filled(found[1], found[2]), text)


def _filled(what: str, folder: str) -> str:
    if what == "branches":
        tables = _branches(json.loads((FINDINGS / f"{folder}.json").read_text(encoding="utf-8")))
    else:
        tables = markdown(read([FINDINGS / folder]).verdicts())
    if what == "verdicts":
        tables = "\n\n".join(tables.split("\n\n")[:2]) + "\n"
    return f"<!-- {what}: {folder} -->\n\n{tables}\n<!-- end of {folder} -->"


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
    for page in pages():
        page.write_text(renewed(page.read_text(encoding="utf-8")), encoding="utf-8")
    for experiment in FINDINGS.glob("*/experiment.toml"):
        folder = experiment.parent
        write_forest(read([folder]).verdicts(), folder.with_suffix(".svg"))


if __name__ == "__main__":
    main()
