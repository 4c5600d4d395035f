"""The same arms in other settings: does the sign of a finding hold on the ladder's rungs, and under changes of recipe?

A `Variant` is a change for every arm alike. `derived` makes an ordinary experiment of it, which the usual runner trains
in a folder of its own, so that kills, claims, packing and verdicts are as they are anywhere. Nothing is started here.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from gptlab.errors import ConfigError
from gptlab.files import is_count, is_number, parse_json, read_text
from gptlab.options import build, flatten, options_of
from gptlab.runs.experiment_spec import Arm, Experiment, as_toml, experiment_from, ready_experiments
from gptlab.training.config import TrainingConfig, run_flops
from gptlab.training.presets import RUNGS, TOKENS_PER_PARAMETER, preset_options

Status = Literal["survived", "reversed", "open"]

IN_UPDATES = ("signal.start", "signal.anneal")
"""Options that count updates and that no preset sets."""

LADDER = "ladder.json"
"""At how many rungs of the ladder each arm's sign holds, in the folder of the experiment."""

UNTIED_HEAD = "patches/untied_head.diff"
"""Next to the ready experiments."""


@dataclass(frozen=True)
class Variant:
    """A setting in which arms are compared once more.

    what: in words; options: set over every arm's own; factors: of numbers that arms have, such as learning_rate; rung:
    of the ladder, in place of the experiment's preset; patch: of the code, for every arm; other_seeds: none of the
    experiment's; impossible: why it cannot be tried, "" where it can.
    """

    name: str
    what: str
    options: Mapping[str, Any] = field(default_factory=dict)
    factors: Mapping[str, float] = field(default_factory=dict)
    rung: int | None = None
    patch: Path | None = None
    other_seeds: bool = False
    impossible: str = ""


def rungs(depths: Sequence[int] = RUNGS) -> list[Variant]:
    """The ladder's, from the lowest; raises ConfigError for one that it does not have."""
    for depth in depths:
        preset_options("ladder", {"depth": depth})
    return [Variant(f"depth_{depth}", f"{depth} blocks", rung=depth) for depth in sorted(set(depths))]


def changes(experiment: Experiment, names: Sequence[str]) -> list[Variant]:
    """What a finding about the named arms, their baseline first, has to survive: the cheapest first, by arithmetic.

    A change that an arm makes itself, or that does not fit, is there as impossible, with the reason.
    """
    arms = [experiment.arms[name] for name in names]
    found = [_possible(variant, arms, experiment.preset) for variant in _changes(_config(arms[0], experiment.preset))]
    return sorted(found, key=lambda variant: sum(_flops(variant, arm, experiment.preset) for arm in arms))


def _changes(baseline: TrainingConfig) -> Iterator[Variant]:
    yield Variant("rate_half", "half the learning rate", factors={"learning_rate": 0.5, "min_lr": 0.5})
    yield Variant("rate_double", "twice the learning rate", factors={"learning_rate": 2.0, "min_lr": 2.0})
    yield Variant("muon", "Muon for AdamW", {"optimizer": "muon"})
    yield Variant("untied_head", "an output head of its own", patch=_ready_patch())
    yield Variant("vocabulary", "GPT-2's tokens for bytes", {"tokenizer": "gpt2"})
    yield Variant("corpus", "another corpus, a Markov chain of order 2", {"data": "markov"})
    yield Variant("other_seeds", "seeds that it has not seen", other_seeds=True)
    wanted = TOKENS_PER_PARAMETER * baseline.shape.parameters
    longer = math.ceil(wanted / baseline.total_batch_tokens) / baseline.steps
    yield Variant("tokens", f"{TOKENS_PER_PARAMETER} tokens a parameter",
                  factors=dict.fromkeys(("steps", "warmup_steps", *IN_UPDATES), longer))  # fmt: skip
    above = next((depth for depth in RUNGS if depth > baseline.n_layer), None)
    yield Variant("rung_up", f"the ladder's rung of {above} blocks", rung=above)


def _ready_patch() -> Path | None:
    ready = next(iter(ready_experiments().values()), None)
    return ready.parent / UNTIED_HEAD if ready else None


def _possible(variant: Variant, arms: Sequence[Arm], preset: str) -> Variant:
    """The variant, with the reason where it cannot be tried with these arms."""
    reason = ""
    for arm in arms:
        if any(arm.get(key, preset) == value for key, value in variant.options.items()):
            reason = f"{arm.name} has it already"
        elif variant.name == "untied_head" and (arm.patch or not variant.patch):
            reason = f"{arm.name} is a patch itself" if arm.patch else "the ready patches are not installed"
        elif variant.name == "rung_up" and not variant.rung:
            reason = "the ladder has no rung above it"
        elif variant.factors.get("steps", 2) <= 1:
            reason = "it was trained on as many"
    return replace(variant, impossible=reason)


