"""A signal from a user's own file: FILE.py:FUNCTION. Running it is running their code, so it is asked for by name.

The names of its arguments say what it is. `function(logits (n, V), targets (n,)) -> (n,)` is a signal that reads
blocks. What else it needs it says with attributes: `needs = "previous" | "next" | "final"` (then it takes `other=`),
`has_threshold = True` (`threshold=`), `uses_truth = False` where it does not look at the targets, `formula`. A function
that also takes `tokens` is a sequence objective: `function(logits (B, T, V), tokens, targets) -> (B, T)`, or with
`hidden_states`, the list h_0..h_L, in the place of logits, and `read` after the targets if it wants logits of a state.
"""

from __future__ import annotations

import hashlib
import inspect
import os
from collections.abc import Callable, Mapping
from functools import lru_cache, wraps
from pathlib import Path
from types import CodeType, ModuleType
from typing import TYPE_CHECKING, Any

from gptlab.errors import ConfigError, did_you_mean
from gptlab.files import MB, read_bytes
from gptlab.signals.registry import Objective, Signal

if TYPE_CHECKING:
    from torch import Tensor


class GivenFunction(str):
    """The name FILE.py:FUNCTION of a function that was given as an object, and the function.

    It is a text wherever a name is one, so that it is copied, compared and recorded as such. FILE.py is the file in
    which the function stands, or the name of its module where there is none, as in a notebook.
    """

    function: Callable[..., Any]

    def __new__(cls, function: Callable[..., Any]) -> GivenFunction:
        word = getattr(function, "__name__", type(function).__name__)
        if not word.isidentifier():
            raise ConfigError(f"signal.name: expected a function with a name, found {word}; define it with def")
        found = super().__new__(cls, f"{_file_of(function) or getattr(function, '__module__', 'given') + '.py'}:{word}")
        found.function = function
        return found

    @property
    def content(self) -> bytes:
        """What the record's checksum is taken of: its file, else its source, else its compiled code."""
        if file := _file_of(self.function):
            return read_bytes(file, limit=MB, error=ConfigError)
        try:
            return inspect.getsource(self.function).encode()
        except (OSError, TypeError):
            code = getattr(self.function, "__code__", None)
            return repr(_compiled(code) if code else type(self.function)).encode()


def _compiled(code: CodeType) -> tuple[Any, ...]:
    """What a function does, of its compiled code and that of the functions in it: nothing that says where it stands."""
    constants = [_compiled(c) if inspect.iscode(c) else c for c in code.co_consts]
    return code.co_code, code.co_names, constants


def _file_of(function: Callable[..., Any]) -> str | None:
    """The Python file in which a function is defined; None where there is none on disk."""
    try:
        file = inspect.getsourcefile(inspect.unwrap(function))
    except (TypeError, ValueError):
        return None
    return os.path.relpath(file) if file and file.endswith(".py") and os.path.isfile(file) else None


def user_signal(name: str) -> Signal | Objective:
    """The signal or sequence objective named FILE.py:FUNCTION as its file stands now.

    Raises ConfigError where there is none, where its file does not run, or where it says what it cannot need. What
    the function itself does wrong is said when it is called.
    """
    content = _content(name)
    function = name.function if isinstance(name, GivenFunction) else _function(name, content)
    takes = _arguments(function)
    if "tokens" in takes:
        return _objective(function, takes, name, _source(name, content))
    needs = getattr(function, "needs", None)
    if needs not in (None, "previous", "next", "final"):
        raise ConfigError(f"{name}: needs must be previous, next or final, found {needs!r}")
    signal = Signal(
        name=name,
        formula=_formula(function, name),
        source=_source(name, content),
        needs=needs,
        uses_truth=bool(getattr(function, "uses_truth", True)),
        has_threshold=bool(getattr(function, "has_threshold", False)),
    )
    signal.__dict__["function"] = _checked(function, name)  # in place of the one that `Signal` would look up
    return signal


