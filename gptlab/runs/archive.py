"""A packed experiment: all that `gptlab compare` reads of one, without its weights, in one file to commit or to send.

The file is gzipped JSON: the experiment file's text, what [tune] chose, and of every cell that has ended its config,
its environment and its rows as lists, whose keys stand once, in `columns`. It holds what our readers accepted of a run,
written again: no file's bytes are copied into it. What is read back is checked by the same readers.
"""

from __future__ import annotations

import gzip
import io
import json
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from gptlab.data.prepare import known_tokens
from gptlab.errors import CheckpointError, ConfigError, shown
from gptlab.files import MB, parse_json, parse_toml, read_bytes, refuse_links, write_json, write_whole
from gptlab.runs.cells import ENDED, RESULTS, Cell, Results, Rows, cells_of, is_sha256
from gptlab.runs.experiment_spec import DECLARATION, FILE, Experiment, experiment_from, recorded_declaration
from gptlab.runs.records import (
    CONFIG,
    ENVIRONMENT,
    EVERY,
    METRICS,
    Clock,
    PackedRun,
    Row,
    read_config,
    read_environment,
    read_rows,
    rounded,
)
from gptlab.runs.tuning import FILE as CHOICE
from gptlab.runs.tuning import accepted, read_kept, trial_experiment, trials_folder
from gptlab.runs.variants import LADDER, accepted_ladder, read_ladder

SUFFIX = ".json.gz"
VERSION = 1
LARGEST = 64 * MB
"""Bytes of a pack when it is unzipped: a few bytes of a hostile one could grow to fill the memory."""

MEASURED = ("dose", "signal_norm", "step_change", "batch_noise")
REPLAYED = {"gradient": "signal_norm", "update": "step_change"}
"""What placebos of an experiment take over from their arms, by its `placebo_match`: it keeps all its digits."""

_CELL = re.compile(r"([A-Za-z0-9][\w.+=-]*)/seed_(\d{1,18})")


@dataclass(frozen=True)
class PackedCell:
    """weights_sha256: of the last checkpoint's weights, where that is known."""

    arm: str
    seed: int
    run: PackedRun
    weights_sha256: str | None

    @property
    def name(self) -> str:
        return f"{self.arm}/seed_{self.seed}"


@dataclass(frozen=True)
class Pack:
    """text: of the experiment file; tuning: what [tune] chose; trials: what it chose from, an experiment too; declared:
    declaration.json of its first start, {} where there was none; ladder: at how many rungs each arm's sign holds."""

    text: str
    cells: Sequence[PackedCell]
    tuning: Mapping[str, Any] | None = None
    trials: Pack | None = None
    declared: Mapping[str, Any] = field(default_factory=dict)
    ladder: Mapping[str, Any] | None = None


def is_pack(path: Path) -> bool:
    return path.name.endswith(SUFFIX) and not path.is_dir()


def pack(experiment: Experiment, folder: Path, out: Path) -> Pack:
    """Write the cells of `folder` that have ended to the file `out`, and give them; raises ConfigError if none has.

    Of metrics.jsonl validations, events, every EVERYth update and the last, and of the others the doses are kept; of
    checkpoints and samples nothing.
    """
    if out.exists() and read_pack(out).text != experiment.text:
        raise ConfigError(f"{out} holds another experiment, or another version of its file; give another --out")
    packed = _pack(experiment, folder)
    if not packed.cells:
        raise ConfigError(f"expected finished cells in {folder}, found none; run the experiment first")
    content = json.dumps({"version": VERSION, **_as_json(packed)}, separators=(",", ":"), allow_nan=False).encode()
    if len(content) > LARGEST:
        raise ConfigError(f"{folder}: expected cells that fit into {LARGEST // MB} MB; measure the dose less often")
    write_whole(out, gzip.compress(content, mtime=0), error=ConfigError)
    return packed


def read_pack(path: str | Path) -> Pack:
    """The experiment in a packed file; raises ConfigError where it is damaged, or no such file."""
    try:
        with gzip.open(io.BytesIO(read_bytes(path, error=ConfigError))) as file:
            content = file.read(LARGEST + 1)
        if len(content) > LARGEST:
            raise ConfigError(f"{path}: expected at most {LARGEST // MB} MB when unzipped, found more")
        value = parse_json(content)
        if (version := value["version"]) != VERSION:
            raise ConfigError(f"{path}: expected version {VERSION} of a packed experiment, found {shown(version)}")
        return _from_json(value, Path(path))
    except FileNotFoundError:
        raise ConfigError(f"expected a packed experiment at {path}, found nothing; check the path") from None
    except (OSError, EOFError, zlib.error, ValueError, TypeError, LookupError, AttributeError) as error:
        raise ConfigError(f"{path} is no packed experiment, or a damaged one: {shown(error)}; pack it again") from None