def derived(experiment: Experiment, variant: Variant, names: Sequence[str], seeds: int) -> Experiment:
    """The named arms, their baseline first, in a variant's setting, with so many seeds.

    A number that an arm changes from its preset keeps its ratio to the recipe of another rung. Raises ConfigError where
    the arms cannot be trained so.
    """
    if experiment.tune:
        raise ConfigError(f"{experiment.name}: expected an experiment without [tune], whose choices hold for its own "
                          "setting alone; give arms their options")  # fmt: skip
    first = max(experiment.seeds) + 1 if variant.other_seeds else min(experiment.seeds)
    chosen = range(first, first + seeds) if variant.other_seeds else experiment.seeds[:seeds]
    preset = "ladder" if variant.rung else experiment.preset
    name, metric = f"{experiment.name}.{variant.name}", experiment.metric
    head = {"name": name, "preset": preset, "baseline": names[0], "seeds": list(chosen), "metric": metric.name,
            "better": metric.better}  # fmt: skip
    head |= {} if experiment.delta is None else {"delta": experiment.delta}
    if set(names) & set(experiment.replayed):
        head["placebo_match"] = experiment.placebo_match
    arms = (_table(experiment.arms[name], variant, experiment.preset) for name in names)
    return experiment_from(as_toml(head) + "".join(arms), Path(f"{name}.toml"), Path())


def _table(arm: Arm, variant: Variant, preset: str) -> str:
    """An arm of a derived experiment, as TOML."""
    table, patch = f"arms.{json.dumps(arm.name)}", variant.patch or arm.patch
    own = as_toml({"patch": str(patch)}) if patch else ""
    return f"\n[{table}]\n{own}{as_toml(_changed(arm, variant, preset), table + '.')}"


def _changed(arm: Arm, variant: Variant, preset: str) -> dict[str, Any]:
    """An arm's options in a variant's setting."""
    usual = _usual(preset, arm)
    if variant.rung:
        rung = preset_options("ladder", {"depth": variant.rung})
        factors = {key: rung[key] / value for key, value in usual.items() if value and is_number(rung.get(key))
                   and is_number(value)}  # fmt: skip
        factors |= dict.fromkeys(IN_UPDATES, factors["steps"])
        return {"depth": variant.rung} | {k: _times(v, factors.get(k, 1.0)) for k, v in arm.options.items()}
    values = {**usual, **arm.options}
    scaled = {key: _times(values[key], factor) for key, factor in variant.factors.items() if values.get(key)}
    return {**arm.options, **scaled, **variant.options}


def _times(value: Any, factor: float) -> Any:
    if not is_number(value):
        return value
    return round(value * factor) if isinstance(value, int) else value * factor


def _usual(preset: str, arm: Arm) -> dict[str, Any]:
    """What an arm's runs have where it sets nothing."""
    return {**flatten(TrainingConfig()), **preset_options(preset, arm.options)}


def _config(arm: Arm, preset: str) -> TrainingConfig:
    """An arm's options but for those that only its patch knows."""
    known = {*(one.key for one in options_of(TrainingConfig)), "also"}
    options = {**preset_options(preset, arm.options), **arm.options, "preset": preset}
    return build(TrainingConfig, {key: value for key, value in options.items() if key in known})


def _flops(variant: Variant, arm: Arm, preset: str) -> float:
    """Arithmetic of a cell; of an impossible variant none."""
    if variant.impossible:
        return 0.0
    changed = replace(arm, options=_changed(arm, variant, preset))
    return run_flops(_config(changed, "ladder" if variant.rung else preset))


def read_ladder(folder: Path) -> dict[str, Any] | None:
    """The content of an experiment's ladder.json, None where there is none; raises ConfigError for a damaged one."""
    path = folder / LADDER
    try:
        return accepted_ladder(parse_json(read_text(path, inside=folder, error=ConfigError)))
    except FileNotFoundError:
        return None
    except ValueError:
        raise ConfigError(
            f"{path} is damaged: expected at how many rungs signs hold; remove it and climb the ladder again"
        ) from None


def accepted_ladder(content: Any) -> dict[str, Any]:
    """The depths of `content`, and how many rungs hold each arm's sign; raises ValueError where it has no such."""
    match content:
        case {"depths": [*depths], "arms": {**arms}} if all(map(is_count, depths)):
            of_arms = {name: (one.get("holds"), one.get("of")) for name, one in arms.items() if isinstance(one, dict)}
            if of_arms.keys() == arms.keys() and all(is_count(n) for counts in of_arms.values() for n in counts):
                return {"depths": depths, "arms": {name: {"holds": k, "of": n} for name, (k, n) in of_arms.items()}}
    raise ValueError("depths, or an arm's rungs")


def status(sign: float, found: Mapping[str, Any]) -> Status:
    """Whether a difference has the sign of the finding: open where its 95% interval has both, or is unknown."""
    difference, (low, high) = found["difference"], found["interval"]
    if difference is None or low is None or high is None or low <= 0 <= high:
        return "open"
    return "survived" if difference * sign > 0 else "reversed"
