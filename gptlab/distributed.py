"""The processes of one run: who this one is, sums over all of them, one decision for all of them.

torchrun's variables are read here and nowhere else. Gradients are summed here too, instead of by
DistributedDataParallel: the backward pass goes down block by block and visits a judged block more than once, which
DDP's hooks, made for one backward call a step, do not allow. The sum is the same, once a step, over flat buckets.

Processes find each other, and after a failed call find out who is still there, through the store that lives in torchrun
itself and so outlives the processes it starts.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import socket
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TypeVar

from gptlab import errors
from gptlab.processes import end_with

if TYPE_CHECKING:
    import torch
    from torch.distributed import PrefixStore, TCPStore

_T = TypeVar("_T")

BUCKET_BYTES = 25 * 2**20
LETTING_GO = 0.1  # s; without it about one of 100 pairs of processes that end right after a collective aborts

ROUND = "gptlab/round"
PATIENCE, MOMENT = 5.0, 1.0
"""Seconds in which those that are there answer a roll call. They give up within moments of each other, so where only
one has not answered after MOMENT seconds, it is not waited for."""


@dataclass(frozen=True)
class World:
    """This process among those of the run; a single process without torchrun is rank 0 of 1."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    launch: str = ""
    """A hash of torchrun's name for this start of the run; empty without torchrun."""
    attempt: int = 0
    """How often torchrun has started the processes again (`--max-restarts`)."""
    store: str = ""
    """host:port of the store by which the processes find each other."""
    store_stays: bool = False
    """Whether that store is torchrun's own, and stays when processes are started again."""

    @staticmethod
    def from_environment() -> World:
        def number(name: str, default: int) -> int:
            return int(os.environ.get(name, default))

        launch = os.environ.get("TORCHELASTIC_RUN_ID", "")
        return World(
            number("RANK", 0),
            number("WORLD_SIZE", 1),
            number("LOCAL_RANK", 0),
            number("LOCAL_WORLD_SIZE", 1),
            hashlib.sha256(launch.encode()).hexdigest()[:16] if launch else "",
            number("TORCHELASTIC_RESTART_COUNT", 0),
            f"{os.environ.get('MASTER_ADDR', '')}:{os.environ.get('MASTER_PORT', '')}",
            os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
        )

    @property
    def launched(self) -> bool:
        """Whether torchrun started this process."""
        return bool(self.launch)

    @property
    def main(self) -> bool:
        """Whether this is the process that writes."""
        return self.rank == 0

    def connect(self, device: torch.device, timeout: timedelta = timedelta(minutes=30)) -> None:
        """Join the process group: nccl between GPUs, gloo between CPUs; nothing for a single process.

        timeout: how long any call waits for the others, this one too, until they count as lost. gloo's calls then
        raise LostProcessError; nccl's own watchdog ends the process.
        """
        if self.size == 1:
            return
        import torch.distributed as dist

        cuda = device.type == "cuda"
        backend, where = "nccl" if cuda else "gloo", device if cuda else None
        with self.collective():
            if self.store_stays:
                store = join_store(self.store, self.rank, self.size, timeout)
                dist.init_process_group(
                    backend, store=store, rank=self.rank, world_size=self.size, timeout=timeout, device_id=where
                )
            else:
                dist.init_process_group(backend, timeout=timeout, device_id=where)

    def disconnect(self) -> None:
        if self.size > 1:
            import torch.distributed as dist

            if dist.is_initialized():
                dist.destroy_process_group()
                # Whatever still names the group (DTensor's caches do) keeps gloo's threads alive. One that lets go of
                # its last tensor while the interpreter ends aborts the process, so it gets the time to do so before.
                time.sleep(LETTING_GO)

    def sum_(self, tensors: Sequence[torch.Tensor]) -> None:
        """Replace every tensor by its sum over all ranks, in buckets, in the order given (the same on all ranks)."""
        if self.size == 1:
            return
        import torch
        import torch.distributed as dist

        for places in buckets(tensors):
            bucket = [tensors[k] for k in places]
            flat = torch.cat([t.reshape(-1) for t in bucket])
            with self.collective():
                dist.all_reduce(flat)
            for t, part in zip(bucket, flat.split([t.numel() for t in bucket]), strict=True):
                t.copy_(part.view_as(t))

    def gather(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """The tensors of all ranks, one shape for all, in the order of ranks."""
        if self.size == 1:
            return [tensor]
        import torch
        import torch.distributed as dist

        parts = [torch.empty_like(tensor) for _ in range(self.size)]
        with self.collective():
            dist.all_gather(parts, tensor)
        return parts

    def broadcast_from_main(self, action: Callable[[], Any], device: torch.device) -> Any:
        """What `action` gives on rank 0 (JSON values), on every rank; an error of ours there is raised everywhere."""
        if self.size == 1:
            return action()
        import torch
        import torch.distributed as dist

        message = b""
        if self.main:
            try:
                answer = {"value": action()}
            except errors.GptlabError as error:
                answer = {"error": type(error).__name__, "text": str(error)}
            message = json.dumps(answer).encode()
        length = torch.tensor([len(message)], device=device)
        with self.collective():
            dist.broadcast(length, 0)
        text = torch.zeros(int(length), dtype=torch.uint8)
        if self.main:
            text = torch.frombuffer(bytearray(message), dtype=torch.uint8)
        text = text.to(device)
        with self.collective():
            dist.broadcast(text, 0)
        answer = json.loads(bytes(text.cpu().tolist()))
        if "error" in answer:
            raise getattr(errors, answer["error"])(answer["text"])
        return answer["value"]

    def barrier(self) -> None:
        if self.size > 1:
            import torch.distributed as dist

            with self.collective():
                dist.barrier()

    @contextmanager
    def collective(self) -> Iterator[None]:
        """Inside, an error of the process group (gloo's and nccl's are RuntimeErrors) becomes LostProcessError."""
        try:
            yield
        except RuntimeError as error:
            silent = missing_ranks(self.store, self.rank, self.size)
            raise errors.LostProcessError(_what_is_lost(silent, self.size, error)) from error

    def name_lost_ranks(self, records: Iterator[_T]) -> Iterator[_T]:
        """The same records, made among much else by collectives of PyTorch's own, as FSDP2's are within a pass.

        A RuntimeError there is another's only if another process no longer answers; then it is LostProcessError.
        """
        try:
            yield from records
        except RuntimeError as error:
            silent = missing_ranks(self.store, self.rank, self.size) if self.size > 1 else None
            if silent:
                raise errors.LostProcessError(_what_is_lost(silent, self.size, error)) from error
            raise


def _what_is_lost(silent: list[int] | None, size: int, error: RuntimeError) -> str:
    if silent == []:
        reason = str(error).partition("\n")[0][:200]
        return (
            f"the {size} processes of this run are all there but cannot talk to each other: {reason}; check the network"
        )
    who = f": rank{'s' * (len(silent) > 1)} {', '.join(map(str, silent))} of {size}" if silent else ""
    return (
        f"another process of this run has ended or no longer answers{who}; its own message or torchrun's report says "
        "why; run the same command again to resume from the newest checkpoint"
    )


def buckets(tensors: Sequence[torch.Tensor]) -> Iterable[list[int]]:
    """The places of consecutive tensors of one dtype, up to BUCKET_BYTES together."""
    bucket: list[int] = []
    size = 0
    for k, t in enumerate(tensors):
        if bucket and (size + t.nbytes > BUCKET_BYTES or t.dtype != tensors[bucket[0]].dtype):
            yield bucket
            bucket, size = [], 0
        bucket.append(k)
        size += t.nbytes
    if bucket:
        yield bucket


@contextmanager
def said_once(what: str) -> Iterator[bool]:
    """Whether this process is to say something that other processes of torchrun on this machine may say as well.

    Any may be the first to end, and then torchrun ends the others: so whoever comes first speaks, within the block, and
    the others wait until that is said. torchrun gives the processes of a machine a folder in common; where it does not,
    local rank 0 speaks.
    """
    line = hashlib.sha256(what.encode(errors="replace")).hexdigest().encode()
    with ExitStack() as ends:
        marker, mine = None, os.environ.get("LOCAL_RANK", "0") == "0"
        if own_file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
            with suppress(OSError):
                marker = ends.enter_context(_marker(Path(own_file).parents[1] / "said"))
                fcntl.flock(marker, fcntl.LOCK_EX)  # held by who speaks; the kernel takes it from one that is killed
                mine = line not in marker.read().split(b"\n")
        yield mine
        if marker and mine:
            marker.write(line + b"\n")


def _marker(path: Path) -> IO[bytes]:
    """A file to read and append to; raises OSError too where standard error leads nowhere, as torchrun can be asked."""
    if os.path.samestat(os.fstat(2), os.stat(os.devnull)):
        raise OSError("what is said here is not seen")
    flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW
    return os.fdopen(os.open(path, flags, 0o600), "r+b", 0)


def launcher_hangs_up() -> bool:
    """Whether torchrun started this process and ends it when the terminal goes, as it does even under nohup."""
    heard = os.environ.get("TORCHELASTIC_SIGNALS_TO_HANDLE", "SIGTERM,SIGINT,SIGHUP,SIGQUIT")
    return World.from_environment().launched and "SIGHUP" in heard


def end_with_launcher() -> None:
    """Make this process end when the torchrun that started it is gone, so that no orphan continues to write."""
    parent = os.getppid()
    orphan = parent == 1 and not _is_torchrun(1)  # in a container torchrun itself may be process 1
    end_with(0 if orphan else parent)


def _is_torchrun(process: int) -> bool:
    try:
        command = Path(f"/proc/{process}/cmdline").read_bytes()
    except OSError:
        return False
    return b"torchrun" in command or b"torch.distributed" in command or b"torch/distributed" in command


def join_store(address: str, rank: int, size: int, timeout: timedelta) -> PrefixStore:
    """A part of the store at `address` ("host:port") that nobody has used before, the same for all ranks.

    When torchrun starts processes again (`--max-restarts`), its store still holds the addresses of the old ones, and a
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


def missing_ranks(address: str, rank: int, size: int, patience: float = PATIENCE) -> list[int] | None:
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
