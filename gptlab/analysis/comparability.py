"""Whether runs may be compared, and what they differ by at equal cost.

Runs may differ in what their arms declare, and in nothing else: a difference in data, validation set, model, software
or machine type that nobody declared is often mistaken for the effect of a method; here each is found and named.

A signal costs arithmetic and time, for which the baseline could have made more updates: so an arm is set against runs
of its baseline that really were longer, where there are any, and never against an extrapolated curve. And what a signal
did to calibration alone, one temperature mends: what is left is knowledge.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from gptlab.analysis.design import pair
from gptlab.analysis.run import Run
from gptlab.analysis.statistics import jackknife
from gptlab.errors import ConfigError, shortened, shown
from gptlab.options import build
from gptlab.runs.tuning import LENGTH
from gptlab.training.config import FREE_ON_RESUME, TrainingConfig, run_flops

FREE = FREE_ON_RESUME | {"seed", "preset", "signal.placebo_match"}
"""Options that make no other experiment of a run."""
COMMON = frozenset({"data", "tokenizer", "block_size", "eval_tokens", "n_layer", "n_head", "n_embd", "share_blocks"})
"""Options of data and model: runs that are compared by themselves, without an experiment file, share them."""
TUNED = frozenset({"learning_rate", "min_lr", "signal.dose", "signal.weight", "also"})
"""What [tune] may set for each arm."""
LONGEST_NAME = 1000
"""Characters of an arm's name that is made from its options."""


def own_options(run: Run) -> dict[str, Any]:
    """The options that distinguish a run's arm from others."""
    also = [{key: value for key, value in one.items() if f"signal.{key}" not in FREE} for one in run.options["also"]]
    return {key: value for key, value in {**run.options, "also": also}.items() if key not in FREE}


def undeclared(run: Run, reference: Run, declared: frozenset[str], sibling: Run) -> Iterator[str]:
    """What makes `run` another experiment than `reference`, a run of its baseline, one line each.

    In the `declared` keys it may differ from it, but not from its `sibling`, a run of its own arm.
    """
    expected_of = {True: (sibling, _facts(sibling)), False: (reference, _facts(reference))}
    for (name, key), found in _facts(run).items():
        other, facts = expected_of[key in declared]
        expected = facts.get((name, key))
        if found != expected and not (name == "data shards" and _grew(run, other, key)):
            yield f"{run.path}: {name} {key}: expected {_short(expected)} as in {other.path}, found {_short(found)}"


def _facts(run: Run) -> dict[tuple[str, str], Any]:
    """{(what it is, key): value} of everything that must be declared to differ."""
    data, environment = run.config.get("data", {}), run.environment
    facts: dict[tuple[str, str], Any] = {("option", key): value for key, value in own_options(run).items()}
    facts |= {("data shards", key): data.get(key) for key in ("train", "val")}
    facts["data", "tokenizer"] = data.get("tokenizer")
    if run.finished:
        facts["validation set", "validation_sha256"] = run.ended.get("validation_sha256")
    other = {"options", "data", "replayed", "listener"}
    for key in run.config.keys() - other:  # gptlab's version, a patch, a user's code
        facts["software", key] = run.config[key]
    facts |= {("software", key): environment.get(key) for key in ("python", "torch", "compile")}
    facts |= {("machine", key): environment.get(key) for key in ("platform", "dtype")}
    now = _versions({"gptlab": run.config.get("gptlab"), **environment})
    sessions = [_versions(before) for before in environment.get("earlier", [])]
    facts["software", "earlier"] = [before for before in sessions if before != now]
    facts["machine", "device"] = str(environment.get("device", "")).partition(":")[0]
    return facts | {("machine", key): now[key] for key in ("processor", "gpus")}


def _versions(before: Mapping[str, Any]) -> dict[str, Any]:
    """What made a session."""
    machine = before.get("machine", {})
    facts = {key: before.get(key) for key in ("gptlab", "python", "torch", "compile", "platform", "dtype")}
    return {**facts, "processor": machine.get("processor"), "gpus": sorted(set(machine.get("gpus", [])))}


def _grew(run: Run, reference: Run, split: str) -> bool:
    """Whether one run only began while the shards of the same corpus were still being prepared."""
    first, second = sorted((run.config["data"], reference.config["data"]), key=lambda data: len(data[split]))
    return first[split] == second[split][: len(first[split])] and not first.get("complete", True)


def _short(value: Any) -> str:
    """A value for a line of text: checksums cut, lists by their ends."""
    if isinstance(value, list) and len(value) > 2:
        return f"[{_short(value[0])}, ... {len(value)} of them]"
    if isinstance(value, list):
        return "[" + ", ".join(map(_short, value)) + "]"
    return repr(value)[:13] + "…'" if isinstance(value, str) and len(value) == 64 else shown(value, 120)


def arm_of(options: Mapping[str, Any], baseline: Mapping[str, Any]) -> str:
    """A name for runs with `options`, from what they change of the baseline's.

    >>> arm_of({"signal.name": "entropy", "learning_rate": 0.1}, {"signal.name": "none", "learning_rate": 0.1})
    'entropy'
    """
    changed = {key: value for key, value in options.items() if baseline.get(key) != value}
    name = changed.pop("signal.name", None)
    words = [*([str(name)] if name else []), *(f"{key}={shortened(str(value), 60)}" for key, value in changed.items())]
    return shortened(", ".join(words), LONGEST_NAME)


COST_TOLERANCE = {"equal_flops": 0.05, "equal_time": 0.10}
"""How far costs may differ that are called equal, as a share; clocks are less exact than counts."""
Arms = Mapping[str, Sequence[Run]]
"""{arm: its finished runs}"""


