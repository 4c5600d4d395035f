"""The part of a document that a script writes: what stands between two marks, and nothing else of the page."""

from __future__ import annotations

from pathlib import Path


def rewrite(page: Path, start: str, end: str, content: str) -> None:
    """Put `content` between the marks `start` and `end` of a page, which it must hold once each."""
    text = page.read_text(encoding="utf-8")
    assert text.count(start) == text.count(end) == 1, f"{page}: expected {start} and {end} once each"
    before, _, rest = text.partition(start)
    _, _, after = rest.partition(end)
    page.write_text(f"{before}{start}\n\n{content}{end}{after}", encoding="utf-8")
