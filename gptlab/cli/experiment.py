"""`gptlab experiment`: run an experiment's cells, see how they stand, try every arm first, or pack what came out.

Exit codes of `run`: 0 every cell finished; 3 a cell failed; 4 none failed, but one diverged; 75 stopped, run again.
A person sees a live table on a terminal, and a line a cell elsewhere.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from gptlab.analysis.tables import number
from gptlab.cli.arguments import Parser, count
from gptlab.cli.console import StopRequest, console, duration, grid, printable, say
from gptlab.errors import ConfigError, GptlabError, UsageError

if TYPE_CHECKING:
    from gptlab.runs.cells import State
    from gptlab.runs.executor import Executor, Packing, Queue
    from gptlab.runs.experiment_runner import Progress, Runner, Snapshot, TunedRunner
    from gptlab.runs.experiment_spec import Experiment
    from gptlab.runs.smoke import Trial

ACTIONS = ("run", "status", "smoke", "plan", "ladder", "pack", "unpack")
EXECUTORS = ("slurm", "local")
SMOKE_SECONDS = 120.0

STYLE: dict[State, str] = {
    "waiting": "dim", "running": "cyan", "stopped": "yellow", "finished": "green", "diverged": "red", "failed": "red",
}  # fmt: skip
SPOKEN: tuple[State, ...] = ("finished", "diverged", "failed")


def main(argv: list[str]) -> int:
    """Do one of ACTIONS; raises ConfigError for a file that cannot be run, Stopped when asked to stop."""
    options = _parser().parse(argv)
    if options.executor and options.action != "run":
        raise UsageError(f"--executor is for run, found it with {options.action}")
    if options.slurm and not options.executor:
        raise UsageError("--slurm is for jobs of a cluster: add --executor slurm")
    actions = {"run": _run, "status": _status, "smoke": _smoke, "plan": _plan, "ladder": _ladder, "pack": _pack,
               "unpack": _unpack}  # fmt: skip
    return actions[options.action](options)


def _parser() -> Parser:
    parser = Parser(
        prog="gptlab experiment",
        description="run: train every cell (arm and seed) that is missing, as many at a time as suits the machine; run "
        "it again after any stop or kill. status: how the cells stand, from any terminal. smoke: in two minutes, does "
        "every arm run, is its signal active, at what dose, and what will the whole cost? plan: what can its "
        "seeds find, and is 'no difference' within reach? ladder: train every arm on rungs of the preset ladder too; "
        "at how many does its sign hold? pack: write all that verdicts need, and no weights, to one small file to "
        "commit or send. unpack: make a folder of such a file, in which run trains what is missing.",
        epilog="A file declares arms, seeds and delta (ready: first_look, 1_noise); `gptlab compare` gives "
        "verdicts. Exit codes of run: 0 every cell finished, 3 a cell failed, 4 one diverged, 75 stopped: run again.",
    )
    add = parser.add_argument
    file = "an experiment file, or the name of a ready one; for status and pack its folder too"
    executor = "run: submit each cell as a job through submitit [processes of this machine]"
    slurm = "what each job asks of the cluster, as in --slurm partition=gpu; may be repeated"
    add("action", choices=ACTIONS)
    add("file", metavar="FILE", help=file)
    add("--out", metavar="DIR", help="the experiment's folder [log/<name>]; for pack a file")
    add("--json", action="store_true", help="print JSON on standard output")
    add("--seeds", type=count, metavar="N", help="run only the first N seeds, a look, say [all]")
    add("--jobs", type=count, metavar="N", help="cells at a time, at most [what suits the machine]")
    add("--depths", type=_depths, default=(2, 4), metavar="N,N,..", help="ladder: its rungs, of 2,3,4,6,8 [2,4]")
    add("--executor", choices=EXECUTORS, help=executor)
    add("--slurm", action="append", metavar="KEY=VALUE", help=slurm)
    add("--allow_code", action="store_true", help="let signal.name be a function in a file of yours")
    add("--sigma", type=float, metavar="X", help="plan, smoke: spread of paired differences between seeds [its runs']")
    add("--seconds", type=count, default=SMOKE_SECONDS, metavar="N", help=f"time of smoke [{SMOKE_SECONDS:.0f}]")
    return parser


def _depths(text: str) -> list[int]:
    return [count(part) for part in text.split(",")]


def _read(options: argparse.Namespace) -> tuple[Experiment, Path]:
    """The experiment and its folder."""
    from gptlab.runs.experiment_spec import FILE, find_experiment, read_experiment

    path = find_experiment(options.file)
    looks = options.action in ("status", "pack")
    if looks and not path.exists():
        raise ConfigError(f"expected an experiment's folder, or its file, at {path}, found none; see `gptlab runs`")
    if path.is_dir() and looks:
        if not (path / FILE).is_file():
            raise ConfigError(f"expected an experiment's folder, found no {FILE} in {path}; check the path")
        return read_experiment(path / FILE, copy=True), path
    experiment = read_experiment(path)
    if experiment.codes and not options.allow_code and not looks:
        raise UsageError(f"signal.name {experiment.codes[0]} is a function in a file: it runs as your code; "
                         "add --allow_code")  # fmt: skip
    return experiment, Path(options.out) if options.out and options.action != "pack" else experiment.folder


def _run(options: argparse.Namespace) -> int:
    from gptlab.runs.experiment_runner import Runner, TunedRunner

    experiment, folder = _read(options)
    packing, executor = _where(options, experiment, folder)
    kind = TunedRunner if experiment.tune else Runner
    runner = kind(experiment, folder, packing, options.seeds, options.allow_code, executor)
    runner.prepare()
    if options.executor:
        _prepare_data(experiment)
    trials = sum(cell.arm.trial_of is not None for cell in runner.cells)
    first = f", {trials} of them trials that choose options first" * (trials > 0)
    why = packing.why({cell.n_embd for cell in runner.cells})
    note = f"{experiment.name}: {len(runner.cells)} cells in {folder}{first}; {why}"
    say(note)
    with StopRequest() as stop, Watch() as watch:
        try:
            for snapshot in runner.run(stop):
                watch.show(snapshot)
        except GptlabError as error:
            error.found = _summary(runner)
            raise
    if options.json:
        print(json.dumps(_summary(runner), indent=1))
    return _close(runner)


def _where(options: argparse.Namespace, experiment: Experiment, folder: Path) -> tuple[Packing | Queue, Executor]:
    """How many cells run at a time, and what runs them."""
    from gptlab.runs.executor import Children, Packing, Queue

    if not options.executor:
        return Packing.of_this_machine(options.jobs), Children()
    from gptlab.runs.cluster import JobOptions, Jobs

    try:
        asked = JobOptions.read(options.slurm or [])
    except ConfigError as error:
        raise UsageError(f"--slurm: {error}") from None
    jobs = options.jobs
    if options.executor == "local":
        jobs = jobs or Packing.of_this_machine().cores
    return Queue(jobs, asked.cpus_per_task, asked.gpus_per_node), Jobs(options.executor, experiment.name, folder, asked)


def _prepare_data(experiment: Experiment) -> None:
    """Prepare the corpora of all arms to their end: a cluster's nodes may not reach what they are made from."""
    from gptlab.cli.data import open_or_prepare
    from gptlab.distributed import World

    keys = ("data", "tokenizer")
    corpora = {tuple(arm.get(k, experiment.preset) for k in keys) for arm in experiment.arms.values() if not arm.patch}
    for data, tokenizer in sorted(corpora):
        _, preparing = open_or_prepare(data, tokenizer, World(), say)
        while preparing():
            time.sleep(1.0)


