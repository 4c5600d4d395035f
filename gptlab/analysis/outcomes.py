"""Where losses come from: finished run folders, an experiment's folder or another trainer's log -> arms x seeds.

All at one step, with what was declared of them and their passports, ready for `compare`. Nothing is judged here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gptlab.analysis.beside import beside, longer_runs_of
from gptlab.analysis.logs import SUFFIXES, read_log
from gptlab.analysis.run import Run, mean_dose, passport, read_run
from gptlab.analysis.sameness import COMMON, TUNED, arm_of, own_options, undeclared
from gptlab.analysis.tuned import Tuning, read_tuning
from gptlab.analysis.verdicts import compare
from gptlab.errors import ConfigError, DataError, did_you_mean
from gptlab.options import flatten_table
from gptlab.parsing import parse_toml
from gptlab.runs.archive import SUFFIX, is_pack, read_pack

EXPERIMENT = "experiment.toml"
"""The copy of the experiment file that lies beside an experiment's arms."""


CODED = {"patch", "signal.name", "also"}
"""Keys of an arm that may bring code of its own, which its runs record."""


@dataclass(frozen=True)
class Outcomes:
    """losses: {arm: {seed: loss at `step`}}, None where a run diverged; arguments: the rest of `compare`'s.

    passports: {arm: figures}; changes: {arm: {option: [the baseline's, its own]}}; undeclared: differences that
    forbid to compare, one line each; notes: runs that were left out, and why. curves: {arm: {seed: {step: validation
    loss}}}, runs: {arm: its finished runs}, none of a log's; both in the order of seeds. tuning: what trials chose.
    """

    name: str
    step: int
    losses: Mapping[str, Mapping[int, float | None]]
    arguments: Mapping[str, Any]
    passports: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    changes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    undeclared: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    curves: Mapping[str, Mapping[int, Mapping[int, float]]] = field(default_factory=dict)
    runs: Mapping[str, Sequence[Run]] = field(default_factory=dict)
    longer: Mapping[str, str] = field(default_factory=dict)
    tuning: Tuning = field(default_factory=Tuning)

    def verdicts(self, **given: Any) -> dict[str, Any]:
        """`compare`'s result with each arm's passport and changes; `given` arguments stand over the declared ones.

        A given baseline stands over declared groups.
        """
        arguments = {**self.arguments, **{key: value for key, value in given.items() if value is not None}}
        result = compare(self.losses, **arguments)
        for arm, found in result["arms"].items():
            found["changes"] = dict(self.changes.get(arm, {}))
            figures = ("noise_floor", "seed_correlation", "smallest_difference")
            longer = [name for name, of in self.longer.items() if of == found["baseline"]]
            if all(max(run.losses) == self.step for run in self.runs.get(arm, ())):
                found |= beside(arm, found["baseline"], longer, self.runs, result["looks"])
            found["passport"] = {**self.passports.get(arm, {}), **{key: found[key] for key in figures}}
        head = {"experiment": self.name, "step": self.step}
        tail = {"tuning": self.tuning.as_json(), "undeclared": list(self.undeclared), "notes": list(self.notes)}
        return {**head, **result, **tail}


def read(sources: Sequence[str | Path], *, step: int | None = None, baseline: str | None = None) -> Outcomes:
    """The outcomes in one experiment folder, one log (.csv, .jsonl), or any number of run folders.

    step: of the losses; by default the last one at which every finished run was validated. baseline: an arm's name,
    or of single runs the folder of one of its runs. Raises ConfigError, DataError or CheckpointError.
    """
    first = Path(sources[0])
    if first.suffix in SUFFIXES:
        return _of_log(_only(sources), step, baseline)
    if is_experiment(first):
        return _of_experiment(_only(sources), step)
    if not first.exists():
        raise ConfigError(f"expected a run, an experiment's folder or a log at {first}, found nothing; check the path")
    if first.is_file():
        raise ConfigError(f"{first}: expected a log that ends in {' or '.join((*SUFFIXES, SUFFIX))}, or a folder")
    return _of_runs([read_run(path) for path in sources], step, baseline)


def is_experiment(path: Path) -> bool:
    """Whether it is an experiment's folder, or a packed one."""
    return is_pack(path) or (path / EXPERIMENT).is_file()


def _only(sources: Sequence[str | Path]) -> Path:
    if len(sources) > 1:
        raise ConfigError(f"expected {sources[0]} alone, found {len(sources)} sources; only single runs go together")
    return Path(sources[0])


