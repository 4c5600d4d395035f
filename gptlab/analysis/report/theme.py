"""The look of all figures: colours by what they mean, and matplotlib's figures as SVG inside a page or as files.

The page's style sheet gives colours their values, light and dark. matplotlib knows only fixed colours, so that each
meaning has one that nothing else uses, and `inline` puts the style sheet's variable in its place, `save` the variable's
light value, for print. Equal bytes for equal data. What the figures show is in plots.py.
"""

from __future__ import annotations

import io
import re
import threading
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from gptlab.files import write_whole

if TYPE_CHECKING:
    from matplotlib.axes import Axes
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
DARK, GREY, BLUE, RED, GREEN, AMBER = "#57606a", "#8c959f", "#1f6feb", "#cf222e", "#1a7f37", "#bf8700"
SHADES = ("#9ecbff", "#54a0ff", BLUE, "#0b3d91")
"""Of things in an order, such as blocks from the first to the last."""
SERIES = ("#0072b2", "#d55e00", "#cc79a7", "#e69f00", "#009e73", DARK)
"""Of things without one; distinct with any kind of colour vision (Okabe and Ito 2008)."""
FILE_SETTINGS: dict[str, Any] = {
    "svg.hashsalt": "gptlab", "svg.fonttype": "none", "text.parse_math": False, "font.family": "sans-serif",
    "font.size": 9.0,
    "axes.spines.top": False, "axes.spines.right": False, "path.simplify": False,
}  # fmt: skip
"""Of a figure that is only ever a file, in colours of its own: those of the documents, dose_response and lens."""
_KEPT_STYLES = {"fill", "stroke", "stroke-width", "stroke-dasharray", "opacity", "fill-opacity", "stroke-opacity",
                "stroke-linecap", "stroke-linejoin", "text-anchor", "font-size"}  # fmt: skip
_SETTING = threading.Lock()


@contextmanager
def settings(more: Mapping[str, Any] | None = None) -> Iterator[None]:
    """matplotlib's settings for a figure, and back again; they are the process's, so that threads take turns."""
    import matplotlib as mpl

    with _SETTING, mpl.rc_context(cast(Any, {**SETTINGS, **(more or {})})):
        yield


def panels(rows: int, columns: int, size: tuple[float, float]) -> tuple[Figure, list[Axes]]:
    """A figure of FILE_SETTINGS, in inches, and its axes row by row; draw into them under the same settings."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    return figure, list(figure.subplots(rows, columns, squeeze=False).ravel())


@dataclass(frozen=True)
class Drawn:
    """A figure with what `inline` needs to know of it."""

    figure: Figure
    name: str
    description: str
    texts: Mapping[str, str] = field(default_factory=dict)

    def inline(self) -> str:
        return inline(self.figure, self.name, self.description, self.texts)

    def save(self, path: Path, style: str) -> None:
        """Write it for a paper; an SVG has the colours of `style`, the page's sheet, light and dark."""
        if path.suffix.lower() == ".svg":
            write_whole(path, standalone(self.inline(), style))
        else:
            _print_colours(self.figure, style)
            _print_texts(self.figure, self.texts)
            save(self.figure, path)


def save(figure: Figure, path: str | Path, of: Mapping[str, Any] = SETTINGS) -> None:
    """Write a figure, made under the settings `of`, as its file's ending says: equal bytes for equal figures and
    matplotlib."""
    form = Path(path).suffix.removeprefix(".").lower()
    date = {"pdf": "CreationDate", "svg": "Date"}.get(form)
    buffer = io.BytesIO()
    with settings({**of, "svg.hashsalt": "gptlab", "pdf.fonttype": 42, "path.simplify": False}):
        metadata = cast(Any, {date: None} if date else None)
        figure.savefig(buffer, format=form, dpi=300, metadata=metadata, facecolor="white")
    write_whole(path, buffer.getvalue())


def _print_colours(figure: Figure, style: str) -> None:
    """Give every part of the figure the light value of the colour that stands for a variable."""
    import numpy as np
    from matplotlib.colors import to_hex

    light = dict(re.findall(r"--([\w-]+): (#\w+);", style[: style.index("@media")]))
    values = {of: light.get(css[6:-1], light["ink"]) for of, css in CSS_COLOURS.items()}
    for part in figure.findobj():
        for kind in ("color", "facecolor", "edgecolor", "markerfacecolor", "markeredgecolor"):
            now = getattr(part, f"get_{kind}", lambda: None)()
            if now is None or (isinstance(now, str) and now == "none"):
                continue
            colours = [now] if isinstance(now, str) or np.ndim(now) == 1 else list(now)
            if len(colours) == 1 and (found := values.get(to_hex(colours[0]))):
                alpha = part.get_alpha()
                getattr(part, f"set_{kind}")(found)
                part.set_alpha(alpha)


def _print_texts(figure: Figure, texts: Mapping[str, str]) -> None:
    from matplotlib.text import Text

    for part in figure.findobj(Text):
        part.set_text(texts.get(part.get_text(), part.get_text()))


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