def longer_runs_of(arms: Arms, baselines: Mapping[str, str]) -> dict[str, str]:
    """{arm: its baseline} of the arms that are nothing but a longer run of it; they are no arms to judge."""
    found = {}
    for arm, baseline in baselines.items():
        if not (arms[arm] and arms[baseline]):
            continue
        own, theirs = own_options(arms[arm][0]), own_options(arms[baseline][0])
        differ = {key for key in {**own, **theirs} if own.get(key) != theirs.get(key)}
        if "steps" in differ & own.keys() & theirs.keys() and differ <= LENGTH and own["steps"] > theirs["steps"]:
            found[arm] = baseline
    return found


def cost_matched(
    arm: str, baseline: str, longer: Sequence[str], runs: Arms, looks: Sequence[int] | None, metric: str
) -> dict[str, dict[str, Any] | None]:
    """`tempered`, `equal_flops` and `equal_time` of an arm: arm minus baseline in the metric, paired by seed.

    Each is None where there is nothing to compare, `tempered` too for another metric than the loss; else its
    difference, 95% interval and n, for equal cost also `against`, the arm that cost as much, and `ratio`, its cost over
    this arm's.
    """
    tempered = {
        name: {run.seed: run.tempered for run in runs.get(name, ()) if metric == "loss"} for name in (arm, baseline)
    }
    found: dict[str, dict[str, Any] | None] = {"tempered": _paired(tempered[arm], tempered[baseline], looks)}
    for name, cost in (("equal_flops", _flops), ("equal_time", lambda run: run.seconds)):
        found[name] = None
        costs = {other: _mean_cost(runs.get(other, ()), cost) for other in (arm, baseline, *longer)}
        ratios = {other: costs[other] / costs[arm] for other in (baseline, *longer) if costs[arm] and costs[other]}
        nearest = min(ratios, key=lambda other: abs(ratios[other] - 1), default=None)
        if nearest is None or abs(ratios[nearest] - 1) > COST_TOLERANCE[name]:
            continue
        curves = {of: {run.seed: run.figures.get(metric) for run in runs[of]} for of in (arm, nearest)}
        last = {of: {seed: curve[max(curve)] for seed, curve in found.items() if curve} for of, found in curves.items()}
        if paired := _paired(last[arm], last[nearest], looks):
            found[name] = {**paired, "against": nearest, "ratio": ratios[nearest]}
    return found


def steps_saved(
    own: Mapping[Any, Mapping[int, float]], other: Mapping[Any, Mapping[int, float]], last: int, *, paired: bool,
    better: str,
) -> dict[str, Any] | None:  # fmt: skip
    """How many of `last` steps earlier the arm's mean curve reaches where its baseline's ends, with a 95% interval.

    Below 0 it is the baseline that reaches earlier where the arm ends. own, other: {seed: {step: metric}}. The interval
    is the jackknife's over seeds, of each arm by itself where they are not paired. None without curves of 2 seeds.
    """
    if len(own) < 2 or len(other) < 2:
        return None
    curves = (*own.values(), *other.values())
    steps = sorted(set.intersection(*({s for s in curve if s <= last} for curve in curves)))
    sign = 1.0 if better == "lower" else -1.0
    mine, theirs = (sign * np.array([[curve[s] for s in steps] for curve in of.values()]) for of in (own, other))
    if len(steps) < 2:
        return None

    def without(i: int | None, k: int | None) -> float:
        a, b = (of.mean(0) if j is None else np.delete(of, j, 0).mean(0) for of, j in ((mine, i), (theirs, k)))
        return last - _reached(steps, a, b[-1]) if a[-1] <= b[-1] else _reached(steps, b, a[-1]) - last

    saved = without(None, None)
    if paired:
        parts = [jackknife(saved, [without(i, i) for i in range(len(mine))])]
    else:
        parts = [jackknife(saved, [without(i, None) for i in range(len(mine))])]
        parts += [jackknife(saved, [without(None, k) for k in range(len(theirs))])]
    half = math.hypot(*((high - low) / 2 for low, high in parts))
    return {"value": saved, "interval": [saved - half, saved + half], "of": last}


def _reached(steps: Sequence[int], curve: np.ndarray, target: float) -> float:
    """The first step, between two validations on a line, at which a curve is as low as its end or a target above it."""
    k = int((curve <= target).argmax())
    if k == 0:
        return float(steps[0])
    share = (curve[k - 1] - target) / (curve[k - 1] - curve[k])
    return steps[k - 1] + float(share) * (steps[k] - steps[k - 1])


def _paired(
    own: Mapping[int, float | None], other: Mapping[int, float | None], looks: Sequence[int] | None
) -> dict[str, Any] | None:
    """The effect over the seeds at which both have a figure; None where there are none."""
    known = {name: {k: x for k, x in of.items() if x is not None} for name, of in (("own", own), ("other", other))}
    pairing = pair(known, "own", "other", looks)
    return pairing.effect if pairing.n else None


def _mean_cost(runs: Sequence[Run], cost: Callable[[Run], float]) -> float:
    """Of runs, 0 where that of any is not known."""
    costs = [cost(run) for run in runs]
    return sum(costs) / len(costs) if costs and all(costs) else 0.0


def _flops(run: Run) -> float:
    """Of its updates; 0 for a run of patched code, which may do anything and know other options."""
    try:
        return 0.0 if run.config.get("patch") else run_flops(build(TrainingConfig, dict(run.options)))
    except ConfigError:
        return 0.0
