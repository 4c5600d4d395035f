"""Which runs lie in a folder, and how they stand: one row of plain values a run, sorted, filtered and grouped.

Reads only.
"""

from __future__ import annotations

import fnmatch
import math
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from gptlab.analysis.run import Run, read_run
from gptlab.analysis.statistics import spread
from gptlab.errors import GptlabError, UsageError, did_you_mean
from gptlab.files import LOCK, is_locked
from gptlab.options import as_typed
from gptlab.runs.experiment_spec import FILE as EXPERIMENT

FIGURES = (
    "run", "experiment", "arm", "state", "step", "steps", "loss", "bits_per_byte", "dose", "clipped_share",
    "finished_at",
)  # fmt: skip
NO_DIFFERENCE = frozenset({"out", "resume"})
"""Options that name a run and do not make it."""
STATES = {"finished": "finished", "Stopped": "stopped", "DivergedError": "diverged", None: "unfinished"}
"""By a run's last event; failed with another error of ours, unfinished (killed) without any."""
_CONDITION = re.compile(r"([\w.]+)(<=|>=|!=|=|<|>)(.*)")


@dataclass(frozen=True)
class Listed:
    """figures: of FIGURES, None where there is none; options: as recorded; problem: why a run cannot be read."""

    path: Path
    figures: dict[str, Any]
    options: dict[str, Any]
    problem: str = ""

    def value(self, key: str) -> Any:
        """A figure or an option."""
        return self.figures[key] if key in self.figures else self.options.get(key)


def find_runs(folder: Path) -> Iterator[Path]:
    """The run folders in `folder` at any depth, itself included, by name; hidden folders (the trash) are left out."""
    if (folder / "config.json").is_file():
        yield folder
        return
    for name in sorted(entry.name for entry in os.scandir(folder) if entry.is_dir(follow_symlinks=False)):
        if not name.startswith("."):
            yield from find_runs(folder / name)


def listed(root: Path, path: Path, until: float = math.inf) -> Listed:
    """How a run stands. until: the moment at which reading it ends, as for read_rows."""
    name = path.relative_to(root).as_posix() if path != root else path.name
    experiment, arm = experiment_of(root, path)
    try:
        run = read_run(path, until)
    except GptlabError as error:
        known = {"run": name, "experiment": experiment, "arm": arm, "state": "damaged"}
        return Listed(path, dict.fromkeys(FIGURES) | known, {}, str(error))
    named = str(run.options.get("arm") or (run.options["signal.name"] if run.has_signal else "baseline"))
    figures = figures_of(run, name) | {"experiment": experiment, "arm": arm or named}
    return Listed(path, figures, dict(run.options))


def experiment_of(root: Path, path: Path) -> tuple[str | None, str | None]:
    """The names of the experiment and the arm that a run is a cell of, None for any other run."""
    for folder in path.parents:
        if not folder.is_relative_to(root):
            break
        if (folder / EXPERIMENT).is_file():
            arm = path.parent.relative_to(folder).as_posix()
            return (folder.relative_to(root).as_posix() if folder != root else root.name), arm
    return None, None


def figures_of(run: Run, name: str) -> dict[str, Any]:
    """The FIGURES of a run that was read, but for its experiment and its arm."""
    last, rows = max(run.losses, default=None), run.path / "metrics.jsonl"
    written = datetime.fromtimestamp(rows.stat().st_mtime, UTC) if rows.exists() else None
    return {
        "run": name,
        "state": "running" if is_locked(run.path / LOCK) else STATES.get(run.ended.get("event"), "failed"),
        "step": run.last_step,
        "steps": run.options.get("steps"),
        "loss": run.losses[last] if last is not None else None,
        "bits_per_byte": run.ended.get("bits_per_byte", run.bits_per_byte),
        "dose": run.dose if run.has_signal else None,
        "clipped_share": run.ended.get("clipped_share"),
        "finished_at": f"{written:%Y-%m-%d %H:%M:%S}" if written else None,
    }


def differing(runs: Sequence[Listed]) -> list[str]:
    """The options in which these runs are not all alike, in the config's order."""
    read = [run for run in runs if run.options]
    keys = [key for key in dict.fromkeys(key for run in read for key in run.options) if key not in NO_DIFFERENCE]
    return [key for key in keys if len({repr(run.options.get(key)) for run in read}) > 1]


