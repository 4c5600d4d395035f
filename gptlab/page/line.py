"""One worker with a bounded line before it: however many ask at once, one is served at a time and few wait."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

T = TypeVar("T")


class Busy(Exception):
    """The line is full."""


class Line:
    """Calls that wait for one worker, at most `most` of them at a time."""

    def __init__(self, name: str, most: int, first: Callable[[], object] = lambda: None) -> None:
        """first: done before the first call is served, whatever comes of it."""
        self._worker = ThreadPoolExecutor(1, thread_name_prefix=name)
        self._worker.submit(first)
        self._under_way: set[Future[Any]] = set()
        self._most, self._waiting = most, 0

    async def call(self, work: Callable[[], T]) -> T:
        """What `work()` gives, computed by the worker; raises Busy at once where the line is full."""
        if self._waiting >= self._most:
            raise Busy
        self._waiting += 1
        try:
            return await asyncio.wrap_future(self._submit(work))
        finally:
            self._waiting -= 1

    def _submit(self, work: Callable[[], T]) -> Future[T]:
        future = self._worker.submit(work)
        self._under_way.add(future)
        future.add_done_callback(self._under_way.discard)
        return future

    @property
    def busy(self) -> bool:
        """Whether a call is still being computed, whoever still waits for it."""
        return bool(self._under_way)

    def close(self) -> None:
        """Let go of all that waits; what is being computed ends by itself."""
        self._worker.shutdown(wait=False, cancel_futures=True)


@dataclass(frozen=True)
class Kept:
    """mark: of what it was made from; seconds: its making took; made_at: on the monotonic clock."""

    value: Any
    mark: Hashable
    seconds: float
    made_at: float


class Cache:
    """The last `size` results, each made anew when what it is made from has changed, but not all the time.

    share: of one core's time that renewing a result may take. A page that is costly to draw is drawn less often, so
    that to watch a run does not slow it down. Used by one thread.
    """

    def __init__(self, size: int, share: float = 1.0, clock: Callable[[], float] = time.monotonic) -> None:
        self._size, self._share, self._clock = size, share, clock
        self._kept: OrderedDict[Hashable, Kept] = OrderedDict()

    def get(self, key: Hashable, mark: Hashable, make: Callable[[], T]) -> tuple[T, Hashable]:
        """The result of `key` and the mark that it was made at."""
        kept = self._kept.pop(key, None)
        now = self._clock()
        if kept is None or (kept.mark != mark and now - kept.made_at >= kept.seconds * (1 / self._share - 1)):
            kept = None  # freed before another one is made, which may need the room
            while len(self._kept) >= self._size:
                self._kept.popitem(last=False)
            value = make()
            made_at = self._clock()
            kept = Kept(value, mark, made_at - now, made_at)
        self._kept[key] = kept
        return kept.value, kept.mark
