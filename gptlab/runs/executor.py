"""How a cell is run: with how many threads or on which GPU, with which code, in which process.

Packing chooses for this machine, Queue for a cluster, which packs its nodes itself; cluster.py has the cluster's jobs.

An arm's own code is the package with a patch applied, which knows its patch and records it with every run. It is made
from the package in use and the patch, once for a runner, and kept in memory. Each cell gets a copy of its own in a
fresh private folder, removed when the cell has ended: nothing that lies in an experiment's folder, which may have come
from anywhere, is run in its place. The package in use and the user's checkout are never changed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import gptlab
from gptlab.errors import ConfigError, Stopped, shown
from gptlab.files import MB, kind_of, open_new, read_bytes, read_text
from gptlab.processes import ForkServer, environment, how_it_ended, package, python_command, usable_cores, wait_for
from gptlab.runs.cells import OUTPUT, Cell, Claim, revoke

SIDE_BY_SIDE = 512
"""The widest model, in channels, of which one run a core is trained rather than one run over all cores.

Two single-threaded runs of the preset shakespeare-tiny (128 wide) side by side gave 1.26 times the tokens a second of
one run with two threads: threads of small matrices wait for each other. Wider models fill their threads, and two of
them need twice the memory and share the caches.
"""


def _gpu_files() -> list[Path]:
    """The device files of GPUs, empty where there is none."""
    return [*Path("/dev").glob("nvidia[0-9]*"), *Path("/dev").glob("kfd"), *Path("/dev").glob("dxg")]


@dataclass(frozen=True)
class Packing:
    """cores: that may be used; gpus: how many there are; jobs: the most cells at a time, None for what fits."""

    cores: int
    gpus: int = 0
    jobs: int | None = None

    @classmethod
    def of_this_machine(cls, jobs: int | None = None) -> Packing:
        """torch is only asked where a GPU's device file is there: loading it takes seconds and memory."""
        gpus = 0
        if _gpu_files():
            from gptlab.device import Machine

            gpus = len(Machine.probe().gpus)
        return cls(usable_cores(), gpus, jobs)

    def threads(self, n_embd: int) -> int:
        """Threads of a run of a model that wide, on the CPU; sums round by it, so `jobs` has no say."""
        return self.cores if n_embd > SIDE_BY_SIDE else 1

    def fits(self, n_embd: int, running: list[int]) -> bool:
        """Whether a run may start next to those that run, given their models' widths."""
        if self.jobs and len(running) >= self.jobs:
            return False
        if self.gpus:
            return len(running) < self.gpus
        return not running or sum(map(self.threads, [n_embd, *running])) <= self.cores

    def options(self, n_embd: int, slot: int) -> dict[str, str]:
        """What a run of a model that wide is given where its arm says nothing; slot: the lowest that no run has."""
        return {"device": f"cuda:{slot}"} if self.gpus else {"threads": str(self.threads(n_embd))}

    def why(self, widths: set[int]) -> str:
        """The choice for models of these widths, in words."""
        if self.gpus:
            some = f"{self.jobs} of " if self.jobs and self.jobs < self.gpus else ""
            return f"one run on each of {some}{self.gpus} GPU{'s' * (self.gpus > 1)}"
        reasons = []
        if min(widths) <= SIDE_BY_SIDE:
            many = min(self.jobs or self.cores, self.cores)
            reasons.append(
                f"{many} run{'s' * (many > 1)} at a time of one thread: models up to {SIDE_BY_SIDE} wide gain more "
                "from cores of their own than from threads"
            )
        if max(widths) > SIDE_BY_SIDE:
            reasons.append(f"one run over all {self.cores} cores for models wider than {SIDE_BY_SIDE}")
        return "; ".join(reasons)


@dataclass(frozen=True)
class Queue:
    """jobs: the most that wait or run at a time, None for all; cores, gpus: of a job, 0 where none are asked for."""

    jobs: int | None = None
    cores: int = 0
    gpus: int = 0

    def fits(self, n_embd: int, running: list[int]) -> bool:
        """Whether one more may join the queue: which node has room for it, the cluster knows."""
        return self.jobs is None or len(running) < self.jobs

    def options(self, n_embd: int, slot: int) -> dict[str, str]:
        """The job's GPU; else threads as on this machine, wide models taking all the cores that the node gives."""
        if self.gpus:
            return {"device": "cuda:0"}
        if n_embd <= SIDE_BY_SIDE:
            return {"threads": "1"}
        return {"threads": str(self.cores)} if self.cores else {}

    def why(self, widths: set[int]) -> str:
        """The choice in words."""
        return f"a job a cell, {f'{self.jobs} at a time' if self.jobs else 'all in the queue at once'}"


