"""An experiment as its TOML file declares it: arms, seeds or looks, delta; read with clear refusals, run elsewhere.

name = "1_noise"                      where it goes: log/<name>
preset = "shakespeare-tiny"
baseline = "baseline"                 an arm's name
seeds = [1, 2, 3, 4, 5]               or: looks = [5, 10, 20], which are seeds 1..20
delta = 0.01                          the largest difference that does not matter, in the metric's unit
metric = "loss"                       what is judged: any figure of val rows; the default
better = "lower"                      or "higher": which way it is better; known of the usual figures
baseline_seeds = 20                   so many of the baseline in all, where that is more
placebo_match = "gradient"            what placebos take of their arms: or "update", or "own", the default
[options]                             for every arm
steps = 700
[arms.baseline]
[arms.confidence]                     what makes an arm differ
signal.name = "confidence"            a user's own: "idea.py:margin", of a file next to this one
[arms.idea]
patch = "idea.diff"                   a change of gptlab's code, next to this file
[groups]                              arms that pair only within a group, its baseline first
small = ["baseline", "confidence"]
[tune]                                options chosen for every arm by as many trials
seeds = [101, 102]                    kept apart from the verdict's: what chose an option must not also judge it
learning_rate = [0.5, 1, 2]           factors of the arm's learning rate; the default
dose = [0.5, 1, 2]                    factors of its signal.dose, or weight; [1], which tunes none, is the default
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

from gptlab.errors import ConfigError, did_you_mean, shown
from gptlab.files import MB, is_count, is_number, parse_toml, read_json, read_text, write_whole
from gptlab.options import LARGEST_SIZES, build, check_size, flatten, flatten_table, options_of, table_options, typed
from gptlab.processes import package
from gptlab.signals.registry import next_to
from gptlab.training.config import TrainingConfig
from gptlab.training.presets import PRESETS, preset_options

FILE = "experiment.toml"
"""The copy of the experiment file in the experiment's folder; gptlab/analysis/load.py reads it too."""

TRIALS = ".tune"
"""The folder of an experiment's trials, in the experiment's own."""

KEYS = (
    "name", "preset", "baseline", "seeds", "looks", "delta", "metric", "better", "placebo_match", "options", "arms",
    "groups", "tune", "baseline_seeds",
)  # fmt: skip
PLACEBO_MATCHES = ("own", "gradient", "update")
TUNE_KEYS = ("seeds", "learning_rate", "dose")
NOT_AN_ARMS = {
    "preset": "give it once, above [options]",
    "seed": "give seeds = [..] above [options]",
    "out": "give it as --out to `gptlab experiment run`",
    "resume": "cells always continue where they were",
}
"""Options that an experiment sets itself, and what to do instead."""

LARGEST_DELTA = 1e6
"""A TOML integer may be larger than any float."""

NAMELESS = "experiment"
"""The name of a copy that has none."""

MOST_ARMS, MOST_SEEDS, MOST_CELLS = 1000, 10_000, 50_000
"""More than anyone can train, and few enough for a list of them all."""

COUNTS = ("depth", "steps", "n_embd", "n_layer", "total_batch_tokens", "eval_every", "eval_tokens", "signal.start")
"""Options that are reckoned with here, of patched arms too."""

CLOSEST_FACTORS, LARGEST_FACTOR, MOST_FACTORS = 1.01, 1e6, 50
"""Of [tune]. Factors with a smaller ratio to the next one would be the same trial."""

_NAME = re.compile(r"[A-Za-z0-9][\w.+=-]*")


@dataclass(frozen=True)
class Metric:
    """The figure of val rows that is judged. better: "lower" or "higher"; unit: "" where none is known."""

    name: str = "loss"
    better: str = "lower"

    @classmethod
    def of(cls, name: str = "loss", better: str | None = None, otherwise: str | None = None) -> Metric:
        """better, else what is known of the figure, else `otherwise`; raises ConfigError where none of them says it."""
        known = next((way for way, names in FIGURES.items() if name in names), otherwise)
        if (better or known) not in FIGURES:
            raise ConfigError(f'better: expected "lower" or "higher" for the metric {name!r}, found {shown(better)}')
        return cls(name, better or known or "")

    @property
    def unit(self) -> str:
        return next((names[self.name] for names in FIGURES.values() if self.name in names), "")

    @property
    def label(self) -> str:
        return self.name.replace("_", " ")

    @property
    def sign(self) -> float:
        """Of a change for the worse."""
        return 1.0 if self.better == "lower" else -1.0


