"""Where losses come from: finished run folders, an experiment's folder or another trainer's log -> arms x seeds.

All at one step, with what was declared of them and their passports, ready for `compare`. Nothing is judged here.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from gptlab.analysis.comparability import (
    COMMON,
    TUNED,
    arm_of,
    cost_matched,
    longer_runs_of,
    own_options,
    steps_saved,
    undeclared,
)
from gptlab.analysis.design import Seed, order
from gptlab.analysis.logs import SUFFIXES, Logged, read_table, read_texts, text_logs
from gptlab.analysis.run import Run, find_runs, mean_dose, norm_ratio, passport, read_run
from gptlab.analysis.statistics import repeated, spread
from gptlab.analysis.verdict import compare
from gptlab.errors import ConfigError, DataError, did_you_mean
from gptlab.runs.archive import SUFFIX, is_pack, read_pack
from gptlab.runs.experiment_spec import FILE as EXPERIMENT
from gptlab.runs.experiment_spec import (
    Metric,
    declaration,
    experiment_from,
    flat_options,
    read_experiment,
    recorded_declaration,
)
from gptlab.runs.records import edited_rows
from gptlab.runs.tuning import read_kept
from gptlab.runs.variants import read_ladder
from gptlab.training.presets import PRESETS

LOSS = Metric()
CODED = {"patch", "signal.name", "also"}
"""Keys of an arm that may bring code of its own, which its runs record."""


@dataclass(frozen=True)
class Tuning:
    """on: whether the experiment has [tune]; kept: the content of its tuning.json, empty where that is missing."""

    on: bool = False
    kept: Mapping[str, Any] = field(default_factory=dict)

    def of_arm(self, arm: str) -> dict[str, Any]:
        """For the arm's passport. trials: how many its options were chosen of, None where that is not known."""
        found = self.kept.get("arms", {}).get(arm, {})
        return {"tuned": self.on, "trials": self.kept.get("trials") if found else None, "follows": found.get("follows")}

    def as_json(self) -> dict[str, Any] | None:
        """For the comparison's result: None without [tune]."""
        return {"trials": None, "seeds": None, "arms": {}, **self.kept} if self.on else None


