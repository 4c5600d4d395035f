"""[tune]: the trials of an experiment, and what is chosen of them.

The trials are an ordinary experiment derived from it, whose arms are trials. It runs in the folder's .tune by the same
runner, so that kills, claims and packing are as they are anywhere; status and compare read that folder too. For every
arm the options with the lowest validation loss are chosen, by a pure function of the trials' outcomes, so that a killed
and an unkilled experiment choose alike, and kept in tuning.json. Nothing is started here.
"""

from __future__ import annotations

import json
import math
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gptlab.errors import ConfigError
from gptlab.files import is_count, is_number, parse_json, read_text, write_json
from gptlab.runs.experiment_spec import TRIALS, Arm, Experiment, as_toml

FILE = "tuning.json"
"""The choice, in the experiment's folder, without a clock."""

CONTROL = frozenset({"signal.control", "signal.flip", "signal.flip_to"})
"""What a control arm may differ in from its signal's arm and still take over its choice."""

SIGNAL = frozenset({"signal", "also"})
LENGTH = frozenset({"steps", "warmup_steps"})
"""Options in which a longer run of a baseline may differ from it."""


@dataclass(frozen=True)
class Trial:
    """One try of an arm. learning_rate, dose: factors, None of an arm that has no dose to tune.

    options: what it sets over the arm's own.
    """

    arm: str
    learning_rate: float
    dose: float | None
    options: Mapping[str, Any]

    @property
    def name(self) -> str:
        return f"{self.arm}.lr{self.learning_rate:g}" + ("" if self.dose is None else f".dose{self.dose:g}")

    @property
    def distance(self) -> float:
        """How far it is from the arm as it was declared."""
        return abs(math.log(self.learning_rate)) + abs(math.log(self.dose or 1.0))


def trials_of(experiment: Experiment, arm: Arm) -> tuple[Trial, ...]:
    """An arm's trials: every pair of factors, or as many learning rates where it has no dose to tune.

    Raises ConfigError for a learning rate of 0, or a text in its place, which only a patched arm can hold.
    """
    tune = experiment.tune
    assert tune
    if arm.count("eval_every", experiment.preset) == 0:
        raise ConfigError(f"[tune] arm {arm.name!r}: expected a validation loss to choose by, found eval_every = 0")
    if len(tune.dose) == 1 and tune.dose[0] == 1:
        pairs = [(rate, None) for rate in tune.learning_rate]
    elif _has_dose(experiment, arm):
        pairs = [(rate, dose) for rate in tune.learning_rate for dose in tune.dose]
    else:
        pairs = [(rate, None) for rate in tune.only_learning_rate]
    return tuple(
        Trial(arm.name, rate, dose, {**_rates(experiment, arm, rate), **_doses(experiment, arm, dose)})
        for rate, dose in pairs
    )


def _rates(experiment: Experiment, arm: Arm, factor: float) -> dict[str, float]:
    """The learning rate times the factor, and with it min_lr where it was set; unset it follows by itself."""
    found = {}
    for key in ("learning_rate", "min_lr"):
        value = _number(arm, key, arm.get(key, experiment.preset))
        if value is not None:
            found[key] = value * factor
    if not found.get("learning_rate"):
        raise ConfigError(f"[tune] arm {arm.name!r}: a learning_rate of 0 times a factor is 0; leave [tune] out")
    return found


def _doses(experiment: Experiment, arm: Arm, factor: float | None) -> dict[str, Any]:
    """The doses, or else weights, of all the arm's signals times the factor: several keep their proportions."""
    if factor is None:
        return {}
    first, *also = (_scaled(experiment, arm, signal, factor) for signal in _signals(experiment, arm))
    found: dict[str, Any] = {f"signal.{key}": first[key] for key in ("dose", "weight") if first[key] is not None}
    return {**found, **({"also": tuple(also)} if also else {})}


def _scaled(experiment: Experiment, arm: Arm, signal: Mapping[str, Any], factor: float) -> dict[str, Any]:
    if not _is_active(arm, signal):
        return dict(signal)
    dose, weight = (_number(arm, f"signal.{key}", signal.get(key)) for key in ("dose", "weight"))
    if dose is not None:
        return {**signal, "dose": dose * factor}
    usual = 1 / arm.count("n_layer", experiment.preset)
    return {**signal, "weight": (usual if weight is None else weight) * factor}


