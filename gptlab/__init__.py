"""Train GPT-2 with auxiliary per-block losses, and find out with matched seeds and controls whether they help."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

if sys.platform == "win32":  # locks (fcntl), signals and process groups are POSIX's
    sys.exit("gptlab: expected Linux or macOS, found Windows; use WSL, its Linux (`wsl --install`), and install there")

if TYPE_CHECKING:
    from gptlab import signals
    from gptlab.api import Comparison, compare, load, record, train

__version__ = "0.1.0"
__all__ = ["Comparison", "compare", "load", "record", "signals", "train"]

_exports: dict[str, str] = dict.fromkeys(("Comparison", "compare", "load", "record", "train"), "gptlab.api")


def __getattr__(name: str) -> Any:
    if name == "signals":
        import importlib

        return importlib.import_module("gptlab.signals")
    return lazy_exports(__name__, _exports, name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]


def lazy_exports(package: str, exports: dict[str, str], name: str) -> Any:
    """The object `name` of `package`, imported now from the module that `exports` names for it (PEP 562).

    Options are checked and help is shown before torch is imported; a package whose `__init__` imported its modules
    would make every command pay those two seconds.
    """
    import importlib

    if name not in exports:
        raise AttributeError(f"module {package!r} has no attribute {name!r}")
    return getattr(importlib.import_module(exports[name]), name)
