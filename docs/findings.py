"""The tables and pictures of the findings, from the packed experiments beside them.

    python docs/findings.py     renews them all: in docs/findings/*.md and the README

What stands between <!-- compare: FOLDER --> and <!-- end of FOLDER --> is what `gptlab compare docs/findings/FOLDER`
prints as Markdown; with <!-- verdicts: FOLDER --> it is the first of its tables. Each folder gets a FOLDER.svg.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from gptlab.analysis.outcomes import read
from gptlab.analysis.report.comparison import write_forest
from gptlab.analysis.tables import markdown

ROOT = Path(__file__).parents[1]
FINDINGS = ROOT / "docs" / "findings"
MARK = re.compile(r"<!-- (compare|verdicts): (\w+) -->\n.*?<!-- end of \2 -->", re.DOTALL)


def pages() -> Iterator[Path]:
    """The documents that hold tables."""
    yield ROOT / "README.md"
    yield from sorted(FINDINGS.glob("*.md"))


def renewed(text: str) -> str:
    """A document with its tables as the committed results give them now."""
    return MARK.sub(lambda found: _filled(found[1], found[2]), text)


def _filled(what: str, folder: str) -> str:
    tables = markdown(read([FINDINGS / folder]).verdicts())
    if what == "verdicts":
        tables = "\n\n".join(tables.split("\n\n")[:2]) + "\n"
    return f"<!-- {what}: {folder} -->\n\n{tables}\n<!-- end of {folder} -->"


def main() -> None:
    for page in pages():
        page.write_text(renewed(page.read_text(encoding="utf-8")), encoding="utf-8")
    for experiment in FINDINGS.glob("*/experiment.toml"):
        folder = experiment.parent
        write_forest(read([folder]).verdicts(), folder.with_suffix(".svg"))


if __name__ == "__main__":
    main()
