"""How a run begins: in a new folder, where it was stopped, or not at all because it is finished or another run's."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gptlab.data.corpus import Corpus
from gptlab.errors import CheckpointError
from gptlab.runs import checkpoint
from gptlab.runs.folder import RunFolder
from gptlab.runs.provenance import changes, made_elsewhere, made_of_what, recorded, refuse
from gptlab.training.config import TrainingConfig


@dataclass(frozen=True)
class Beginning:
    """folder: the run's; checkpoint: where to go on from; finished: the summary of a run that needs nothing more."""

    folder: str
    checkpoint: str | None = None
    finished: dict[str, Any] | None = None
    notes: tuple[str, ...] = ()


def begin(
    config: TrainingConfig, corpus: Corpus, environment: Mapping[str, Any], *, despite: bool = False, attempt: int = 0
) -> tuple[RunFolder, Beginning]:
    """Take the run's folder as its only writer and find where to start.

    despite: go on with a run of other options, data or code, and record what differs (see `despite.py`). attempt: how
    often torchrun has started this command anew. Raises CheckpointError if the folder holds another run (with the
    difference) or what is no run's, if `--resume must` finds nothing to go on with, if no checkpoint of it is whole, or
    if it finished before and its checkpoints are gone.
    """
    launch = environment.get("launch") if attempt else None
    folder = RunFolder(_free(Path(config.folder), launch) if config.resume == "never" else config.folder)
    if config.resume == "must" and not folder.exists():
        raise CheckpointError(f"--resume must: expected a run in {folder.path}, found none; check --out")
    if summary := _finished(folder, config, corpus, despite):
        return folder, Beginning(str(folder.path), finished=summary)
    folder.refuse_foreign()
    folder.lock()
    try:
        if summary := _finished(folder, config, corpus, despite):  # by the process that the lock was waited for
            folder.close()
            return folder, Beginning(str(folder.path), finished=summary)
        checkpoint.remove_debris(folder.checkpoints)
        changed = changes(folder, config, corpus) if folder.begun() else []
        found, notes = _where_to_go_on(folder, config)
        if found is None and folder.begun() and (step := folder.finished_at()):
            raise CheckpointError(
                f"{folder.path} finished at step {step} and has no checkpoint to go on from; "
                "give another --out, or --resume never for a new folder"
            )
        made_of = made_of_what(config, corpus)
        step = found.step if found else 0
        if history := recorded(folder, changed, step):
            made_of["despite"] = history
        environment = {**environment, **made_elsewhere(folder, environment, step)}
        if environment.get("earlier", [{}])[-1].get("until_step") == step > 0:
            notes.append("until here it was made by other software or elsewhere; environment.json keeps both")
        folder.record("config.json", made_of)
        folder.record("environment.json", environment)
        folder.open_records(**(found.state["records"] if found else {}))
        if changed:
            folder.write("event", step, {"event": "despite", "differences": changed})
            notes.append("going on despite:" + "".join(f"\n  {line}" for line in changed))
    except BaseException:
        folder.close()
        raise
    return folder, Beginning(str(folder.path), str(found.folder) if found else None, notes=tuple(notes))


def _where_to_go_on(folder: RunFolder, config: TrainingConfig) -> tuple[checkpoint.Verified | None, list[str]]:
    """The checkpoint and notes of `RunFolder.newest_whole`; where that fails the run's last row says why."""
    try:
        found, notes = folder.newest_whole()
        if config.resume == "must" and found is None:
            raise CheckpointError(
                f"--resume must: {folder.path} has no checkpoint yet; use --resume auto to start it anew"
            )
    except CheckpointError as error:
        folder.append_event({"event": type(error).__name__, "text": str(error)})
        raise
    return found, notes


def _finished(folder: RunFolder, config: TrainingConfig, corpus: Corpus, despite: bool) -> dict[str, Any] | None:
    """The summary if the folder's run is the one asked for and finished, None if there is none or not so far.

    Raises CheckpointError with the difference if it is another. A run that never made a step can be any.
    """
    if not folder.begun():
        return None
    refuse(folder, config, corpus, despite)
    return folder.finished(config.steps)


def _free(path: Path, launch: str | None) -> Path:
    """`path`, or with -2, -3, ... the first that holds no run.

    launch: torchrun's name for this start, where it has started the command anew; the unfinished run of that name,
    which is the newest there is, then goes on.
    """
    candidate, n, last = path, 1, None
    while RunFolder(candidate).exists():
        n, last = n + 1, candidate
        candidate = path.with_name(f"{path.name}-{n}")
    if launch and last:
        run = RunFolder(last)
        if run.recorded("environment.json").get("launch") == launch and not run.finished(run.config().steps):
            return last
    return candidate


def as_json(beginning: Beginning) -> dict[str, Any]:
    return dataclasses.asdict(beginning)
