"""Cells as jobs of a cluster, submitted through submitit: to Slurm, or as submitit's own processes on this machine.

All machines share the experiment's folder, and its locks. Whether a job trains its cell is shown by the cell's claim,
which the job itself holds; how far it came, by the cell's rows. The cluster is asked only of jobs that hold no claim.
submitit pickles its calls into a folder of the experiment: whoever can write there can run code as you.

A job has a lease, a file in the cell's folder that the runner writes and revokes. A job that finds it gone, or
another's, ends, and saves first if it has begun. So a cell is never trained by two jobs, however many were submitted
by runners that were killed, and a job is stopped in the same way whether it waits or runs, and wherever that is.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import shlex
import signal
import sys
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Literal

from gptlab.errors import ConfigError, GptlabError, Stopped, did_you_mean, needs_package, one_line
from gptlab.files import open_regular, write_whole
from gptlab.options import option, options_of, typed
from gptlab.processes import end_with
from gptlab.runs.cells import OUTPUT, Cell, Claim, claimed, lease, leased, revoke, saved_step
from gptlab.runs.executor import Child, PatchedPackage

if TYPE_CHECKING:
    import submitit

System = Literal["slurm", "local"]

FOLDER = ".jobs"
"""Where submitit keeps its scripts, pickles and logs, in the experiment's folder."""

TRIES = 3
"""Jobs of a cell in a row that may end without a further checkpoint."""

ASK_EVERY = 30.0
"""Seconds between two questions to the cluster about a job that has let go of its claim."""

LOST = 600.0
"""Seconds after which a job counts as gone of which the cluster knows nothing, or only that it was preempted."""

REFUSED = 60.0
"""Seconds that nothing is submitted after a refusal, be it of too many jobs."""

PATIENCE = 60.0
"""Seconds that a job waits for the cell's claim: the runner has it while it submits."""

LOOK_EVERY = 1.0
"""Seconds between two looks of a job at its lease."""


