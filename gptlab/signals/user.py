"""A signal from a user's own file: FILE.py:FUNCTION. Running it is running their code, so it is asked for by name.

The function has a signal's form, `function(logits (n, V), targets (n,)) -> (n,)`. What else it needs it says with
attributes: `needs = "previous" | "next" | "final"` (then it takes `other=`), `has_threshold = True` (`threshold=`),
`uses_truth = False` where it does not look at the targets, `formula`.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from functools import lru_cache, wraps
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from gptlab.errors import ConfigError, did_you_mean
from gptlab.files import MB, read_bytes
from gptlab.signals.registry import Signal

if TYPE_CHECKING:
    from torch import Tensor


def user_signal(name: str) -> Signal:
    """The signal named FILE.py:FUNCTION as its file stands now.

    Raises ConfigError where there is none, where its file does not run, or where it says what it cannot need. What
    the function itself does wrong is said when it is called.
    """
    content = _content(name)
    function = _function(name, content)
    needs = getattr(function, "needs", None)
    if needs not in (None, "previous", "next", "final"):
        raise ConfigError(f"{name}: needs must be previous, next or final, found {needs!r}")
    said = (function.__doc__ or "").strip() or name
    signal = Signal(
        name=name,
        formula=getattr(function, "formula", said.splitlines()[0]),
        source=f"{name}, sha256 {hashlib.sha256(content).hexdigest()[:12]}",
        needs=needs,
        uses_truth=bool(getattr(function, "uses_truth", True)),
        has_threshold=bool(getattr(function, "has_threshold", False)),
    )
    signal.__dict__["function"] = _checked(function, name)  # in place of the one that `Signal` would look up
    return signal


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
    def signal(logits: Tensor, targets: Tensor, **options: Any) -> Tensor:
        try:
            values = function(logits, targets, **options)
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
