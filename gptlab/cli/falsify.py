"""`gptlab falsify` and `gptlab experiment ladder`: does the sign of a finding hold in other settings?

Every setting is an experiment of its own below the output folder, trained by the usual runner and judged by the usual
verdict; a command that was stopped continues where it was.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gptlab.analysis.tables import Table, interval, number
from gptlab.cli.arguments import Parser, amount, count
from gptlab.cli.console import StopRequest, say, show_result
from gptlab.errors import ConfigError, GptlabError, Stopped, UsageError, did_you_mean

if TYPE_CHECKING:
    from gptlab.runs.experiment_spec import Experiment
    from gptlab.runs.variants import Variant

SEEDS = 3
BUDGET_ENDED = "the budget ended"
FALSIFIED = "falsify.json"
SHOWN = ("verdict", "difference", "interval", "n")


def main(argv: list[str]) -> int:
    """Try a finding's arm in other settings within a budget; raises ConfigError or UsageError for no such finding."""
    options = _parser().parse(argv)
    from gptlab.files import write_json
    from gptlab.runs.variants import changes, status

    experiment, verdicts = _finding(Path(options.finding))
    arm = _arm(verdicts, options.arm)
    found = verdicts[arm]
    names, sign = [found["baseline"], arm], found["difference"]
    folder = Path(options.out or f"{experiment.folder}.falsify")
    result: dict[str, Any] = {"finding": str(options.finding), "arm": arm, "baseline": names[0],
                              "metric": experiment.metric.name, "found": _short(found), "changes": []}  # fmt: skip
    settings = _only(changes(experiment, names), options.only)
    for variant, verdict, reason in _each(experiment, settings, names, folder, options, options.budget * 3600):
        outcome = {"status": status(sign, verdict[arm]), **_short(verdict[arm])} if verdict else {"status": "not tried"}
        result["changes"].append({"name": variant.name, "what": variant.what, **outcome, "reason": reason})
    tried = Counter(one["status"] for one in result["changes"])
    result |= {"survived": tried["survived"], "reversed": tried["reversed"], "open": tried["open"],
               "tried": sum(tried.values()) - tried["not tried"]}  # fmt: skip
    result["sentence"] = (
        f"the sign of {arm} survived {tried['survived']} of {result['tried']} changes, was reversed in "
        f"{tried['reversed']}, and {tried['open']} are open"
    )
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / FALSIFIED, result)
    if options.json:
        print(json.dumps(result, indent=1, allow_nan=False))
    else:
        show_result([changes_table(result)], [f"written: {folder / FALSIFIED}"], first=[result["sentence"]])
    return 0


def _parser() -> Parser:
    parser = Parser(
        prog="gptlab falsify",
        description="Does a finding survive? Its arm and baseline are trained again with half and twice the learning "
        "rate, Muon, an untied head, another vocabulary, another corpus, other seeds, 20 tokens a parameter and a rung "
        "up the ladder, the cheapest first, until the budget ends; run it again with a larger one to continue.",
        epilog="A change survived where the 95% interval of the difference lies on the finding's side of 0, is "
        "reversed where it lies on the other, and open where it has both. Exit codes: 0 done, 75 stopped: run again.",
    )
    add = parser.add_argument
    add("finding", metavar="FINDING", help="an experiment with finished runs: its folder, pack, file or name")
    add("--budget", metavar="HOURS", type=_hours, required=True, help="time after which nothing more is trained")
    add("--arm", metavar="NAME", help="the arm that the finding is about [the one that is better or worse]")
    add("--only", metavar="NAME,..", help="these changes alone, such as rate_half,other_seeds [all]")
    add("--seeds", type=count, default=SEEDS, metavar="N", help=f"seeds of every setting [{SEEDS}]")
    add("--out", metavar="DIR", help="where the settings' experiments go [log/<name>.falsify]")
    add("--jobs", type=count, metavar="N", help="cells at a time, at most [what suits the machine]")
    add("--allow_code", action="store_true", help="let signal.name be a function in a file of yours")
    add("--json", action="store_true", help="print JSON on standard output")
    return parser


