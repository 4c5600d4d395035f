"""Scripts of tools/ and benchmarks/ as modules, for the tests of what is in them. No tests here."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[1]


def load_script(path: str) -> ModuleType:
    """A script as a module, by its path from the root, such as "tools/scale.py"; loaded once.

    Its folder is one to import from, as when Python runs it.
    """
    file, name = ROOT / path, "script_" + path.removesuffix(".py").replace("/", "_")
    if name not in sys.modules:
        if str(file.parent) not in sys.path:
            sys.path.append(str(file.parent))
        spec = importlib.util.spec_from_file_location(name, file)
        assert spec is not None
        assert spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)  # dataclasses look their module up
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]
