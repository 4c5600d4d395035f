"""Who is still there, asked once a call between the processes of a run has failed.

A process group says that a call failed, and often not because of whom: a stopped process answers nobody, and its
neighbours, who then give up, look dead to theirs. So every process that has given up signs in torchrun's store, which
lives in torchrun itself, and those that have not signed a little later are named.
"""

from __future__ import annotations

import time
from datetime import timedelta

PATIENCE, MOMENT = 5.0, 1.0
"""Seconds in which those that are there sign. They give up within moments of each other, so where only one has not
signed after MOMENT seconds, it is not waited for."""


def absent(store: str, call: str, rank: int, size: int, patience: float = PATIENCE) -> list[int] | None:
    """Sign as `rank`, and give the ranks that have not signed in time; None where the store does not answer.

    store: "host:port"; call: names this roll call among those of earlier attempts of the run.
    """
    import torch.distributed as dist

    host, _, port = store.rpartition(":")
    try:
        client = dist.TCPStore(host, int(port), is_master=False, timeout=timedelta(seconds=patience))
        client.set(f"{call}/{rank}", "here")
        missing, began = set(range(size)) - {rank}, time.monotonic()
        while True:
            missing -= {other for other in missing if client.check([f"{call}/{other}"])}
            waited = time.monotonic() - began
            if not missing or waited > (patience if len(missing) > 1 else min(patience, MOMENT)):
                return sorted(missing)
            time.sleep(0.05)
    except (RuntimeError, ValueError):  # torch's DistError is a RuntimeError
        return None