def unpack(path: Path, out: Path | None = None) -> tuple[Path, list[PackedCell]]:
    """Lay a packed experiment out as a new folder, in which `gptlab experiment run` makes what is missing.

    out: by default where the experiment runs, log/<name>. Gives the folder and its cells; raises ConfigError.
    """
    packed = read_pack(path)
    out = out or experiment_from(packed.text, path).folder
    if out.exists():
        raise ConfigError(f"--out: expected a new folder, found {out}; give another")
    _unpack(packed, out)
    return out, list(packed.cells)


def _pack(experiment: Experiment, folder: Path) -> Pack:
    ended = [cell for cell in cells_of(experiment, folder) if Rows(cell).look().state(running=False) in ENDED]
    for path in (*(cell.folder for cell in ended), folder / CHOICE, folder / LADDER):
        refuse_links(path, folder, error=ConfigError)
    outcomes = Results(experiment, folder, ended).content()["cells"]
    weights = {(found["arm"], found["seed"]): found["weights_sha256"] for found in outcomes}
    norms = "placebo" in experiment.text  # in a comment it only makes the pack larger
    exact = REPLAYED.get(experiment.placebo_match)
    cells = [_packed(cell, weights[cell.arm.name, cell.seed], norms, exact) for cell in ended]
    trials = trials_folder(folder)
    has_trials = (trials / FILE).is_file()  # a choice stands without its trials, whose folder may be removed
    tried = _of_trials(_pack(trial_experiment(experiment), trials)) if has_trials else None
    return Pack(experiment.text, cells, read_kept(folder), tried, recorded_declaration(folder), read_ladder(folder))


def _of_trials(packed: Pack) -> Pack:
    """Trials without what no choice is made by: what was measured in updates that are not logged."""
    cells = []
    for cell in packed.cells:
        rows = [row for row in cell.run.rows if row.keys() - {"step", "kind", *MEASURED}]
        cells.append(replace(cell, run=replace(cell.run, rows=rows)))
    return replace(packed, cells=cells)


def _packed(cell: Cell, weights_sha256: str | None, norms: bool, exact: str | None) -> PackedCell:
    folder = cell.folder
    config, environment = _config(cell), read_environment(folder)
    rows = _kept(folder) if norms else map(_without_norms, _kept(folder))
    replayed = exact if config["options"].get("signal.control") == "none" else None  # nothing replays a control
    kept = [{key: _rounded(row, key, replayed) for key in row} for row in rows]
    kept = kept if norms else list(_without_repeats(kept))
    names = dict(_absolute(config))
    run = PackedRun(folder, _renamed(config, names), _renamed(environment, names), kept)
    return PackedCell(cell.arm.name, cell.seed, run, weights_sha256)


def _as_json(packed: Pack) -> dict[str, Any]:
    columns: dict[tuple[str, ...], int] = {}
    cells = {
        cell.name: {
            "config": cell.run.config,
            "environment": cell.run.environment,
            "weights_sha256": cell.weights_sha256,
            "rows": [[columns.setdefault(tuple(row), len(columns)), *row.values()] for row in cell.run.rows],
        }
        for cell in packed.cells
    }
    trials = packed.trials and _as_json(packed.trials)
    head = {"experiment": packed.text, "tuning": packed.tuning, "trials": trials, "declared": packed.declared}
    if packed.ladder:
        head["ladder"] = packed.ladder
    return {**head, "columns": list(columns), "cells": cells}


def _absolute(value: Any) -> Iterator[tuple[str, str]]:
    """Every absolute path in a config, or of a function in a file, and its last name, which is what a pack tells."""
    if isinstance(value, str):
        if value.startswith("/"):
            yield value, value.rstrip("/").rpartition("/")[2]
    elif isinstance(value, dict | list):
        for one in [*value, *value.values()] if isinstance(value, dict) else value:
            yield from _absolute(one)


def _renamed(value: Any, names: Mapping[str, str]) -> Any:
    """The value with other names in all of its texts, the longest first."""
    if isinstance(value, str):
        for name in sorted(names, key=len, reverse=True):
            value = value.replace(name, names[name])
    elif isinstance(value, list):
        value = [_renamed(one, names) for one in value]
    elif isinstance(value, dict):
        value = {_renamed(key, names): _renamed(one, names) for key, one in value.items()}
    return value


def _rounded(row: Row, key: str, exact: str | None) -> Any:
    """A figure of a row: lists and what train rows have are drawn or averaged, for which DIGITS are enough."""
    value = row[key]
    if isinstance(value, list):
        return [rounded(one) if isinstance(one, float) else one for one in value]
    return rounded(value) if isinstance(value, float) and row["kind"] == "train" and key != exact else value


