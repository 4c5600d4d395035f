"""Meeting in a part of the store that nobody has used, and a roll call; ranks are threads over one real store."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import pytest
import torch.distributed as dist

from gptlab.distributed import ROUND, join_store, missing_ranks

SOON = timedelta(seconds=20)


@pytest.fixture
def store() -> dist.TCPStore:
    return dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def address(store: dist.TCPStore) -> str:
    return f"127.0.0.1:{store.port}"


def together(call: Callable[[int], Any], ranks: list[int]) -> list[Any]:
    """What the call gives to each of these ranks, all at the same time."""
    with ThreadPoolExecutor(len(ranks)) as pool:
        return [future.result() for future in [pool.submit(call, rank) for rank in ranks]]


def test_every_round_has_a_part_of_its_own_and_all_ranks_the_same(store: dist.TCPStore) -> None:
    """The second round is the one after a restart: all that the first has said still stands in the store."""
    for told in ("first", "second"):
        parts = together(lambda rank: join_store(address(store), rank, 3, SOON), [2, 1, 0])
        assert not parts[0].check(["told"]), "nothing of another round is seen"
        parts[0].set("told", told)
        assert [part.get("told") for part in parts] == [told.encode()] * 3


def test_who_comes_first_does_not_join_a_round_of_the_dead(store: dist.TCPStore) -> None:
    """Rank 1 comes half a second before rank 0, and finds a round in which another rank 1 was taken."""
    store.set(ROUND, "dead")
    store.set(f"{ROUND}/dead", json.dumps(["another process"]))

    def come(rank: int) -> dist.PrefixStore:
        time.sleep(0.0 if rank else 0.5)
        return join_store(address(store), rank, 2, SOON)

    late, early = together(come, [0, 1])
    late.set("told", "alive")
    assert early.get("told") == b"alive"


def test_a_rank_that_waits_in_vain_says_so(store: dist.TCPStore) -> None:
    with pytest.raises(RuntimeError, match="rank 0 has not come"):
        join_store(address(store), 1, 2, timedelta(seconds=0.3))
    with pytest.raises(RuntimeError):
        join_store(address(store), 0, 2, timedelta(seconds=0.3))


@pytest.mark.parametrize(("there", "missing"), [([0, 1, 3], [2]), ([1, 2], [0, 3]), ([0, 1, 2, 3], [])])
def test_those_that_do_not_answer_are_named(there: list[int], missing: list[int], store: dist.TCPStore) -> None:
    found = together(lambda rank: missing_ranks(address(store), rank, 4, patience=0.5), there)
    assert found == [missing] * len(there)


def test_a_store_that_is_gone_tells_nothing_and_at_once() -> None:
    began = time.monotonic()
    assert missing_ranks("127.0.0.1:1", 0, 2, patience=60.0) is None
    assert time.monotonic() - began < 30, "a refused call is not tried again until the patience is over"
    assert missing_ranks(":", 0, 2) is None
