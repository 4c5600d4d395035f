"""What runs say together: verdicts between arms, the statistics under them, and how many seeds they need."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from gptlab import lazy_exports

if TYPE_CHECKING:
    from gptlab.analysis.noise.measure import probe
    from gptlab.analysis.verdict import compare

__all__ = ["compare", "probe"]

# No module here may bear the name of an export: importing it would put the module in the function's place.
_exports = {"compare": "gptlab.analysis.verdict", "probe": "gptlab.analysis.noise.measure"}


def __getattr__(name: str) -> Any:
    return lazy_exports(__name__, _exports, name)