@dataclass(frozen=True)
class Group:
    """Runs of one arm of one experiment, with equal options but for the seed; differences: from its baseline's runs."""

    experiment: str | None
    arm: str | None
    runs: list[Listed]
    differences: dict[str, Any]

    @property
    def name(self) -> str:
        """A run's where there is one alone, else the arm's."""
        alone = self.experiment is None and len(self.runs) == 1
        return str(self.runs[0].figures["run"] if alone or self.arm is None else self.arm)

    @property
    def states(self) -> str:
        """How many runs are in which state.

        >>> state = lambda word: Listed(Path(), {"state": word}, {})
        >>> Group(None, None, [state("finished"), state("failed"), state("finished")], {}).states
        '2 finished, 1 failed'
        """
        found = Counter(run.figures["state"] for run in self.runs)
        return ", ".join(f"{count} {state}" for state, count in found.most_common())

    def values(self, figure: str) -> list[float]:
        """Of the runs that have it."""
        return [run.figures[figure] for run in self.runs if run.figures[figure] is not None]

    def mean(self, figure: str) -> tuple[float | None, float | None]:
        """A figure's mean over the runs that have it, and its standard deviation from two runs on."""
        found = self.values(figure)
        return (sum(found) / len(found) if found else None), spread(found)


def grouped(runs: Sequence[Listed]) -> dict[str | None, list[Group]]:
    """{experiment, None for other runs: its groups}, all in the order of `runs`; other runs come last."""
    by_experiment: dict[str | None, list[Listed]] = {}
    for run in runs:
        by_experiment.setdefault(run.figures["experiment"], []).append(run)
    by_experiment |= {None: by_experiment.pop(None)} if None in by_experiment else {}
    return {name: _groups(name, members) for name, members in by_experiment.items()}


def _groups(experiment: str | None, runs: Sequence[Listed]) -> list[Group]:
    keys = [key for key in differing(runs) if key != "seed"]
    around = [run for run in runs if run.options and run.figures["arm"] == "baseline"] or runs
    usual = {key: Counter(repr(run.options.get(key)) for run in around).most_common(1) for key in keys}
    groups: dict[tuple[Any, ...], Group] = {}
    for run in runs:
        shown = {key: run.options.get(key) for key in keys if repr(run.options.get(key)) != usual[key][0][0]}
        same = run.figures["arm"], run.problem, *(repr(run.options.get(key)) for key in keys)
        groups.setdefault(same, Group(experiment, same[0], [], shown if run.options else {})).runs.append(run)
    return list(groups.values())


def where(runs: Sequence[Listed], conditions: Sequence[str]) -> list[Listed]:
    """The runs that meet every condition, as `loss<2.5` or `arm=gated*`; raises UsageError, for no such arm too."""
    tests = [_parsed(condition, runs) for condition in conditions]
    for key, sign, wanted in tests:
        names = list(dict.fromkeys(str(value) for run in runs if (value := run.value(key)) is not None))
        if runs and key in ("arm", "experiment") and sign == "=" and not fnmatch.filter(names, wanted):
            listed = ", ".join(names) or "none"
            raise UsageError(f"--where: no {key} {wanted!r}{did_you_mean(wanted, names)}; there are {listed}")
    return [run for run in runs if all(_meets(run.value(key), sign, wanted) for key, sign, wanted in tests)]


def ordered(runs: Sequence[Listed], key: str, *, reverse: bool = False) -> list[Listed]:
    """Sorted by a figure or an option; runs without it come last either way. Raises UsageError."""
    _check(key, runs)
    having = [run for run in runs if run.value(key) is not None]
    kind = float if all(isinstance(run.value(key), int | float) for run in having) else str
    having.sort(key=lambda run: kind(run.value(key)), reverse=reverse)
    return having + [run for run in runs if run.value(key) is None]


def _parsed(condition: str, runs: Sequence[Listed]) -> tuple[str, str, str]:
    if not (match := _CONDITION.fullmatch(condition)):
        raise UsageError(f"--where: expected KEY=VALUE, or one of != < <= > >=, found {condition!r}")
    _check(match[1], runs)
    return match[1], match[2], match[3]


def _check(key: str, runs: Sequence[Listed]) -> None:
    known = [*FIGURES, *dict.fromkeys(option for run in runs for option in run.options)]
    if runs and key not in known:
        raise UsageError(f"no figure or option {key!r}{did_you_mean(key, known)}; figures are {', '.join(FIGURES)}")


def _meets(found: Any, sign: str, wanted: str) -> bool:
    """Numbers are compared as numbers, all else as text with * for anything, equal or not; no value is `none`."""
    try:
        a, b = float(found), float(wanted)
    except (TypeError, ValueError):
        if sign not in ("=", "!="):
            return False
        return fnmatch.fnmatchcase(as_typed(found), wanted) == (sign == "=")
    return {"=": a == b, "!=": a != b, "<": a < b, "<=": a <= b, ">": a > b, ">=": a >= b}[sign]
