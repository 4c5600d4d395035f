"""The `gptlab` command: finds the subcommand, and turns an error of ours into one line and its exit code."""

from __future__ import annotations

import importlib
import json
import os
import sys
import traceback
from collections.abc import Callable, Sequence

import gptlab
from gptlab.cli.terminal import printable
from gptlab.distributed import World
from gptlab.errors import GptlabError, UsageError, did_you_mean

COMMANDS = {
    "train": "train GPT-2, with or without a block loss",
    "data": "prepare a corpus, or look at one",
    "experiment": "run arms against seeds, see how they stand, or try every arm first",
    "compare": "say of every arm whether it is better, worse, no different or undecided, and why",
    "dose_response": "how many times the tokens a known error costs, against theory",
    "noise": "measure whether a signal teaches, or is bias or noise",
    "sample": "write on from a prompt, each block's guess beside it",
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


def main(argv: Sequence[str] | None = None) -> int:
    """Run `gptlab ARGV` and give its exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(_help())
        return 0
    if argv[0] == "--version":
        print(f"gptlab {gptlab.__version__}")
        return 0
    name = argv[0]

    def command(rest: list[str]) -> int:
        if name not in COMMANDS:
            raise UsageError(f"no command {name!r}{did_you_mean(name, COMMANDS)}; see `gptlab --help`")
        return importlib.import_module(f"gptlab.cli.{name}").main(rest)

    return guarded(command, argv[1:])


def guarded(command: Callable[[list[str]], int], argv: Sequence[str]) -> int:
    """Run a command; an error of ours, a full disk or Ctrl-C becomes one line on standard error and an exit code.

    `--debug` shows the traceback too. With `--json` the error also stands on standard output, as JSON.
    """
    try:
        return command([a for a in argv if a != "--debug"])
    except BrokenPipeError:  # the reader (head, less) has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (GptlabError, OSError, KeyboardInterrupt) as error:
        code, text, shown = _told(error)
        found = error.found if isinstance(error, GptlabError) else {}
        if shown:
            print(f"gptlab: {printable(text)}", file=sys.stderr)
        if "--debug" in argv:
            traceback.print_exc()
    if "--json" in argv and shown:
        print(json.dumps({**found, "error": text, "exit_code": code}))
    return code


def _told(error: GptlabError | OSError | KeyboardInterrupt) -> tuple[int, str, bool]:
    """The exit code of an error, its line, and whether this process is the one to say it; raises what is not ours."""
    if isinstance(error, GptlabError):
        return error.exit_code, str(error), not error.everywhere or World.from_environment().local_rank == 0
    if isinstance(error, KeyboardInterrupt):
        return 130, "interrupted", True
    if error.filename is None and error.errno is None:
        raise error
    return 3, f"{error.strerror}: {error.filename or 'a file'}; check the path and the disk", True


def _help() -> str:
    width = max(map(len, COMMANDS)) + 2
    lines = [f"  {name:<{width}}{summary}" for name, summary in COMMANDS.items()]
    return "\n".join(
        [
            "usage: gptlab COMMAND [options]",
            "",
            "A laboratory for pretraining GPT-2 in which every block is judged by the confidence of the next.",
            "",
            *lines,
            "",
            "`gptlab COMMAND --help` shows a command's options. Each takes --json and --debug.",
        ]
    )