FIGURES = {
    "lower": {
        **dict.fromkeys(("loss", "val_loss", "excess_loss", "clean_loss", "tempered_loss"), "nats"),
        **dict.fromkeys(("bits_per_byte", "val_bpb", "bpb"), "bits a byte"), "perplexity": "",
    },
    "higher": {"accuracy": "share of tokens", "truth_probability": "probability"},
}  # fmt: skip
"""{which way it is better: {figure: its unit}} of val rows and of others' logs."""


@dataclass(frozen=True)
class Arm:
    """options: what its cells' runs are given over the preset, under dotted keys; patch: a change of gptlab's code.

    The options of a patched arm are as the file has them: what they may be, only the patched code knows. Those that
    are known here have a known type nevertheless.
    trial_of: the arm for which it tries options, where it is a trial.
    """

    name: str
    options: Mapping[str, Any]
    patch: Path | None = None
    trial_of: str | None = None

    def get(self, key: str, preset: str) -> Any:
        """The value of an option in the arm's runs."""
        return {**flatten(TrainingConfig()), **preset_options(preset, self.options), **self.options}[key]

    def count(self, key: str, preset: str) -> int:
        """The value of an option that counts something."""
        return int(self.get(key, preset))

    @property
    def signals(self) -> Iterator[str]:
        """The names of its signals that the file sets."""
        yield str(self.options.get("signal.name", "none"))
        yield from (str(one.get("name", "none")) for one in self.options.get("also", ()))


@dataclass(frozen=True)
class Tune:
    """[tune]. Factors rise. An arm with a dose gets every pair of a learning rate and a dose.

    A dose is not tuned unless it is asked for: it is mostly what an arm is about, and three of them cost three times
    as much.
    """

    seeds: tuple[int, ...]
    learning_rate: tuple[float, ...] = (0.5, 1, 2)
    dose: tuple[float, ...] = (1,)

    @property
    def trials(self) -> int:
        """Trials of every arm, each on all seeds."""
        return len(self.learning_rate) * len(self.dose)

    @property
    def only_learning_rate(self) -> tuple[float, ...]:
        """As many learning rates as there are trials: those of an arm without a dose."""
        return finer(self.learning_rate, self.trials)


@dataclass(frozen=True)
class Experiment:
    """seeds: all that were declared, of looks those of the last one; delta: None where the file declares none;
    table: the file's content; tune: [tune] of it; placebo_match: "own" where placebos are scaled on their own model;
    metric: what is judged; further: seeds that baselines have besides.
    """

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
    placebo_match: str = "own"
    metric: Metric = Metric()
    further: tuple[int, ...] = ()

    @cached_property
    def replayed(self) -> Mapping[str, str]:
        """{placebo: the arm whose runs' norms its own runs take}: arms that differ in signal.control alone, and in
        which rotation a placebo has."""
        if self.placebo_match == "own":
            return {}
        wanted = {name: {**arm.options, "signal.control": "placebo"} for name, arm in self.arms.items()}
        return {
            name: of
            for name, arm in self.arms.items()
            for of, signal in self.arms.items()
            if signal.options.get("signal.control") != "placebo"
            and (_but_rotation(arm.options), arm.patch) == (wanted[of], signal.patch)
        }

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
        return sorted({name for arm in self.arms.values() for name in arm.signals if ".py:" in name})


def _but_rotation(options: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in options.items() if key != "signal.rotation"}


def ready_experiments() -> dict[str, Path]:
    """The files that come with gptlab, by name: next to the package in a checkout, within it when installed."""
    return {
        path.stem: path
        for folder in (package().parent, package())
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

    copy: it is the copy in an experiment's folder, next to which patches and signal files need not lie.
    """
    path = Path(path)
    try:
        text = read_text(path, limit=MB, inside=path.parent if copy else None, error=ConfigError)
    except FileNotFoundError:
        ready = ready_experiments()
        raise ConfigError(
            f"expected an experiment file at {path}, found none{did_you_mean(path.stem, ready)}; ready ones, "
            f"by name: {', '.join(ready)}"
        ) from None
    return experiment_from(text, path, None if copy else path.parent)


def experiment_from(text: str, path: Path, folder: Path | None = None) -> Experiment:
    """The experiment that a text declares, which `path` holds; folder: where its patches lie, None for a copy."""
    try:
        table = parse_toml(text)
    except ValueError as error:
        raise ConfigError(f"{path} is not a TOML file that can be read: {error}") from None
    with _named(f"{path}:"):
        return _experiment(table, text, folder)


@contextlib.contextmanager
def _named(where: str) -> Iterator[None]:
    """Inside, a ConfigError says where in the file it is."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{where} {error}") from None


