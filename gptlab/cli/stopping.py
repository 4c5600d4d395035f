"""Being asked to stop: SIGTERM or Ctrl-C is a request, a second one is an order."""

from __future__ import annotations

import os
import signal
from types import FrameType


class StopRequest:
    """Called, it says whether the process was asked to stop. A second signal ends the process at once."""

    def __init__(self) -> None:
        self._asked = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._hear)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        if self._asked:
            os._exit(128 + number)
        self._asked = True

    def __call__(self) -> bool:
        return self._asked
