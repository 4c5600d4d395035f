"""The trials of an experiment with [tune]: an ordinary experiment derived from it, whose arms are trials.

It runs in the folder's .tune by the same runner, so that kills, claims and packing are as they are anywhere; status
and compare read that folder too. Pure functions; nothing is started or chosen here.
"""

from __future__ import annotations

import json
import math
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gptlab.errors import ConfigError
from gptlab.runs.experiment_spec import TRIALS, Arm, Experiment, as_toml

CONTROL = frozenset({"signal.control", "signal.flip", "signal.flip_to"})
"""What a control arm may differ in from its signal's arm and still take over its choice."""

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
    if not _is_plain(experiment, arm) and not _has_weight(experiment, arm):
        wanted = _signalless(arm)
        for other in experiment.arms.values():
            if _is_plain(experiment, other) and (other.patch, _signalless(other)) == (arm.patch, wanted):
                return other
    elif _is_control(experiment, arm):
        wanted = _without(CONTROL, arm)
        for other in experiment.arms.values():
            alike = (other.patch, _without(CONTROL, other)) == (arm.patch, wanted)
            if alike and not _is_control(experiment, other):
                return other
    for name in experiment.baselines:
        other = experiment.arms[name]
        alike = (other.patch, _without(LENGTH, other)) == (arm.patch, _without(LENGTH, arm))
        if alike and arm.count("steps", experiment.preset) > other.count("steps", experiment.preset):
            return other
    return arm


def _is_plain(experiment: Experiment, arm: Arm) -> bool:
    return all(signal.get("name", "none") == "none" for signal in _signals(experiment, arm))


def _has_weight(experiment: Experiment, arm: Arm) -> bool:
    weights = (_number(arm, "signal.weight", signal.get("weight")) for signal in _signals(experiment, arm))
    return any(weight != 0 for weight in weights)


def _is_control(experiment: Experiment, arm: Arm) -> bool:
    return arm.get("signal.control", experiment.preset) != "none" and not _is_plain(experiment, arm)


def _signalless(arm: Arm) -> dict[str, Any]:
    return {key: value for key, value in arm.options.items() if key.partition(".")[0] not in ("signal", "also")}


def _without(keys: frozenset[str], arm: Arm) -> dict[str, Any]:
    return {key: value for key, value in arm.options.items() if key not in keys}


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
    head = {
        "name": f"{experiment.name}.tune",
        "preset": experiment.preset,
        "baseline": baseline.name,
        "seeds": experiment.tune.seeds,
        **({} if experiment.delta is None else {"delta": experiment.delta}),
    }
    text = as_toml(head) + "".join(_table(arm) for arm in arms.values())
    return Experiment(
        name=head["name"],
        preset=experiment.preset,
        baseline=baseline.name,
        seeds=experiment.tune.seeds,
        looks=None,
        delta=experiment.delta,
        arms=arms,
        table=tomllib.loads(text),
        text=text,
    )


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
    return {arm: seeds + tries * trials.get(arm, 0) for arm in experiment.arms}
