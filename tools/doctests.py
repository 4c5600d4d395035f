"""An extension of griffe, which reads docstrings for docs/api.md: examples after >>> become blocks of code.

The site's generator loads it by its path (zensical.toml). Without it Markdown takes >>> for a quotation.
"""

# pyright: reportMissingImports=false, reportUntypedBaseClass=false
from __future__ import annotations

import re
from typing import Any

from griffe import Extension, Object

EXAMPLES = re.compile(r"^>>> .*?(?=\n\n|\Z)", re.DOTALL | re.MULTILINE)


class Doctests(Extension):
    def on_object(self, *, obj: Object, **_: Any) -> None:
        if obj.docstring:
            obj.docstring.value = EXAMPLES.sub(lambda found: f"```pycon\n{found[0]}\n```", obj.docstring.value)
