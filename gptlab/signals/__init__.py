"""What a block's reading is worth: one pure function a signal, one registry, one memory-flat reader."""

from gptlab.signals.config import SignalConfig
from gptlab.signals.registry import SIGNALS, Signal

__all__ = ["SIGNALS", "Signal", "SignalConfig"]