MARK = "PATCH.sha256"
"""A file in the copy's package that holds the SHA-256 of its patch."""

LARGEST_PATCH, LARGEST_ARCHIVE = MB, 64 * MB


def applied() -> str | None:
    """SHA-256 of the patch that the running package carries; None for the package as it is."""
    mark = package() / MARK
    return read_text(mark, inside=mark.parent).strip() if mark.exists() else None


@dataclass(frozen=True)
class PatchedPackage:
    """files: {gptlab/...: text} of the package under a patch, its mark too; patch: as it was applied."""

    files: Mapping[str, str]
    patch: bytes = b""

    @property
    def archive(self) -> bytes:
        """All of it as one file, for machines that share no memory with this one."""
        return json.dumps(self.files, sort_keys=True).encode()

    @classmethod
    def from_archive(cls, path: Path, sha256: str) -> PatchedPackage:
        """What another machine has archived; raises ConfigError where the file is not as it was written."""
        archive = read_bytes(path, limit=LARGEST_ARCHIVE, inside=path.parent, error=ConfigError)
        if hashlib.sha256(archive).hexdigest() != sha256:
            raise ConfigError(f"{path}: expected the code that was submitted, found another content; submit it again")
        return cls(json.loads(archive))

    def unpack(self) -> Path:
        """A fresh folder that holds the package and that nobody else can write: to be put on sys.path."""
        folder = Path(tempfile.mkdtemp(prefix="gptlab_code_"))
        _write(folder, self.files)
        return folder


def patched(patch: Path) -> PatchedPackage:
    """The package under a patch.

    A patch changes or adds Python files of gptlab/ and nothing else: a researcher reads these, and a run of the arm
    can contain nothing that is not among them. Raises ConfigError where it cannot be read, does not apply, changes
    something else or nothing.
    """
    try:
        content = read_bytes(patch, limit=LARGEST_PATCH, error=ConfigError)
    except FileNotFoundError as error:
        raise ConfigError(f"patch {patch}: {error.strerror}; expected a file such as `git diff` writes") from None
    before = {f"gptlab/{name}": _text(package() / name) for name in _files(package()) if name != MARK}
    with tempfile.TemporaryDirectory(prefix="gptlab_patch_") as scratch:
        folder = Path(scratch, "package")
        _write(folder, before)
        apply_patch(patch, content, folder)
        after = {path: _changed(patch, folder, path, before) for path in _files(folder)}
    if lost := sorted(before.keys() - after.keys()):
        raise ConfigError(f"patch {patch}: it removes {shown(lost[0])}; empty the file instead")
    if after == before:
        raise ConfigError(f"patch {patch}: it changes nothing; leave it out")
    return PatchedPackage({**after, f"gptlab/{MARK}": hashlib.sha256(content).hexdigest() + "\n"}, content)


def _changed(patch: Path, folder: Path, name: str, before: Mapping[str, str]) -> str:
    """A file as the patch leaves it; raises ConfigError where that is no plain Python file of the package."""
    path = folder / name
    mode = path.lstat().st_mode
    text = _text(path) if stat.S_ISREG(mode) else ""
    if text == before.get(name) and not mode & 0o111:
        return text
    if not stat.S_ISREG(mode):
        found = kind_of(mode)
    elif mode & 0o111:
        found = "a program"
    elif not re.fullmatch(r"gptlab/(\w+/)*\w+\.py", name):
        found = "another file"
    elif not text.isprintable() and not all(c.isprintable() or c in "\n\t\f" for c in text):
        found = "no text"
    else:
        return text
    raise ConfigError(f"patch {patch}: expected changes of Python files in gptlab/, found {found}: {shown(name)}")


def apply_patch(patch: Path, content: bytes, folder: Path, to: str = f"gptlab {gptlab.__version__}") -> None:
    """`git apply` outside of any repository: inside one git would leave out what lies elsewhere.

    to: what the folder holds, in words. Raises ConfigError with git's reason where it does not apply.
    """
    where = environment(without="GIT_", GIT_CEILING_DIRECTORIES=os.path.realpath(folder.parent))
    command = ["git", "apply", "--whitespace=nowarn", "-"]
    try:
        done = subprocess.run(command, cwd=folder, input=content, check=False, capture_output=True, env=where)
    except FileNotFoundError:
        raise ConfigError(f"patch {patch}: applying it needs the program git, which is not installed") from None
    if done.returncode:
        reasons = done.stderr.decode(errors="replace").strip().splitlines() or ["no reason given"]
        raise ConfigError(
            f"patch {patch} does not apply to {to}: {reasons[0].removeprefix('error: ')}; "
            f"make it with `git diff{' -- gptlab' * to.startswith('gptlab ')}` against the code in use"
        )


