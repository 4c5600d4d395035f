"""`gptlab runs`: the runs in a folder, their state and their differences; or move some to the trash."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gptlab.analysis.tables import number
from gptlab.cli.arguments import Parser
from gptlab.cli.console import console, grid, printable
from gptlab.errors import UsageError

if TYPE_CHECKING:
    from gptlab.analysis.listing import Listed


def main(argv: list[str]) -> int:
    """List, or delete; raises UsageError for a folder that is not there, and for what may not be deleted."""
    options = _parse(argv)
    root = Path(options.folder)
    if not root.is_dir():
        raise UsageError(f"expected a folder of runs, found none at {root}; give one, or train a run")
    if options.delete:
        return _delete(root, options)

    from gptlab.analysis.listing import differing, find_runs, listed, ordered, where

    runs = where([listed(root, path) for path in find_runs(root)], options.where)
    runs = ordered(runs, options.sort, reverse=options.reverse)
    keys = differing(runs)
    if options.json:
        rows = [{**run.figures, "differences": {k: run.options.get(k) for k in keys}} for run in runs]
        rows = [{**row, "problem": run.problem} if run.problem else row for row, run in zip(rows, runs, strict=True)]
        print(json.dumps({"folder": str(root), "runs": rows}, indent=1, allow_nan=False))
    elif runs:
        _show(runs, keys)
    else:
        print(f"no runs in {root}" + " that meet this" * bool(options.where))
    return 0


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = Parser(
        prog="gptlab runs",
        description="List the runs in a folder with their last figures and the options in which they differ. Deleted "
        "runs are moved into FOLDER/.trash; moving one back restores it, removing the trash frees the disk.",
    )
    add = parser.add_argument
    add("folder", metavar="FOLDER", nargs="?", default="log", help="where runs lie, at any depth [log]")
    add("--where", metavar="KEY=VALUE", action="append", default=[], help="only runs that meet this; also != < <= > >=")
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


def _show(runs: list[Listed], keys: list[str]) -> None:
    rows = []
    for run in runs:
        f = run.figures
        step = f"{f['step']}/{f['steps']}" if f["step"] is not None else "–"
        words = " ".join(f"{key}={_word(run.options.get(key))}" for key in keys) if run.options else run.problem
        figures = (number(f[key], ".4f") for key in ("loss", "bits_per_byte", "dose"))
        rows.append((f["run"], f["state"], step, *figures, words))
    console().print(grid(("run", "state", ">step", ">loss", ">bits/byte", ">dose", "differs in"), rows))


def _word(value: Any) -> str:
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)