@dataclass(frozen=True)
class JobOptions:
    """What --slurm KEY=VALUE may ask of the cluster for each job. A job is one process on one node."""

    partition: str | None = option(None, "where jobs are queued")
    account: str | None = option(None, "who pays")
    qos: str | None = option(None, "quality of service")
    constraint: str | None = option(None, "features that a node must have")
    timeout_min: int = option(
        240, "time of a job; a cell that needs more saves and continues in the next", unit="minutes"
    )
    signal_delay_s: int = option(120, "time to save before that ends", unit="seconds")
    cpus_per_task: int = option(0, "cores of a job", shown="the cluster's choice")
    gpus_per_node: int = option(0, "GPUs of a job, 0 or 1")
    gres: str | None = option(None, "other resources, as Slurm names them")
    mem_gb: float = option(0.0, "memory of a job", unit="GB", shown="the cluster's choice")
    nodelist: str | None = option(None, "nodes that may be used")
    exclude: str | None = option(None, "nodes that may not")
    mail_type: str | None = option(None, "events of which Slurm sends mail")
    mail_user: str | None = option(None, "to whom")
    setup: str | None = option(None, "a shell command to run before, to load modules, say")

    def __post_init__(self) -> None:
        if not 0 <= self.gpus_per_node <= 1:
            raise ConfigError(f"gpus_per_node: expected 0 or 1, a cell is one process; found {self.gpus_per_node}")
        for name in ("timeout_min", "signal_delay_s"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: expected at least 1, found {getattr(self, name)}")

    @classmethod
    def read(cls, words: Sequence[str]) -> JobOptions:
        """The options in `words`, each KEY=VALUE; raises ConfigError that names the nearest key."""
        known = {one.key: one for one in options_of(cls)}
        found: dict[str, Any] = {}
        for word in words:
            key, equals, value = word.partition("=")
            key = key.strip().replace("-", "_")
            if not equals:
                raise ConfigError(f"expected KEY=VALUE, found {word!r}")
            if key not in known:
                raise ConfigError(f"unknown key {key!r}{did_you_mean(key, known)}; there are {', '.join(known)}")
            found[key] = typed(known[key], value)
        return cls(**found)

    def parameters(self) -> dict[str, Any]:
        """As submitit's AutoExecutor takes them; what was not asked for is left out."""
        given = {key: value for key, value in dataclasses.asdict(self).items() if value}
        if self.setup:
            given["setup"] = [self.setup]
        shared = ("timeout_min", "cpus_per_task", "gpus_per_node", "mem_gb")
        return {key if key in shared else f"slurm_{key}": value for key, value in given.items()}


class Job:
    """A cell's job. submitted: the cluster's side of it."""

    def __init__(self, cell: Cell, submitted: submitit.Job[int], token: str) -> None:
        self.cell, self._submitted, self._token = cell, submitted, token
        self._stopped, self._ran = False, False
        self._asked = time.monotonic()
        self._unknown_since: float | None = None

    def over(self) -> bool:
        if claimed(self.cell):
            self._ran, self._unknown_since = True, None
            return False
        if self._stopped:  # a job that waited was taken out of the queue
            return self._is_slurm or self._submitted.done()
        now = time.monotonic()
        press = self._ran and now - self._asked >= ASK_EVERY
        if press:
            self._asked = now
        if self._submitted.done(force_check=press):
            return True
        if self._submitted.state not in ("UNKNOWN", "PREEMPTED"):  # of which submitit says that they are not done
            self._unknown_since = None
            return False
        self._unknown_since = self._unknown_since or now
        return now - self._unknown_since >= LOST

    def stop(self) -> None:
        self._stopped = True
        revoke(self.cell.folder, self._token)
        if self._is_slurm and not claimed(self.cell):
            self._submitted.cancel(check=False)

    def kill(self) -> None:
        if self._is_slurm:
            self._submitted.cancel(check=False)
            return
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(self._submitted.job_id), signal.SIGKILL)
        while not self._submitted.done():
            time.sleep(0.05)

    def close(self) -> str | None:
        revoke(self.cell.folder, self._token)
        if self._stopped:
            return None
        log, lines = self._submitted.paths.stdout, []
        with contextlib.suppress(FileNotFoundError, GptlabError), open_regular(log) as file:
            file.seek(max(0, log.stat().st_size - 20_000))
            lines = file.read().decode(errors="replace").split("\n")
        last = next((line.strip() for line in reversed(lines) if line.strip()), "nothing")
        return (
            f"{TRIES} jobs in a row saved no further checkpoint; the last, {self._submitted.job_id}, is "
            f"{self._submitted.state.lower()}, and its log {log} ends: {last}"
        )

    @property
    def _is_slurm(self) -> bool:
        import submitit

        return isinstance(self._submitted, submitit.SlurmJob)