def _objective(function: Callable[..., Any], takes: list[str], name: str, source: str) -> Objective:
    if takes[:3] not in (["logits", "tokens", "targets"], ["hidden_states", "tokens", "targets"]):
        raise ConfigError(
            f"{name}: expected a sequence objective to take logits or hidden_states, then tokens and targets, "
            f"found {', '.join(takes)}"
        )
    reads = "logits" if takes[0] == "logits" else "hidden_states"
    objective = Objective(name, _formula(function, name), source, reads)
    used = (
        function
        if reads == "logits" or "read" in takes
        else lambda states, tokens, targets, read: function(states, tokens, targets)
    )
    objective.__dict__["function"] = _checked(used, name)
    return objective


def _arguments(function: Callable[..., Any]) -> list[str]:
    try:
        return list(inspect.signature(function).parameters)
    except (TypeError, ValueError):  # a built-in function does not say
        return []


def _formula(function: Callable[..., Any], name: str) -> str:
    said = (function.__doc__ or "").strip() or name
    return getattr(function, "formula", said.splitlines()[0])


def _source(name: str, content: bytes) -> str:
    return f"{name}, sha256 {hashlib.sha256(content).hexdigest()[:12]}"


def file_hash(name: str) -> str:
    """SHA-256 of the file of FILE.py:FUNCTION, for the record."""
    return hashlib.sha256(_content(name)).hexdigest()


def next_to(folder: Path, options: Mapping[str, Any]) -> dict[str, Any]:
    """Options under dotted keys with the files of users' signals taken as lying in `folder`, as a TOML file's do.

    >>> next_to(Path("ideas"), {"signal.name": "margin.py:margin", "steps": 3})
    {'signal.name': 'ideas/margin.py:margin', 'steps': 3}
    """
    return _renamed(options, lambda name: os.path.normpath(folder / name))


def without_folders(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options under dotted keys with users' signals named without their folder: a project may be moved."""
    return _renamed(options, os.path.basename)


def _renamed(options: Mapping[str, Any], rename: Callable[[str], str]) -> dict[str, Any]:
    found = dict(options)
    for key in ("name", "signal.name"):
        if isinstance(name := found.get(key), str) and ".py:" in name:
            found[key] = rename(name)
    if found.get("also"):
        found["also"] = tuple(_renamed(one, rename) for one in found["also"])
    return found


def _content(name: str) -> bytes:
    if isinstance(name, GivenFunction):
        return name.content
    path = Path(name.rpartition(":")[0])
    try:
        return read_bytes(path, limit=MB, error=ConfigError)
    except FileNotFoundError:
        raise ConfigError(f"signal {name}: expected a Python file at {path}, found none") from None
    except ConfigError as error:
        raise ConfigError(f"signal {name}: {error}") from None


@lru_cache(maxsize=16)
def _function(name: str, content: bytes) -> Any:
    """The function of a file of that content: a file that has changed is run again, an equal one only once."""
    path, function = Path(name.rpartition(":")[0]), name.rpartition(":")[2]
    module = ModuleType(f"gptlab_user_{path.stem}")
    module.__file__ = str(path)
    try:
        exec(compile(content, str(path), "exec"), vars(module))
    except (Exception, SystemExit) as error:
        raise ConfigError(f"signal {name}: {path} does not run: {_one_line(error)}") from error
    found = getattr(module, function, None)
    if not callable(found):
        known = [k for k, v in vars(module).items() if callable(v)]
        raise ConfigError(f"signal {name}: {path} has no function {function!r}{did_you_mean(function, known)}")
    return found


def _checked(function: Callable[..., Any], name: str) -> Callable[..., Tensor]:
    """The function, with an error or another shape than a value a token as an error that is the user's to mend."""
    from torch import Tensor

    @wraps(function)
    def signal(*given: Any, **options: Any) -> Tensor:  # the last tensor has a row for each value
        targets = next(one for one in reversed(given) if isinstance(one, Tensor))
        try:
            values = function(*given, **options)
        except Exception as error:
            raise ConfigError(f"signal {name} failed: {_one_line(error)}") from error
        if not isinstance(values, Tensor) or values.shape != targets.shape:
            found = f"shape {tuple(values.shape)}" if isinstance(values, Tensor) else f"a {type(values).__name__}"
            raise ConfigError(
                f"signal {name}: expected one value a token, a tensor of shape {tuple(targets.shape)}, found {found}"
            )
        return values

    return signal


def _one_line(error: BaseException) -> str:
    """An error in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())
