"""What can go wrong for a user, as one tree of exceptions, each with the exit code it ends a command with.

    GptlabError
    ├── UsageError          2   a wrong option or argument on the command line
    ├── DataError           3   a corpus, shard or token that is missing, damaged or out of range
    ├── ConfigError         3   a config file, preset or combination of options that cannot be run
    ├── CheckpointError     3   a checkpoint or run folder that is missing, damaged or another run's
    ├── LostProcessError    3   another process of the same run that ended or no longer answers
    ├── DivergedError       4   a loss or gradient that is no longer finite
    └── Stopped            75   a stop that was asked for, with a checkpoint saved: run again to resume

A message is one line: what was expected, what was found, what to do. Our own faults are `assert`s, not these.
"""

from __future__ import annotations

import difflib
import importlib.metadata
import importlib.util
import re
import shlex
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any

LONGEST_MESSAGE = 4000
"""Characters of an error line. A list of differing options needs a thousand or two; a file's content has no end."""


class GptlabError(Exception):
    """Base of every error that is the user's to mend; `exit_code` is what the process ends with.

    found: what the command has to show nevertheless; with `--json` it is one object with the error
    """

    exit_code = 3
    found: Mapping[str, Any] = MappingProxyType({})

    def __init__(self, message: str = "") -> None:
        super().__init__(shortened(message, LONGEST_MESSAGE))


class UsageError(GptlabError):
    exit_code = 2


class DataError(GptlabError):
    exit_code = 3


class ConfigError(GptlabError):
    exit_code = 3


class CheckpointError(GptlabError):
    exit_code = 3


class LostProcessError(GptlabError):
    exit_code = 3


class DivergedError(GptlabError):
    exit_code = 4


class Stopped(GptlabError):
    exit_code = 75


def shortened(text: str, longest: int) -> str:
    """`text` with its middle left out where it has more than `longest` characters: the end says what to do.

    >>> shortened("expected 1, found xxxxxxxxxxxxxxxxxxxx; mend line 3", 40)
    'expected 1, found [...]xxxx; mend line 3'
    """
    if len(text) <= longest:
        return text
    kept = longest - len(" [...]")
    return f"{text[: (kept + 1) // 2]} [...]{text[len(text) - kept // 2 :]}"


def shown(value: object, longest: int = 80) -> str:
    """A value that was found, as an error quotes it: its repr, shortened.

    >>> shown("x" * 100, 20)
    "'xxxxxx [...]xxxxxx'"
    """
    text = repr(value[: 4 * longest]) if isinstance(value, str | bytes) else repr(value)
    return shortened(text, longest)


def one_line(error: BaseException) -> str:
    """What another library's error says, on one line and not at length."""
    return shortened(" ".join(str(error).split()), 200) or type(error).__name__


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`"; did you mean 'x'?"` for the known word nearest to `word`, else an empty string.

    >>> did_you_mean("lerning_rate", ["learning_rate", "seed"])
    "; did you mean 'learning_rate'?"
    """
    nearest = difflib.get_close_matches(word[:100].replace("-", "_"), list(known), n=1, cutoff=0.5)
    return f"; did you mean {nearest[0]!r}?" if nearest else ""


def needs_package(what: str, package: str) -> str:
    """One line: `what` needs a package that is not installed, and what to type here, in versions that gptlab supports.

    It names the package, not an extra of gptlab: that works however gptlab itself was installed.

    >>> needs_package("--log trackio", "trackio")
    '--log trackio needs the package trackio, which is not installed; pip install trackio'
    """
    try:
        requirements = [line.partition(";")[0].strip() for line in importlib.metadata.requires("gptlab") or ()]
    except importlib.metadata.PackageNotFoundError:  # a checkout on PYTHONPATH
        requirements = []
    asked = next((one for one in requirements if re.match(rf"{package}(?![\w.-])", one)), package)
    return f"{what} needs the package {package}, which is not installed; {pip_command()} install {shlex.quote(asked)}"


def pip_command() -> str:
    """What installs packages here: the environments that uv makes have no pip."""
    return "pip" if importlib.util.find_spec("pip") else "uv pip"