def _summary(runner: Runner | TunedRunner) -> dict[str, Any]:
    return {
        "experiment": runner.experiment.name,
        "folder": str(runner.folder),
        "results": str(runner.folder / "results.json"),
        "ran": runner.ran,
        **_as_json(runner.snapshot().cells),
    }


def _as_json(cells: Sequence[Progress]) -> dict[str, Any]:
    """How many cells are in which state, and each of them."""
    each = [
        {
            "arm": one.cell.arm.name, "trial_of": one.cell.arm.trial_of, "seed": one.cell.seed, "state": one.state,
            "step": one.step, "steps": one.cell.steps, "loss": one.loss, "dose": one.dose, "reason": one.reason,
            "seconds_left": one.seconds_left,
        }
        for one in cells
    ]  # fmt: skip
    return {"states": dict(Counter(one.state for one in cells)), "cells": each}


def _close(runner: Runner | TunedRunner) -> int:
    """Say what became of the cells; the exit code. A trial may diverge: finding that out is what it is for."""
    from gptlab.runs.tuning import read_kept

    if runner.experiment.tune and (kept := read_kept(runner.folder)):
        console(stderr=True).print(choices(kept), soft_wrap=True, end="")
    cells = runner.snapshot().cells
    states = Counter(one.state for one in cells if one.state != "diverged" or not one.cell.arm.trial_of)
    waits = any(one.state == "failed" and one.cell.arm.trial_of for one in cells)
    for state, code in (("failed", 3), ("diverged", 4)):
        if states[state]:
            console(stderr=True).print(ended_early([one for one in cells if one.state == state]), soft_wrap=True)
            say(
                f"gptlab: {states[state]} of {len(runner.cells)} cells {state}; see `gptlab experiment status "
                f"{runner.folder}`"
                + "; run again to try them again" * (state == "failed")
                + ", an arm waits until all its trials have ended" * (state == "failed" and waits)
            )
            return code
    say(f"every cell finished; verdicts: gptlab compare {runner.folder}")
    return 0


