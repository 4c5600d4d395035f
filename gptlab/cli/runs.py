"""`gptlab runs`: the runs in a folder, their state and their differences; or move some to the trash."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from gptlab.analysis.tables import number
from gptlab.cli.arguments import Parser
from gptlab.cli.console import console, grid, printable
from gptlab.errors import UsageError
from gptlab.options import as_typed

if TYPE_CHECKING:
    from gptlab.analysis.listing import Group

COLUMNS = {"arm or run": 0, "state": 0, "step": 72, "loss": 0, "bits/byte": 120, "dose": 90, "differs in": 0}
"""From how many characters of width on each is shown."""
FIGURES = {"step": "step", "loss": "loss", "bits/byte": "bits_per_byte", "dose": "dose"}
"""Columns of figures, aligned to the right."""
MOST_WORDS = 6
"""Differences that are shown of a group; --json has all."""


def main(argv: list[str]) -> int:
    """List, or delete; raises UsageError for a folder that is not there, and for what may not be deleted."""
    options = _parse(argv)
    root = Path(options.folder)
    if not root.is_dir():
        raise UsageError(f"expected a folder of runs, found none at {root}; give one, or train a run")
    if options.delete:
        return _delete(root, options)

    from gptlab.analysis.listing import differing, find_runs, grouped, listed, ordered, where

    runs = where([listed(root, path) for path in find_runs(root)], options.where)
    runs = ordered(runs, options.sort, reverse=options.reverse)
    if options.json:
        keys = differing(runs)
        rows = [{**run.figures, "differences": {k: run.options.get(k) for k in keys}} for run in runs]
        rows = [{**row, "problem": run.problem} if run.problem else row for row, run in zip(rows, runs, strict=True)]
        print(json.dumps({"folder": str(root), "runs": rows}, indent=1, allow_nan=False))
    for experiment, groups in grouped(runs).items() if not options.json else ():
        _show(experiment, groups, each=options.each)
    if not (runs or options.json):
        print(f"no runs in {root}" + " that meet this" * bool(options.where))
    return 0


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = Parser(
        prog="gptlab runs",
        description="List the runs in a folder: a line for each arm of each experiment with the mean of its runs' last "
        "figures, the standard deviation over its runs, and the options that differ from its baseline's. Deleted "
        "runs are moved into FOLDER/.trash; moving one back restores it, removing the trash frees the disk.",
    )
    add = parser.add_argument
    add("folder", metavar="FOLDER", nargs="?", default="log", help="where runs lie, at any depth [log]")
    where = "only runs that meet this, as arm=NAME, experiment=NAME or loss<2.5; also != <= > >=; * stands for anything"
    add("--where", metavar="KEY=VALUE", action="append", default=[], help=where)
    add("--each", action="store_true", help="a line for each run")
    add("--sort", metavar="KEY", default="run", help="by a figure (loss, step, dose, ...) or an option [run]")
    add("--reverse", action="store_true", help="largest first")
    add("--delete", metavar="RUN", nargs="+", default=[], help="move these runs into the trash")
    add("--yes", action="store_true", help="delete without asking")
    add("--json", action="store_true", help='print {"folder", "runs": [{"run", "state", ..., "differences"}]}')
    return parser.parse(argv)


def _delete(root: Path, options: argparse.Namespace) -> int:
    from gptlab.runs.folder import TRASH, deletable, move_to_trash

    runs = list(dict.fromkeys(deletable(root, name) for name in options.delete))  # all are checked before one goes
    if not options.yes:
        if not sys.stdin.isatty():
            raise UsageError("--delete asks on a terminal, and there is none: add --yes")
        for run in runs:
            print(f"  {printable(str(run))}", file=sys.stderr)
        print(f"move {len(runs)} run{'s' * (len(runs) > 1)} into {root / TRASH}? [y/N] ", end="", file=sys.stderr)
        sys.stderr.flush()
        if sys.stdin.readline().strip().lower() not in ("y", "yes"):
            print("nothing was deleted", file=sys.stderr)
            return 0
    moved = {str(run): str(move_to_trash(root, run)) for run in runs}
    if options.json:
        print(json.dumps({"moved": moved}, indent=1))
        return 0
    for run, target in moved.items():
        print(printable(f"{run} moved to {target}"))
    return 0


def _show(experiment: str | None, groups: list[Group], *, each: bool) -> None:
    """An experiment's table; where the terminal is narrow it has fewer columns."""
    from rich.text import Text

    from gptlab.analysis.listing import Group

    if each:
        groups = [Group(None, None, [run], group.differences) for group in groups for run in group.runs]
    shown_on = console()
    if not shown_on.is_terminal:  # which has no width: a row is a line
        shown_on.width = 1000
    columns = [name for name, least in COLUMNS.items() if shown_on.width >= least]
    title = "other runs" if experiment is None else experiment
    shown_on.print(Text(printable(f"{title}: {sum(len(group.runs) for group in groups)} runs"), "bold"))
    right = [f">{name}" if name in FIGURES else name for name in columns]
    rows = [[_cell(group, name) for name in columns] for group in groups]
    shown_on.print(grid(right, rows, width=shown_on.width))
    shown_on.print()


def _cell(group: Group, column: str) -> str:
    run = group.runs[0]
    if column == "arm or run":
        return group.name
    if column == "state":
        return group.states if len(group.runs) > 1 else run.figures["state"]
    if column == "step":
        steps = [int(step) for step in group.values("step")]
        least, most = min(steps, default=0), max(steps, default=0)
        return f"{least if least == most else f'{least}–{most}'}/{number(run.figures['steps'], 'd')}" if steps else "–"
    if column == "differs in":
        words = [f"{key}={as_typed(value)}" for key, value in group.differences.items()]
        more = [f"and {len(words) - MOST_WORDS} more"] if len(words) > MOST_WORDS else []
        return run.problem or " ".join(words[:MOST_WORDS] + more)
    mean, deviation = group.mean(FIGURES[column])
    return number(mean, ".4f") + (f" ±{deviation:.4f}" if deviation is not None else "")