def _of_log(path: Path, step: int | None, baseline: str | None) -> Outcomes:
    logged = read_log(path)
    runs = {f"{arm}, seed {seed}": steps for arm, seeds in logged.items() for seed, steps in seeds.items()}
    whole = {name: steps for name, steps in runs.items() if all(map(math.isfinite, steps.values()))}
    step = _common_step(whole, step)
    losses = {
        arm: {seed: steps[step] if f"{arm}, seed {seed}" in whole else None for seed, steps in seeds.items()}
        for arm, seeds in logged.items()
    }
    notes = tuple(f"{name} has no finite loss" for name in runs if name not in whole)
    curves = {
        arm: {seed: seeds[seed] for seed in sorted(seeds) if f"{arm}, seed {seed}" in whole}
        for arm, seeds in logged.items()
    }
    return Outcomes(path.stem, step, losses, {"baseline": baseline}, notes=notes, curves=curves)


def _of_runs(runs: list[Run], step: int | None, baseline: str | None) -> Outcomes:
    """Runs by themselves: equal options but for the seed make an arm; options of data and model must be equal."""
    plain = [run for run in runs if not run.has_signal]
    named = [run for run in runs if baseline and run.path == Path(baseline)]
    if baseline and not named:
        raise ConfigError(f"--baseline: expected the folder of one of the runs, found {baseline!r}")
    reference = (named or plain or runs)[0]
    arms: dict[str, list[Run]] = {"baseline": []}
    for run in runs:
        name = arm_of(own_options(run), own_options(reference)) or "baseline"
        arms.setdefault(name, []).append(run)
    for name, members in arms.items():
        seeds = [run.seed for run in members]
        if twice := {seed for seed in seeds if seeds.count(seed) > 1}:
            raise ConfigError(f"{name}: expected one run a seed, found two of seed {min(twice)}; leave one out")
    differ = frozenset(key for run in runs for key in own_options(run)) - COMMON | {"code"}
    declared = {arm: own_options(members[0]) for arm, members in arms.items()}
    return _outcomes("runs", arms, declared, step, {"baseline": "baseline"}, dict.fromkeys(arms, differ))