@dataclass(frozen=True)
class Outcomes:
    """losses: {arm: {seed: the metric at `step`}}, None where a run diverged; arguments: the rest of `compare`'s.

    changes: {arm: {option: [the baseline's, its own]}}; undeclared: differences that forbid to compare; notes: runs
    left out, and why. curves: {arm: {seed: {step: the metric}}}, runs: {arm: its finished runs, none of a log's},
    both in the order of seeds. longer: {arm: baseline} of arms that are only a longer run of it. declared:
    when and as what, in words.
    """

    name: str
    step: int
    losses: Mapping[str, Mapping[Any, float | None]]
    arguments: Mapping[str, Any]
    passports: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    changes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    undeclared: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    curves: Mapping[str, Mapping[Any, Mapping[int, float]]] = field(default_factory=dict)
    runs: Mapping[str, Sequence[Run]] = field(default_factory=dict)
    longer: Mapping[str, str] = field(default_factory=dict)
    tuning: Tuning = field(default_factory=Tuning)
    declared: str = ""

    def _norm_ratio(self, arm: str, other: str) -> dict[str, float] | None:
        return norm_ratio(self.runs.get(arm, ()), self.runs.get(other, ()))

    def _mark_plateau(self, arm: str, found: dict[str, Any]) -> None:
        """Count the runs of an arm, its baseline and its placebo that are at the plateau, or only better than that
        and not than frequencies of pairs; its reason says so."""
        placebo, baseline = found["placebo"], found["baseline"]
        which = [("", arm, baseline, found, "")]
        which += [(" of its baseline", baseline, arm, found, "baseline_")]
        which += [(" of its placebo", placebo["arm"], arm, placebo, "")] if placebo else []
        for whose, name, other, to, prefix in which:
            runs, key = self.runs.get(name, ()), f"{prefix}at_plateau"
            pairs = [run.not_below_bigrams(self.step) for run in runs]
            count = to[f"{prefix}not_below_bigrams"] = sum(map(bool, pairs)) if pairs and None not in pairs else None
            if count:
                found["reason"] += (
                    f"; {count} of {len(runs)} runs{whose} {'is' if count == 1 else 'are'} not below bigrams, no "
                    f"better than the frequencies of pairs of tokens ({runs[0].ended['bigram_loss']:.4f} nats)"
                )
            known = [run.at_plateau(self.step) for run in runs]
            count = to[key] = sum(map(bool, known)) if known and None not in known else None
            if not count:
                continue
            found["reason"] += (
                f"; {count} of {len(runs)} runs{whose} {'is' if count == 1 else 'are'} at the plateau, no better than "
                f"the frequencies of tokens ({runs[0].unigram_loss:.4f} nats)"
            )
            own, others = (spread([x for x in self.losses[of].values() if x is not None]) for of in (name, other))
            if count == len(runs) and own is not None and others is not None and 10 * own < others:
                found["reason"] += (
                    f": they hardly differ, so that the interval between the two is {other}'s spread alone"
                )

    def _saved(self, arm: str, found: Mapping[str, Any], better: str) -> dict[str, Any] | None:
        own, other = self.curves.get(arm, {}), self.curves.get(found["baseline"], {})
        if found["paired"]:
            own, other = ({seed: of[seed] for seed in found["seeds"] if seed in of} for of in (own, other))
        return steps_saved(own, other, self.step, paired=found["paired"], better=better)

    def verdicts(self, **given: Any) -> dict[str, Any]:
        """`compare`'s result with each arm's passport and changes; `given` arguments override the declared ones."""
        _refuse_repeated(self.losses, self.curves)
        arguments = {**self.arguments, **{key: value for key, value in given.items() if value is not None}}
        result = {"experiment": self.name, "step": self.step, **compare(self.losses, **arguments)}
        for arm, found in result["arms"].items():
            found["changes"] = dict(self.changes.get(arm, {}))
            longer = [name for name, of in self.longer.items() if of == found["baseline"]]
            if all(max(run.losses) == self.step for run in self.runs.get(arm, ())):
                found |= cost_matched(arm, found["baseline"], longer, self.runs, result["looks"], result["metric"])
            found["steps_saved"] = self._saved(arm, found, result["better"])
            of_signal = {name for name, runs in self.runs.items() if any(run.has_signal for run in runs)}
            if arm in of_signal and found["baseline"] not in of_signal:
                found["dose_of_baseline"] = self._norm_ratio(arm, found["baseline"])
            if found["placebo"]:
                placebo = found["placebo"]["arm"]
                found["placebo"]["norm_ratio"] = self._norm_ratio(arm, placebo)
                of_arm, of_placebo = (self.runs.get(name, ()) for name in (arm, placebo))
                found["placebo"]["step_ratio"] = norm_ratio(of_arm, of_placebo, "step_changes")
            self._mark_plateau(arm, found)
            figures = ("noise_floor", "seed_correlation", "arms_correlation", "smallest_difference")
            found["passport"] = {**self.passports.get(arm, {}), **{key: found[key] for key in figures}}
        tuning = self.tuning.as_json()
        return {
            **result,
            "declared": self.declared or None,
            "tuning": tuning,
            "undeclared": list(self.undeclared),
            "notes": list(self.notes),
        }


def read(
    sources: Sequence[str | Path], *, step: int | None = None, baseline: str | None = None,
    seeds: Sequence[int] | None = None, metric: Metric = LOSS, until: float = math.inf,
) -> Outcomes:  # fmt: skip
    """The outcomes in one experiment folder, one table of another trainer, its text logs, or any number of run folders.

    step: by default the last at which every finished run was validated. baseline: an arm's name, or of single runs the
    folder of one. seeds: those that count, of runs and logs; by default all that any arm has. metric: of runs and logs.
    until: when reading ends, as for read_rows. Raises ConfigError, DataError or CheckpointError.
    """
    first = Path(sources[0])
    if len(sources) > 1 and (first.suffix in SUFFIXES or is_experiment(first)):
        raise ConfigError(f"expected {first} alone, found {len(sources)} sources; only single runs go together")
    if first.suffix in SUFFIXES:
        return _of_log(first.stem, read_table(first, metric.name), step, baseline, seeds, metric)
    if (texts := text_logs(sources)) is not None:
        return _of_log("logs", read_texts(texts), step, baseline, seeds, metric)
    if is_experiment(first):
        return _of_experiment(first, step, until)
    if not first.exists():
        raise ConfigError(f"expected a run, an experiment's folder or a log at {first}, found nothing; check the path")
    if first.is_file():
        raise ConfigError(f"{first}: expected a log that ends in {' or '.join((*SUFFIXES, SUFFIX))}, or a folder")
    runs = [path for source in map(Path, sources) for path in _runs_in(source)]
    return _of_runs([read_run(path, until) for path in runs], step, baseline, seeds, metric)