def _experiment(table: Mapping[str, Any], text: str, folder: Path | None) -> Experiment:
    for key in table:
        _check_known("unknown key", key, KEYS)
    name, preset = _text(table, "name", None if folder else NAMELESS), _text(table, "preset", "shakespeare-tiny")
    if not _is_name(name):
        raise ConfigError(f"name: expected a name for a folder, of letters, digits and . _ + = -, found {shown(name)}")
    _check_known("preset: unknown preset", preset, PRESETS)
    seeds, looks = _seeds(table)
    trials, tune = _table(table, "tune"), None
    if "tune" in table:
        with _named("[tune]"):
            tune = _tune(trials, seeds)
    own = _table(table, "arms")
    _check_count(len(own), len(seeds) + (tune.trials * len(tune.seeds) if tune else 0))
    with _named("[options]"):
        common = _options(_table(table, "options"))
    arms = {arm: _arm(arm, options, preset, common, folder) for arm, options in own.items()}
    if len(arms) < 2:
        raise ConfigError(f"expected a baseline and at least one other arm as [arms.NAME], found {len(arms)}")
    baseline = _text(table, "baseline")
    _check_known("baseline: no arm", baseline, arms)
    _check_twins(arms)
    groups = _table(table, "groups")
    with _named("[groups]"):
        _check_groups(groups, arms, baseline)
    delta = table.get("delta")
    if delta is not None and not (is_number(delta) and 0 <= delta <= LARGEST_DELTA):
        raise ConfigError(f"delta: expected a number in the metric's unit, at least 0, found {shown(delta)}")
    delta, match = None if delta is None else float(delta), _text(table, "placebo_match", "own")
    _check_known("placebo_match: expected one of", match, PLACEBO_MATCHES)
    metric = Metric.of(_text(table, "metric", "loss"), _text(table, "better") if "better" in table else None)
    further = _further(table, [*seeds, *(tune.seeds if tune else ())], len(seeds))
    found = Experiment(name, preset, baseline, seeds, looks, delta, arms, table, text, tune, match, metric, further)
    _check_replayed(found)
    return found


DECLARATION = "declaration.json"
"""What an experiment declared when its first cell began, and when that was."""


def keep_declaration(experiment: Experiment, folder: Path) -> None:
    """Record the declaration as long as no cell has begun; later only arms that were added, with their date."""
    path, now = folder / DECLARATION, datetime.now(UTC).isoformat(timespec="seconds")
    begun = any(folder.glob("*/seed_*/metrics.jsonl"))
    before = recorded_declaration(folder) if begun else {"at": now, "added": {}, "declared": experiment.table}
    if not before:  # it began before declarations were recorded: a date of today would say too much
        return
    table, arms = before["declared"], experiment.table["arms"]
    added = {**before["added"], **{arm: now for arm in arms if arm not in table["arms"]}}
    table = {**table, "arms": {**arms, **table["arms"]}}
    record = {"at": before["at"], "added": added, "declared": table, "sha256": _hash(table)}
    write_whole(path, json.dumps(record, indent=1, ensure_ascii=False) + "\n")


def recorded_declaration(folder: Path) -> dict[str, Any]:
    """What declaration.json of an experiment's folder holds; {} where there is none."""
    try:
        return dict(read_json(folder / DECLARATION, limit=4 * MB, inside=folder, error=ConfigError))
    except FileNotFoundError:
        return {}