def _of_experiment(folder: Path, step: int | None) -> Outcomes:
    """An experiment's cells <arm>/seed_<n>/, or those of a packed one, with what its file declared."""
    packed, path = None, folder
    if is_pack(folder):
        packed = read_pack(folder)
        table = parse_toml(packed.text)
    else:
        path = folder / EXPERIMENT
        try:
            table = parse_toml(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ConfigError(f"{path} is not a TOML file that can be read: {error}") from None
    if not isinstance(table.get("arms"), dict) or table.get("baseline") not in table["arms"]:
        hint = did_you_mean(str(table.get("baseline")), table.get("arms", ()))
        raise ConfigError(f"{path}: expected arms, and the name of one of them as baseline{hint}")
    looks, seeds = table.get("looks"), table.get("seeds")
    if (looks is None) == (seeds is None):
        raise ConfigError(f"{path}: expected either seeds or looks, found {'both' if looks else 'neither'}")
    if packed:
        found = {arm: [read_run(cell.run) for cell in packed.cells if cell.arm == arm] for arm in table["arms"]}
    else:
        found = {arm: [read_run(cell) for cell in _cells(folder / arm)] for arm in table["arms"]}
    arms = {arm: [run for run in runs if seeds is None or run.seed in seeds] for arm, runs in found.items()}
    extra = [run for arm, runs in found.items() for run in runs if run not in arms[arm]]
    changed = {arm: _flat(own) for arm, own in table["arms"].items()}
    common = _flat(table.get("options", {}))
    allowed = {
        arm: frozenset(own) | (TUNED if "tune" in table else set()) | ({"code"} if CODED & own.keys() else set())
        for arm, own in changed.items()
    }
    arguments = {
        "baseline": table["baseline"],
        "delta": table.get("delta", 0.01),
        "looks": looks,
        "planned": None if seeds is None else len(seeds),
        "groups": table.get("groups"),
    }
    declared = {arm: {**common, **changed[arm]} for arm in arms}
    name = str(table.get("name", folder.name))
    notes = [f"{run.path}: seed {run.seed} was not declared" for run in extra]
    tuning = Tuning("tune" in table, packed.tuning or {}) if packed else read_tuning(folder, table)
    return _outcomes(name, arms, declared, step, arguments, allowed, tuning=tuning, notes=notes)


def _flat(table: Mapping[str, Any]) -> dict[str, Any]:
    """A table of options under dotted keys; of several [[signal]] tables the first is `signal`, the rest `also`."""
    table = dict(table)
    if isinstance(table.get("signal"), list):
        table["signal"], *table["also"] = table["signal"]
    return flatten_table(table)


def _cells(arm: Path) -> list[Path]:
    return sorted(path for path in arm.glob("seed_*") if (path / "config.json").is_file())


def _outcomes(
    name: str,
    arms: Mapping[str, list[Run]],
    declared: Mapping[str, Mapping[str, Any]],
    step: int | None,
    arguments: dict[str, Any],
    allowed: Mapping[str, frozenset[str]],
    *,
    tuning: Tuning | None = None,
    notes: Sequence[str] = (),
) -> Outcomes:
    """declared: {arm: options that were set}; allowed: {arm: keys in which its runs may differ from its baseline's}."""
    tuning = tuning or Tuning()
    runs = [run for members in arms.values() for run in members]
    ended = {arm: [run for run in members if run.finished or run.diverged] for arm, members in arms.items()}
    left = [run for run in runs if not (run.finished or run.diverged)]
    whole = {arm: [run for run in members if run.finished] for arm, members in ended.items()}
    whole = {arm: sorted(members, key=lambda run: run.seed) for arm, members in whole.items()}
    of_all: str = arguments["baseline"]
    baselines = dict.fromkeys(arms, of_all)
    for members in (arguments.get("groups") or {}).values():
        baselines |= dict.fromkeys(members, members[0])
    longer = longer_runs_of(whole, baselines)
    judged = {arm: members for arm, members in ended.items() if arm not in longer}
    step = _common_step({str(run.path): run.losses for of in judged.values() for run in of if run.finished}, step)
    losses = {
        arm: {run.seed: run.losses[step] if run.finished else None for run in members}
        for arm, members in judged.items()
    }
    differences: list[str] = []
    for arm, members in ended.items():
        references = ended.get(baselines[arm]) or members
        may_differ = allowed[arm] | allowed[baselines[arm]] if arm != baselines[arm] else frozenset()
        for run in members:
            differences += undeclared(run, references[0], may_differ, members[0])
    controls = {arm: control for arm in arms if (control := _control(declared[arm])) != "none"}
    signals = [arm for arm in arms if arm not in controls and _differs_by_signal(declared, arm, baselines[arm])]
    return Outcomes(
        name=name,
        step=step,
        losses=losses,
        arguments={
            **arguments,
            "groups": _without(longer, arguments.get("groups")),
            "placebos": {arm: placebo for arm in signals if (placebo := _placebo_of(arm, declared, controls))},
            "controls": list(controls),
            "signals": signals,
            "doses": {arm: mean_dose(ended[arm]) for arm in [*signals, *controls]},
        },
        passports={arm: {**passport(members, step), **tuning.of_arm(arm)} for arm, members in ended.items() if members},
        changes={arm: _changes(ended[arm], ended.get(baselines[arm], [])) for arm in arms if arm != baselines[arm]},
        undeclared=tuple(differences),
        notes=(*notes, *(f"{run.path} stands at step {run.last_step} and has not finished" for run in left)),
        curves={arm: {run.seed: run.losses for run in members} for arm, members in whole.items()},
        runs=whole,
        longer=longer,
        tuning=tuning,
    )


def _without(arms: Mapping[str, str], groups: Mapping[str, list[str]] | None) -> dict[str, list[str]] | None:
    if not groups:
        return None
    return {name: [arm for arm in members if arm not in arms] for name, members in groups.items()}


def _common_step(losses: Mapping[str, Mapping[int, float]], asked: int | None) -> int:
    """The step asked for, or the last at which all were validated; raises DataError where there is none."""
    if not losses:
        raise DataError("expected finished runs, found none; wait for them or train them")
    shared = set.intersection(*(set(steps) for steps in losses.values()))
    if asked is not None and asked not in shared:
        lacking = next(name for name, steps in losses.items() if asked not in steps)
        have = ", ".join(map(str, sorted(shared))) or "none"
        raise DataError(f"--step {asked}: {lacking} has no validation loss there; steps that all have: {have}")
    if not shared:
        steps = "; ".join(f"{name}: {max(steps, default='none')}" for name, steps in list(losses.items())[:4])
        raise DataError(f"expected a step at which every run was validated, found none; last steps are {steps}")
    return max(shared) if asked is None else asked


def _control(options: Mapping[str, Any]) -> str:
    return options.get("signal.control", "none") if options.get("signal.name", "none") != "none" else "none"


def _signal(options: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in options.items() if key.partition(".")[0] in ("signal", "also")}


def _differs_by_signal(declared: Mapping[str, Mapping[str, Any]], arm: str, baseline: str) -> bool:
    has = declared[arm].get("signal.name", "none") != "none"
    return has and arm != baseline and _signal(declared[arm]) != _signal(declared[baseline])


def _placebo_of(arm: str, declared: Mapping[str, Mapping[str, Any]], controls: Mapping[str, str]) -> str | None:
    """The arm that differs from `arm` only in `signal.control`, which is placebo."""
    wanted = {**declared[arm], "signal.control": "placebo"}
    return next((other for other in controls if declared[other] == wanted), None)


def _changes(runs: list[Run], baseline: list[Run]) -> dict[str, list[Any]]:
    if not runs or not baseline:
        return {}
    theirs, own = own_options(baseline[0]), own_options(runs[0])
    return {key: [theirs.get(key), value] for key, value in own.items() if theirs.get(key) != value}