def _status(options: argparse.Namespace) -> int:
    from gptlab.runs.experiment_runner import standing
    from gptlab.runs.tuning import read_kept

    experiment, folder = _read(options)
    snapshot, kept = standing(experiment, folder), read_kept(folder) if experiment.tune else None
    if options.json:
        head = {"experiment": experiment.name, "folder": str(folder), "seconds_left": snapshot.seconds_left}
        print(json.dumps({**head, **_as_json(snapshot.cells), "tuning": kept}, indent=1))
        return 0

    shown_on = console()
    shown_on.print(cell_table(snapshot.cells), "", sep="\n")
    if early := [one for one in snapshot.cells if one.reason]:
        shown_on.print(ended_early(early), "", sep="\n")
    shown_on.print(summary(snapshot))
    if kept:
        shown_on.print("", choices(kept), sep="\n", end="")
    return 0


def _pack(options: argparse.Namespace) -> int:
    from gptlab.runs.archive import SUFFIX, pack

    if not (options.out or "").endswith(SUFFIX):
        raise UsageError(f"experiment pack: expected --out NAME{SUFFIX}, the file to write")
    experiment, folder = _read(options)
    packed = pack(experiment, folder, Path(options.out))
    found = {"experiment": experiment.name, "file": options.out, "cells": [cell.name for cell in packed.cells]}
    line = f"{len(packed.cells)} cells in {options.out}; gptlab compare {options.out}"
    print(json.dumps(found) if options.json else line)
    return 0


def _unpack(options: argparse.Namespace) -> int:
    from gptlab.runs.archive import unpack

    folder, cells = unpack(Path(options.file), Path(options.out) if options.out else None)
    found = {"folder": str(folder), "cells": [cell.name for cell in cells]}
    print(json.dumps(found) if options.json else f"{len(cells)} cells in {folder}")
    return 0


def _smoke(options: argparse.Namespace) -> int:
    from gptlab.runs.executor import Packing
    from gptlab.runs.smoke import equal_steps, smoke
    from gptlab.runs.tuning import cells_an_arm

    experiment, folder = _read(options)
    packing = Packing.of_this_machine(options.jobs)
    sigma = _sigma(options, folder)
    reach = _reach(experiment, sigma) if sigma else None
    seeds = len(experiment.seeds[: options.seeds])
    cells, trials = cells_an_arm(experiment, seeds), []
    with StopRequest() as stop:
        for trial in smoke(experiment, packing, options.seconds, allow_code=options.allow_code, stop=stop):
            message = trial.reason or f"{trial.signal}, a cell takes {duration(trial.seconds)}"
            say(f"{trial.arm}: {message}")
            trials.append(trial)
    total, longer = _total(experiment, trials, cells, packing), equal_steps(experiment, trials)
    tuning = f", {total['cells'] - seeds * len(cells)} of them trials that choose options" if experiment.tune else ""
    if options.json:
        arms = {t.arm: {**vars(t), "equal_flops_steps": longer.get(t.arm)} for t in trials}
        print(json.dumps({"experiment": experiment.name, "arms": arms, "total": total, "plan": reach}))
    else:
        shown_on = console()
        shown_on.print(smoke_table(trials, cells, longer), "")
        shown_on.print(
            f"One cell of each is shown; in all {total['cells']} cells{tuning}, {total['at_a_time']} at a time: about "
            f"{duration(total['seconds'])}, {megabytes(total['bytes'])}, {total['flops']:.2g} FLOPs"
        )
        if reach and (out := _out_of_reach(experiment, reach)):
            shown_on.print(f"'No difference' with a spread of {sigma:.4g}: {out}")
    return 3 if any(trial.reason for trial in trials) else 0


