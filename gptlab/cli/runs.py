"""`gptlab runs`, `page`, `verify` and `digest`: a folder's runs, and whether one is as it was written.

`runs` lists their state and their differences, or moves some to the trash; `page` shows them in a browser, behind a
link that only this start knows; `verify` and `digest` only read. Digests compare two runs for equality, never
closeness.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import secrets
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from socket import gethostname
from typing import TYPE_CHECKING

from gptlab.analysis.tables import number
from gptlab.cli.arguments import Parser
from gptlab.cli.console import StopRequest, console, grid, printable, say
from gptlab.errors import CheckpointError, UsageError
from gptlab.options import as_typed

if TYPE_CHECKING:
    from gptlab.analysis.run import Group
    from gptlab.cli.model import Opened
    from gptlab.page.guard import AccessPolicy
    from gptlab.runs.checkpoint import Problem
    from gptlab.runs.folder import RunFolder


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

    from gptlab.analysis.run import differing, find_runs, grouped, listed, ordered, where

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

    from gptlab.analysis.run import Group

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


COVERS = (
    "checkpoints, by checksums; a finished run's rows in metrics.jsonl but for a clock's figures, by the hash in the "
    "last; an experiment's declaration, by the one of its first start. Not covered: config.json, "
    "environment.json, log.txt, runs from before such hashes, and whoever changes a hash too"
)


def verify(argv: list[str]) -> int:
    """Print what is damaged and return 3 if anything is; raises CheckpointError where there is no run."""
    description = (
        "Check every checkpoint of a run against its checksums, that its records can be read, and that the rows of a "
        "finished run are those that it ended with; of an experiment's folder every cell, and that its declaration is "
        "that of its first start. Training falls back to the newest checkpoint that is whole. Exit code 3 if anything "
        "is damaged."
    )
    options = _one_run(argv, "verify", description, 'print {"ok", "problems": [{"file", "problem"}]}')
    problems = list(_problems(Path(options.run)))
    if options.json:
        print(json.dumps({"ok": not problems, "problems": [dataclasses.asdict(p) for p in problems]}, indent=1))
        return 3 if problems else 0
    for p in problems:
        print(f"{p.file}: {p.problem}")
    if problems:
        raise CheckpointError(
            f"expected {options.run} as it was written, found {len(problems)} damaged file(s), listed above; "
            "training continues from the newest checkpoint that is whole"
        )
    print(f"{options.run}: every file is as it was written\ncovered: {COVERS}")
    return 0


def digest(argv: list[str]) -> int:
    """Print the SHA-256 and the step of a run's newest checkpoint; raises CheckpointError where it is damaged."""
    description = (
        "SHA-256 over weights, moments, RNG and data cursor of a run's newest checkpoint. Two runs have the same one "
        "only if every bit of their states is equal."
    )
    options = _one_run(argv, "digest", description, 'print {"sha256", "step"}')
    from gptlab.runs import checkpoint
    from gptlab.runs.folder import newest

    sha256, step = checkpoint.digest(newest(options.run))
    print(json.dumps({"sha256": sha256, "step": step}) if options.json else f"{sha256}  step {step}")
    return 0


def _one_run(argv: list[str], name: str, description: str, json_help: str) -> argparse.Namespace:
    parser = Parser(prog=f"gptlab {name}", description=description)
    parser.add_argument(
        "run", metavar="RUN", help="a run's folder, or one of its checkpoints; for verify an experiment's too"
    )
    parser.add_argument("--json", action="store_true", help=json_help)
    return parser.parse(argv)


def _problems(path: Path) -> Iterator[Problem]:
    from gptlab.runs import checkpoint
    from gptlab.runs.experiment_spec import FILE, declaration, read_experiment, recorded_declaration
    from gptlab.runs.folder import RunFolder

    if (path / FILE).is_file() and not (path / "config.json").exists():
        yield from (
            checkpoint.Problem(str(path / FILE), line)
            for line in declaration(read_experiment(path / FILE, copy=True), path, recorded_declaration(path))[1]
        )
        for config in sorted(path.glob("*/seed_*/config.json")):
            yield from _problems(config.parent)
        return
    folder = RunFolder(path)
    if not folder.exists() and not folder.checkpoints.is_dir():
        if not path.is_dir() or not any((path / name).exists() for name in (checkpoint.MANIFEST, checkpoint.WEIGHTS)):
            raise CheckpointError(f"expected a run or a checkpoint, found none at {path}; check the path")
        yield from checkpoint.verify(path)
        return
    needed = {"metrics.jsonl": 0, "log.txt": 0}
    for saved in checkpoint.complete(folder.checkpoints):
        damage = checkpoint.verify(saved)
        yield from damage
        if not damage:
            try:
                records = checkpoint.read_state(saved / checkpoint.STATE)["records"]
            except CheckpointError as error:
                yield checkpoint.Problem(str(saved / checkpoint.STATE), str(error))
                continue
            lengths = {"metrics.jsonl": records.get("metrics_bytes", 0), "log.txt": records.get("log_bytes", 0)}
            needed = {name: max(length, lengths[name]) for name, length in needed.items()}
    yield from _unreadable(folder, needed)


