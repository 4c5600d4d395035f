"""Being asked to stop: Ctrl-C, SIGTERM or a terminal that has gone is a request, a second one is an order."""

from __future__ import annotations

import os
import signal
import time
from types import FrameType, TracebackType

from gptlab.distributed import launcher_hangs_up

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
ECHO = 1.0
"""Seconds in which a second signal is the first one again: a Ctrl-C reaches torchrun and its workers alike, torchrun
passes it on to them, and `timeout` signals its command and then the command's group."""


class Interrupted(KeyboardInterrupt):
    """A request to stop that came before there was anything to save; `number` is the signal's."""

    def __init__(self, number: int) -> None:
        super().__init__("interrupted")
        self.number = number


class StopRequest:
    """Called, it says whether the process was asked to stop. A second request ends the process at once.

    It listens from entering the `with` block to its end, and then leaves the signals to whom they were before. SIGHUP
    stays ignored where it was on entry, as nohup asks, unless torchrun, which would end its processes, hears it. It may
    come several times when a terminal goes, and never is an order.

    raising: whether a request raises Interrupted at once, until `defer` is called.
    """

    def __init__(self, *, raising: bool = False) -> None:
        self._raising = raising
        self._asked: float | None = None

    def __enter__(self) -> StopRequest:
        ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN and not launcher_hangs_up()
        listened = [number for number in SIGNALS if number != signal.SIGHUP or not ignored]
        self._before = {number: signal.signal(number, self._hear) for number in listened}
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def defer(self) -> None:
        """From now on a request waits until somebody asks for it."""
        self._raising = False

    def _hear(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._asked is None:
            self._asked = now
            if self._raising:
                raise Interrupted(number)
        elif number != signal.SIGHUP and now - self._asked >= ECHO:
            os._exit(128 + number)

    def __call__(self) -> bool:
        return self._asked is not None
