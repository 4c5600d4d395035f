"""An experiment as its TOML file declares it: arms, seeds or looks, delta; read with clear refusals, run elsewhere.

name = "1_noise"                      where it goes: log/<name>
preset = "shakespeare-tiny"
baseline = "baseline"                 an arm's name
seeds = [1, 2, 3, 4, 5]               or: looks = [5, 10, 20], which are seeds 1..20
delta = 0.01                          nats: the largest difference that does not matter
[options]                             for every arm
steps = 700
[arms.baseline]
[arms.confidence]                     what makes an arm differ
signal.name = "confidence"
[arms.idea]
patch = "idea.diff"                   a change of gptlab's code, beside the file
[groups]                              arms that pair only within a group, its baseline first
small = ["baseline", "confidence"]
[tune]                                options chosen for every arm by as many trials: gptlab/runs/tune.py
seeds = [101, 102]                    kept apart from the verdict's
learning_rate = [0.5, 1, 2]           factors; the default
dose = [0.5, 1, 2]                    factors; [1], which tunes none, is the default
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gptlab.errors import ConfigError, did_you_mean
from gptlab.options import build, flatten, flatten_table, table_options
from gptlab.parsing import parse_toml
from gptlab.runs.tune import Tune, read_tune
from gptlab.training.config import TrainingConfig
from gptlab.training.presets import PRESETS

FILE = "experiment.toml"
"""The copy of the experiment file in the experiment's folder; gptlab/analysis/load.py reads it too."""

TRIALS = ".tune"
"""The folder of an experiment's trials, in the experiment's own."""

KEYS = ("name", "preset", "baseline", "seeds", "looks", "delta", "options", "arms", "groups", "tune")
NOT_AN_ARMS = {
    "preset": "give it once, above [options]",
    "seed": "give seeds = [..] above [options]",
    "out": "give it as --out to `gptlab experiment run`",
    "resume": "cells always go on where they were",
}
"""Options that an experiment sets itself, and what to do instead."""

LARGEST_DELTA = 1e6
"""Nats; a TOML integer may be larger than any float."""

NAMELESS = "experiment"
"""The name of a copy that has none."""

_NAME = re.compile(r"[A-Za-z0-9][\w.+=-]*")


@dataclass(frozen=True)
class Arm:
    """options: what its cells' runs are given over the preset, under dotted keys; patch: a change of gptlab's code.

    The options of a patched arm are as the file has them: what they may be, only the patched code knows.
    trial_of: the arm for which it tries options, where it is a trial.
    """

    name: str
    options: Mapping[str, Any]
    patch: Path | None = None
    trial_of: str | None = None

    def get(self, key: str, preset: str) -> Any:
        """The value of an option in the arm's runs."""
        return {**flatten(TrainingConfig()), **PRESETS[preset], **self.options}[key]


@dataclass(frozen=True)
class Experiment:
    """seeds: all that were declared, of looks those of the last one; delta: None where the file declares none;
    table: the file's content; tune: [tune] of it."""

    name: str
    preset: str
    baseline: str
    seeds: tuple[int, ...]
    looks: tuple[int, ...] | None
    delta: float | None
    arms: Mapping[str, Arm]
    table: Mapping[str, Any] = field(repr=False)
    text: str = field(repr=False)
    tune: Tune | None = None

    @property
    def folder(self) -> Path:
        return Path("log", self.name)

    @property
    def baselines(self) -> list[str]:
        """The baseline of all, or the first arm of every group."""
        return [group[0] for group in self.table.get("groups", {}).values()] or [self.baseline]

    @property
    def codes(self) -> list[str]:
        """The users' own signals, FILE.py:FUNCTION, that arms use."""
        signals = [s for arm in self.arms.values() for s in (arm.options, *arm.options.get("also", ()))]
        names = [str(s.get("signal.name", s.get("name", ""))) for s in signals]
        return sorted({name for name in names if ".py:" in name})


