"""Losses that other trainers logged: a table of several runs (CSV, TSV, JSON lines), or text logs of a run or more.

Columns and formats are known by name. Nothing is judged here, and a log is read, never run.
"""

from __future__ import annotations

import csv
import io
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from gptlab.errors import ConfigError, DataError
from gptlab.files import is_count, open_regular, parse_json

SUFFIXES = (".csv", ".tsv", ".jsonl")
TEXTS = (".txt", ".log", ".out")
"""Endings of text logs in a folder."""

COLUMNS = {"step": ("step", "iter", "iteration"), "arm": ("arm", "name", "commit"), "seed": ("seed",)}
LOSSES = ("loss", "val_loss", "val_bpb", "bpb")
"""Names of the columns, the first that is there counts; those of `loss` where no other metric is asked for."""

FORMATS = {
    "nanoGPT": (re.compile(r"step (\d+): train loss \S+, val loss ([^\s,]+)"), "loss"),
    "modded-nanogpt": (re.compile(r"step:(\d+)/\d+ (?:.* )?val_loss:(\S+)"), "loss"),
    "llm.c": (re.compile(r"s:(\d+) tel:(\S+)"), "loss"),
    "build-nanogpt": (re.compile(r"(\d+) val (\S+)"), "loss"),
    "autoresearch": (re.compile(r"()val_bpb:\s*(\S+)"), "val_bpb"),
}
"""{trainer: (a line with a step, where there is one, and the figure of validation; what that is)}."""

Logged = dict[str, dict[Any, dict[int, float]]]
"""{arm: {seed, or the name of a run without one: {step: figure}}}"""


def read_table(path: Path, metric: str) -> tuple[Logged, str]:
    """What a table holds of `metric`, whose name comes with it, arms in the order of first rows.

    A figure that is empty or no finite number, and one of a row whose `status` is crash, is of a run that diverged.
    Without seeds each row of an arm and step is a run of its own. Raises DataError naming the line that is wrong.
    """
    found: Logged = {}
    names: dict[str, str] = {}
    for number, row in _rows(path):
        names = names or _columns(path, number, row, metric)
        arm, seed, step, figure = _typed(path, number, row, names)
        of_arm = found.setdefault(arm, {})
        if seed is None:
            seed = f"run {sum(step in steps for steps in of_arm.values()) + 1}"
        steps = of_arm.setdefault(seed, {})
        if step in steps:
            raise DataError(f"{path}, line {number}: {arm} with seed {seed} has a loss at step {step} already")
        steps[step] = figure
    if not found:
        raise DataError(f"{path}: expected rows with step, {metric}, arm, seed, found none")
    return found, names["figure"]


def _columns(path: Path, number: int, row: Mapping[str, Any], metric: str) -> dict[str, str]:
    """{what it holds: the column's name} of the columns that there are; step and seed may be missing."""
    wanted = {**COLUMNS, "figure": LOSSES if metric == "loss" else (metric,)}
    found = {what: next((name for name in names if name in row), "") for what, names in wanted.items()}
    if missing := [wanted[what][0] for what in ("figure", "arm") if not found[what]]:
        have = ", ".join(map(str, row))
        expected = f"step, {metric}, arm, seed"
        raise DataError(f"{path}, line {number}: expected {expected}, found no {missing[0]} among {have}")
    return found


def _typed(path: Path, number: int, row: Mapping[str, Any], names: Mapping[str, str]) -> tuple[str, Any, int, float]:
    columns = [name for name in (names[what] for what in ("step", "figure", "arm", "seed")) if name]
    if missing := [column for column in columns if column not in row]:
        raise DataError(f"{path}, line {number}: expected {', '.join(columns)}, found no {missing[0]}")
    try:
        figure = row[names["figure"]]
        value = math.nan if figure in ("", None) or row.get("status") == "crash" else float(figure)
        seed = int(row[names["seed"]]) if names["seed"] else None
        step = int(row[names["step"]]) if names["step"] else 0
        if is_count(step) and (seed is None or is_count(seed)):
            return str(row[names["arm"]]), seed, step, value if math.isfinite(value) else math.nan
    except (ValueError, TypeError, OverflowError):
        pass
    shown = ", ".join(f"{column}={row[column]!r:.60}" for column in columns)
    raise DataError(f"{path}, line {number}: expected numbers in step, {names['figure']} and seed, found {shown}")