def _signals(experiment: Experiment, arm: Arm) -> Iterator[Mapping[str, Any]]:
    """The options of the arm's signals, the first one's without its prefix."""
    yield {key: arm.get(f"signal.{key}", experiment.preset) for key in ("name", "dose", "weight")}
    yield from arm.options.get("also", ())


def _is_active(arm: Arm, signal: Mapping[str, Any]) -> bool:
    dose, weight = (_number(arm, f"signal.{key}", signal.get(key)) for key in ("dose", "weight"))
    return signal.get("name", "none") != "none" and dose != 0 and weight != 0


def _has_dose(experiment: Experiment, arm: Arm) -> bool:
    return any(_is_active(arm, signal) for signal in _signals(experiment, arm))


def _number(arm: Arm, key: str, value: Any) -> float | None:
    """An option as a number; the options of a patched arm are as its file has them."""
    if value is None or value == "none":
        return None
    try:
        return float(value)
    except (TypeError, ValueError):
        raise ConfigError(f"[tune] arm {arm.name!r}: {key}: expected a number, found {value!r}") from None


def leaders(experiment: Experiment) -> dict[str, str]:
    """{arm: the arm whose trials choose for it}, which mostly is itself.

    A control must differ from its signal's arm in the control alone, so it takes over that arm's choice. An arm whose
    signals all have weight 0 is the arm without them, bit for bit, and takes over that one's. What is nothing but a
    longer run of a baseline stays one.
    """
    found = {arm.name: _leader(experiment, arm).name for arm in experiment.arms.values()}
    for arm, leader in found.items():
        while found[leader] != leader:  # it follows another itself: weight 0 in a longer run, say
            leader = found[leader]
        found[arm] = leader
    return found


def _leader(experiment: Experiment, arm: Arm) -> Arm:
    def alike(other: Arm, but_for: frozenset[str]) -> bool:
        return (other.patch, _without(but_for, other)) == (arm.patch, _without(but_for, arm))

    def steps(of: Arm) -> int:
        return of.count("steps", experiment.preset)

    arms, found = experiment.arms.values(), []
    if not _is_plain(experiment, arm) and not _has_weight(experiment, arm):
        found = [other for other in arms if _is_plain(experiment, other) and alike(other, SIGNAL)]
    elif _is_control(experiment, arm):
        found = [other for other in arms if not _is_control(experiment, other) and alike(other, CONTROL)]
    baselines = (experiment.arms[name] for name in experiment.baselines)
    found += [other for other in baselines if alike(other, LENGTH) and steps(arm) > steps(other)]
    return found[0] if found else arm


def _is_plain(experiment: Experiment, arm: Arm) -> bool:
    return all(signal.get("name", "none") == "none" for signal in _signals(experiment, arm))


def _has_weight(experiment: Experiment, arm: Arm) -> bool:
    weights = (_number(arm, "signal.weight", signal.get("weight")) for signal in _signals(experiment, arm))
    return any(weight != 0 for weight in weights)


def _is_control(experiment: Experiment, arm: Arm) -> bool:
    return arm.get("signal.control", experiment.preset) != "none" and not _is_plain(experiment, arm)


def _without(keys: frozenset[str], arm: Arm) -> dict[str, Any]:
    """The arm's options without those keys, or tables."""
    return {k: v for k, v in arm.options.items() if k not in keys and k.partition(".")[0] not in keys}


def all_trials(experiment: Experiment) -> dict[str, tuple[Trial, ...]]:
    """{arm: its trials} of the arms that are tuned by themselves; raises ConfigError where there is nothing to try."""
    assert experiment.tune
    tuned = [experiment.arms[name] for name, leader in leaders(experiment).items() if name == leader]
    if experiment.tune.dose != (1,) and not any(_has_dose(experiment, arm) for arm in tuned):
        raise ConfigError("[tune] dose: no arm has a signal whose dose could be tuned; leave it out")
    return {arm.name: trials_of(experiment, arm) for arm in tuned}


def trial_experiment(experiment: Experiment) -> Experiment:
    """The trials as an experiment of their own. Its baseline is the trial nearest to the declared baseline."""
    assert experiment.tune
    found = all_trials(experiment)
    arms = {
        trial.name: Arm(trial.name, {**of.options, **trial.options}, of.patch, trial_of=name)
        for name, trials in found.items()
        for trial in trials
        for of in [experiment.arms[name]]
    }
    baseline = min(found[leaders(experiment)[experiment.baseline]], key=lambda trial: trial.distance)
    name, preset, seeds, delta = f"{experiment.name}.tune", experiment.preset, experiment.tune.seeds, experiment.delta
    head = {"name": name, "preset": preset, "baseline": baseline.name, "seeds": seeds}
    head |= {} if delta is None else {"delta": delta}
    text = as_toml(head) + "".join(_table(arm) for arm in arms.values())
    return Experiment(name, preset, baseline.name, seeds, None, delta, arms, tomllib.loads(text), text)


