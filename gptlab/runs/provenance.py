"""What a run is made of, how that has changed since it began, and resuming despite it (`--despite`).

A run that is resumed with other options, data or code is no longer the run that it says it is. It is refused with the
difference, a line each; with `--despite` it continues, and the difference stands in config.json from then on, so that
`gptlab compare` shows it too.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from typing import Any

import gptlab
from gptlab.data.corpus import Corpus
from gptlab.errors import CheckpointError
from gptlab.options import flatten
from gptlab.runs.executor import applied
from gptlab.runs.folder import RunFolder, differences
from gptlab.runs.records import read_config
from gptlab.signals.user import file_hash
from gptlab.training.config import TrainingConfig

FIXED = ("tokenizer", "block_size", "n_layer", "n_embd", "share_blocks", "optimizer")
"""Options that decide which tensors there are: with another of these a checkpoint does not fit."""
PASSING = ("launch", "reasons", "earlier")
"""What environment.json says of a session alone."""


def made_of_what(config: TrainingConfig, corpus: Corpus) -> dict[str, Any]:
    """What config.json records of a run."""
    found: dict[str, Any] = {"gptlab": gptlab.__version__, "options": flatten(config), "data": corpus.identity()}
    if code := _code(config):
        found["code"] = code
    if patch := applied():
        found["patch"] = patch
    return found


def changes(folder: RunFolder, config: TrainingConfig, corpus: Corpus) -> list[str]:
    """What makes of the folder's run another than the one asked for, one line each."""
    lines = differences(folder.config(), config)
    before = read_config(folder.path)
    files = {os.path.basename(str(name)): file for name, file in (before.get("code") or {}).items()}
    if files != {os.path.basename(name): file for name, file in _code(config).items()}:
        lines.append("code: a signal's file has changed since the run began")
    if before.get("patch") != applied():
        lines.append("patch: the run was made by this code under another patch, or under none")
    return lines + [f"data: {line}" for line in corpus.grew_from(before["data"])]


def refuse(folder: RunFolder, config: TrainingConfig, corpus: Corpus, despite: bool) -> None:
    """Raise CheckpointError with the difference if the folder's run is another; despite: only what cannot fit."""
    lines = changes(folder, config, corpus)
    if not lines:
        return
    listed = "\n  ".join(lines)
    if not despite:
        raise CheckpointError(
            f"{folder.path} holds another run; use --resume never for a new folder, give --out, or continue it "
            f"--despite:\n  {listed}"
        )
    old, new = flatten(folder.config()), flatten(config)
    if unfit := [key for key in FIXED if old[key] != new[key]]:
        raise CheckpointError(
            f"--despite: a checkpoint of {folder.path} does not fit another {', '.join(unfit)}; "
            f"use --resume never for a new folder, or give --out:\n  {listed}"
        )


def recorded(folder: RunFolder, changed: list[str], step: int) -> list[dict[str, Any]]:
    """All that the run was resumed despite of: what config.json says, and what has changed now, at `step`."""
    before = read_config(folder.path).get("despite", []) if folder.begun() else []
    return [*before, {"step": step, "differences": changed}] if changed else before


def sessions_before(environment: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What environment.json says of earlier sessions, as far as it is objects."""
    earlier = environment.get("earlier")
    return [one for one in earlier if isinstance(one, dict)] if isinstance(earlier, list) else []


def made_elsewhere(folder: RunFolder, environment: Mapping[str, Any], step: int) -> dict[str, Any]:
    """{"earlier": what environment.json said of each session before, up to its last step}, where those differ from now.

    A run that is resumed after an update, or on another machine, was made by both.
    """
    if not step:
        return {}
    before: dict[str, Any] = {}
    with contextlib.suppress(CheckpointError):  # nothing hangs on it
        before = folder.recorded("environment.json")
    earlier = sessions_before(before)
    before.pop("earlier", None)
    before["gptlab"] = folder.recorded("config.json").get("gptlab")
    if any(before.get(key) != value for key, value in {**environment, "gptlab": gptlab.__version__}.items()
           if key not in PASSING):  # fmt: skip
        earlier = [*earlier, {"until_step": step, **before}]
    return {"earlier": earlier} if earlier else {}


def _code(config: TrainingConfig) -> dict[str, str]:
    """SHA-256 of the file of every signal that is a user's own."""
    return {signal.name: file_hash(signal.name) for signal in config.signals if signal.is_code}
