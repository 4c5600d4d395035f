"""An experiment without its weights: all that `gptlab compare` reads, small enough to be committed or sent.

The copy is laid out as the experiment's own folder, so that everything that reads one reads the other. Put back under
log/, its cells count as finished, and `gptlab experiment run` makes only those that are missing.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gptlab.data.prepare import known_tokens
from gptlab.errors import CheckpointError, ConfigError
from gptlab.runs.cells import CLAIM, ENDED, Cell, Rows, cells_of
from gptlab.runs.choice import FILE as CHOICE
from gptlab.runs.experiment_file import FILE, Experiment
from gptlab.runs.lock import LOCK
from gptlab.runs.records import Clock, read_config, read_environment, read_rows
from gptlab.runs.results import FILE as RESULTS
from gptlab.runs.results import write_whole
from gptlab.runs.trials import trial_experiment, trials_folder

EVERY = 50
"""Updates between two train rows that are kept whole."""
LIVE = ("checkpoints", "log.txt", LOCK, CLAIM)
"""What a cell has and its copy has not."""


def pack(experiment: Experiment, folder: Path, out: Path) -> list[Cell]:
    """Copy the cells of `folder` that have ended into `out`, and give them; raises ConfigError where none has.

    Of metrics.jsonl validations, events, every EVERYth update and the last, and of the others the doses are kept; of
    checkpoints and samples nothing.
    """
    if out.resolve() == folder.resolve():
        raise ConfigError(f"--out: expected another folder than the experiment's own, found {out}")
    if (out / FILE).is_file() and (out / FILE).read_text(encoding="utf-8") != experiment.text:
        raise ConfigError(f"{out} holds another experiment, or another version of its file; give another --out")
    ended = [cell for cell in cells_of(experiment, folder) if Rows(cell).look().state(running=False) in ENDED]
    if not ended:
        raise ConfigError(f"expected finished cells in {folder}, found none; run the experiment first")
    for cell in ended:
        there = out / cell.folder.relative_to(folder)
        if live := [name for name in LIVE if (there / name).exists()]:
            raise ConfigError(f"{there} is a run, with {live[0]}, which a copy would damage; give another --out")
    out.mkdir(parents=True, exist_ok=True)
    for cell in ended:
        there = out / cell.folder.relative_to(folder)
        there.mkdir(parents=True, exist_ok=True)
        write_whole(there / "config.json", json.dumps(_config(cell), indent=1) + "\n")
        write_whole(there / "environment.json", json.dumps(read_environment(cell.folder), indent=1) + "\n")
        write_whole(there / "metrics.jsonl", "".join(f"{json.dumps(row)}\n" for row in _kept(cell)))
    write_whole(out / FILE, experiment.text)
    for name in (RESULTS, CHOICE):
        if (folder / name).is_file():
            write_whole(out / name, (folder / name).read_text(encoding="utf-8"))
    trials = trials_folder(folder)
    return [*pack(trial_experiment(experiment), trials, trials_folder(out)), *ended] if _has_trials(trials) else ended


def _has_trials(folder: Path) -> bool:
    """A choice stands without its trials, whose folder may be removed."""
    return (folder / FILE).is_file()


def _config(cell: Cell) -> dict[str, Any]:
    """The cell's config, and how many tokens its corpus has, which elsewhere may not be at hand."""
    config = read_config(cell.folder)
    options, data = config["options"], config["data"]
    try:
        tokens = data.get("train_tokens") or known_tokens(options["data"], options["tokenizer"], data["train"])
    except (KeyError, TypeError, ValueError):
        raise CheckpointError(f"{cell.folder / 'config.json'} is damaged: expected what data the run had") from None
    return {**config, "data": {**data, "train_tokens": tokens}}


def _kept(cell: Cell) -> Iterator[dict[str, Any]]:
    """The rows of the copy; a kept update has the mean speed since the one kept before, so that no time is lost."""
    rows = list(read_rows(cell.folder))
    last = max((k for k, row in enumerate(rows) if row["kind"] == "train"), default=-1)
    clock, seconds, tokens = Clock(), 0.0, 0
    for k, row in enumerate(rows):
        if row["kind"] == "train":
            clock.tick(row)
        if row["kind"] in ("val", "event"):
            yield row
        elif row["kind"] == "train" and (row["step"] % EVERY == 0 or k == last):
            if clock.seconds > seconds:
                row = {**row, "tokens_per_second": (row["tokens"] - tokens) / (clock.seconds - seconds)}
            seconds, tokens = clock.seconds, row.get("tokens", tokens)
            yield row
        elif row.get("dose") is not None:  # a verdict shows the mean of all
            yield {key: row[key] for key in ("step", "kind", "dose")}