def _rows(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    lines = _lines(path)
    if path.suffix != ".jsonl":
        try:
            yield from enumerate(csv.DictReader(lines, delimiter="\t" if path.suffix == ".tsv" else ","), 2)
        except csv.Error as error:
            raise DataError(f"{path}: expected values with a separator between them: {error}") from None
        return
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = parse_json(line)
        except ValueError as error:
            raise DataError(f"{path}, line {number}: expected a JSON object: {error}") from None
        if not isinstance(row, dict):
            raise DataError(f"{path}, line {number}: expected a JSON object, found {line.strip()[:40]!r}")
        yield number, row


def _lines(path: Path) -> Iterator[str]:
    try:
        with io.TextIOWrapper(open_regular(path), encoding="utf-8", newline="") as file:
            yield from file
    except FileNotFoundError:
        raise DataError(f"expected a log at {path}, found none; check the path") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: expected text in UTF-8: {error}") from None


def text_logs(sources: Sequence[str | Path]) -> list[tuple[str, Path]] | None:
    """(arm, file) of text logs, given as files, folders of files or ARM=either; None where the sources are others'.

    Without ARM= an arm is a folder: of a file its own. Raises ConfigError for what is no log.
    """
    pairs = [_named(str(source)) for source in sources]
    if not any(_is_text(path) for _, path in pairs):
        return None
    found = []
    for (arm, path), source in zip(pairs, sources, strict=True):
        if not _is_text(path):
            raise ConfigError(f"{source}: expected a log like the others, or a folder of them ({', '.join(TEXTS)})")
        files = sorted(one for one in path.iterdir() if one.suffix in TEXTS) if path.is_dir() else [path]
        found += [(arm or (path if path.is_dir() else path.parent).resolve().name, file) for file in files]
    return found


def _named(source: str) -> tuple[str, Path]:
    arm, _, path = source.partition("=")
    return (arm, Path(path)) if path and not Path(source).exists() else ("", Path(source))


def _is_text(path: Path) -> bool:
    if path.is_dir() and not any((path / name).is_file() for name in ("config.json", "experiment.toml")):
        return any(one.suffix in TEXTS for one in path.iterdir())
    return path.is_file() and path.suffix in TEXTS


def read_texts(files: Iterable[tuple[str, Path]]) -> tuple[Logged, str]:
    """What text logs hold and the metric; a number behind `seed` in a file's name is the seed of its one run.

    Files of an arm that have one name are distinguished by their folders, as in seed_1/log.txt.
    """
    found: Logged = {}
    metrics: dict[str, Path] = {}
    files = list(files)
    named = Counter((arm, path.name) for arm, path in files)
    for arm, path in files:
        runs, metric = _read_text(path)
        metrics.setdefault(metric, path)
        name = path.name if named[arm, path.name] == 1 else f"{path.parent.name}/{path.name}"
        match = re.search(r"seed[ _=-]?(\d{1,9})(?!\d)", name.removesuffix(path.suffix))
        for number, steps in enumerate(runs, 1):
            seed = f"{name}, run {number}" if len(runs) > 1 else int(match[1]) if match else name
            if seed in found.setdefault(arm, {}):
                raise DataError(f"{path}: expected one run a seed, found a second one of {arm} with {seed}")
            found[arm][seed] = steps
    if len(metrics) > 1:
        listed = "; ".join(f"{metric} in {path}" for metric, path in metrics.items())
        raise DataError(f"expected one figure in all logs, found {listed}")
    return found, next(iter(metrics))


def _read_text(path: Path) -> tuple[list[dict[int, float]], str]:
    """[{step: figure} of each run], in the first format that a line has.

    A log that is back at its first step holds another run. One that was resumed has a step in its middle again, which
    counts again; so does what was started again before it had reached the last step.
    """
    found: dict[str, list[dict[int, float]]] = {}
    for line in _lines(path):
        for name, (pattern, _) in FORMATS.items():
            if match := pattern.match(line.strip()):
                try:
                    value = float(match[2])
                except ValueError:
                    continue
                step, runs = int(match[1] or 0), found.setdefault(name, [{}])
                if match[1] and len(runs[-1]) > 1 and step == next(iter(runs[-1])):
                    runs.append({})
                runs[-1][step] = value if math.isfinite(value) else math.nan
    if not found:
        raise DataError(
            f"{path}: expected lines with losses of validation as {', '.join(FORMATS)} write them, found none"
        )
    first = next(name for name in FORMATS if name in found)
    last = max(step for run in found[first] for step in run)
    return [run for run in found[first] if last in run], FORMATS[first][1]
