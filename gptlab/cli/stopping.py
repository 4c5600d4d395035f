"""Being asked to stop: SIGTERM or Ctrl-C is a request, a second one is an order."""

from __future__ import annotations

import os
import signal
import time
from types import FrameType, TracebackType

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopRequest:
    """Called, it says whether the process was asked to stop. A second signal ends the process at once.

    It listens from entering the `with` block to its end, and then leaves the signals to whom they were before. echo:
    seconds in which a second signal is the first one again. A Ctrl-C reaches torchrun and its workers alike, and
    torchrun passes it on to them.
    """

    def __init__(self, echo: float = 0.0) -> None:
        self._echo = echo
        self._asked: float | None = None

    def __enter__(self) -> StopRequest:
        self._before = [signal.signal(number, self._hear) for number in SIGNALS]
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in zip(SIGNALS, self._before, strict=True):
            signal.signal(number, handler)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._asked is None:
            self._asked = now
        elif now - self._asked >= self._echo:
            os._exit(128 + number)

    def __call__(self) -> bool:
        return self._asked is not None
