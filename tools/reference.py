"""The generated part of the reference: docs/options.md and docs/commands.md, from the options and parsers themselves.

python tools/reference.py    renews what stands there between <!-- NAME --> and <!-- end of NAME -->
"""

from __future__ import annotations

import contextlib
import io
import os
import re
from itertools import groupby
from pathlib import Path
from typing import get_args

from gptlab.cli.main import COMMANDS
from gptlab.cli.main import main as gptlab
from gptlab.options import Option, options_of
from gptlab.training.config import TrainingConfig
from gptlab.training.presets import PRESETS

DOCS = Path(__file__).parents[1] / "docs"
WIDTH = "96"
"""Columns of a help text on a page."""

PARTS_OF = {"data": ("prepare", "info")}
"""Commands of commands."""

BAR = "\\|"
"""A bar within a cell of a table."""

KINDS = {int: "whole number", float: "number", str: "text", bool: "true or false"}


def options_tables() -> str:
    """Every option of a run, a table a group."""
    found = groupby(options_of(TrainingConfig), key=lambda option: option.group or "Signal")
    return "\n\n".join(f"### {group}\n\n{_options(list(options))}" for group, options in found)


def _options(options: list[Option]) -> str:
    lines = ["| option | value | default | meaning |", "|---|---|---|---|"]
    for option in options:
        kind = _kind(option) + (f", {option.unit}" if option.unit else "")
        lines.append(f"| `--{option.key}` | {kind} | `{option.default_shown}` | {option.help.replace('|', BAR)} |")
    return "\n".join(lines)


def _kind(option: Option) -> str:
    if option.choices and len(option.choices) < 8:
        return ", ".join(f"`{choice}`" for choice in option.choices)
    kinds = [kind for kind in (get_args(option.type) or (option.type,)) if kind is not type(None)]
    return " or ".join(KINDS.get(kind, str(kind)) for kind in kinds)


def presets_table() -> str:
    """The options in which presets differ, a row each."""
    lines = ["| option | " + " | ".join(f"`{name}`" for name in PRESETS) + " |", "|---" * (len(PRESETS) + 1) + "|"]
    for option in options_of(TrainingConfig):
        values = [str(preset.get(option.key, option.default_shown)) for preset in PRESETS.values()]
        if len(set(values)) > 1:
            lines.append(f"| `--{option.key}` | " + " | ".join(values) + " |")
    return "\n".join(lines)


def commands_table() -> str:
    return "\n".join(["| command | what it does |", "|---|---|",
                      *(f"| [`gptlab {name}`](#{name}) | {text} |" for name, text in COMMANDS.items())])  # fmt: skip


def help_texts() -> str:
    """What `gptlab COMMAND --help` prints, of every command but `train`, whose options have a page of their own."""
    return "\n\n".join(f"### {name}\n\n{_help(name)}" for name in COMMANDS)


def _help(name: str) -> str:
    if name == "train":
        return "It takes the options of `train_gpt2.py` and `train_gpt2_ben.py`: [all of them](options.md)."
    calls = [[name, *more, "--help"] for more in ([], *([part] for part in PARTS_OF.get(name, ())))]
    return "\n\n".join(f"```text\n{_printed(words)}\n```" for words in calls)


def _printed(words: list[str]) -> str:
    columns, out = os.environ.get("COLUMNS"), io.StringIO()
    os.environ["COLUMNS"] = WIDTH
    try:
        with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
            gptlab(words)
    finally:
        os.environ.pop("COLUMNS") if columns is None else os.environ.update(COLUMNS=columns)
    return out.getvalue().strip()


PARTS = {
    "options": options_tables, "presets": presets_table, "commands": commands_table, "help": help_texts,
}  # fmt: skip
MARK = re.compile(r"<!-- (options|presets|commands|help) -->\n.*?<!-- end of \1 -->", re.DOTALL)
PAGES = ("options.md", "commands.md")


def renewed(text: str) -> str:
    """A page with its generated parts as they should be now."""
    return MARK.sub(lambda mark: f"<!-- {mark[1]} -->\n\n{PARTS[mark[1]]()}\n\n<!-- end of {mark[1]} -->", text)


def main() -> None:
    for path in (DOCS / name for name in PAGES):
        path.write_text(renewed(path.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
