"""The `gptlab` command: its subcommands, their completion, and an error of ours as one line and an exit code."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import re
import signal
import sys
import traceback
from collections.abc import Callable, Sequence

import gptlab
from gptlab.cli.console import ReaderLeft, say, standard_streams
from gptlab.distributed import said_once
from gptlab.errors import GptlabError, LostProcessError, UsageError, did_you_mean, shown

COMMANDS = {
    "train": "train GPT-2, with or without a block loss",
    "data": "prepare a corpus, or look at one",
    "experiment": "run arms against seeds, see how they stand, or try every arm first",
    "compare": "say of every arm whether it is better, worse, no different or undecided, and why",
    "falsify": "does a finding survive other settings, within a budget of hours",
    "judge": "keep or discard ideas for any trainer, at an error rate that holds for all of them",
    "dose_response": "how many times the tokens a known error costs, against theory",
    "noise": "measure whether a signal teaches, or is bias or noise",
    "sample": "generate text from a prompt, with each block's best next token",
    "lens": "what every block would say at every position, and what early exit saves",
    "eval": "score a model and its blocks: validation, HellaSwag, LAMBADA, lm-eval's tasks",
    "digest": "SHA-256 over a run's weights, moments, RNG and data cursor",
    "verify": "check a run's files against their checksums",
    "export": "write a model as a Hugging Face GPT-2 folder or for llm.c",
    "import": "read a model of Hugging Face, nanoGPT, build-nanogpt or llm.c",
    "bench": "measure training speed against the matmul limit and peers",
    "page": "runs, live curves, comparisons and the lens in a browser",
    "runs": "list runs with their figures and differences, or move some to the trash",
    "completion": "print a completion script for bash or zsh",
    "doctor": "what this machine has, and what a run would use and why",
}

ELSEWHERE = {
    "dose_response": "compare:dose_response",
    "page": "runs:page",
    "verify": "runs:verify",
    "digest": "runs:digest",
    "export": "model:export",
    "import": "model:import_",
    "bench": "machine:bench",
    "doctor": "machine:doctor",
    "completion": "main:completion",
}
"""Commands that are not the function `main` of the module of their own name."""

IN_FILES = frozenset({"train", "experiment", "falsify", "data", "judge"})
"""Commands whose work is kept in files: they continue whatever becomes of the streams that show it."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run `gptlab ARGV` and give its exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    name = argv[0] if argv else "--help"

    def command(rest: list[str]) -> int:
        if name in ("-h", "--help", "help"):
            print(_help())
            return 0
        if name == "--version":
            print(f"gptlab {gptlab.__version__}")
            return 0
        if name not in COMMANDS:
            raise UsageError(f"no command {shown(name)}{did_you_mean(name, COMMANDS)}; see `gptlab --help`")
        return _command(name)(rest)

    return guarded(command, argv[1:], in_files=name in IN_FILES)


def _command(name: str) -> Callable[[list[str]], int]:
    module, _, function = ELSEWHERE.get(name, f"{name}:main").partition(":")
    return getattr(importlib.import_module(f"gptlab.cli.{module}"), function)


def guarded(command: Callable[[list[str]], int], argv: Sequence[str], *, in_files: bool = True) -> int:
    """Run a command; an error of ours, a full disk or Ctrl-C becomes one line on standard error and an exit code.

    `--debug` shows the traceback too. With `--json` the error also stands on standard output, as JSON. in_files:
    whether what the command makes is kept in files, so that it succeeds whatever becomes of its output.
    """
    with standard_streams(in_files=in_files) as lost:
        code = _run(command, argv)
        if (error := lost()) and not (isinstance(error, BrokenPipeError) or in_files or code):
            say(f"gptlab: standard output could not be written: {error.strerror}; give it another place")
            return 3
    return code