def _only(variants: list[Variant], names: str | None) -> list[Variant]:
    wanted = names.split(",") if names else [variant.name for variant in variants]
    known = {variant.name: variant for variant in variants}
    for name in wanted:
        if name not in known:
            raise UsageError(f"--only: no change {name!r}{did_you_mean(name, known)}; there are {', '.join(known)}")
    return [variant for variant in variants if variant.name in wanted]


def _hours(text: str) -> float:
    if not (hours := amount(text)):
        raise argparse.ArgumentTypeError(f"expected hours above 0, found {text!r}")
    return hours


def ladder(options: argparse.Namespace, experiment: Experiment, folder: Path) -> int:
    """Train all arms on rungs of the ladder, and say of each at how many its sign holds."""
    from gptlab.files import write_json
    from gptlab.runs.experiment_spec import FILE
    from gptlab.runs.variants import LADDER, rungs, status

    if experiment.table.get("groups"):
        raise ConfigError(
            f"{experiment.name}: expected an experiment without [groups], whose arms pair with one baseline"
        )
    names = [experiment.baseline, *(name for name in experiment.arms if name != experiment.baseline)]
    folder = folder.with_name(f"{folder.name}.ladder") if not options.out else folder
    found: list[dict[str, Any]] = []
    for variant, verdict, reason in _each(experiment, rungs(options.depths), names, folder, options):
        arms = {arm: _short(of) for arm, of in (verdict or {}).items()}
        found.append({"depth": variant.rung, "arms": arms, "reason": reason})
    signs = {}
    for arm in names[1:]:
        on = [rung["arms"][arm] for rung in found if arm in rung["arms"]]
        sign = next((one["difference"] for one in on if status(1.0, one) != "open"), None)
        holds = sum(status(sign, one) == "survived" for one in on) if sign else 0
        signs[arm] = {"sign": sign and ("higher" if sign > 0 else "lower"), "holds": holds, "of": len(on)}
    depths = [rung["depth"] for rung in found if rung["arms"]]
    result = {"experiment": experiment.name, "metric": experiment.metric.name, "depths": depths, "rungs": found,
              "arms": signs}  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / LADDER, result)
    if (experiment.folder / FILE).is_file():  # for the passports of its verdicts
        write_json(experiment.folder / LADDER, result)
    if options.json:
        print(json.dumps(result, indent=1, allow_nan=False))
    else:
        lines = (_holds(arm, one) for arm, one in signs.items())
        show_result([rungs_table(result)], [*lines, f"written: {folder / LADDER}"])
    return 0


def _holds(arm: str, one: Mapping[str, Any]) -> str:
    if one["sign"] is None:
        return f"{arm}: no rung shows a sign"
    return f"{arm}: the sign, {one['sign']} than the baseline, holds at {one['holds']} of {one['of']} rungs"


def _finding(path: Path) -> tuple[Experiment, Mapping[str, Any]]:
    """The experiment of a finding, and the verdicts on its arms."""
    from gptlab.analysis.load import read
    from gptlab.runs.archive import is_pack, read_pack
    from gptlab.runs.experiment_spec import FILE, experiment_from, find_experiment, read_experiment, ready_experiments

    if is_pack(path):
        ready = next(iter(ready_experiments().values()), path)
        return experiment_from(read_pack(path).text, path, ready.parent), read([path]).verdicts()["arms"]
    if path.is_dir():
        if not (path / FILE).is_file():
            raise ConfigError(f"expected an experiment's folder, found no {FILE} in {path}; check the path")
        return _with_patches(read_experiment(path / FILE, copy=True), path), read([path]).verdicts()["arms"]
    experiment = read_experiment(find_experiment(path))
    if not experiment.folder.is_dir():
        raise ConfigError(
            f"expected finished runs in {experiment.folder}, found none; first: gptlab experiment run {path}"
        )
    return experiment, read([experiment.folder]).verdicts()["arms"]


def _with_patches(experiment: Experiment, folder: Path) -> Experiment:
    """The experiment of a folder's copy, with the patches that its cells ran."""
    from dataclasses import replace

    arms = {name: replace(arm, patch=folder / name / "patch.diff") if arm.patch else arm
            for name, arm in experiment.arms.items()}  # fmt: skip
    return replace(experiment, arms=arms)