def ready_experiments() -> dict[str, Path]:
    """The files that come with gptlab, by name: next to the package in a checkout, within it when installed."""
    package = Path(__file__).parent.parent
    return {
        path.stem: path
        for folder in (package.parent, package)
        if (folder / "experiments" / "first_look.toml").is_file()
        for path in sorted((folder / "experiments").glob("*.toml"))
    }


def find_experiment(file: str | Path) -> Path:
    """A path that exists, or else the ready experiment that it names: first_look, experiments/first_look.toml."""
    path = Path(file)
    if path.exists() or path.suffix not in ("", ".toml") or path.parent not in (Path(), Path("experiments")):
        return path
    return ready_experiments().get(path.stem, path)


def read_experiment(path: str | Path, *, copy: bool = False) -> Experiment:
    """The experiment that a file declares; raises ConfigError that names the file and the nearest key.

    copy: it is the copy in an experiment's folder, beside which patches need not lie.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        ready = ready_experiments()
        raise ConfigError(
            f"expected an experiment file at {path}, found none{did_you_mean(path.stem, ready)}; ready ones, "
            f"by name: {', '.join(ready)}"
        ) from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} is not a TOML file that can be read: {error}") from None
    return experiment_from(text, path, None if copy else path.parent)


def experiment_from(text: str, path: Path, folder: Path | None = None) -> Experiment:
    """The experiment that a text declares, which `path` holds; folder: where its patches lie, None for a copy."""
    try:
        table = parse_toml(text)
    except ValueError as error:
        raise ConfigError(f"{path} is not a TOML file that can be read: {error}") from None
    try:
        return _experiment(table, text, folder)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def _experiment(table: Mapping[str, Any], text: str, folder: Path | None) -> Experiment:
    for key in table:
        if key not in KEYS:
            raise ConfigError(f"unknown key {key!r}{did_you_mean(key, KEYS)}; there are {', '.join(KEYS)}")
    name, preset = _text(table, "name", None if folder else NAMELESS), _text(table, "preset", "shakespeare-tiny")
    if not _NAME.fullmatch(name):
        raise ConfigError(f"name: expected a name for a folder, of letters, digits and . _ + = -, found {name!r}")
    if preset not in PRESETS:
        raise ConfigError(
            f"preset: unknown preset {preset!r}{did_you_mean(preset, PRESETS)}; presets are {', '.join(PRESETS)}"
        )
    common = _options(_table(table, "options"), "options")
    arms = {arm: _arm(arm, own, preset, common, folder) for arm, own in _table(table, "arms").items()}
    if len(arms) < 2:
        raise ConfigError(f"expected a baseline and at least one other arm as [arms.NAME], found {len(arms)}")
    baseline = _text(table, "baseline")
    if baseline not in arms:
        raise ConfigError(f"baseline: no arm {baseline!r}{did_you_mean(baseline, arms)}; there are {', '.join(arms)}")
    _check_twins(arms)
    _check_groups(_table(table, "groups"), arms, baseline)
    seeds, looks = _seeds(table)
    delta = table.get("delta")
    is_number = isinstance(delta, int | float) and not isinstance(delta, bool)
    if delta is not None and not (is_number and 0 <= delta <= LARGEST_DELTA):
        raise ConfigError(f"delta: expected nats, at least 0, found {delta!r}")
    tune = read_tune(_table(table, "tune"), seeds) if "tune" in table else None
    return Experiment(
        name, preset, baseline, seeds, looks, None if delta is None else float(delta), arms, table, text, tune
    )


def _text(table: Mapping[str, Any], key: str, default: str | None = None) -> str:
    value = table.get(key, default)
    if not isinstance(value, str):
        raise ConfigError(f"{key}: expected text, found {'nothing' if value is None else repr(value)}")
    return value


def _table(table: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = table.get(key, {})
    if not isinstance(value, Mapping):
        raise ConfigError(f"{key}: expected a table [{key}], found {value!r}")
    return value


def _options(table: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A table's options, typed; raises ConfigError for one that is unknown or not an arm's to set."""
    for key, instead in NOT_AN_ARMS.items():
        if key in table:
            raise ConfigError(f"[{where}] {key} is the experiment's to set: {instead}")
    try:
        return table_options(table, TrainingConfig)
    except ConfigError as error:
        raise ConfigError(f"[{where}] {error}") from None


