"""What the trials of [tune] chose: for every arm the options with the lowest validation loss, kept in tuning.json.

Chosen by a pure function of the trials' outcomes, so that a killed and an unkilled experiment choose alike.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gptlab.errors import ConfigError
from gptlab.files import read_text, write_json
from gptlab.parsing import is_count, is_number, parse_json
from gptlab.runs.experiment_spec import Experiment
from gptlab.runs.tuning import Trial, all_trials, leaders

FILE = "tuning.json"
"""The choice, in the experiment's folder, without a clock."""


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
    is chosen: the arm runs as it was declared, and will tell.
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
    made anew elsewhere, say.
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
            f"{path} is damaged: expected what trials chose for every arm; remove it and run the experiment again"
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


def _number(value: Any) -> bool:
    return value is None or is_number(value)


def _text(value: Any) -> bool:
    return value is None or isinstance(value, str)


def _plain(value: Any) -> bool:
    """Whether it is what an option may be: text, a number, true or false, null, or lists and tables of these."""
    if isinstance(value, dict | list):
        return all(map(_plain, value.values() if isinstance(value, dict) else value))
    return value is None or isinstance(value, str | bool) or is_number(value)


def _list_of(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(map(fits, value))


def _table_of(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, dict) and all(map(fits, value.values()))


_OF_ARM: Mapping[str, Callable[[Any], bool]] = {
    "follows": _text,
    "trial": _text,
    "learning_rate": _number,
    "dose": _number,
    "options": _table_of(_plain),
    "loss": _number,
    "notes": _list_of(lambda value: isinstance(value, str)),
    "losses": _table_of(_list_of(_number)),
}
_OF_ALL: Mapping[str, Callable[[Any], bool]] = {
    "experiment": _text,
    "seeds": _list_of(is_count),
    "trials": is_count,
    "factors": _table_of(_list_of(_number)),
}


def as_json(experiment: Experiment, made: Mapping[str, Choice]) -> dict[str, Any]:
    """What tuning.json holds: the factors tried, and for every arm what was chosen of them, and how each trial did."""
    tune, follows = experiment.tune, leaders(experiment)
    assert tune
    arms = {
        arm: {
            "follows": None if follows[arm] == arm else follows[arm],
            "trial": choice.trial.name if choice.trial else None,
            "learning_rate": choice.trial.learning_rate if choice.trial else None,
            "dose": choice.trial.dose if choice.trial else None,
            "options": choice.options,
            "loss": choice.loss,
            "notes": choice.notes,
            "losses": choice.losses,
        }
        for arm, choice in made.items()
    }
    head = {"experiment": experiment.name, "seeds": tune.seeds, "trials": tune.trials}
    factors = {"learning_rate": tune.learning_rate, "dose": tune.dose}
    return json.loads(json.dumps({**head, "factors": factors, "arms": arms}))  # as it is read: with lists for tuples
