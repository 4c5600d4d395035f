"""A signal from a user's own file: FILE.py:FUNCTION. Running it is running their code, so it is asked for by name.

The function has a signal's form, `function(logits (n, V), targets (n,)) -> (n,)`. What else it needs it says with
attributes: `needs = "previous" | "next" | "final"` (then it takes `other=`), `has_threshold = True` (`threshold=`),
`uses_truth = False` where it does not look at the targets, `formula`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import lru_cache, wraps
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from gptlab.errors import ConfigError, did_you_mean
from gptlab.signals.registry import Signal

if TYPE_CHECKING:
    from torch import Tensor


def user_signal(name: str) -> Signal:
    """The signal named FILE.py:FUNCTION as its file stands now.

    Raises ConfigError where there is none, where its file does not run, or where it says what it cannot need. What
    the function itself does wrong is told when it is called.
    """
    content = _file(name).read_bytes()
    function = _function(name, content)
    needs = getattr(function, "needs", None)
    if needs not in (None, "previous", "next", "final"):
        raise ConfigError(f"{name}: needs must be previous, next or final, found {needs!r}")
    said = (function.__doc__ or "").strip() or name
    signal = Signal(
        name=name,
        family="user",
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
    return hashlib.sha256(_file(name).read_bytes()).hexdigest()


def _file(name: str) -> Path:
    path = Path(name.rpartition(":")[0])
    if not path.is_file():
        raise ConfigError(f"signal {name}: expected a Python file at {path}, found none")
    return path


@lru_cache(maxsize=16)
def _function(name: str, content: bytes) -> Any:
    """The function of a file of that content: a file that has changed is run anew, an equal one only once."""
    path, function = _file(name), name.rpartition(":")[2]
    module = ModuleType(f"gptlab_user_{path.stem}")
    module.__file__ = str(path)
    try:
        exec(compile(content, str(path), "exec"), vars(module))
    except Exception as error:
        raise ConfigError(f"signal {name}: {path} does not run: {_told(error)}") from error
    found = getattr(module, function, None)
    if not callable(found):
        known = [k for k, v in vars(module).items() if callable(v)]
        raise ConfigError(f"signal {name}: {path} has no function {function!r}{did_you_mean(function, known)}")
    return found


def _checked(function: Callable[..., Any], name: str) -> Callable[..., Tensor]:
    """The function, with an error or another shape than a value a token told as the user's to mend."""
    from torch import Tensor

    @wraps(function)
    def signal(logits: Tensor, targets: Tensor, **options: Any) -> Tensor:
        try:
            values = function(logits, targets, **options)
        except Exception as error:
            raise ConfigError(f"signal {name} failed: {_told(error)}") from error
        if not isinstance(values, Tensor) or values.shape != targets.shape:
            found = f"shape {tuple(values.shape)}" if isinstance(values, Tensor) else f"a {type(values).__name__}"
            raise ConfigError(
                f"signal {name}: expected one value a token, a tensor of shape {tuple(targets.shape)}, found {found}"
            )
        return values

    return signal


def _told(error: Exception) -> str:
    """An error in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())
