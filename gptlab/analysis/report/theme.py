"""The colours of a report, by what they mean. The page's style sheet gives them their values, light and dark.

matplotlib knows only fixed colours, so that each meaning has one that nothing else uses, and svg.py puts the style
sheet's variable in its place.
"""

from __future__ import annotations

ARMS = 8
"""Colours for arms; the first is the baseline's."""

BLOCKS = 10
"""Shades for blocks, from the first to the last."""

INK, MUTED, GRID = "#010001", "#010002", "#010003"
VERDICTS = {
    "better": "#030001",
    "worse": "#030002",
    "no difference": "#030003",
    "inactive": "#030004",
    "undecided": "#030005",
}

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
