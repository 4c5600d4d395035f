"""Where the scripts of this folder keep what they measured, and how it comes into a document."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gptlab.files import write_json

MEASURED = Path(__file__).with_name("results") / "measured.json"
"""What scripts measured, by their names; large results have a file of their own next to it."""


def measured(name: str) -> dict[str, Any]:
    """What a script kept last; empty where it kept nothing."""
    return json.loads(MEASURED.read_text(encoding="utf-8")).get(name, {})


def keep(name: str, found: dict[str, Any]) -> None:
    """Put what a script measured in the place of what it kept before."""
    every = json.loads(MEASURED.read_text(encoding="utf-8")) | {name: found}
    write_json(MEASURED, dict(sorted(every.items())))


def rewrite(page: Path, start: str, end: str, content: str) -> None:
    """Put `content` between the marks `start` and `end` of a page, which it must hold once each."""
    text = page.read_text(encoding="utf-8")
    assert text.count(start) == text.count(end) == 1, f"{page}: expected {start} and {end} once each"
    before, _, rest = text.partition(start)
    _, _, after = rest.partition(end)
    page.write_text(f"{before}{start}\n\n{content}{end}{after}", encoding="utf-8")
