"""`gptlab judge`: try an idea against a lab's baseline, and keep or discard it at an error rate that is known.

Exit codes of a verdict: 0 keep; 10 discard; 11 undecided; 12 inactive; 13 broken; 4 diverged. Others are everybody's.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gptlab.cli.arguments import Parser
from gptlab.cli.console import StopRequest, duration, printable, say
from gptlab.errors import UsageError

if TYPE_CHECKING:
    from gptlab.judge.procedure import Judge


def main(argv: list[str]) -> int:
    """Judge an idea, or write, show, report or export a lab."""
    options = _parse(argv)
    from gptlab.judge.lab import FILE, read_lab
    from gptlab.judge.procedure import Judge

    if options.idea and options.idea_too:
        raise UsageError("an idea is given once: as IDEA or as --idea")
    idea = options.idea or options.idea_too
    shows = [name for name in ("init", "status", "report", "export") if getattr(options, name)]
    if len(shows) + bool(idea) > 1 or not (shows or idea or options.adopt):
        raise UsageError("expected an IDEA, or one of --init, --status, --report, --adopt and --export csv")
    folder = Path(options.lab)
    _write_lab(folder / FILE, options, must=not options.init)
    lab = read_lab(folder)
    with StopRequest() as stop:
        judge = Judge(lab, stop, say, options.allow_code)
        if options.init:
            return _init(judge, options.json)
        if shows:
            return _show(judge, shows[0], options.json)
        line = judge.judge(Path(idea)) if idea else _last_kept(judge)
        return _ended(judge, line, options)


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = Parser(
        prog="gptlab judge",
        description="Try an idea for a trainer against its baseline: screen it on shared seeds, confirm it on fresh "
        "ones, and write the verdict into the lab's ledger, so that false keeps stay rare over all ideas. Exit codes: "
        "0 keep, 10 discard, 11 undecided, 12 inactive, 13 broken, 4 diverged.",
    )
    add = parser.add_argument
    add("idea", metavar="IDEA", nargs="?", help="a diff, or an arm's TOML where the baseline is a preset")
    add("--idea", metavar="IDEA", dest="idea_too", help="the same")
    add("--lab", metavar="DIR", default="lab", help="the folder of lab.toml, the ledger and the runs [lab]")
    add("--init", action="store_true", help="write lab.toml, measure the noise floor, say what the looks can find")
    add("--command", metavar="TEXT", help="of a lab.toml to write: what trains, with {seed}")
    add("--path", metavar="DIR", help="of a lab.toml to write: the folder that it runs in a copy of [.]")
    add("--preset", metavar="NAME", help="of a lab.toml to write: a preset of gptlab in place of a command")
    add("--metric", metavar="REGEX", help="of a lab.toml to write: a pattern with one group, the metric")
    add(
        "--better",
        metavar="lower|higher",
        choices=["lower", "higher"],
        help="of a lab.toml to write: which metric is better [lower]",
    )
    add("--status", action="store_true", help="what was tried, and what is left of the error rate")
    add("--report", action="store_true", help="write report.html into the lab")
    add("--export", metavar="csv", choices=["csv"], help="print the ledger as CSV")
    add("--adopt", action="store_true", help="make the idea, or the last kept one, part of the baseline if it is kept")
    add("--allow_code", action="store_true", help="let an arm's signal.name be a function in a file next to it")
    add("--json", action="store_true", help='print {"verdict", "reason", "difference", "interval", "n", ...}')
    return parser.parse(argv)


def _write_lab(path: Path, options: argparse.Namespace, *, must: bool) -> None:
    """Write lab.toml from the options that describe one; `must`: they are for an idea, and need a file or all of it."""
    from gptlab.files import write_whole
    from gptlab.judge.lab import lab_text

    given = {
        "baseline.command": options.command, "baseline.preset": options.preset, "metric.pattern": options.metric,
        "metric.better": options.better,
    }  # fmt: skip
    named = {key: value for key, value in {**given, "baseline.path": options.path}.items() if value is not None}
    if path.exists():
        if named:
            raise UsageError(f"{path} is there: change it, in place of giving {', '.join(sorted(named))}")
        return
    if not (options.command or options.preset):
        if must:
            return  # read_lab says what is missing
        raise UsageError("--init: expected --command, --path and --metric, or --preset")
    path.parent.mkdir(parents=True, exist_ok=True)
    if options.command:
        named["baseline.path"] = str(Path(options.path or ".").resolve())
    write_whole(path, lab_text(named))


def _init(judge: Judge, as_json: bool) -> int:
    from gptlab.files import read_text, write_whole
    from gptlab.judge.lab import FILE, with_measured

    found, path = judge.measure(), judge.lab.folder / FILE
    plan = judge.plan
    low, high = found["runs_of_a_kept_idea"]
    lines = [
        f"the baseline's metric is {found['mean']:.6g}, its seed-to-seed SD {found['noise_floor']:.3g} ({found['n']} "
        f"seeds), a run takes {found['seconds_a_run']:.3g} s",
        f"looks at {', '.join(map(str, plan.looks))} seeds, confirmation at {', '.join(map(str, plan.confirm_looks))} "
        f"fresh ones: a gain of {found['smallest_effect']:.3g} is kept with probability 0.8 at first, after 10 failed "
        f"confirmations one of {found['smallest_effect_later']:.3g}, if pairing by seed is of no help; less if it is",
        f"a discarded idea costs {plan.looks[0]} to {plan.looks[-1]} runs, a kept one {low} to {high}",
    ]
    write_whole(path, with_measured(read_text(path), lines))
    if as_json:
        print(json.dumps({"lab": str(path), **found}, indent=1))
    else:
        print(printable("\n".join([*lines, f"written to {path}"])))
    return 0


def _show(judge: Judge, what: str, as_json: bool) -> int:
    from gptlab.judge.report import as_csv, status, write_report

    if what == "export":
        sys.stdout.write(as_csv(judge))
    elif what == "report":
        path = write_report(judge)
        print(json.dumps({"report": str(path)}) if as_json else f"written to {path}")
    else:
        found = status(judge)
        print(json.dumps(found, indent=1) if as_json else printable(_status_lines(found)))
    return 0


def _status_lines(found: Mapping[str, Any]) -> str:
    counts = ", ".join(f"{count} {verdict}" for verdict, count in found["verdicts"].items()) or "none"
    lines = [
        f"{found['tries']} ideas tried: {counts}",
        f"error rate {found['error_rate']:g}: {found['level_left']:.3g} left after {found['failed_confirmations']} "
        f"confirmations without a keep; the next has {found['next_level']:.2g}",
        f"{len(found['adopted'])} adopted" + "".join(f"; {name}" for name in found["adopted"]),
    ]
    if stack := found["stack"]:
        lines.append(f"all of them against the first baseline: {stack['difference']:+.4g}, 95% {_interval(stack)}")
    return "\n".join([*lines, "the ledger is whole"])


def _interval(found: Mapping[str, Any]) -> str:
    low, high = found["interval"]
    return f"{low:+.4g} to {high:+.4g}" if low is not None else "–"


def _last_kept(judge: Judge) -> Mapping[str, Any]:
    kept = [line for line in judge.ledger.read()[0] if line["verdict"] == "keep"]
    if not kept:
        raise UsageError("--adopt: no idea was kept yet; give one to judge")
    return kept[-1]


def _ended(judge: Judge, line: Mapping[str, Any], options: argparse.Namespace) -> int:
    """Show a verdict, adopt it where that was asked; the exit code."""
    from gptlab.judge.procedure import EXIT

    shown = {**line, "exit_code": EXIT[line["verdict"]], "adopted": None, "stack": None}
    if options.adopt and (line["verdict"] == "keep" or not (options.idea or options.idea_too)):
        shown["adopted"] = judge.adopt(line)["line"]
        shown["stack"] = judge.measure_stack()
    if options.json:
        print(json.dumps(shown, indent=1))
        return shown["exit_code"]
    again = " (answered from the ledger)" if line.get("answered_from_the_ledger") else ""
    lines = [f"{line['verdict']}: {line['name']}: {line['reason']}{again}"]
    if line["difference"] is not None:
        lines.append(
            f"  difference {line['difference']:+.4g}, 95% {_interval(line)}, {line['n']} seeds of {line['seeds']}; "
            f"noise floor {line['noise_floor']:.3g}"
        )
    lines.append(
        f"  level spent {line['level_spent']:.2g}, left {line['level_left']:.3g}; {duration(line['seconds'])} of runs"
    )
    if shown["adopted"]:
        lines.append("  adopted: it is part of the baseline from now on")
    print(printable("\n".join(lines)))
    return shown["exit_code"]