def _runs_in(source: Path) -> list[Path]:
    """The runs in a folder at any depth, itself included; itself where it has none, for an error to name it."""
    return list(find_runs(source)) or [source] if source.is_dir() else [source]


def refuse_undeclared(outcomes: Outcomes, *, despite: bool) -> None:
    """Raise ConfigError with the differences where runs differ in what nobody declared, unless asked to go ahead."""
    if outcomes.undeclared and not despite:
        listed = "\n  ".join(outcomes.undeclared)
        raise ConfigError(
            f"expected runs that differ only in what their arms declare, found other differences; leave runs out, "
            f"or use --despite:\n  {listed}"
        )


def is_experiment(path: Path) -> bool:
    """Whether it is an experiment's folder, or a packed one."""
    return is_pack(path) or (path / EXPERIMENT).is_file()


def _of_log(
    name: str, log: tuple[Logged, str], step: int | None, baseline: str | None, seeds: Sequence[Seed] | None,
    metric: Metric,
) -> Outcomes:  # fmt: skip
    logged, figure = log
    better = metric.better if figure == metric.name or metric.better == "higher" else Metric.of(figure).better
    every = [(arm, seed) for arm, found in logged.items() for seed in found]
    notes = [f"{arm}: seed {seed} was not declared" for arm, seed in every if seeds is not None and seed not in seeds]
    every = [(arm, seed) for arm, seed in every if seeds is None or seed in seeds]
    whole = [(arm, seed) for arm, seed in every if all(map(math.isfinite, logged[arm][seed].values()))]
    step = _common_step({f"{arm}, seed {seed}": logged[arm][seed] for arm, seed in whole}, step)
    losses: dict[str, dict[Seed, float | None]] = {arm: {} for arm in logged}
    curves: dict[str, dict[Seed, Mapping[int, float]]] = {arm: {} for arm in logged}
    for arm, seed in every:
        losses[arm][seed] = logged[arm][seed][step] if (arm, seed) in whole else None
    for arm, seed in sorted(whole, key=lambda run: order(run[1])):
        curves[arm][seed] = logged[arm][seed]
    notes += [f"{arm}, seed {seed} has no finite loss" for arm, seed in every if (arm, seed) not in whole]
    arguments = {
        "baseline": baseline, "seeds": _all_seeds(losses.values()) if seeds is None else seeds,
        "metric": figure, "better": better,
    }  # fmt: skip
    return Outcomes(name, step, losses, arguments, notes=tuple(notes), curves=curves)


def _refuse_repeated(losses: Mapping[str, Mapping[Any, float | None]], curves: Mapping[str, Any]) -> None:
    """Raise ConfigError for an arm of which one run is there more than once.

    All its losses are equal (of four seeds or more, as fewer get no verdict), or two runs agree in every digit.
    """
    for arm, found in losses.items():
        if len(found) > 3 and len(set(found.values())) == 1 and None not in found.values():
            raise ConfigError(
                f"{arm}: expected another loss with each seed, found {next(iter(found.values())):g} with all "
                f"{len(found)}; was one run given more than once, or does its seed change nothing?"
            )
        if twice := repeated(
            {seed: [x for _, x in sorted(curve.items())] for seed, curve in curves.get(arm, {}).items()}
        ):
            raise ConfigError(
                f"{arm}: expected another loss with each seed, found the same ones with {twice[0]} and {twice[1]}; one "
                "run that is logged twice counts once: leave one out"
            )


def _all_seeds(losses: Iterable[Iterable[Seed]]) -> list[Seed]:
    return sorted({seed for found in losses for seed in found}, key=order)


def _of_runs(
    runs: list[Run], step: int | None, baseline: str | None, seeds: Sequence[int] | None, metric: Metric
) -> Outcomes:
    """Runs by themselves: equal options but for the seed make an arm; options of data and model must be equal."""
    notes = [f"{run.path}: seed {run.seed} was not declared" for run in runs if seeds and run.seed not in seeds]
    runs = [run for run in runs if not seeds or run.seed in seeds]
    plain = [run for run in runs if not run.has_signal]
    of_arm = [run for run in plain if run.options.get("arm") == (baseline or "baseline")]
    named = of_arm or [run for run in runs if baseline and run.path == Path(baseline)]
    if baseline and not named:
        raise ConfigError(f"--baseline: expected the folder of one of the runs, or an arm's name, found {baseline!r}")
    if not runs:
        raise ConfigError(f"--seeds: expected seeds that the runs have, found none of them; {'; '.join(notes)}")
    reference = (named or plain or runs)[0]
    first = str(reference.options.get("arm", "baseline"))
    arms: dict[str, list[Run]] = {first: []}
    for run in runs:
        name = run.options.get("arm") or arm_of(own_options(run), own_options(reference)) or first
        arms.setdefault(name, []).append(run)
    differ = frozenset(key for run in runs for key in own_options(run)) - COMMON | {"code"}
    declared = {arm: own_options(members[0]) for arm, members in arms.items()}
    arguments = {"baseline": first, "seeds": seeds, "metric": metric.name, "better": metric.better}
    return _outcomes("runs", arms, declared, step, arguments, dict.fromkeys(arms, differ), Tuning(), notes)


