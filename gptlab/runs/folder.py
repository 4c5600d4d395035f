"""A run's folder: config.json, environment.json, metrics.jsonl, log.txt, checkpoints/, and one writer at a time.

Rows are appended and a checkpoint records how long the files were, so that a resume cuts off what came after it and
writes it again: no row twice, none missing.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from gptlab.errors import CheckpointError, ConfigError, UsageError
from gptlab.files import KB, LOCK, open_append, read_text, refuse_links, take_lock, write_json
from gptlab.options import recorded
from gptlab.runs import checkpoint
from gptlab.runs.records import last_row, read_record, read_rows
from gptlab.training.config import TrainingConfig

LOCK_PATIENCE = 30.0
WRITTEN = ("config.json", "environment.json", "metrics.jsonl", "log.txt", "report.html", "checkpoints", LOCK)
"""What a run's writer makes in its folder."""


class RunFolder:
    """The folder of one run, opened for reading; `lock` makes this process its writer."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._lock: BinaryIO | None = None
        self._metrics: BinaryIO | None = None
        self._log: BinaryIO | None = None

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    def exists(self) -> bool:
        """Whether a run was ever set up here."""
        return (self.path / "config.json").is_file()

    def begun(self) -> bool:
        """Whether the run has made a step; one that failed before (options, memory) leaves nothing to keep."""
        return self.exists() and (
            bool(checkpoint.complete(self.checkpoints)) or any(row["kind"] == "train" for row in self.rows())
        )

    def refuse_foreign(self) -> None:
        """Raise CheckpointError where the folder holds what looks like a run and is none: nothing of it is to be lost.

        A run's config.json is written first, so that there is no record of ours without it.
        """
        self._refuse_links()
        found = ""
        if os.path.lexists(self.path / "config.json"):
            try:
                self.recorded("config.json", "options")
            except CheckpointError:
                found = "a config.json that is no run's"
        elif names := [name for name in WRITTEN if name != LOCK and (self.path / name).exists()]:
            found = f"{' and '.join(names)} without a config.json"
        if found:
            raise CheckpointError(f"expected a new folder or a run's, found {found} in {self.path}; give another --out")

    def finished_at(self) -> int | None:
        """The last step at which the run was finished; it may have continued since."""
        return max((row["step"] for row in self.rows() if row.get("event") == "finished"), default=None)

    def lock(self, patience: float = LOCK_PATIENCE) -> None:
        """Become the only writer; raises CheckpointError naming the holder if it does not let go in `patience` s."""
        holder = ""
        self._refuse_links()
        deadline = time.monotonic() + patience
        while (file := take_lock(self.path / LOCK, error=CheckpointError)) is None:
            if time.monotonic() > deadline:
                with contextlib.suppress(FileNotFoundError, CheckpointError):
                    holder = read_text(self.path / LOCK, limit=KB, inside=self.path, error=CheckpointError).strip()
                raise CheckpointError(
                    f"{self.path} is being written by {holder or 'another process'}; wait for it, stop it, or give "
                    "another --out"
                )
            time.sleep(0.2)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}".encode())
        file.flush()
        self._lock = file

    def _refuse_links(self) -> None:
        """Raise CheckpointError where a file of the run is a link: who writes the run would write what it leads to."""
        for name in WRITTEN:
            if (path := self.path / name).is_symlink():
                raise CheckpointError(
                    f"{path} is a link to elsewhere; a run is written in its own folder only: remove the link, or "
                    "give another --out"
                )

    def close(self) -> None:
        """Write no more, and let go of the lock."""
        for file in (self._metrics, self._log, self._lock):
            if file is not None:
                file.close()
        self._metrics = self._log = self._lock = None

    def config(self) -> TrainingConfig:
        """The recorded config; raises CheckpointError where it is missing, damaged or of another version."""
        options = self.recorded("config.json", "options")["options"]
        try:
            return recorded(TrainingConfig, options)
        except ConfigError as error:
            raise CheckpointError(f"{self.path / 'config.json'} is no config of this version: {error}") from None

    def recorded(self, name: str, *keys: str) -> dict[str, Any]:
        """A JSON file of the folder: an object that has an object for each of `keys`; raises CheckpointError."""
        return read_record(self.path / name, *keys)

    def record(self, name: str, value: Mapping[str, Any]) -> None:
        """Write a JSON file of the folder, whole or not at all."""
        self.path.mkdir(parents=True, exist_ok=True)
        write_json(self.path / name, value)

    def rows(self) -> Iterator[dict[str, Any]]:
        """The rows of metrics.jsonl; a last line that was cut off by a kill is left out.

        Raises CheckpointError naming the first line that is no row.
        """
        return read_rows(self.path)

    def finished(self, steps: int) -> dict[str, Any] | None:
        """The summary of a run that reached `steps`, else None."""
        last, _ = last_row(self.path)  # None for a damaged tail: that run is not finished
        return last if last and last.get("event") == "finished" and last["step"] >= steps else None

    def open_records(self, metrics_bytes: int = 0, log_bytes: int = 0) -> None:
        """Open metrics.jsonl and log.txt for appending after so many bytes; what stood behind is cut off."""
        self._metrics = _open_at(self.path / "metrics.jsonl", metrics_bytes)
        self._log = _open_at(self.path / "log.txt", log_bytes)

    def write(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        """Append a row to metrics.jsonl, and build-nanogpt's line to log.txt for train and val rows."""
        if self._metrics is None or self._log is None:
            return
        row = {"step": step, "kind": kind, **values}
        try:
            self._metrics.write(json.dumps(row, allow_nan=False).encode() + b"\n")
            self._metrics.flush()
            if kind in ("train", "val"):
                self._log.write(f"{step} {kind} {values['loss']:.{6 if kind == 'train' else 4}f}\n".encode())
            self._log.flush()
        except OSError as error:
            self._metrics = None
            raise CheckpointError(
                f"could not write {self.path / 'metrics.jsonl'}: {error.strerror}; "
                "make room and run the same command again"
            ) from error

    def append_event(self, values: Mapping[str, Any]) -> None:
        """Write an event row behind all whole rows there are, at the step of the last one."""
        path, log = self.path / "metrics.jsonl", self.path / "log.txt"
        if not path.exists() or not log.exists():
            return
        last, end = last_row(self.path)
        self.open_records(end, log.stat().st_size)
        self.write("event", last["step"] if last else 0, values)

    def written(self) -> dict[str, int]:
        """The lengths of the record files, flushed to disk: what a checkpoint keeps to cut them back to."""
        lengths = {}
        for name, file in (("metrics_bytes", self._metrics), ("log_bytes", self._log)):
            assert file is not None, "records are opened before a checkpoint is saved"
            file.flush()
            os.fsync(file.fileno())
            lengths[name] = file.tell()
        return lengths

    def newest_whole(self) -> tuple[checkpoint.Verified | None, list[str]]:
        """The newest checkpoint that is whole, and what was said of newer ones that are not.

        Raises CheckpointError if there are checkpoints and none of them is whole.
        """
        notes: list[str] = []
        for folder in checkpoint.complete(self.checkpoints):
            try:
                refuse_links(folder, self.path, error=CheckpointError)
                return checkpoint.verified(folder), notes
            except CheckpointError as error:
                notes.append(f"{error}; falling back to the checkpoint before it")
        if notes:
            raise CheckpointError(f"no checkpoint in {self.checkpoints} is whole: {notes[0].partition(';')[0]}")
        return None, notes