def _files(folder: Path) -> Iterator[str]:
    """The names of all that lies in a folder and below, but for folders and what Python keeps there of itself."""
    for root, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if name != "__pycache__")
        links = [name for name in folders if Path(root, name).is_symlink()]
        for name in sorted([*names, *links]):
            yield Path(root, name).relative_to(folder).as_posix()


def _text(path: Path) -> str:
    return path.read_bytes().decode(errors="surrogateescape")


def _write(folder: Path, files: Mapping[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        with open_new(folder / name) as file:
            file.write(text.encode(errors="surrogateescape"))


class Worker(Protocol):
    """What trains a cell, wherever that is."""

    def over(self) -> bool:
        """Whether it has ended."""
        ...

    def stop(self) -> None:
        """Ask it to save and to end."""
        ...

    def kill(self) -> None:
        """End it now."""
        ...

    def close(self) -> str | None:
        """Let go of the cell. Gives in words the end that a worker could not report itself, or None."""
        ...


class Executor(Protocol):
    """Where workers come from."""

    def find(self, cell: Cell) -> Worker | None:
        """The cell's worker that another runner has left behind or shares, if there is one."""
        ...

    def start(self, cell: Cell, claim: Claim, code: PatchedPackage | None, words: Sequence[str]) -> Worker | None:
        """Have `gptlab WORDS` run with that code, or the package in use; None where there is no room after all.

        From then on the claim is the worker's.
        """
        ...

    def again(self, cell: Cell) -> bool:
        """Whether a cell that could continue, and whose worker has ended nevertheless, is to be started again."""
        ...

    def close(self) -> None:
        """Called when a runner needs no more workers for now."""
        ...


class Child:
    """A process of this machine that runs `gptlab WORDS` for the cell in a folder, and ends with this process."""

    def __init__(self, folder: Path, claim: Claim, code: PatchedPackage | None, words: Sequence[str]) -> None:
        """In a session of its own: a Ctrl-C reaches the runner alone, which asks its children to stop, once."""
        self._claim = claim
        self._code = code.unpack() if code else None
        command = python_command("gptlab.cli.main:main", *words, code=self._code, ends_with_us=True)
        with open_new(folder / OUTPUT) as output:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                pass_fds=[claim.descriptor],
            )

    def over(self) -> bool:
        return self._process.poll() is not None

    def stop(self) -> None:
        self._process.terminate()

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()
        self._process.wait()

    def close(self) -> str | None:
        self._claim.release()
        if self._code:
            shutil.rmtree(self._code, ignore_errors=True)
        return None if self.code in (0, Stopped.exit_code) else how_it_ended(self.code)

    @property
    def code(self) -> int:
        """The exit code of a process that is over."""
        return self._process.returncode


class ForkedChild(Child):
    """The same, forked from a server that has imported PyTorch already."""

    def __init__(self, server: ForkServer, folder: Path, claim: Claim, words: Sequence[str]) -> None:
        self._claim, self._server, self._code = claim, server, None
        with open_new(folder / OUTPUT) as output:
            self._cell = server.fork(words, output.fileno(), claim.descriptor)

    def over(self) -> bool:
        return self._server.code(self._cell) is not None

    def stop(self) -> None:
        self._server.send_signal(self._cell, signal.SIGTERM)

    def kill(self) -> None:
        self._server.send_signal(self._cell, signal.SIGKILL)
        wait_for(self._server, self._cell)

    @property
    def code(self) -> int:
        return wait_for(self._server, self._cell)


class Children:
    """Starts cells as processes of this machine. One that was killed is not tried again before the next `run`."""

    def __init__(self) -> None:
        self._server: ForkServer | None = None
        self._forks = sys.platform == "linux" and not _gpu_files()

    def find(self, cell: Cell) -> Child | None:
        return None

    def start(self, cell: Cell, claim: Claim, code: PatchedPackage | None, words: Sequence[str]) -> Child:
        revoke(cell.folder)  # a job that still waits for this cell somewhere is not needed any more
        if code or not self._forks:
            return Child(cell.folder, claim, code, words)
        if self._server is None or not self._server.alive:
            self.close()
            self._server = ForkServer()
        return ForkedChild(self._server, cell.folder, claim, words)

    def again(self, cell: Cell) -> bool:
        return False

    def close(self) -> None:
        if self._server:
            self._server.close()
            self._server = None
