"""The look of a report's figures: colours by what they mean, and matplotlib's figures as SVG inside a page.

The page's style sheet gives colours their values, light and dark. matplotlib knows only fixed colours, so that each
meaning has one that nothing else uses, and `inline` puts the style sheet's variable in its place. Equal bytes for equal
data. What the figures show is in plots.py.
"""

from __future__ import annotations

import io
import threading
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ARMS, BLOCKS = 8, 10
"""Colours for arms, the first being the baseline's; shades for blocks, from the first to the last."""
INK, MUTED, GRID = "#010001", "#010002", "#010003"
_VERDICTS = ("better", "worse", "no difference", "inactive", "undecided")
VERDICTS = {verdict: f"#03{k:04x}" for k, verdict in enumerate(_VERDICTS, 1)}
CSS_COLOURS = {
    INK: "currentColor",
    MUTED: "var(--muted)",
    GRID: "var(--line)",
    **{f"#0400{i:02x}": f"var(--arm-{i})" for i in range(ARMS)},
    **{f"#0500{i:02x}": f"var(--block-{i})" for i in range(BLOCKS)},
    **{colour: f"var(--{verdict.replace(' ', '-')})" for verdict, colour in VERDICTS.items()},
}


def arm(index: int) -> str:
    """The colour of arm `index`, 0 being the baseline; after the last one they come again."""
    return f"#0400{arm_shade(index):02x}"


def arm_shade(index: int) -> int:
    return index if index < ARMS else 1 + (index - 1) % (ARMS - 1)


def block(number: int, blocks: int) -> str:
    """The colour of block `number` of 1..blocks."""
    return f"#0500{block_shade(number, blocks):02x}"


def block_shade(number: int, blocks: int) -> int:
    return round((number - 1) / max(1, blocks - 1) * (BLOCKS - 1))


TEXT = 12
"""Size of a figure's text, in the units of its view box."""
SETTINGS = {
    "svg.fonttype": "none",  # text stays text: it can be read aloud, selected and found
    "text.parse_math": False,
    "font.family": "DejaVu Sans",  # matplotlib's own, for measuring: the page's font is drawn
    "font.size": TEXT,
}
"""matplotlib's settings while a figure is made and drawn."""
_KEPT_STYLES = {"fill", "stroke", "stroke-width", "stroke-dasharray", "opacity", "fill-opacity", "stroke-opacity",
                "stroke-linecap", "stroke-linejoin", "text-anchor", "font-size"}  # fmt: skip
_SETTING = threading.Lock()


@contextmanager
def settings(more: Mapping[str, Any] | None = None) -> Iterator[None]:
    """matplotlib's settings for a figure, and back again; they are the process's, so that threads take turns."""
    import matplotlib as mpl

    with _SETTING, mpl.rc_context(cast(Any, {**SETTINGS, **(more or {})})):
        yield


def inline(figure: Figure, name: str, description: str, texts: Mapping[str, str] | None = None) -> str:
    """The figure as an <svg> element without styles, scripts or ids that another figure could have too.

    name: of the figure, unique on its page. description: for a reader who cannot see it. texts: {placeholder: text}
    for names that others chose, which matplotlib's font may lack; they are put in here, as text.
    """
    buffer = io.StringIO()
    with settings({"svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    drawn = ElementTree.fromstring(buffer.getvalue())
    root = ElementTree.Element("svg", viewBox=drawn.attrib["viewBox"], role="img")
    root.set("aria-label", description)
    root.extend(_tidy(child, texts or {}) for child in drawn if _tag(child) != "metadata")
    for unused in [child for child in root if child.tag == "defs" and not len(child)]:
        root.remove(unused)
    return ElementTree.tostring(root, encoding="unicode")


def standalone(svg: str, style: str) -> str:
    """An inline figure as a file of its own, which brings the page's colours and font with it, light and dark.

    style: the page's style sheet.
    """
    root = ElementTree.fromstring(svg)
    root.set("xmlns", "http://www.w3.org/2000/svg")
    _, _, width, height = root.attrib["viewBox"].split()
    root.attrib |= {"width": width, "height": height}
    colours = style[style.index(":root") : style.index("* {")]  # variables come first in it, and nothing else
    own = ElementTree.Element("style")
    own.text = f"{colours}svg {{ background: var(--paper); color: var(--ink); font-family: system-ui, sans-serif; }}"
    root.insert(0, own)
    return ElementTree.tostring(root, encoding="unicode") + "\n"


def _tag(element: ElementTree.Element) -> str:
    return element.tag.rpartition("}")[2]


def _tidy(element: ElementTree.Element, texts: Mapping[str, str]) -> ElementTree.Element:
    """The element without namespaces, its style as attributes: a strict policy forbids style attributes."""
    text = (element.text or "").strip()
    tidy = ElementTree.Element(_tag(element), dict(_attributes(element)))
    tidy.text = texts.get(text, text) or None
    tidy.extend(_tidy(child, texts) for child in element if _tag(child) != "style")
    return tidy


def _attributes(element: ElementTree.Element) -> Iterator[tuple[str, str]]:
    for key, value in element.attrib.items():
        key = key.rpartition("}")[2]
        if key == "style":
            yield from _styles(value)
        elif key in ("fill", "stroke"):
            yield key, CSS_COLOURS.get(value, value)
        elif key != "id" or _tag(element) in ("path", "clipPath"):  # others are named alike in every figure
            yield key, value


def _styles(style: str) -> Iterator[tuple[str, str]]:
    for part in style.split(";"):
        key, _, value = (word.strip() for word in part.partition(":"))
        if key in _KEPT_STYLES:
            yield key, CSS_COLOURS.get(value, value)
        elif key == "font":  # matplotlib before 3.11 writes size and family as one
            yield "font-size", value.partition(" ")[0]
