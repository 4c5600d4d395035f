"""What a block's reading is worth: one pure function a signal, one registry, one memory-flat reader.

Every signal is also an attribute: `gptlab.signals.entropy` is `SIGNALS["entropy"]`.

>>> import gptlab, torch
>>> gptlab.signals.entropy(torch.zeros(1, 4), torch.tensor([0]))
tensor([1.3863])
"""

from __future__ import annotations

from gptlab.signals.config import SignalConfig
from gptlab.signals.registry import SIGNALS, Signal

__all__ = ["SIGNALS", "Signal", "SignalConfig"]


def __getattr__(name: str) -> Signal:
    if name not in SIGNALS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return SIGNALS[name]


def __dir__() -> list[str]:
    return sorted([*__all__, *SIGNALS])