def _table(arm: Arm) -> str:
    table = f"arms.{json.dumps(arm.name)}"
    patch = as_toml({"patch": arm.patch.name}) if arm.patch else ""
    return f"\n[{table}]\n{patch}{as_toml(arm.options, table + '.')}"


def trials_folder(folder: Path) -> Path:
    """Where an experiment's trials run."""
    return folder / TRIALS


def cells_an_arm(experiment: Experiment, seeds: int) -> dict[str, int]:
    """{arm: how many cells it takes} over so many of the verdict's seeds, its trials included."""
    trials = {arm: len(found) for arm, found in all_trials(experiment).items()} if experiment.tune else {}
    tries = len(experiment.tune.seeds) if experiment.tune else 0
    further = len(experiment.further) if seeds > 1 else 0
    return {
        arm: seeds + further * (arm in experiment.baselines) + tries * trials.get(arm, 0) for arm in experiment.arms
    }


@dataclass(frozen=True)
class Choice:
    """What an arm's trials came to.

    trial: the best one, None where all diverged; losses: {trial: one a seed}, nats, None where it diverged; loss: of
    the best, the mean over seeds; notes: what to know of it, in words.
    """

    trial: Trial | None
    losses: Mapping[str, tuple[float | None, ...]]
    loss: float | None
    notes: tuple[str, ...] = ()

    @property
    def options(self) -> Mapping[str, Any]:
        return self.trial.options if self.trial else {}


def choose(trials: Sequence[Trial], losses: Mapping[str, Sequence[float | None]]) -> Choice:
    """The trial with the lowest mean loss over seeds; one that diverged on any seed loses.

    Among equals the one nearest to the arm as it was declared, then the smaller learning rate. Where all diverged none
    is chosen: the arm runs as it was declared.
    """
    kept = {trial.name: tuple(losses[trial.name]) for trial in trials}
    means = {name: mean for name, found in kept.items() if (mean := _mean(found)) is not None}
    left = [trial for trial in trials if trial.name in means]
    if not left:
        return Choice(None, kept, None, ("every trial diverged: it runs as it was declared",))
    best = min(left, key=lambda trial: (means[trial.name], trial.distance, trial.learning_rate, trial.dose or 0.0))
    return Choice(best, kept, means[best.name], tuple(_edges(best, trials)))


def _mean(losses: Sequence[float | None]) -> float | None:
    """None where one is missing."""
    known = [loss for loss in losses if loss is not None]
    return math.fsum(known) / len(known) if len(known) == len(losses) else None


def _edges(best: Trial, trials: Sequence[Trial]) -> Iterable[str]:
    for what, chosen, tried in (
        ("learning rate", best.learning_rate, [trial.learning_rate for trial in trials]),
        ("dose", best.dose, [trial.dose for trial in trials if trial.dose is not None]),
    ):
        if chosen is None or len(set(tried)) < 2 or min(tried) < chosen < max(tried):
            continue
        which = "smallest" if chosen == min(tried) else "largest"
        yield f"the best {what} is the {which} that was tried, {chosen:g} times the declared one: try a wider range"


def choices(experiment: Experiment, cells: Sequence[Mapping[str, Any]]) -> dict[str, Choice]:
    """{arm: its choice} of the arms whose trials have all ended, from the entries of the trials' results.json.

    Controls and arms of weight 0 have the choice of the arm that they follow.
    """
    assert experiment.tune
    ended = {(cell["arm"], cell["seed"]): cell["loss"] for cell in cells if cell["state"] != "failed"}
    made: dict[str, Choice] = {}
    for arm, trials in all_trials(experiment).items():
        names = [trial.name for trial in trials]
        if all((name, seed) in ended for name in names for seed in experiment.tune.seeds):
            made[arm] = choose(trials, {name: [ended[name, seed] for seed in experiment.tune.seeds] for name in names})
    return {arm: made[leader] for arm, leader in leaders(experiment).items() if leader in made}


def chosen(experiment: Experiment, made: Mapping[str, Choice]) -> Experiment:
    """The experiment with what was chosen set over every arm's options; arms without a choice are left out."""
    arms = {
        name: replace(arm, options={**arm.options, **made[name].options})
        for name, arm in experiment.arms.items()
        if name in made
    }
    return replace(experiment, arms=arms)