def _run(command: Callable[[list[str]], int], argv: Sequence[str]) -> int:
    try:
        return command([a for a in argv if a != "--debug"])
    except ReaderLeft:  # head or less has seen enough
        return 0
    except (GptlabError, OSError, KeyboardInterrupt) as error:
        code, text = _described(error)
        # a process that cannot reach another says so in its own words, which differ from rank to rank
        with said_once(type(error).__name__ if isinstance(error, LostProcessError) else text) as mine:
            if mine:
                say(f"gptlab: {text}")
                if "--json" in argv:
                    _print_error(error, text, code)
        if "--debug" in argv:
            traceback.print_exc()
    return code


def _print_error(error: BaseException, text: str, code: int) -> None:
    found = error.found if isinstance(error, GptlabError) else {}
    with contextlib.suppress(ReaderLeft):
        print(json.dumps({**found, "error": text, "exit_code": code}), flush=True)


def _described(error: GptlabError | OSError | KeyboardInterrupt) -> tuple[int, str]:
    """The exit code of an error, and its line; raises what is not ours."""
    if isinstance(error, GptlabError):
        return error.exit_code, str(error)
    if isinstance(error, KeyboardInterrupt):
        return 128 + getattr(error, "number", signal.SIGINT), str(error) or "interrupted"
    if error.filename is None and error.errno is None:
        raise error
    return 3, f"{error.strerror}: {error.filename or 'a file'}; check the path and the disk"


def _help() -> str:
    width = max(map(len, COMMANDS)) + 2
    lines = [f"  {name:<{width}}{summary}" for name, summary in COMMANDS.items()]
    return "\n".join(
        [
            "usage: gptlab COMMAND [options]",
            "",
            "Train GPT-2 with auxiliary per-block losses, and find out, with matched seeds and controls, whether they",
            "help.",
            "",
            *lines,
            "",
            "`gptlab COMMAND --help` shows a command's options. Each takes --debug, and all but completion --json.",
        ]
    )


def completion(argv: list[str]) -> int:
    """Print a script that completes commands, options and their values in a shell.

    shtab writes it from every command's own parser, so that no list is kept twice, and the shell asks no Python when
    the tab key is pressed.
    """
    import shtab

    from gptlab.cli.arguments import Parser

    parser = Parser(
        prog="gptlab completion",
        description='Print a completion script: put `eval "$(gptlab completion bash)"` into ~/.bashrc, '
        'or `eval "$(gptlab completion zsh)"` below `autoload -Uz compinit && compinit` into ~/.zshrc.',
    )
    parser.add_argument("shell", choices=shtab.SUPPORTED_SHELLS, help="whose script")
    options = parser.parse(argv)
    root = argparse.ArgumentParser(prog="gptlab", description="Train GPT-2 with auxiliary per-block losses.")
    commands = root.add_subparsers()
    for name, summary in COMMANDS.items():
        commands.add_parser(name, help=summary, parents=[_parser_of(name)], add_help=False)
    print(shtab.complete(root, options.shell))
    return 0


def _parser_of(name: str) -> argparse.ArgumentParser:
    """A command's own parser, taken where it would print its help; values of options as choices, else files."""
    import shtab

    from gptlab.signals.registry import known_names
    from gptlab.training.presets import PRESETS

    found: list[argparse.ArgumentParser] = []
    print_help = argparse.ArgumentParser.print_help
    argparse.ArgumentParser.print_help = lambda self, file=None: found.append(self)
    try:
        with contextlib.suppress(SystemExit):
            _command(name)(["--help"])
    finally:
        argparse.ArgumentParser.print_help = print_help
    (parser,) = found
    named = {"--preset": (*PRESETS,), "--signal.name": known_names()}  # their help is elsewhere
    for action in parser._actions:
        words = str(action.metavar or "")
        action.choices = action.choices or next((named[o] for o in action.option_strings if o in named), None)
        if not action.choices and _WORDS.fullmatch(words):
            action.choices = words.split("|")
        if not action.choices and action.nargs != 0:
            action.complete = shtab.FILE  # type: ignore[attr-defined]
    return parser


_WORDS = re.compile(r"[a-z\d.-]+(\|[a-z\d.-]+)+")
"""How an option whose values are checked later shows them: on|off, say."""