def _ladder(options: argparse.Namespace) -> int:
    from gptlab.cli.falsify import ladder

    return ladder(options, *_read(options))


def _plan(options: argparse.Namespace) -> int:
    """What the declared seeds can find, from the spread that was given or that runs of the experiment show."""
    experiment, folder = _read(options)
    sigma = _sigma(options, folder)
    if not sigma:
        raise UsageError(
            f"experiment plan: expected --sigma X, the spread of paired differences between seeds, or at least 2 "
            f"finished seeds of an arm and its baseline in {folder}, found {sigma}"
        )
    found = _reach(experiment, sigma)
    if options.json:
        print(json.dumps(found))
        return 0
    print(f"{found['cells']} cells; {found['n']} seeds with a spread of {sigma:.4g}, {found['arms']} arm(s) to judge:")
    print(f"  a difference of {found['smallest_difference']:.4g} is found with probability 0.8")
    print(f"  'no difference' is within reach for a delta of {found['delta_in_reach']:.4g} or more")
    if out := _out_of_reach(experiment, found):
        print(f"  {out}")
    return 0


def _sigma(options: argparse.Namespace, folder: Path) -> float | None:
    """The spread that was given, or that of the runs in an experiment's folder; None where there are too few."""
    from gptlab.analysis.design import pooled_sigma
    from gptlab.analysis.load import read

    if options.sigma is None:
        with contextlib.suppress(GptlabError):
            return pooled_sigma(read([folder]).verdicts()["arms"])
        return None
    if not 0 < options.sigma < 1e6:
        raise UsageError(
            f"--sigma: expected a spread above 0, of paired differences between seeds, found {options.sigma}"
        )
    return options.sigma


def _reach(experiment: Experiment, sigma: float) -> dict[str, Any]:
    """What the declared seeds can find with that spread: `power.plan`, and what is in reach of so many."""
    from gptlab.analysis.design import plan, smallest_delta, smallest_difference
    from gptlab.analysis.statistics import EQUIVALENCE, look_level
    from gptlab.runs.tuning import cells_an_arm

    n, looks = len(experiment.seeds), experiment.looks
    arms = [a for a in experiment.arms.values() if a.options.get("signal.control", "none") == "none"]
    found = plan(sigma, sigma, delta=experiment.delta, arms=max(1, len(arms) - len(experiment.baselines)), looks=looks)
    return {
        **found,
        "n": n,
        "smallest_difference": smallest_difference(sigma, n, found["level"]),
        "delta_in_reach": smallest_delta(sigma, n, look_level(EQUIVALENCE, looks, n)),
        "cells": sum(cells_an_arm(experiment, n).values()),
    }


def _out_of_reach(experiment: Experiment, found: Mapping[str, Any]) -> str | None:
    """In words, why the declared seeds will hardly say 'no difference'; None where they may."""
    proposed, needed = found["delta_in_reach"], found["seeds_for_no_difference"]
    if experiment.delta is None:
        return f"no delta is declared, so that 'no difference' means exact equality: delta = {proposed:.2g} would do"
    if experiment.delta < proposed:
        return f"out of reach for the declared {experiment.delta:g}, which takes {needed or 'over 10,000'} seeds"
    return None