def _arm(name: str, own: Any, preset: str, common: Mapping[str, Any], folder: Path | None) -> Arm:
    where = f"arms.{name}"
    if not _NAME.fullmatch(name) or not isinstance(own, Mapping):
        raise ConfigError(f"arms: expected [arms.NAME] of letters, digits and . _ + = -, found {name!r} = {own!r}")
    patch = _text(own, "patch", "")
    own = {key: value for key, value in own.items() if key != "patch"}
    if patch:
        if folder and not (folder / patch).is_file():
            raise ConfigError(f"[{where}] patch: expected a file at {folder / patch}, found none")
        return Arm(name, {**common, **flat_options(own)}, (folder or Path()) / patch)
    options = {**common, **_options(own, where)}
    try:
        build(TrainingConfig, {**PRESETS[preset], **options})
    except ConfigError as error:
        raise ConfigError(f"[{where}] {error}") from None
    return Arm(name, options)


def flat_options(table: Mapping[str, Any]) -> dict[str, Any]:
    """A table under dotted keys as it stands; of several [[signal]] tables the first is `signal`, the rest `also`."""
    table, also = dict(table), []
    if isinstance(table.get("signal"), list):
        table["signal"], *also = table["signal"]
    return {**flatten_table(table), **({"also": tuple(also)} if also else {})}


def _check_twins(arms: Mapping[str, Arm]) -> None:
    seen: list[Arm] = []
    for arm in arms.values():
        for other in seen:
            if (other.options, other.patch) == (arm.options, arm.patch):
                raise ConfigError(
                    f"arms: {other.name!r} and {arm.name!r} are the same; let them differ in something, for a twin in "
                    "init_jitter = 1e-6"
                )
        seen.append(arm)


def _check_groups(groups: Mapping[str, Any], arms: Mapping[str, Arm], baseline: str) -> None:
    for name, group in groups.items():
        if not isinstance(group, list) or len(group) < 2 or not all(isinstance(arm, str) for arm in group):
            raise ConfigError(f"[groups] {name}: expected a list of at least two arms, found {group!r}")
    members = [arm for group in groups.values() for arm in group]
    for arm in members:
        if arm not in arms:
            raise ConfigError(f"[groups] no arm {arm!r}{did_you_mean(str(arm), arms)}; there are {', '.join(arms)}")
    for arm in arms if groups else ():
        if members.count(arm) != 1:
            raise ConfigError(f"[groups] expected every arm in one group, found {arm!r} in {members.count(arm)}")
    for name, group in groups.items():
        if baseline in group and group[0] != baseline:
            raise ConfigError(f"[groups] {name}: expected the baseline {baseline!r} first, found {group[0]!r}")


def _seeds(table: Mapping[str, Any]) -> tuple[tuple[int, ...], tuple[int, ...] | None]:
    """All seeds, and the looks where they were given."""
    given = [key for key in ("seeds", "looks") if key in table]
    if len(given) != 1:
        raise ConfigError(f"expected either seeds or looks, found {'both' if given else 'neither'}")
    key = given[0]
    numbers = table[key]
    if not isinstance(numbers, list) or not numbers or not all(type(n) is int and n >= 0 for n in numbers):
        raise ConfigError(f"{key}: expected a list of whole numbers such as [1, 2, 3], found {numbers!r}")
    if sorted(set(numbers)) != (numbers if key == "looks" else sorted(numbers)):
        rising = "rising numbers of seeds" if key == "looks" else "each seed once"
        raise ConfigError(f"{key}: expected {rising}, found {numbers}")
    if key == "seeds":
        return tuple(numbers), None
    if numbers[0] < 2:
        raise ConfigError(f"looks: expected the first at 2 seeds or more, found {numbers}")
    return tuple(range(1, numbers[-1] + 1)), tuple(numbers)