def _arm(verdicts: Mapping[str, Any], wanted: str | None) -> str:
    decided = [
        arm for arm, found in verdicts.items() if found["verdict"] in ("better", "worse") and not found["control"]
    ]
    if wanted is None and len(decided) == 1:
        return decided[0]
    if wanted is None or wanted not in verdicts:
        listed = ", ".join(decided) or "none"
        raise UsageError(
            f"--arm: expected one of {', '.join(verdicts)}, found {wanted or 'nothing'}; better or worse: {listed}"
        )
    if not verdicts[wanted]["difference"]:
        raise ConfigError(f"--arm {wanted}: expected an arm with a difference, found {verdicts[wanted]['verdict']}")
    return wanted


def _each(
    experiment: Experiment,
    variants: Sequence[Variant],
    names: Sequence[str],
    folder: Path,
    options: argparse.Namespace,
    seconds: float = math.inf,
) -> Iterator[tuple[Variant, Mapping[str, Any] | None, str]]:
    """Every variant with the verdicts on its arms; None where it was not trained, with the reason."""
    from gptlab.analysis.load import read
    from gptlab.cli.experiment import Watch
    from gptlab.runs.cells import ENDED, RESULTS, Rows
    from gptlab.runs.executor import Packing
    from gptlab.runs.experiment_runner import Runner
    from gptlab.runs.variants import derived

    end = time.monotonic() + seconds
    packing = Packing.of_this_machine(options.jobs)
    with StopRequest() as stop:
        for variant in variants:
            begun = (folder / variant.name / RESULTS).is_file()  # what is whole is read, however late it is
            if variant.impossible or (time.monotonic() > end and not begun):
                yield variant, None, variant.impossible or BUDGET_ENDED
                continue
            try:
                asked = derived(experiment, variant, names, options.seeds or SEEDS)
                runner = Runner(asked, folder / variant.name, packing, allow_code=options.allow_code)
                runner.prepare()
                if not all(Rows(cell).look().state(False) in ENDED for cell in runner.cells):
                    say(f"{variant.what}: {len(runner.cells)} cells in {runner.folder}")
                    with Watch() as watch:
                        for snapshot in runner.run(lambda: stop() or time.monotonic() > end):
                            watch.show(snapshot)
                failed = [one for one in runner.snapshot().cells if one.state == "failed"]
                if failed:
                    raise ConfigError(f"{failed[0].cell.name}: {failed[0].reason}")
                verdicts = read([runner.folder]).verdicts()["arms"]
            except GptlabError as error:
                if stop():
                    raise
                yield variant, None, BUDGET_ENDED if isinstance(error, Stopped) else str(error)
            else:
                yield variant, verdicts, ""


def _short(found: Mapping[str, Any]) -> dict[str, Any]:
    return {key: found[key] for key in SHOWN}


def changes_table(result: Mapping[str, Any]) -> Table:
    """What `gptlab falsify` found, a change a row."""
    title = f"{result['arm']} against {result['baseline']}, {result['metric']}"
    rows: list[tuple[str, ...]] = [("as it was found", "", *_cells(result["found"]))]
    for one in result["changes"]:
        rows.append((one["what"], one["status"], *(_cells(one) if "n" in one else (one["reason"], "", ""))))
    return Table(title, ("change", "sign", "difference", "95% interval", "seeds"), rows)


def rungs_table(result: Mapping[str, Any]) -> Table:
    """What `gptlab experiment ladder` found, an arm and rung a row."""
    header = ("arm", "blocks", "verdict", "difference", "95% interval", "seeds")
    rows: list[tuple[str, ...]] = []
    for arm in result["arms"]:
        for rung in result["rungs"]:
            one = rung["arms"].get(arm)
            found = (one["verdict"], *_cells(one)) if one else ("not trained", rung["reason"], "", "")
            rows.append((arm, str(rung["depth"]), *found))
    return Table(f"{result['experiment']} on the ladder, {result['metric']}", header, rows)


def _cells(one: Mapping[str, Any]) -> tuple[str, str, str]:
    return number(one["difference"], "+.4f"), interval(one["interval"]), str(one["n"])