def _total(experiment: Experiment, trials: list[Trial], cells: dict[str, int], packing: Any) -> dict[str, Any]:
    """Of the arms that ran: what all their cells cost, about."""
    threads = {arm.name: packing.threads(arm.get("n_embd", experiment.preset)) for arm in experiment.arms.values()}
    share = {name: 1 / packing.gpus if packing.gpus else many / packing.cores for name, many in threads.items()}
    return {
        "cells": sum(cells.values()),
        "at_a_time": min(sum(cells.values()), packing.gpus or packing.cores // min(threads.values())),
        "seconds": sum(cells[t.arm] * (t.seconds or 0) * share[t.arm] for t in trials),
        "bytes": sum(cells[t.arm] * (t.bytes or 0) for t in trials),
        "flops": sum(cells[t.arm] * (t.flops or 0) for t in trials),
    }


class Watch:
    """Shows snapshots as they come on standard error: a live table on a terminal, else a line a cell."""

    def __init__(self, shown_on: Console | None = None) -> None:
        self.console = shown_on or console(stderr=True)
        self._live = Live(console=self.console, auto_refresh=False, transient=True)
        self._states: dict[str, State] = {}

    def __enter__(self) -> Watch:
        if self.console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._live.stop()

    def show(self, snapshot: Snapshot) -> None:
        live, ended = self._live.is_started, [cell for cell in snapshot.cells if cell.state in SPOKEN]
        for cell in snapshot.cells:
            before = self._states.get(cell.cell.name)
            if cell.state != before and (cell.state in SPOKEN or (cell.state == "running" and not live)):
                count = f"{len(ended)} of {len(snapshot.cells)} cells have ended"
                where = f"{count}, {duration(snapshot.seconds_left)} left"
                self.console.print(Text.assemble(*_line(cell), ("  " + where, "dim")), soft_wrap=True)
            self._states[cell.cell.name] = cell.state
        if live:
            running = [cell for cell in snapshot.cells if cell.state == "running"]
            self._live.update(Group(cell_table(running), summary(snapshot)), refresh=True)


def _line(cell: Progress) -> list[Any]:
    loss = "" if cell.loss is None or cell.state == "running" else f"  loss {cell.loss:.4f}"
    reason = f"  {printable(cell.reason)}" if cell.reason else ""
    return [(f"{cell.state:<9}", STYLE[cell.state]), f"{cell.cell.name}  step {cell.step:,}{loss}{reason}"]


def cell_table(cells: Sequence[Progress]) -> Table:
    """A row a cell: arm, seed, state, step, loss, dose, time left."""
    rows = [
        (
            one.cell.arm.name, str(one.cell.seed), Text(one.state, STYLE[one.state]), f"{one.step:,}",
            f"{one.cell.steps:,}", number(one.loss, ".4f"), number(one.dose, ".3f"),
            duration(one.seconds_left),
        )
        for one in cells
    ]  # fmt: skip
    return grid(("arm", "seed", "state", ">step", ">of", ">loss", ">dose", ">left"), rows)


def ended_early(cells: Sequence[Progress]) -> Table:
    """A row an arm whose cells ended early in one way: its seeds, how far the first of them came, and why."""
    groups: dict[tuple[str, str], list[Progress]] = {}
    for one in cells:
        groups.setdefault((one.cell.arm.name, one.reason or "no reason given"), []).append(one)
    rows = [
        (arm, ", ".join(str(one.cell.seed) for one in found), f"{found[0].step:,}", Text(printable(reason), "red"))
        for (arm, reason), found in groups.items()
    ]
    return grid(("arm", "seeds", "step", "reason"), rows)


def choices(kept: Mapping[str, Any]) -> Text:
    """What tuning.json says was chosen, a line an arm, with what to know of it."""
    lines = []
    for arm, found in kept["arms"].items():
        options = ", ".join(f"{key} {_short(value)}" for key, value in found["options"].items()) or "as declared"
        whose = f", the best of {kept['trials']} trials" if found["trial"] else ""
        whose += f" of {found['follows']}" if found["follows"] else ""
        lines += [(f"{arm}: {options}{whose}\n", ""), *((f"  {note}\n", "yellow") for note in found["notes"])]
    return Text.assemble(*lines)


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else printable(str(value))


def summary(snapshot: Snapshot) -> Text:
    """How many cells are in which state, and the time left."""
    counts = Counter(cell.state for cell in snapshot.cells)
    parts = [(f"{counts[state]} {state}  ", style) for state, style in STYLE.items() if counts[state]]
    return Text.assemble(*parts, f"{duration(snapshot.seconds_left)} left")


def smoke_table(trials: Sequence[Trial], cells: Mapping[str, int], longer: Mapping[str, int]) -> Table:
    """A row an arm: what a few steps showed, how many `cells` it takes, and what one whole cell would cost.

    longer: updates of its baseline that cost as many FLOPs.
    """
    rows = [
        (
            one.arm, f"{one.steps:,}", number(one.dose, ".3f"),
            Text(one.signal, "yellow" if one.signal == "inactive so far" else ""), str(cells[one.arm]),
            duration(one.seconds), megabytes(one.bytes), number(one.flops, ".2g"),
            number(longer.get(one.arm), ","),
        )
        for one in trials
    ]  # fmt: skip
    columns = ("arm", ">steps", ">dose", "signal", ">cells", ">time", ">disk", ">FLOPs", ">as baseline steps")
    return grid(columns, rows)


def megabytes(count: int | None) -> str:
    return "–" if count is None else f"{count / 1e6:,.1f} MB"
