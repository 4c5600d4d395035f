"""Workers with a bounded queue before them, and results that are kept until what they are made from has changed."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

T = TypeVar("T")


class Busy(Exception):
    """The queue is full."""


class Late(Exception):
    """The answer took longer than a request waits."""


class WorkerQueue:
    """Calls served by a few threads: at most `most` of them wait or are computed, and none longer than `patience` s."""

    def __init__(
        self, name: str, workers: int, most: int, patience: float, first: Callable[[], object] = lambda: None
    ) -> None:
        """first: done before the first call is served, whatever comes of it."""
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix=name)
        self._pool.submit(first)
        self._under_way: set[Future[Any]] = set()
        self._most, self._patience, self._waiting = most, patience, 0

    async def call(self, work: Callable[[], T]) -> T:
        """What `work()` gives, computed by a worker; raises Busy at once where the queue is full, Late after a while.

        Work that is late is finished nevertheless, so that what it keeps is there for the next request.
        """
        if self._waiting >= self._most:
            raise Busy
        self._waiting += 1
        try:
            return await asyncio.wait_for(asyncio.wrap_future(self._submit(work)), self._patience)
        except TimeoutError:
            raise Late from None
        finally:
            self._waiting -= 1

    def _submit(self, work: Callable[[], T]) -> Future[T]:
        future = self._pool.submit(work)
        self._under_way.add(future)
        future.add_done_callback(self._under_way.discard)
        return future

    @property
    def busy(self) -> bool:
        """Whether a call is still being computed, whoever still waits for it."""
        return bool(self._under_way)

    def close(self) -> None:
        """Let go of all that waits; what is being computed ends by itself."""
        self._pool.shutdown(wait=False, cancel_futures=True)


@dataclass(frozen=True)
class Kept:
    """mark: of what it was made from; seconds: its making took; made_at: on the monotonic clock."""

    value: Any
    mark: Hashable
    seconds: float
    made_at: float


class Cache:
    """The last `size` results, each renewed when what it is made from has changed, but not all the time.

    share: of one core's time that renewing a result may take. A page that is costly to draw is drawn less often, so
    that to watch a run does not slow it down. Threads that ask for the same result wait for it together.
    """

    def __init__(self, size: int, share: float = 1.0, clock: Callable[[], float] = time.monotonic) -> None:
        self._size, self._share, self._clock = size, share, clock
        self._kept: OrderedDict[Hashable, Kept] = OrderedDict()
        self._lock, self._making = threading.Lock(), {}

    def get(self, key: Hashable, mark: Hashable, make: Callable[[], T]) -> tuple[T, Hashable]:
        """The result of `key` and the mark that it was made at."""
        with self._lock:
            if kept := self._current(key, mark):
                return kept.value, kept.mark
            making = self._making.setdefault(key, threading.Lock())
        with making:
            with self._lock:
                if kept := self._current(key, mark):  # another thread has just made it
                    return kept.value, kept.mark
                self._kept.pop(key, None)  # freed before another one is made, which may need the room
                while len(self._kept) >= self._size:
                    self._kept.popitem(last=False)
            begun = self._clock()
            value = make()
            made_at = self._clock()
            with self._lock:
                self._kept[key] = Kept(value, mark, made_at - begun, made_at)
                self._making.pop(key, None)
        return value, mark

    def _current(self, key: Hashable, mark: Hashable) -> Kept | None:
        """What is kept of `key`, if it need not be renewed yet; it is then the newest in use."""
        kept = self._kept.get(key)
        rest = 1 / self._share - 1  # how much longer than its making a result is left alone
        if kept is None or (kept.mark != mark and self._clock() - kept.made_at >= kept.seconds * rest):
            return None
        self._kept.move_to_end(key)
        return kept