def _of_experiment(folder: Path, step: int | None, until: float) -> Outcomes:
    """An experiment's cells <arm>/seed_<n>/, or those of a packed one, with what its file declared."""
    packed = read_pack(folder) if is_pack(folder) else None
    experiment = experiment_from(packed.text, folder) if packed else read_experiment(folder / EXPERIMENT, copy=True)
    found: dict[str, list[Run]] = {}
    for arm in experiment.arms:
        cells = sorted(path for path in (folder / arm).glob("seed_*") if (path / "config.json").is_file())
        sources = [cell.run for cell in packed.cells if cell.arm == arm] if packed else cells
        found[arm] = [read_run(source, until) for source in sources]
    declared_seeds = {
        arm: (*experiment.seeds, *(experiment.further if arm in experiment.baselines else ())) for arm in found
    }
    arms = {arm: [run for run in runs if run.seed in declared_seeds[arm]] for arm, runs in found.items()}
    own = {arm: flat_options(table) for arm, table in experiment.table["arms"].items()}
    allowed = {
        arm: frozenset(options) | (TUNED if experiment.tune else set())
        | ({"code"} if CODED & options.keys() else set()) | (PRESETS["ladder"].keys() if "depth" in options else set())
        for arm, options in own.items()
    }  # fmt: skip
    arguments = {
        "baseline": experiment.baseline, "delta": experiment.delta, "looks": experiment.looks,
        "seeds": experiment.seeds, "planned": None if experiment.looks else len(experiment.seeds),
        "groups": experiment.table.get("groups"), "metric": experiment.metric.name, "better": experiment.metric.better,
        "baseline_seeds": experiment.further,
    }  # fmt: skip
    common = flat_options(experiment.table.get("options", {}))
    declared = {arm: {**common, **own[arm]} for arm in arms}
    extra = [run for arm, runs in found.items() for run in runs if run.seed not in declared_seeds[arm]]
    notes = [f"{run.path}: seed {run.seed} was not declared" for run in extra]
    kept = packed.tuning if packed else read_kept(folder) if experiment.tune else None
    tuning = Tuning(experiment.tune is not None, kept or {})
    name = experiment.table.get("name", folder.name)
    outcomes = _outcomes(name, arms, declared, step, arguments, allowed, tuning, notes)
    ladder = (packed.ladder if packed else read_ladder(folder)) or {"arms": {}}
    rungs = {arm: {**of, "depths": ladder["depths"]} for arm, of in ladder["arms"].items()}
    passports = {arm: {**found, "rungs": rungs.get(arm)} for arm, found in outcomes.passports.items()}
    words, changed = declaration(experiment, folder, packed.declared if packed else recorded_declaration(folder))
    undeclared_too = (*changed, *outcomes.undeclared)
    return replace(outcomes, declared=words, undeclared=undeclared_too, passports=passports)