def _unreadable(folder: RunFolder, needed: dict[str, int]) -> Iterator[Problem]:
    """The records that do not parse, or are shorter than a checkpoint needs to cut them back to."""
    from gptlab.runs.checkpoint import Problem
    from gptlab.runs.records import edited_rows

    for name, length in needed.items():
        path = folder.path / name
        found = path.stat().st_size if path.is_file() else 0
        if found < length:
            yield Problem(str(path), f"expected at least {length} bytes, found {found}")
    reads = {
        "config.json": folder.config,
        "environment.json": lambda: folder.recorded("environment.json"),
        "metrics.jsonl": lambda: edited_rows(folder.path),
    }
    for name, read in reads.items():
        try:
            found = read()
            if isinstance(found, str):
                yield Problem(str(folder.path / name), found)
        except CheckpointError as error:
            yield Problem(str(folder.path / name), str(error))


def page(argv: list[str]) -> int:
    """Print the link and serve it until Ctrl-C, which is 0; raises UsageError, and ConfigError for a port in use."""
    options = _page_options(argv)
    from gptlab.page.app import READ, WRITE, create_app, listen, serve
    from gptlab.page.guard import AccessPolicy

    with listen(options.host, options.port) as listening:
        policy = AccessPolicy(
            options.host, listening.getsockname()[1], secrets.token_urlsafe(), frozenset({READ, WRITE})
        )
        app, queues = create_app(Path(options.folder), options.model, partial(_open_model, options=options), policy)
        with StopRequest() as asked_to_stop:
            _announce(policy, options)
            serve(app, listening, asked_to_stop)
            if queues.busy:  # Python would wait for a model to be opened that nobody will look into
                os._exit(0)
    return 0


def _page_options(argv: list[str]) -> argparse.Namespace:
    parser = Parser(
        prog="gptlab page",
        description="Show runs, their curves while they run, comparisons and the lens in a browser. The link that is "
        "printed holds a new token each time; nothing is written, and nothing is fetched from elsewhere. From another "
        "machine: ssh -L PORT:127.0.0.1:PORT MACHINE, then open the link here.",
    )
    add = parser.add_argument
    add("folder", metavar="FOLDER", nargs="?", default="log", help="where runs lie, at any depth [log]")
    add("--host", metavar="ADDRESS", default="127.0.0.1", help="where to listen [127.0.0.1: this machine alone]")
    add("--port", metavar="N", type=int, default=0, help="where to listen; 0 takes any that is free [0]")
    add("--model", metavar="SOURCE", help="a model for the lens: a run, a checkpoint or a Hugging Face GPT-2 folder")
    add("--device", metavar="NAME", default="auto", help="of the lens: auto, cpu, cuda or cuda:N [auto]")
    add("--dtype", choices=["fp32", "bf16"], default="fp32", help="of the lens's matmuls [fp32]")
    add("--threads", metavar="N", type=int, default=0, help="of the lens [all cores]")
    add("--json", action="store_true", help='print {"url"} instead of words')
    options = parser.parse(argv)
    if not 0 <= options.port <= 65535:
        raise UsageError(f"--port: expected a number from 0 to 65535, found {options.port}")
    for name, what in (("folder", "a folder of runs"), ("model", "a run, a checkpoint or a Hugging Face folder")):
        given = getattr(options, name)
        if given is not None and not Path(given).is_dir():
            raise UsageError(f"expected {what}, found none at {given}; check the path")
    return options


def _open_model(source: str, options: argparse.Namespace) -> Opened:
    from gptlab.cli.model import open_model

    return open_model(source, options.device, options.dtype, options.threads)


def _announce(policy: AccessPolicy, options: argparse.Namespace) -> None:
    """The link on standard output, and on standard error what it gives away."""
    name = policy.host if policy.local else gethostname()
    shown = f"[{name}]" if ":" in name else name
    url = f"http://{shown}:{policy.port}/{policy.token}/"
    print(json.dumps({"url": url}) if options.json else url, flush=True)
    say(f"the runs in {options.folder}, until Ctrl-C")
    if not policy.local:
        say(
            f"warning: {policy.host} is open to other machines: whoever has or overhears the link can read these runs "
            f"and their samples, and ask the lens; safer is ssh -L {policy.port}:127.0.0.1:{policy.port}"
        )
