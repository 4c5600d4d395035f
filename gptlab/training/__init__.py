"""One update, and the loop of them: records come out, state goes in and out, no disk is touched here."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from gptlab import lazy_exports

if TYPE_CHECKING:
    from gptlab.training.block_graph import Losses
    from gptlab.training.config import TrainingConfig
    from gptlab.training.gradient_sources import backward

__all__ = ["Losses", "TrainingConfig", "backward"]

_exports = {
    "Losses": "gptlab.training.block_graph",
    "TrainingConfig": "gptlab.training.config",
    "backward": "gptlab.training.gradient_sources",
}


def __getattr__(name: str) -> Any:
    return lazy_exports(__name__, _exports, name)
