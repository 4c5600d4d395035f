"""The page of a report: templates filled with escaped text, under a policy that lets it load and run nothing.

What it shows is in run.py and comparison.py.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gptlab
from gptlab.analysis.report import theme
from gptlab.analysis.tables import number
from gptlab.files import write_whole
from gptlab.options import as_typed

TEMPLATES = Path(__file__).parent / "templates"

_UNSHOWN = {
    **{code: 0x2400 + code for code in range(0x20) if chr(code) not in "\n\t"},  # Unicode's pictures of them
    **dict.fromkeys([0x200E, 0x200F, *range(0x7F, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A)], "\ufffd"),
}
"""Characters that HTML forbids, or that make a line read otherwise than it is, such as marks of direction."""


@dataclass(frozen=True)
class Panel:
    """A plot with its words. legend: (the colour's class, what it is)."""

    title: str
    svg: str
    legend: Sequence[tuple[str, str]] = field(default_factory=list)
    note: str = ""


@dataclass(frozen=True)
class Sample:
    """Text that a model wrote. tokens: (the token, [each block's (best next token, its probability)])."""

    title: str
    prompt: str
    text: str
    tokens: Sequence[tuple[str, Sequence[tuple[str, float]]]]


def stylesheet() -> str:
    return (TEMPLATES / "style.css").read_text(encoding="utf-8")


def render(template: str, *, base: str = "base.html", folders: Sequence[Path] = (), **content: Any) -> str:
    """The page that `template` makes of `content`, whose text stays text whoever wrote it.

    base: the template around it; folders: where templates lie that are not a report's own.
    """
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([TEMPLATES, *folders]), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {
        "figure": number, "visible": visible, "tenth": tenth, "value": value, "breakable": breakable,
    }  # fmt: skip
    style = stylesheet()
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    content |= {"base": base, "style": style, "style_hash": digest, "version": gptlab.__version__}
    return environment.get_template(template).render(content).translate(_UNSHOWN)


def write(path: str | Path, page: str) -> Path:
    """Write the page whole or not at all and give its path; raises DataError and OSError as files.write_whole does."""
    write_whole(Path(path), page.encode("utf-8", errors="replace"))
    return Path(path)


def sample(row: Mapping[str, Any], title: str) -> Sample:
    """A sample from its row in metrics.jsonl."""
    steps = [[(str(word), float(p)) for word, p in blocks] for blocks in row["blocks"]]
    return Sample(title, row["prompt"].lstrip("\0"), row["text"], list(zip(row["written"], steps, strict=False)))


def arm_class(index: int) -> str:
    return f"arm-{theme.arm_shade(index)}" + " dashed" * (index >= theme.ARMS)


def block_class(number: int, blocks: int) -> str:
    return f"block-{theme.block_shade(number, blocks)}"


def visible(token: str) -> str:
    """A token with a sign for every blank."""
    return token.replace("\n", "⏎").replace("\t", "⇥").replace(" ", "␣").replace("\0", "∅") or "·"


def tenth(p: float) -> int:
    """The tenth that a probability falls in, 0..9: the name of its shade."""
    return min(9, max(0, int(10 * p)))


def value(option: Any) -> str:
    """An option as one would type it."""
    return "–" if option is None else as_typed(option)


def breakable(name: str) -> str:
    """A name, escaped, that breaks over lines after its slashes, points and underscores first."""
    import markupsafe

    return markupsafe.Markup(re.sub(r"([/._-])(?=\w)", r"\1<wbr>", str(markupsafe.escape(name))))