def _outcomes(
    name: str, arms: Mapping[str, list[Run]], declared: Mapping[str, Mapping[str, Any]], step: int | None,
    arguments: dict[str, Any], allowed: Mapping[str, frozenset[str]], tuning: Tuning, notes: Sequence[str],
) -> Outcomes:  # fmt: skip
    """declared: {arm: options that were set}; allowed: {arm: keys in which its runs may differ from its baseline's}."""
    for of_arm, members in arms.items():
        _refuse_copies(of_arm, members)
    ended = {arm: [run for run in members if run.finished or run.diverged] for arm, members in arms.items()}
    left = [run for members in arms.values() for run in members if not (run.finished or run.diverged)]
    by_seed = {arm: sorted(members, key=lambda run: run.seed) for arm, members in ended.items()}
    whole = {arm: [run for run in members if run.finished] for arm, members in by_seed.items()}
    groups: Mapping[str, list[str]] = arguments.get("groups") or {}
    baselines: dict[str, str] = dict.fromkeys(arms, str(arguments["baseline"]))
    for members in groups.values():
        baselines |= dict.fromkeys(members, members[0])
    longer = longer_runs_of(whole, baselines)
    judged = {arm: members for arm, members in ended.items() if arm not in longer}
    if arguments["seeds"] is None:
        arguments["seeds"] = _all_seeds([run.seed for run in arms[arm]] for arm in judged)
    metric = arguments["metric"]
    _check_metric(metric, [run for of in judged.values() for run in of if run.finished])
    finished = {str(run.path): run.figures.get(metric, {}) for of in judged.values() for run in of if run.finished}
    step = _common_step(finished, step)
    losses = {
        arm: {run.seed: run.figures[metric][step] if run.finished else None for run in members}
        for arm, members in judged.items()
    }
    differences: list[str] = []
    for arm, members in ended.items():
        references = ended.get(baselines[arm]) or members
        may_differ = allowed[arm] | allowed[baselines[arm]] if arm != baselines[arm] else frozenset()
        for run in members:
            differences += undeclared(run, references[0], may_differ, members[0])
            differences += [edited] if run.finished and (edited := edited_rows(run.source)) else []
    has_signal = [arm for arm in arms if declared[arm].get("signal.name", "none") != "none"]
    controls = [arm for arm in has_signal if declared[arm].get("signal.control", "none") != "none"]
    signals = [
        arm for arm in has_signal
        if arm not in controls and arm != (of := baselines[arm]) and _signal(declared[arm]) != _signal(declared[of])
    ]  # fmt: skip
    return Outcomes(
        name=name,
        step=step,
        losses=losses,
        arguments={
            **arguments,
            "groups": {g: [arm for arm in members if arm not in longer] for g, members in groups.items()} or None,
            "placebos": {arm: placebo for arm in signals if (placebo := _placebo_of(arm, declared, controls))},
            "controls": controls,
            "signals": signals,
            "doses": {arm: mean_dose(ended[arm]) for arm in [*signals, *controls]},
        },
        passports={arm: {**passport(members, step), **tuning.of_arm(arm)} for arm, members in ended.items() if members},
        changes={arm: _changes(ended[arm], ended.get(baselines[arm], [])) for arm in arms if arm != baselines[arm]},
        undeclared=tuple(differences),
        notes=(*notes, *(f"{run.path} is at step {run.last_step} and has not finished" for run in left)),
        curves={arm: {run.seed: run.figures.get(metric, {}) for run in members} for arm, members in whole.items()},
        runs=whole,
        longer=longer,
        tuning=tuning,
    )


def _check_metric(metric: str, runs: Sequence[Run]) -> None:
    """Raise ConfigError for a metric that no run has a figure of."""
    known = sorted({name for run in runs for name in run.figures})
    if known and metric not in known:
        raise ConfigError(
            f"metric: no figure {metric!r}{did_you_mean(metric, known)}; the runs have {', '.join(known)}"
        )


def _refuse_copies(arm: str, members: Sequence[Run]) -> None:
    """Raise ConfigError where two runs of an arm have one seed, or are one run under two names."""
    seeds, seen, starts = [run.seed for run in members], {}, {}
    if twice := {seed for seed in seeds if seeds.count(seed) > 1}:
        where = " and ".join(str(run.path) for run in members if run.seed == min(twice))
        raise ConfigError(f"{arm}: expected one run a seed, found {where} of seed {min(twice)}; leave one out")
    for run in members:
        mark = (run.seconds, tuple(run.losses.items()), run.doses)
        if run.seconds and mark in seen:  # no two runs take equally long to the last digit
            raise ConfigError(f"{arm}: expected runs of their own, found {run.path} to be a copy of {seen[mark]}")
        seen[mark] = run.path
        if run.start and run.start in starts:
            raise ConfigError(
                f"{arm}: expected other initial weights and data with each seed, found the first update of {run.path} "
                f"to be that of {starts[run.start]}; what the seed does not change is counted once: leave one out"
            )
        starts[run.start] = run.path


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


def _signal(options: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in options.items() if key.partition(".")[0] in ("signal", "also")}


def _placebo_of(arm: str, declared: Mapping[str, Mapping[str, Any]], controls: Sequence[str]) -> str | None:
    """The arm that differs from `arm` only in `signal.control`, which is placebo."""
    wanted = {**declared[arm], "signal.control": "placebo"}
    return next((other for other in controls if declared[other] == wanted), None)


def _changes(runs: list[Run], baseline: list[Run]) -> dict[str, list[Any]]:
    theirs, own = (own_options(of[0]) if runs and baseline else {} for of in (baseline, runs))
    return {key: [theirs.get(key), value] for key, value in own.items() if theirs.get(key) != value}