def _open_at(path: Path, length: int) -> BinaryIO:
    file = open_append(path, error=CheckpointError)
    if os.fstat(file.fileno()).st_size < length:
        file.close()
        raise CheckpointError(f"{path} is shorter than its checkpoint says: expected at least {length} bytes")
    file.truncate(length)
    file.seek(0, os.SEEK_END)
    return file


def newest(run: str | Path) -> Path:
    """The checkpoint folder that `run` names: a run's newest, or itself; raises CheckpointError where there is none."""
    path = Path(run)
    if (path / checkpoint.MANIFEST).exists() or (path / checkpoint.WEIGHTS).exists():
        return path
    found = [folder for folder in checkpoint.complete(path / "checkpoints") if not folder.is_symlink()]
    if not found:
        raise CheckpointError(f"expected a run or a checkpoint, found none at {path}; train one or check the path")
    return found[0]


TRASH = ".trash"


def deletable(root: Path, name: str) -> Path:
    """The run in `root` that `name` means: a path below it, or as seen from here.

    Raises UsageError where it lies anywhere else, is a link, is `root` itself, or is no run.
    """
    inside = root.resolve()
    path = root / name if (root / name).exists() else Path(name)
    if not os.path.lexists(path):
        raise UsageError(f"expected a run in {root}, found none named {name}; see `gptlab runs {root}`")
    real = path.resolve()
    if path.is_symlink() or real == inside or inside not in real.parents:
        raise UsageError(f"expected a run inside {root}, found {name}; nothing elsewhere is deleted")
    if TRASH in real.relative_to(inside).parts:
        raise UsageError(f"{name} is in the trash already")
    if not RunFolder(real).exists():
        raise UsageError(f"expected a run at {name}, found no config.json there; see `gptlab runs {root}`")
    return real


def move_to_trash(root: Path, run: Path) -> Path:
    """Move a run into `root`/.trash and give its place; raises CheckpointError where a process is writing it.

    The run's lock is held meanwhile, so that nobody can begin to write it.
    """
    folder = RunFolder(run)
    folder.lock(patience=0.0)
    try:
        trash = root.resolve() / TRASH
        trash.mkdir(exist_ok=True)
        if trash.resolve() != trash:
            raise CheckpointError(f"{trash} is a link to elsewhere; remove the link to delete runs")
        name = "-".join(run.relative_to(root.resolve()).parts)
        target, number = trash / name, 2
        while target.exists():
            target, number = trash / f"{name}-{number}", number + 1
        run.rename(target)
    finally:
        folder.close()
    return target