class Jobs:
    """Submits cells of an experiment in `folder`, each as a job of its own."""

    def __init__(self, system: System, name: str, folder: Path, options: JobOptions) -> None:
        """name: of the jobs; raises ConfigError where submitit, or the cluster, is not there."""
        if find_spec("submitit") is None:
            raise ConfigError(needs_package(f"--executor {system}", "submitit"))
        import submitit

        self.system: System = system
        os.environ["PYTHONSAFEPATH"] = "1"  # submitit starts Python where the experiment's files may lie
        python = f"{shlex.quote(sys.executable)} -P"
        try:
            self._executor = submitit.AutoExecutor(folder / FOLDER, cluster=system, slurm_python=python)
        except RuntimeError:
            raise ConfigError("expected Slurm's srun and sbatch on PATH, found none; use a login node") from None
        parameters = {**options.parameters(), "name": name, "stderr_to_stdout": True}
        if system == "local" and options.timeout_min == JobOptions.timeout_min:
            parameters["timeout_min"] = 60 * 24 * 365  # nobody waits for this machine
        self._executor.update_parameters(**parameters)
        self._saved: dict[str, int] = {}
        self._futile: dict[str, int] = {}
        self._accepted, self._refused_until = 0, 0.0

    def find(self, cell: Cell) -> Job | None:
        import submitit

        found = leased(cell.folder)
        if found.get("system") != self.system or not all(isinstance(found.get(key), str) for key in ("id", "token")):
            return None
        kind = submitit.SlurmJob if self.system == "slurm" else submitit.LocalJob
        job = Job(cell, kind(self._executor.folder, found["id"]), found["token"])
        if not claimed(cell) and job.over():
            return None
        self._saved.setdefault(cell.name, saved_step(cell))
        return job

    def start(self, cell: Cell, claim: Claim, code: PatchedPackage | None, words: Sequence[str]) -> Job | None:
        if time.monotonic() < self._refused_until:
            return None
        token = uuid.uuid4().hex
        lease(cell.folder, token)
        (cell.folder / OUTPUT).unlink(missing_ok=True)  # what an earlier try said is no reason any more
        local = "yes" if self.system == "local" else "no"
        try:
            with blocked(signal.SIGINT):  # a Ctrl-C here is for the runner, not for submitit's local processes
                submitted = self._executor.submit(
                    train_cell, *self._archived(code), str(cell.folder.absolute()), token, local, *words
                )
        except (RuntimeError, OSError) as error:
            return self._refused(cell, error)
        lease(cell.folder, token, system=self.system, id=str(submitted.job_id))
        self._accepted += 1
        self._saved.setdefault(cell.name, saved_step(cell))
        claim.release()
        return Job(cell, submitted, token)

    def _archived(self, code: PatchedPackage | None) -> tuple[str, str]:
        """The file in which a job finds the code to run, and its SHA-256; nothing of it for the package in use."""
        if code is None:
            return "", ""
        archive = code.archive
        sha256 = hashlib.sha256(archive).hexdigest()
        path = Path(self._executor.folder).absolute() / f"code_{sha256[:16]}.json"
        write_whole(path, archive)
        return str(path), sha256

    def _refused(self, cell: Cell, error: Exception) -> None:
        """Wait a while where other jobs were accepted: there may be too many. Else raise ConfigError."""
        revoke(cell.folder)
        if not self._accepted:
            raise ConfigError(f"--executor {self.system}: the job was not accepted: {one_line(error)}") from None
        self._refused_until = time.monotonic() + REFUSED

    def again(self, cell: Cell) -> bool:
        saved = saved_step(cell)
        further = saved > self._saved.get(cell.name, 0)
        self._saved[cell.name] = saved
        self._futile[cell.name] = 0 if further else self._futile.get(cell.name, 0) + 1
        return self._futile[cell.name] < TRIES

    def close(self) -> None:
        """Jobs outlive their runner."""


def train_cell(archive: str, sha256: str, folder: str, token: str, with_launcher: str, *words: str) -> int:
    """Run `gptlab WORDS` on a node, with the code that an archive of this hash holds, or the package in use.

    Gives the exit code, Stopped's where the job is not needed. with_launcher: "yes" ends this process when the one that
    started it ends. SIGTERM, and the signal by which a cluster announces that time is up, ask the training to save and
    to end, once. A plain function of strings: submitit pickles the call.
    """
    if with_launcher == "yes":
        end_with(os.getppid())
    asked = _Asked(Path(folder), token)
    claim = _claim(Path(folder), asked)
    if claim is None:
        print("this job is not needed any more, or another process has the cell")
        return Stopped.exit_code
    code = PatchedPackage.from_archive(Path(archive), sha256) if archive else None
    with blocked(_announcement()):  # some clusters signal the whole tree: it means this process
        child = Child(Path(folder), claim, code, words)
    stopping = False
    while not child.over():
        time.sleep(0.1)
        if not stopping and asked():
            child.stop()
            stopping = True
    child.close()
    return child.code


class _Asked:
    """Called, it says whether the job is to end: a signal came, or its lease is gone."""

    def __init__(self, folder: Path, token: str) -> None:
        self._folder, self._token = folder, token
        self._asked, self._looked = False, 0.0
        for number in (signal.SIGTERM, _announcement()):
            signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._asked = True

    def __call__(self) -> bool:
        now = time.monotonic()
        if not self._asked and now - self._looked >= LOOK_EVERY:
            self._looked = now
            self._asked = leased(self._folder).get("token") != self._token
        return self._asked


def _claim(folder: Path, asked: _Asked) -> Claim | None:
    """The cell's claim, or None where the job is to end or another process keeps it."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline and not asked():
        if claim := Claim.take(folder):
            return claim
        time.sleep(0.1)
    return None


def _announcement() -> signal.Signals:
    """The signal by which submitit has a cluster announce the end of a job's time: USR2, unless the user chose."""
    from submitit import JobEnvironment

    return signal.Signals[f"SIG{JobEnvironment.USR_SIG}"]


@contextlib.contextmanager
def blocked(number: signal.Signals) -> Iterator[None]:
    """Block a signal for a while; processes started meanwhile never get it."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {number})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
