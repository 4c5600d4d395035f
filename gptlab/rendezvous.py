"""How the processes of a run find each other, and who is still there once a call between them has failed.

Both go through the store that lives in torchrun itself and so outlives the processes it starts.
"""

from __future__ import annotations

import json
import socket
import time
import uuid
from datetime import timedelta
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.distributed import PrefixStore, TCPStore

ROUND = "gptlab/round"
PATIENCE, MOMENT = 5.0, 1.0
"""Seconds in which those that are there answer a roll call. They give up within moments of each other, so where only
one has not answered after MOMENT seconds, it is not waited for."""


def meet(address: str, rank: int, size: int, timeout: timedelta) -> PrefixStore:
    """A part of the store at `address` ("host:port") that nobody has used before, the same for all ranks.

    When torchrun starts processes anew (`--max-restarts`), its store still holds the addresses of the old ones, and a
    process group would wait for the dead (pytorch/pytorch#135712). Neither torchrun's count of restarts, which each
    machine keeps for itself, nor anything else it says tells the rounds apart. So rank 0 names the round, and a rank
    that is in doubt joins any name it finds, until one answers with this very process in its list. Raises RuntimeError.
    """
    from torch.distributed import PrefixStore

    store, me = _client(address, timeout), uuid.uuid4().hex
    if rank == 0:
        store.set(ROUND, me)
        joined = [f"{ROUND}/{me}/{other}" for other in range(1, size)]
        store.wait(joined, timeout)
        store.set(f"{ROUND}/{me}", json.dumps([store.get(key).decode() for key in joined]))
        return PrefixStore(me, store)
    deadline = time.monotonic() + timeout.total_seconds()
    while time.monotonic() < deadline:
        if name := _round(store):
            store.set(f"{ROUND}/{name}/{rank}", me)
            if store.check([f"{ROUND}/{name}"]) and me in json.loads(store.get(f"{ROUND}/{name}")):
                return PrefixStore(name, store)
        time.sleep(0.02)
    raise RuntimeError(f"rank 0 has not come within {timeout}")


def absent(address: str, rank: int, size: int, patience: float = PATIENCE) -> list[int] | None:
    """Answer a roll call as `rank`, and give the ranks that do not in time; None where the store cannot be reached.

    A failed call seldom says because of whom it failed: a stopped process answers nobody, and its neighbours, who then
    give up, look dead to theirs.
    """
    try:
        _knock(address, patience)
        store = _client(address, timedelta(seconds=patience))
        call = f"gptlab/lost/{_round(store)}"
        store.set(f"{call}/{rank}", "here")
        missing, began = set(range(size)) - {rank}, time.monotonic()
        while True:
            missing -= {other for other in missing if store.check([f"{call}/{other}"])}
            waited = time.monotonic() - began
            if not missing or waited > (patience if len(missing) > 1 else min(patience, MOMENT)):
                return sorted(missing)
            time.sleep(0.05)
    except (RuntimeError, ValueError, OSError):  # torch's DistError is a RuntimeError; no address is a ValueError
        return None


def _knock(address: str, patience: float) -> None:
    """Raise OSError where nobody listens at `address`.

    A store's client would knock again and again until its time is up, and then print a page of frames; where the node
    that had the store is gone, the others should know at once.
    """
    host, _, port = address.rpartition(":")
    socket.create_connection((host, int(port)), timeout=patience).close()


def _client(address: str, timeout: timedelta) -> TCPStore:
    from torch.distributed import TCPStore

    host, _, port = address.rpartition(":")
    return TCPStore(host, int(port), is_master=False, timeout=timeout)


def _round(store: TCPStore) -> str:
    """The newest round's name, or "" before the first."""
    return store.get(ROUND).decode() if store.check([ROUND]) else ""
