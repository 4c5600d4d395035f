"""`gptlab completion`: a script that completes commands, options and their values in bash and zsh.

The words are read from every command's own --help when the script is printed, so that no list is kept twice, and the
shell asks no Python when the tab key is pressed.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import re
from collections.abc import Mapping
from typing import Any

from gptlab.cli.arguments import Parser
from gptlab.cli.main import COMMANDS
from gptlab.signals.registry import SIGNALS
from gptlab.training.presets import PRESETS

VALUES = {"--preset": list(PRESETS), "--signal.name": ["none", *SIGNALS]}
"""Values that help names elsewhere than behind the option."""
_OPTION = re.compile(r"^  (--[\w.]+)(?: (\{[\w.,-]+\}|[a-z\d-]+(?:\|[a-z\d-]+)+))?", re.MULTILINE)
_WORDS = re.compile(r"^  \{([\w,]+)\}(?: |$)", re.MULTILINE)
_COMMANDS = re.compile(r"^  COMMAND\n((?:    \w+ +.*\n)+)", re.MULTILINE)

BASH = """\
# Completion of gptlab for {shell}. In {profile}: eval "$(gptlab completion {shell})"
{prelude}_gptlab() {{
    local current=${{COMP_WORDS[COMP_CWORD]}} previous=${{COMP_WORDS[COMP_CWORD-1]}} words="" options="" files=yes
    COMPREPLY=()
    if [ "$COMP_CWORD" -eq 1 ]; then
        COMPREPLY=($(compgen -W "{commands}" -- "$current"))
        return
    fi
    case "${{COMP_WORDS[1]}}" in
{cases}
    esac
    case "${{COMP_WORDS[1]}} $previous" in
{values}
    esac
    case "$current" in
        -*) COMPREPLY=($(compgen -W "$options" -- "$current")) ;;
        *) COMPREPLY=($(compgen -W "$words" -- "$current") ${{files:+$(compgen -f -- "$current")}}) ;;
    esac
}}
complete -o filenames -F _gptlab gptlab
"""
PRELUDE = {"bash": "", "zsh": "autoload -Uz compinit bashcompinit\ncompinit\nbashcompinit\n"}
PROFILE = {"bash": "~/.bashrc", "zsh": "~/.zshrc"}


def main(argv: list[str]) -> int:
    """Print the script."""
    parser = Parser(
        prog="gptlab completion",
        description='Print a completion script: put `eval "$(gptlab completion bash)"` into ~/.bashrc, '
        'or `eval "$(gptlab completion zsh)"` into ~/.zshrc.',
    )
    parser.add_argument("shell", choices=["bash", "zsh"], help="whose script")
    parser.add_argument("--json", action="store_true", help="print every command's words, options and values instead")
    options = parser.parse(argv)
    known = {name: _known(name) for name in COMMANDS}
    print(json.dumps(known, indent=1) if options.json else script(options.shell, known))
    return 0


def _known(name: str) -> dict[str, Any]:
    """The words, options and options' values of a command, and of its subcommands."""
    text = _help(name)
    words = [word for group in _WORDS.findall(text) for word in group.split(",")]
    for group in _COMMANDS.findall(text):
        subcommands = re.findall(r"^    (\w+)", group, re.MULTILINE)
        words += subcommands
        text += "".join(_help(name, subcommand) for subcommand in subcommands)
    found = dict(_OPTION.findall(text))
    values = {option: re.split(r"[|,]", shown.strip("{}")) for option, shown in found.items() if shown}
    values |= {option: words for option, words in VALUES.items() if option in found}
    return {"words": words, "options": ["--help", "--debug", *found], "values": values}


def _help(name: str, *words: str) -> str:
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        importlib.import_module(f"gptlab.cli.{name}").main([*words, "--help"])
    return out.getvalue()


def script(shell: str, known: Mapping[str, Any]) -> str:
    """The script for a shell; zsh reads bash's through bashcompinit."""
    cases = [
        f"""        {name}) words="{" ".join(k["words"])}" options="{" ".join(k["options"])}" ;;"""
        for name, k in known.items()
    ]
    values = [
        f"""        "{name} {option}") words="{" ".join(words)}" files="" ;;"""
        for name, k in known.items()
        for option, words in k["values"].items()
    ]
    return BASH.format(
        shell=shell, prelude=PRELUDE[shell], profile=PROFILE[shell], commands=" ".join(known),
        cases="\n".join(cases), values="\n".join(values),
    ).rstrip()  # fmt: skip