def keep(experiment: Experiment, folder: Path, made: Mapping[str, Choice]) -> None:
    """Write tuning.json, whole or not at all.

    Raises ConfigError where it holds another choice for an arm whose cells have begun: trials were removed since and
    made again elsewhere, say.
    """
    path, content = folder / FILE, as_json(experiment, made)
    for arm, kept in (read_kept(folder) or {"arms": {}})["arms"].items():
        begun = any((folder / arm).glob("seed_*/metrics.jsonl"))
        if begun and kept["options"] != content["arms"].get(arm, kept)["options"]:
            raise ConfigError(
                f"{path}: {arm} has begun with {kept['options']}, and its trials now choose "
                f"{content['arms'][arm]['options']}; give another --out, or remove {folder / arm}"
            )
    write_json(path, content, ensure_ascii=False)


def read_kept(folder: Path) -> dict[str, Any] | None:
    """The content of an experiment's tuning.json, None where there is none; raises ConfigError for a damaged one."""
    path = folder / FILE
    try:
        return accepted(parse_json(read_text(path, inside=folder, error=ConfigError)))
    except FileNotFoundError:
        return None
    except ValueError:
        raise ConfigError(
            f"{path} is damaged: expected what trials chose; remove it and run the experiment again"
        ) from None


def accepted(content: Any) -> dict[str, Any]:
    """`content` without what tuning.json does not hold; raises ValueError where it is of other kinds."""
    if not isinstance(content, dict) or not isinstance(content.get("arms"), dict):
        raise ValueError("no arms")
    for arm in content["arms"].values():
        if not isinstance(arm, dict) or not all(key in arm and fits(arm[key]) for key, fits in _OF_ARM.items()):
            raise ValueError("an arm's choice")
    if not all(fits(content[key]) for key, fits in _OF_ALL.items() if key in content):
        raise ValueError("seeds, trials or factors")
    arms = {name: {key: arm[key] for key in _OF_ARM} for name, arm in content["arms"].items()}
    return {**{key: content[key] for key in _OF_ALL if key in content}, "arms": arms}


Check = Callable[[Any], bool]


def _listed(check: Check) -> Check:
    return lambda value: isinstance(value, list) and all(map(check, value))


def _table_of(check: Check) -> Check:
    return lambda value: isinstance(value, dict) and all(map(check, value.values()))


def _number_or_null(value: Any) -> bool:
    return value is None or is_number(value)


def _text_or_null(value: Any) -> bool:
    return value is None or isinstance(value, str)


def _plain(value: Any) -> bool:
    """Whether it is what an option may be: text, a number, true or false, null, or lists and tables of these."""
    return _number_or_null(value) or isinstance(value, str | bool) or _table_of(_plain)(value) or _listed(_plain)(value)


_OF_ARM: Mapping[str, Check] = {
    "follows": _text_or_null, "trial": _text_or_null, "learning_rate": _number_or_null, "dose": _number_or_null,
    "options": _table_of(_plain), "loss": _number_or_null, "notes": _listed(lambda value: isinstance(value, str)),
    "losses": _table_of(_listed(_number_or_null)),
}  # fmt: skip
_OF_ALL: Mapping[str, Check] = {
    "experiment": _text_or_null, "seeds": _listed(is_count), "trials": is_count,
    "factors": _table_of(_listed(_number_or_null)),
}  # fmt: skip


def as_json(experiment: Experiment, made: Mapping[str, Choice]) -> dict[str, Any]:
    """What tuning.json holds: the factors tried, and for every arm what was chosen of them, and how each trial did."""
    tune, follows = experiment.tune, leaders(experiment)
    assert tune
    arms = {
        arm: {
            "follows": None if follows[arm] == arm else follows[arm],
            "trial": trial and trial.name, "learning_rate": trial and trial.learning_rate, "dose": trial and trial.dose,
            "options": choice.options, "loss": choice.loss, "notes": choice.notes, "losses": choice.losses,
        }
        for arm, choice in made.items()
        for trial in [choice.trial]
    }  # fmt: skip
    head = {"experiment": experiment.name, "seeds": tune.seeds, "trials": tune.trials}
    factors = {"learning_rate": tune.learning_rate, "dose": tune.dose}
    return json.loads(json.dumps({**head, "factors": factors, "arms": arms}))  # as it is read: with lists for tuples