def _hash(table: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(table, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def declaration(experiment: Experiment, folder: Path, record: Mapping[str, Any]) -> tuple[str, list[str]]:
    """When and as what an experiment was declared, in words, "" where `record` is empty; and what changed since."""
    if not record:
        return "", []
    try:
        before, at, sha256 = dict(record["declared"]), str(record["at"]), str(record["sha256"])
        arms, added = dict(before["arms"]), dict(record["added"])
        if _hash(before) != sha256:
            return "", [f"{folder / DECLARATION}: its content is not what its checksum says"]
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{folder / DECLARATION} is damaged: {shown(error)}") from None
    now = json.loads(json.dumps(experiment.table))
    pairs = {**{key: (before.get(key), now.get(key)) for key in {**before, **now} if key != "arms"},
             **{f"arms.{arm}": (arms.get(arm), now["arms"].get(arm)) for arm in {**arms, **now["arms"]}}}  # fmt: skip
    changed = [
        f"{folder / FILE}: {key}: declared {shown(old, 80)} on {at}, found {shown(new, 80)}"
        for key, (old, new) in pairs.items()
        if old != new
    ]
    later = "".join(f"; {arm} was added on {date}" for arm, date in added.items())
    return f"declared on {at}, SHA-256 {sha256[:16]}{later}", changed


def _check_replayed(experiment: Experiment) -> None:
    if experiment.placebo_match != "own" and not experiment.replayed:
        raise ConfigError(
            f"placebo_match {experiment.placebo_match}: expected an arm that differs from another in "
            'signal.control = "placebo" alone, found none; add one, or leave placebo_match out'
        )
    for name in experiment.replayed:
        arm = experiment.arms[name]
        replay = {"signal.placebo_of": "RUN", "signal.placebo_match": experiment.placebo_match}
        with _named(f"[arms.{name}]"):
            if not arm.patch:
                usual = preset_options(experiment.preset, arm.options)
                build(TrainingConfig, {**usual, **arm.options, **replay, "preset": experiment.preset})


def _check_known(what: str, found: object, known: Collection[str]) -> None:
    if found not in known:
        raise ConfigError(f"{what} {found!r}{did_you_mean(str(found), known)}; there are {', '.join(known)}")


def _check_count(arms: int, cells_an_arm: int) -> None:
    if arms > MOST_ARMS or arms * cells_an_arm > MOST_CELLS:
        raise ConfigError(
            f"expected at most {MOST_ARMS:,} arms and {MOST_CELLS:,} cells, which are arms times seeds and trials, "
            f"found {arms:,} and {arms * cells_an_arm:,}"
        )


def _is_name(name: str) -> bool:
    """Whether it can be a folder's."""
    return bool(_NAME.fullmatch(name)) and len(name) <= 100


def _text(table: Mapping[str, Any], key: str, default: str | None = None) -> str:
    value = table.get(key, default)
    if not isinstance(value, str):
        raise ConfigError(f"{key}: expected text, found {'nothing' if value is None else shown(value)}")
    return value


def _table(table: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = table.get(key, {})
    if not isinstance(value, Mapping):
        raise ConfigError(f"{key}: expected a table [{key}], found {shown(value)}")
    return value


def _options(table: Mapping[str, Any]) -> dict[str, Any]:
    """A table's options, typed; raises ConfigError for one that is unknown or not an arm's to set."""
    for key, instead in NOT_AN_ARMS.items():
        if key in table:
            raise ConfigError(f"{key} is the experiment's to set: {instead}")
    return table_options(table, TrainingConfig)


def _arm(name: str, own: Any, preset: str, common: Mapping[str, Any], folder: Path | None) -> Arm:
    """folder: where patches and signal files lie, None where nobody asks."""
    if not _is_name(name) or not isinstance(own, Mapping):
        raise ConfigError(
            f"arms: expected [arms.NAME] of letters, digits and . _ + = -, found {shown(name)} = {shown(own)}"
        )
    with _named(f"[arms.{name}]"):
        patch = _text(own, "patch", "")
        own = {key: value for key, value in own.items() if key != "patch"}
        options = {**common, **(_untyped(own) if patch else _options(own))}
        if folder:
            options = next_to(folder, options)
        if not patch:
            build(TrainingConfig, {**preset_options(preset, options), **options, "preset": preset})
        elif folder and not (folder / patch).is_file():
            raise ConfigError(f"patch: expected a file at {folder / patch}, found none")
    return Arm(name, options, (folder or Path()) / patch if patch else None)


def flat_options(table: Mapping[str, Any]) -> dict[str, Any]:
    """A table under dotted keys as it stands; of several [[signal]] tables the first is `signal`, the rest `also`."""
    table, also = dict(table), []
    if isinstance(table.get("signal"), list):
        table["signal"], *also = table["signal"] or [{}]
    return {**flatten_table(table), **({"also": tuple(also)} if also else {})}


def _untyped(table: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a patched arm; raises ConfigError for what no option can be, and for a count that is none."""
    found = flat_options(table)
    also = found.get("also", ())
    if not all(isinstance(one, Mapping) for one in also):
        raise ConfigError(f"signal: expected tables [[signal]], found {shown(also)}")
    single = {key: value for key, value in found.items() if key != "also"}
    for key, value in (pair for one in (single, *also) for pair in one.items()):
        values = value if isinstance(value, list) else [value]
        if not all(is_number(one) or isinstance(one, str | bool) for one in values):
            raise ConfigError(f"{key}: expected text, a number or a list of such, found {shown(value)}")
    for option in options_of(TrainingConfig):
        if option.key in COUNTS and option.key in found:
            found[option.key] = typed(option, found[option.key])
            if option.key in LARGEST_SIZES:
                check_size(option.key, found[option.key])
    return found


def _check_twins(arms: Mapping[str, Arm]) -> None:
    for arm, other in combinations(arms.values(), 2):
        if (arm.options, arm.patch) == (other.options, other.patch):
            raise ConfigError(
                f"arms: {arm.name!r} and {other.name!r} are the same; let them differ in something, for a twin in "
                "init_jitter = 1e-6"
            )


def _check_groups(groups: Mapping[str, Any], arms: Mapping[str, Arm], baseline: str) -> None:
    for name, group in groups.items():
        if not isinstance(group, list) or len(group) < 2 or not all(isinstance(arm, str) for arm in group):
            raise ConfigError(f"{name}: expected a list of at least two arms, found {shown(group)}")
        for arm in group:
            _check_known("no arm", arm, arms)
        if baseline in group and group[0] != baseline:
            raise ConfigError(f"{name}: expected the baseline {baseline!r} first, found {group[0]!r}")
    members = Counter(arm for group in groups.values() for arm in group)
    for arm in arms if groups else ():
        if members[arm] != 1:
            raise ConfigError(f"expected every arm in one group, found {arm!r} in {members[arm]}")


def _counts(table: Mapping[str, Any], key: str, example: str) -> list[int]:
    """A list of whole numbers, as seeds and looks are."""
    numbers = table.get(key)
    if not isinstance(numbers, list) or not numbers or not all(is_count(n) for n in numbers):
        raise ConfigError(f"{key}: expected a list of whole numbers such as {example}, found {shown(numbers)}")
    if max(len(numbers), numbers[-1] if key == "looks" else 0) > MOST_SEEDS:
        found = f"{numbers[-1]:,}" if key == "looks" else f"{len(numbers):,}"
        raise ConfigError(f"{key}: expected at most {MOST_SEEDS:,} seeds, found {found}")
    if key != "looks" and len(set(numbers)) < len(numbers):
        raise ConfigError(f"{key}: expected each seed once, found {shown(numbers)}")
    return numbers


def _seeds(table: Mapping[str, Any]) -> tuple[tuple[int, ...], tuple[int, ...] | None]:
    """All seeds, and the looks where they were given."""
    given = [key for key in ("seeds", "looks") if key in table]
    if len(given) != 1:
        raise ConfigError(f"expected either seeds or looks, found {'both' if given else 'neither'}")
    numbers = _counts(table, given[0], "[1, 2, 3]")
    if given[0] == "seeds":
        return tuple(numbers), None
    if any(high <= low for low, high in pairwise(numbers)):
        raise ConfigError(f"looks: expected rising numbers of seeds, found {shown(numbers)}")
    if numbers[0] < 2:
        raise ConfigError(f"looks: expected the first at 2 seeds or more, found {shown(numbers)}")
    return tuple(range(1, numbers[-1] + 1)), tuple(numbers)


def _further(table: Mapping[str, Any], taken: Collection[int], seeds: int) -> tuple[int, ...]:
    """The seeds of a baseline beyond every arm's: the next ones that nothing else has."""
    wanted = table.get("baseline_seeds", seeds)
    if not is_count(wanted) or not seeds <= wanted <= MOST_SEEDS:
        raise ConfigError(
            f"baseline_seeds: expected how many seeds the baseline has in all, from the arms' {seeds} to "
            f"{MOST_SEEDS:,}, found {shown(wanted)}"
        )
    return tuple(range(max(taken) + 1, max(taken) + 1 + wanted - seeds))


def _tune(table: Mapping[str, Any], verdict: Collection[int]) -> Tune:
    """The table [tune]; raises ConfigError for what cannot be tried, and for seeds that the verdict uses too."""
    for key in table:
        _check_known("unknown key", key, TUNE_KEYS)
    seeds = _counts(table, "seeds", "[101, 102]")
    if shared := sorted(set(seeds) & set(verdict)):
        raise ConfigError(
            f"seeds: {shown(shared)[1:-1]} of the verdict's seeds; what chose an option must not judge "
            f"it: take others, such as [{max(verdict) + 100}, {max(verdict) + 101}]"
        )
    tune = Tune(tuple(seeds), _factors(table, "learning_rate", Tune.learning_rate), _factors(table, "dose", Tune.dose))
    if len(tune.learning_rate) < 2:
        raise ConfigError(
            "learning_rate: expected at least 2 factors, found 1; an arm without a signal has nothing else to "
            "spend its trials on"
        )
    if any(high / low < CLOSEST_FACTORS for low, high in pairwise(tune.only_learning_rate)):
        raise ConfigError(
            f"learning_rate: {tune.trials} trials do not fit between {tune.learning_rate[0]:g} and "
            f"{tune.learning_rate[-1]:g}; give a wider range, or fewer doses"
        )
    return tune


def _factors(table: Mapping[str, Any], key: str, default: tuple[float, ...]) -> tuple[float, ...]:
    given = table.get(key, list(default))
    right = isinstance(given, list) and all(is_number(x) and 1 / LARGEST_FACTOR <= x <= LARGEST_FACTOR for x in given)
    if not right or not 0 < len(given) <= MOST_FACTORS:
        raise ConfigError(
            f"{key}: expected a list of factors above 0, such as [0.5, 1, 2], at most {MOST_FACTORS} of them and up to "
            f"{LARGEST_FACTOR:g}, found {shown(given)}"
        )
    factors = tuple(sorted(given))
    if any(high / low < CLOSEST_FACTORS for low, high in pairwise(factors)):
        raise ConfigError(f"{key}: expected factors that differ by 1% or more, found {given}")
    return factors


def finer(factors: Sequence[float], count: int) -> tuple[float, ...]:
    """`count` factors from the first to the last of `factors`, all of which are among them.

    The widest gap, as a ratio, is divided first, into equal ratios. New ones have four digits, to be read and typed.

    >>> finer((0.5, 1, 2), 9)
    (0.5, 0.5946, 0.7071, 0.8409, 1, 1.189, 1.414, 1.682, 2)
    """
    gaps = [math.log(high / low) for low, high in pairwise(factors)]
    parts = [1] * len(gaps)
    for _ in range(count - len(factors)):
        widest = max(range(len(gaps)), key=lambda i: round(gaps[i] / parts[i], 9))
        parts[widest] += 1
    found: list[float] = []
    for (low, high), many in zip(pairwise(factors), parts, strict=True):
        found += [low, *(float(f"{low * (high / low) ** (k / many):.4g}") for k in range(1, many))]
    return (*found, factors[-1])


def options_file(folder: Path, arm: Arm) -> Path:
    """The options of an arm's cells as `gptlab train --config` takes them."""
    return folder / arm.name / "options.toml"


def options_text(experiment: Experiment, arm: Arm, folder: Path, **more: Any) -> str:
    """What that file holds. A signal's file is named as seen from there, since a config's are next to it."""
    options = {"preset": experiment.preset, **arm.options, **more}
    return as_toml(next_to(Path(os.path.relpath(".", options_file(folder, arm).parent)), options))


def as_toml(options: Mapping[str, Any], table: str = "") -> str:
    """Options under dotted keys as TOML; `also` becomes further [[signal]] tables.

    table: the name, dot included, of the table that they are put under; the caller has opened it.
    """
    options, also = dict(options), options.get("also", ())
    options.pop("also", None)
    if not also:
        return "".join(f"{key} = {_value(value)}\n" for key, value in options.items())
    signal = {key.removeprefix("signal."): value for key, value in options.items() if key.startswith("signal.")}
    plain = {key: value for key, value in options.items() if not key.startswith("signal.")}
    tables = [f"[[{table}signal]]\n{as_toml(one)}" for one in (signal, *also)]
    return as_toml(plain) + "".join(tables)


def _value(value: Any) -> str:
    """A TOML value; JSON's strings, numbers and lists are TOML's too."""
    if value is None:
        return '"none"'
    return json.dumps(list(value) if isinstance(value, tuple) else value, ensure_ascii=False, allow_nan=False)
