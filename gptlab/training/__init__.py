"""One update, and the loop of them: records come out, state goes in and out, no disk is touched here."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from gptlab.lazy import lazy_exports

if TYPE_CHECKING:
    from gptlab.training.config import TrainingConfig
    from gptlab.training.gradients import Losses, backward

__all__ = ["Losses", "TrainingConfig", "backward"]

_exports = {
    "Losses": "gptlab.training.gradients",
    "TrainingConfig": "gptlab.training.config",
    "backward": "gptlab.training.gradients",
}


def __getattr__(name: str) -> Any:
    return lazy_exports(__name__, _exports, name)
