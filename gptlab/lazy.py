"""Names that a package exports without importing their module before they are asked for (PEP 562).

Options are checked and help is shown before torch is imported; a package whose `__init__` imported its modules
would make every command pay those two seconds.
"""

from __future__ import annotations

import importlib
from typing import Any


def lazy_exports(package: str, exports: dict[str, str], name: str) -> Any:
    """The object `name` of `package`, imported now from the module that `exports` names for it."""
    if name not in exports:
        raise AttributeError(f"module {package!r} has no attribute {name!r}")
    return getattr(importlib.import_module(exports[name]), name)
