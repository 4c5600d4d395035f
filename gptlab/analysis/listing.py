"""Which runs lie in a folder, and how they stand: one row of plain values a run, sorted and filtered. Reads only."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from gptlab.analysis.run import Run, read_run
from gptlab.errors import GptlabError, UsageError, did_you_mean
from gptlab.files import LOCK, is_locked

FIGURES = ("run", "state", "step", "steps", "loss", "bits_per_byte", "dose", "clipped_share", "finished_at")
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
    try:
        run = read_run(path, until)
        return Listed(path, figures_of(run, name), dict(run.options))
    except GptlabError as error:
        return Listed(path, dict.fromkeys(FIGURES) | {"run": name, "state": "damaged"}, {}, str(error))


def figures_of(run: Run, name: str) -> dict[str, Any]:
    """The FIGURES of a run that was read."""
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


def where(runs: Sequence[Listed], conditions: Sequence[str]) -> list[Listed]:
    """The runs that meet every condition, as `loss<2.5` or `signal.name=confidence`; raises UsageError."""
    tests = [_parsed(condition, runs) for condition in conditions]
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
    """Numbers are compared as numbers, all else as text, equal or not; no value reads as `none`."""
    try:
        a, b = float(found), float(wanted)
    except (TypeError, ValueError):
        if sign not in ("=", "!="):
            return False
        text = "none" if found is None else str(found).lower() if isinstance(found, bool) else str(found)
        return (text == wanted) == (sign == "=")
    return {"=": a == b, "!=": a != b, "<": a < b, "<=": a <= b, ">": a > b, ">=": a >= b}[sign]
