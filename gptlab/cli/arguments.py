"""Command lines: parsers whose mistakes are errors of ours, and options made from a config's fields."""

from __future__ import annotations

import argparse
import contextlib
import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from gptlab.errors import ConfigError, UsageError, did_you_mean, shown
from gptlab.files import MB, read_toml
from gptlab.options import Option, options_of, table_options, typed
from gptlab.signals.registry import next_to


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that raises UsageError, names the nearest option, and takes `-` and `_` in names alike."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see `{self.prog} --help`")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        """As argparse's own, and it names the nearest choice."""
        known = [*(action.choices or ())]
        if known and value not in known:
            name = action.option_strings[-1] if action.option_strings else self.prog.rpartition(" ")[2]
            self.error(f"{name}: expected {', '.join(known)}, found {shown(value)}{did_you_mean(value, known)}")

    def parse(self, argv: Sequence[str]) -> argparse.Namespace:
        """Parse everything or raise UsageError."""
        words = [_underscored(word) for word in argv]
        parsed, unknown = self.parse_known_args(words)
        if unknown:
            word = unknown[0].partition("=")[0]
            commands = [action.choices.values() for action in self._actions if isinstance(action.choices, dict)]
            parsers = itertools.chain([self], *commands)
            known = [name for parser in parsers for action in parser._actions for name in action.option_strings]
            hint = _hint(word, known) if word.startswith("-") else ""
            raise UsageError(f"unknown argument {shown(word)}{hint}; see `{self.prog} --help`")
        return parsed


ELSEWHERE = {
    "--lr": "--learning_rate", "--wandb": "--log wandb", "--tensorboard": "--log tensorboard",
    "--trackio": "--log trackio", "--max_iters": "--steps", "--max_steps": "--steps", "--num_steps": "--steps",
    "--bs": "--batch_size", "--micro_batch_size": "--batch_size",
    "--wd": "--weight_decay", "--warmup": "--warmup_steps",
    "--warmup_iters": "--warmup_steps", "--lr_decay": "--schedule", "--eval_interval": "--eval_every",
    "--save_every": "--checkpoint_every", "--log_interval": "--log_every", "--seq_len": "--block_size",
    "--context_length": "--block_size", "--depth": "--n_layer", "--n_layers": "--n_layer", "--n_heads": "--n_head",
    "--d_model": "--n_embd", "--hidden_size": "--n_embd", "--out_dir": "--out", "--output_dir": "--out",
    "--dataset": "--data", "--signal": "--signal.name", "--loss": "--signal.name",
}  # fmt: skip
"""What other programs call an option, and where ours has it."""


def _hint(word: str, known: Sequence[str]) -> str:
    """The option that was probably meant: by its name in other programs, else the nearest one."""
    meant = ELSEWHERE.get(word)
    return f"; did you mean '{meant}'?" if meant and meant.split()[0] in known else did_you_mean(word, known)


def _underscored(word: str) -> str:
    if not word.startswith("--"):
        return word
    name, equals, value = word.partition("=")
    return "--" + name[2:].replace("-", "_") + equals + value


def add_options(parser: Parser, config: type, skip: Iterable[str] = ()) -> None:
    """One `--key` for every option of a config, grouped, with help, unit and default; none is set unless given."""
    group: Any = parser
    title = ""
    for option in options_of(config):
        if option.key in skip:
            continue
        heading = "Signal" if option.key.startswith("signal.") else option.group
        if heading != title:
            title, group = heading, parser.add_argument_group(heading)
        is_bool = option.type is bool
        group.add_argument(
            f"--{option.key}",
            default=argparse.SUPPRESS,
            metavar=_metavar(option),
            help=_help(option).replace("%", "%%"),
            **({"nargs": "?", "const": "true"} if is_bool else {}),
        )


def _metavar(option: Option) -> str:
    if option.choices and len(option.choices) <= 4:
        return "|".join(option.choices)
    if option.type is bool:
        return "true|false"
    text = str(option.type)
    return "N" if text.startswith("<class 'int") or text == "int | None" else "X" if "float" in text else "TEXT"


def _help(option: Option) -> str:
    unit = f", {option.unit}" if option.unit else ""
    return f"{option.help} [{option.default_shown}{unit}]"


def given_options(parsed: argparse.Namespace, config: type) -> dict[str, Any]:
    """The options that stood on the command line, in their own types; raises UsageError."""
    words = vars(parsed)
    try:
        return {o.key: typed(o, words[o.key]) for o in options_of(config) if o.key in words}
    except ConfigError as error:
        raise UsageError(f"--{error}") from None


def file_options(path: str | Path, config: type) -> dict[str, Any]:
    """The options of a TOML file, in their own types, signals' files next to it; ConfigError names the nearest key."""
    try:
        table = read_toml(path, limit=MB, error=ConfigError)
    except FileNotFoundError:
        raise ConfigError(f"--config: no file {path}") from None
    try:
        return next_to(Path(path).parent, table_options(table, config))
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def add_paper(parser: Parser, drawn: str) -> None:
    """--figure, --latex and --markdown; drawn: what the figure shows."""
    figure = f"{drawn}: .pdf, .svg or .png"
    parser.add_argument("--figure", "--svg", metavar="FILE", type=figure_file, help=figure)
    parser.add_argument("--latex", metavar="FILE", help="write the tables for a paper too, with booktabs")
    parser.add_argument("--markdown", metavar="FILE", help="write the tables as Markdown too")


def count(text: str, least: int = 1) -> int:
    """The type of an option that counts: a whole number of at least 1."""
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least {least}, found {text!r}")
    return int(text)


def whole(text: str) -> int:
    """The type of an option that is a whole number of at least 0."""
    return count(text, least=0)


def amount(text: str) -> float:
    """The type of an option that is a finite number of at least 0."""
    with contextlib.suppress(ValueError):
        if 0 <= (value := float(text)) < float("inf"):
            return value
    raise argparse.ArgumentTypeError(f"expected a number of at least 0, found {text!r}")


def figure_file(text: str) -> str:
    """The name of a figure's file, whose ending says its format."""
    if not text.lower().endswith((".pdf", ".svg", ".png")):
        raise argparse.ArgumentTypeError(f"expected a file that ends in .pdf, .svg or .png, found {text!r}")
    return text