def _from_json(value: Mapping[str, Any], path: Path) -> Pack:
    """Raises ValueError, TypeError, LookupError or AttributeError for what is no pack, CheckpointError for no run."""
    text, tuning, trials = value["experiment"], value["tuning"], value["trials"]
    columns = [tuple(names) for names in value["columns"]]
    parse_toml(text)
    return Pack(
        text,
        [_cell(name, cell, columns, path) for name, cell in value["cells"].items()],
        None if tuning is None else accepted(tuning),
        None if trials is None else _from_json(trials, path),
        dict(value.get("declared", {})),  # packs of before have none
        None if (ladder := value.get("ladder")) is None else accepted_ladder(ladder),
    )


def _cell(name: str, value: Mapping[str, Any], columns: Sequence[tuple[str, ...]], path: Path) -> PackedCell:
    found, weights = _CELL.fullmatch(name), value["weights_sha256"]
    rows = [dict(zip(columns[table], values, strict=True)) for table, *values in value["rows"]]
    run = PackedRun(path / name, value["config"], value["environment"], rows)
    if not found or read_config(run)["options"]["seed"] != int(found[2]) or not (weights is None or is_sha256(weights)):
        raise ValueError(f"cell {name!r}")
    read_environment(run)
    if not [row["kind"] for row in read_rows(run)][-1:] == ["event"]:
        raise ValueError(f"cell {name!r} without an end")
    return PackedCell(found[1], int(found[2]), run, weights)


def _unpack(packed: Pack, out: Path) -> None:
    out.mkdir(parents=True)
    for cell in packed.cells:
        folder = out / cell.arm / f"seed_{cell.seed}"
        folder.mkdir(parents=True)
        write_json(folder / CONFIG, cell.run.config)
        write_json(folder / ENVIRONMENT, cell.run.environment)
        rows = ({key: row[key] for key in row if key != "rows_sha256"} for row in cell.run.rows)  # of the rows before
        write_whole(folder / METRICS, "".join(f"{json.dumps(row)}\n" for row in rows))
    results = [
        {
            "arm": cell.arm,
            "seed": cell.seed,
            "loss": cell.run.rows[-1].get("loss"),
            "weights_sha256": cell.weights_sha256,
        }
        for cell in packed.cells
    ]
    write_json(out / RESULTS, {"cells": results})  # the runner fills in the rest
    write_whole(out / FILE, packed.text)
    if packed.tuning:
        write_json(out / CHOICE, packed.tuning, ensure_ascii=False)
    if packed.ladder:
        write_json(out / LADDER, packed.ladder, ensure_ascii=False)
    if packed.declared:
        write_json(out / DECLARATION, packed.declared, ensure_ascii=False)
    if packed.trials:
        _unpack(packed.trials, trials_folder(out))


def _config(cell: Cell) -> dict[str, Any]:
    """The cell's config, and how many tokens its corpus has, which elsewhere may not be at hand."""
    config = read_config(cell.folder)
    options, data = config["options"], config["data"]
    try:
        tokens = data.get("train_tokens") or known_tokens(options["data"], options["tokenizer"], data["train"])
    except (KeyError, TypeError, ValueError):
        raise CheckpointError(f"{cell.folder / CONFIG} is damaged: expected what data the run had") from None
    return {**config, "data": {**data, "train_tokens": tokens}}


def _without_norms(row: Row) -> Row:
    """A row of an experiment without placebos: norms are compared with the baseline's alone, every EVERY updates."""
    unread = ("step_change",) if row["step"] % EVERY in (0, 1) else ("step_change", "signal_norm")
    return {key: value for key, value in row.items() if key not in unread}


def _without_repeats(rows: Sequence[Row]) -> Iterator[Row]:
    """Rows without doses that repeat the one before, which stands for them (`mean_over_updates`), as held ones do."""
    measured = [k for k, row in enumerate(rows) if "dose" in row]
    before = None
    for k, row in enumerate(rows):
        if row.keys() == {"step", "kind", "dose"} and row["dose"] == before and k not in measured[-2:]:
            continue
        before = row.get("dose", before)
        yield row


def _kept(run: Path) -> Iterator[Row]:
    """The rows that are kept; an update has the mean speed since the one kept before, so that no time is lost."""
    rows = list(read_rows(run))
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
        elif row.get("dose") is not None or row.get("batch_noise") is not None:  # a verdict shows the mean of all
            yield {key: row[key] for key in ("step", "kind", *MEASURED) if key in row}
        elif row["kind"] == "train" and row["step"] % EVERY == 1:  # where arms usually measure theirs
            yield {key: row[key] for key in ("step", "kind", "grad_norm") if key in row}
