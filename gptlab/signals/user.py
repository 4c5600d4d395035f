"""A signal from a user's own file: FILE.py:FUNCTION. Running it is running their code, so it is asked for by name.

The function has a signal's form, `function(logits (n, V), targets (n,)) -> (n,)`. What else it needs it says with
attributes: `needs = "previous" | "next" | "final"` (then it takes `other=`), `has_threshold = True` (`threshold=`),
`formula`.
"""

from __future__ import annotations

import hashlib
import importlib.util
from functools import lru_cache
from pathlib import Path
from typing import Any

from gptlab.errors import ConfigError, did_you_mean
from gptlab.signals.registry import Signal


def user_signal(name: str) -> Signal:
    """The signal named FILE.py:FUNCTION; raises ConfigError where there is none, or where its file does not run."""
    function = _function(name)
    needs = getattr(function, "needs", None)
    if needs not in (None, "previous", "next", "final"):
        raise ConfigError(f"{name}: needs must be previous, next or final, found {needs!r}")
    signal = Signal(
        name=name,
        family="user",
        formula=getattr(function, "formula", (function.__doc__ or name).strip().splitlines()[0]),
        source=f"{name}, sha256 {file_hash(name)[:12]}",
        needs=needs,
        uses_truth=bool(getattr(function, "uses_truth", True)),
        has_threshold=bool(getattr(function, "has_threshold", False)),
    )
    signal.__dict__["function"] = function  # in place of the one that `Signal` would look up
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
def _function(name: str) -> Any:
    path, function = _file(name), name.rpartition(":")[2]
    spec = importlib.util.spec_from_file_location(f"gptlab_user_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ConfigError(f"signal {name}: {path} does not run: {type(error).__name__}: {error}") from error
    found = getattr(module, function, None)
    if not callable(found):
        known = [k for k, v in vars(module).items() if callable(v)]
        raise ConfigError(f"signal {name}: {path} has no function {function!r}{did_you_mean(function, known)}")
    return found
