"""A page of a report, taken apart for tests, and the hostile names and texts that such a page must show as text."""

from __future__ import annotations

from html.parser import HTMLParser

IMAGE = "<img src=x onerror=alert(1)>"
ARM = "tried"
"""The arm of the hostile experiment: what a file may call an arm is checked where it is read."""
HOSTILE = (IMAGE, '"><script>alert(1)<!--', "$\\frac{1$ & 日本 {{ 7 * 7 }}", "'; }</style><b>")


class Page(HTMLParser):
    """tags: the elements; attributes: (element, name, value); text: all that is read; style: the style sheet."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.source = source
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str, str]] = []
        self.text = self.style = ""
        self._inside = ""
        self.feed(source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        self._inside = tag

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside == "style":
            self.style += data
        else:
            self.text += data

    def values(self, name: str) -> list[str]:
        return [value for _, key, value in self.attributes if key == name]
