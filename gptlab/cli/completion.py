"""`gptlab completion`: a script that completes commands, options and their values in a shell.

shtab writes it from every command's own parser when it is printed, so that no list is kept twice, and the shell asks no
Python when the tab key is pressed.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import re
from typing import Any

import shtab

from gptlab.cli.arguments import Parser
from gptlab.cli.main import COMMANDS
from gptlab.signals.registry import SIGNALS
from gptlab.training.presets import PRESETS

VALUES = {"--preset": (*PRESETS,), "--signal.name": ("none", *SIGNALS)}
"""Values that help names elsewhere than next to the option."""
_WORDS = re.compile(r"[a-z\d.-]+(\|[a-z\d.-]+)+")
"""How an option whose values are checked later shows them: on|off, say."""


def main(argv: list[str]) -> int:
    """Print the script."""
    parser = Parser(
        prog="gptlab completion",
        description='Print a completion script: put `eval "$(gptlab completion bash)"` into ~/.bashrc, '
        'or `eval "$(gptlab completion zsh)"` below `autoload -Uz compinit && compinit` into ~/.zshrc.',
    )
    parser.add_argument("shell", choices=shtab.SUPPORTED_SHELLS, help="whose script")
    parser.add_argument("--json", action="store_true", help="print every command's words, options and values instead")
    options = parser.parse(argv)
    root = argparse.ArgumentParser(prog="gptlab", description="GPT-2 with auxiliary losses, judged.")
    commands = root.add_subparsers()
    for name, summary in COMMANDS.items():
        commands.add_parser(name, help=summary, parents=[_parser_of(name)], add_help=False)
    print(json.dumps(_known(commands.choices), indent=1) if options.json else shtab.complete(root, options.shell))
    return 0


def _parser_of(name: str) -> argparse.ArgumentParser:
    """A command's own parser, taken where it would print its help; values of options as choices, else files."""
    found: list[argparse.ArgumentParser] = []
    print_help = argparse.ArgumentParser.print_help
    argparse.ArgumentParser.print_help = lambda self, file=None: found.append(self)
    try:
        with contextlib.suppress(SystemExit):
            importlib.import_module(f"gptlab.cli.{name}").main(["--help"])
    finally:
        argparse.ArgumentParser.print_help = print_help
    (parser,) = found
    for action in parser._actions:
        words = str(action.metavar or "")
        action.choices = action.choices or next((VALUES[o] for o in action.option_strings if o in VALUES), None)
        if not action.choices and _WORDS.fullmatch(words):
            action.choices = words.split("|")
        if not action.choices and action.nargs != 0:
            action.complete = shtab.FILE  # type: ignore[attr-defined]
    return parser


def _known(commands: dict[str, argparse.ArgumentParser]) -> dict[str, Any]:
    """The words, options and options' values of every command and its subcommands."""
    known = {}
    for name, parser in commands.items():
        actions = list(parser._actions)
        for inner in (a for a in parser._actions if isinstance(a, argparse._SubParsersAction)):
            actions += [action for one in inner.choices.values() for action in one._actions]
        options = {o: list(a.choices or ()) for a in actions for o in a.option_strings if o.startswith("--")}
        words = [word for a in actions if not a.option_strings for word in a.choices or ()]
        known[name] = {
            "words": words, "options": ["--debug", *options], "values": {o: v for o, v in options.items() if v},
        }  # fmt: skip
    return known
