"""How a run begins: in a new folder, where it was stopped, or not at all because it is finished or another run's."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gptlab
from gptlab.data.corpus import Corpus
from gptlab.errors import CheckpointError
from gptlab.options import flatten
from gptlab.runs import checkpoint
from gptlab.runs.folder import RunFolder, differences
from gptlab.runs.patches import applied
from gptlab.signals.user import file_hash
from gptlab.training.config import TrainingConfig


@dataclass(frozen=True)
class Beginning:
    """folder: the run's; checkpoint: where to go on from; finished: the summary of a run that needs nothing more."""

    folder: str
    checkpoint: str | None = None
    finished: dict[str, Any] | None = None
    notes: tuple[str, ...] = ()


def begin(config: TrainingConfig, corpus: Corpus, environment: Mapping[str, Any]) -> tuple[RunFolder, Beginning]:
    """Take the run's folder as its only writer and find where to start.

    Raises CheckpointError if the folder holds another run (with the difference), if `--resume must` finds nothing to
    go on with, or if no checkpoint of it is whole.
    """
    folder = RunFolder(_free(Path(config.folder)) if config.resume == "never" else config.folder)
    if config.resume == "must" and not folder.exists():
        raise CheckpointError(f"--resume must: expected a run in {folder.path}, found none; check --out")
    if summary := _finished(folder, config, corpus):
        return folder, Beginning(str(folder.path), finished=summary)
    folder.lock()
    try:
        if summary := _finished(folder, config, corpus):  # by the process that the lock was waited for
            folder.close()
            return folder, Beginning(str(folder.path), finished=summary)
        checkpoint.remove_debris(folder.checkpoints)
        found, notes = _where_to_go_on(folder, config)
        data = corpus.identity()
        made_of = {"gptlab": gptlab.__version__, "options": flatten(config), "data": data}
        if code := _code(config):
            made_of["code"] = code
        if patch := applied():
            made_of["patch"] = patch
        folder.record("config.json", made_of)
        folder.record("environment.json", environment)
        folder.open_records(**(found.state["records"] if found else {}))
    except BaseException:
        folder.close()
        raise
    return folder, Beginning(str(folder.path), str(found.folder) if found else None, notes=tuple(notes))


def _where_to_go_on(folder: RunFolder, config: TrainingConfig) -> tuple[checkpoint.Checkpoint | None, list[str]]:
    """The checkpoint and notes of `RunFolder.load_newest`; where that fails the run's last row says why."""
    try:
        found, notes = folder.load_newest()
        if config.resume == "must" and found is None:
            raise CheckpointError(
                f"--resume must: {folder.path} has no checkpoint yet; use --resume auto to start it anew"
            )
    except CheckpointError as error:
        folder.append_event({"event": type(error).__name__, "text": str(error)})
        raise
    return found, notes


def _finished(folder: RunFolder, config: TrainingConfig, corpus: Corpus) -> dict[str, Any] | None:
    """The summary if the folder's run is the one asked for and finished, None if there is none or not so far.

    Raises CheckpointError with the difference if it is another. A run that never made a step can be any.
    """
    if not folder.begun():
        return None
    lines = differences(folder.config(), config)
    if folder.recorded("config.json").get("code", {}) != _code(config):
        lines.append("code: a signal's file has changed since the run began")
    if folder.recorded("config.json").get("patch") != applied():
        lines.append("patch: the run was made by this code under another patch, or under none")
    lines += [f"data: {line}" for line in corpus.grew_from(folder.recorded("config.json", "data")["data"])]
    if lines:
        listed = "\n  ".join(lines)
        raise CheckpointError(
            f"{folder.path} holds another run; use --resume never for a new folder, or give --out:\n  {listed}"
        )
    return folder.finished(config.steps)


def _code(config: TrainingConfig) -> dict[str, str]:
    """SHA-256 of the file of every signal that is a user's own."""
    return {signal.name: file_hash(signal.name) for signal in config.signals if signal.is_code}


def _free(path: Path) -> Path:
    """`path`, or with -2, -3, ... the first that holds no run."""
    candidate, n = path, 1
    while RunFolder(candidate).exists():
        n += 1
        candidate = path.with_name(f"{path.name}-{n}")
    return candidate


def restore(path: str) -> checkpoint.Checkpoint:
    """The checkpoint that rank 0 chose, read and verified by every rank."""
    return checkpoint.load(Path(path))


def as_json(beginning: Beginning) -> dict[str, Any]:
    return dataclasses.asdict(beginning)
