"""Train GPT-2 with auxiliary per-block losses, and find out with matched seeds and controls whether they help."""

from __future__ import annotations

__version__ = "0.1.0"


def lazy_exports(package: str, exports: dict[str, str], name: str) -> object:
    """The object `name` of `package`, imported now from the module that `exports` names for it (PEP 562).

    Options are checked and help is shown before torch is imported; a package whose `__init__` imported its modules
    would make every command pay those two seconds.
    """
    import importlib

    if name not in exports:
        raise AttributeError(f"module {package!r} has no attribute {name!r}")
    return getattr(importlib.import_module(exports[name]), name)
