"""Dose and response: how many times the tokens a known error costs, against theory, and whether errors compound.

First pure functions of numbers, in logarithms, since costs multiply: a multiplier's mean over seeds is geometric. Then
`dose_response`: an experiment's runs are read, sorted by what their options make wrong on purpose, into arms that
differ in one error's size, at levels that the clean arm set, and put in one JSON-able result.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from gptlab.analysis.comparability import own_options
from gptlab.analysis.load import read
from gptlab.analysis.run import Run, count_vocabulary
from gptlab.analysis.statistics import Interval, paired_t
from gptlab.errors import ConfigError, DataError
from gptlab.runs.records import read_rows

LogRatios = Mapping[int, float]
"""{seed: log of tokens with the error over tokens without}, of seeds in which both arrived."""
THEORIES: dict[str, tuple[str, Callable[[float, int], float]]] = {
    "uniform": ("1/(1-ρV/(V-1))^a", lambda dose, vocabulary: -_log(1 - dose * vocabulary / (vocabulary - 1))),
    "parity": ("1/(1-2ρ)^a", lambda dose, vocabulary: -_log(1 - 2 * dose)),
    "gaussian": ("(1+s²)^a", lambda dose, vocabulary: math.log1p(dose * dose)),
}
"""By the kind of error: the multiplier as a formula, and log multiplier for a = 1 as (dose, vocabulary) -> number.

uniform: the share of a flipped target's expected gradient that is the true one's. parity: what is left of a label's
correlation with the truth, which enters the samples needed squared (a = 2; Blum, Kalai and Wasserman 2003). gaussian:
the squared length of a gradient with noise over that without.
"""


def _log(x: float) -> float:
    return math.log(x) if x > 0 else -math.inf


def tokens_to_reach(
    tokens: Sequence[float], values: Sequence[float], level: float, *, rising: bool = False
) -> float | None:
    """Tokens at which a validated figure first falls (or rises) to `level`, linear between rows; None where never.

    At the first row, before which nothing is known, its own tokens: they are an upper bound.

    >>> tokens_to_reach([10, 20, 30], [3.0, 2.0, 1.5], 1.75)
    25.0
    """
    sign = -1 if rising else 1
    for i, value in enumerate(values):
        if sign * value <= sign * level:
            if i == 0:
                return float(tokens[0])
            share = (values[i - 1] - level) / (values[i - 1] - value)
            return float(tokens[i - 1] + share * (tokens[i] - tokens[i - 1]))
    return None


@dataclass(frozen=True)
class Multiplier:
    """Tokens with an error over tokens without, paired by seed: the geometric mean over n seeds, its 95% interval.

    Censored seeds (which did not arrive within their run) count as arriving at its end: the ratio is then a lower bound
    without an interval. logs: of the seeds that arrived; bounds: of all seeds. None: no pair.
    """

    n: int
    censored: int
    ratio: float | None
    interval: Interval | None
    logs: LogRatios = field(default_factory=dict)
    bounds: LogRatios = field(default_factory=dict)

    @property
    def whole(self) -> bool:
        return self.n > 0 and not self.censored


def multiplier(
    reached: Mapping[int, float | None], reference: Mapping[int, float | None], ends: Mapping[int, float]
) -> Multiplier:
    """The multiplier of runs against a reference, both {seed: tokens to reach the level, None where never}.

    ends: {seed: tokens that the run saw in all}. Seeds whose reference never arrived are left out.
    """
    paired = {seed: base for seed, base in reference.items() if base is not None and seed in reached}
    if not paired:
        return Multiplier(0, 0, None, None)
    logs = {seed: math.log(own / base) for seed, base in paired.items() if (own := reached[seed]) is not None}
    censored = len(paired) - len(logs)
    bounds = {seed: logs.get(seed, math.log(ends[seed] / base)) for seed, base in paired.items()}
    interval = None if censored else _ratio_interval(list(logs.values()), [0.0] * len(logs))
    return Multiplier(len(paired), censored, math.exp(sum(bounds.values()) / len(bounds)), interval, logs, bounds)


@dataclass(frozen=True)
class Fit:
    """The exponent a of a theory, fitted to logarithms through multiplier 1 at dose 0, one fit a seed; 95% interval.

    worst: the largest factor between a dose's mean multiplier and the fit's.
    """

    exponent: float
    interval: Interval | None
    doses: int
    worst: float


def fit_exponent(found: Sequence[tuple[float, LogRatios]]) -> Fit | None:
    """Fit log multiplier = a·x to pairs (x of the dose, log ratios by seed); None where no seed is in all of them.

    Doses at which some seed is censored must be left out by the caller: a fit of those that arrived is too good.
    """
    found = [(x, logs) for x, logs in found if math.isfinite(x) and x > 0]
    seeds = sorted(set.intersection(*(set(logs) for _, logs in found))) if found else []
    if not seeds:
        return None
    x = np.array([x for x, _ in found])
    y = np.array([[logs[seed] for seed in seeds] for _, logs in found])  # (doses, seeds)
    by_seed = x @ y / (x @ x)
    interval = paired_t(by_seed.tolist()).interval() if len(seeds) > 1 else None
    exponent = float(by_seed.mean())
    return Fit(exponent, interval, len(x), float(np.exp(np.abs(y.mean(1) - exponent * x).max())))


@dataclass(frozen=True)
class Compounding:
    """Noise at every block against noise at each block alone: multipliers, geometric means over seeds.

    sum: of what each costs beyond 1. against: 95% intervals of everywhere over the product and over the sum. bounds:
    what is only a lower bound, since runs are censored: "singles" (so the product and the sum too), "everywhere", "all"
    or "". verdict: product, sum, both (they cannot be distinguished), neither, or undecided.
    """

    n: int
    everywhere: float
    product: float
    sum: float
    against_product: Interval | None
    against_sum: Interval | None
    verdict: str
    bounds: str


def compounding(singles: Sequence[Multiplier], everywhere: Multiplier) -> Compounding | None:
    """Whether the multiplier at every block is the product of the single blocks' or the sum; None without a seed.

    A sum that is not above 0 (errors that save more tokens than there are) has no logarithm, so None as well.
    """
    seeds = sorted(set(everywhere.bounds).intersection(*(single.bounds for single in singles)))
    ratios = {seed: [math.exp(single.bounds[seed]) for single in singles] for seed in seeds}
    sums = {seed: 1 + sum(ratio - 1 for ratio in ratios[seed]) for seed in seeds}
    if not seeds or not singles or min(sums.values()) <= 0:
        return None
    every = [everywhere.bounds[seed] for seed in seeds]
    products = [sum(single.bounds[seed] for single in singles) for seed in seeds]
    added = [math.log(sums[seed]) for seed in seeds]
    against = {"product": _ratio_interval(every, products), "sum": _ratio_interval(every, added)}
    of_singles = any(single.censored for single in singles)
    bounds = ("all" if of_singles else "everywhere") if everywhere.censored else "singles" if of_singles else ""
    mean, product, total = (math.exp(sum(logs) / len(seeds)) for logs in (every, products, added))
    verdict = _compounds(against, bounds)
    return Compounding(len(seeds), mean, product, total, against["product"], against["sum"], verdict, bounds)


def _compounds(against: Mapping[str, Interval | None], bounds: str) -> str:
    intervals = {name: interval for name, interval in against.items() if interval}
    if len(intervals) < len(against):
        return "undecided"
    fits = [name for name, (low, high) in intervals.items() if low <= 1 <= high]
    below, above = all(high < 1 for _, high in intervals.values()), all(low > 1 for low, _ in intervals.values())
    decided = {"": True, "singles": below, "everywhere": above, "all": False}
    if not decided[bounds]:
        return "undecided: not all runs arrived"
    return {0: "neither", 1: "".join(fits), 2: "both"}[len(fits)]


def growth(early: LogRatios, late: LogRatios) -> tuple[float, Interval | None] | None:
    """The multiplier at a late level over that at an early one, with its 95% interval; None without a seed in both.

    Above 1, the error costs more the further training is.
    """
    seeds = sorted(set(early) & set(late))
    if not seeds:
        return None
    a, b = [late[seed] for seed in seeds], [early[seed] for seed in seeds]
    return math.exp((sum(a) - sum(b)) / len(seeds)), _ratio_interval(a, b)


def _ratio_interval(logs: Sequence[float], others: Sequence[float]) -> Interval | None:
    """The 95% interval of a ratio of multipliers, paired by seed; None below two seeds."""
    if len(logs) < 2:
        return None
    low, high = paired_t([a - b for a, b in zip(logs, others, strict=True)]).interval()
    return math.exp(low), math.exp(high)


Clean = tuple[Any, ...]
"""All options of a run but its errors: runs of equal ones may be compared as dose and response."""
_ERRORS = ("target_flip", "target_flip_to", "gradient_noise", "gradient_noise_shape")
_FLIPS = ("control", "flip", "flip_to")


@dataclass(frozen=True)
class Corruption:
    """kind: what is wrong, in words; judges: where, of a signal's flips, lowest first; dose: the share or size.

    figure: of validation rows, the one that shows what was learnt of the truth despite it. theory: a key of THEORIES.
    """

    kind: str
    judges: tuple[int, ...]
    dose: float
    figure: str
    theory: str

    @property
    def series(self) -> str:
        """The name of what differs from it in dose alone."""
        return f"{self.kind} at judge {','.join(map(str, self.judges))}" if self.judges else self.kind

    @property
    def figures(self) -> tuple[str, str]:
        """The figure of a clean arm's rows, which has nothing to undo, and of the arm's with the error."""
        return ("loss" if self.figure == "clean_loss" else self.figure), self.figure


def corruptions(options: Mapping[str, Any]) -> tuple[Clean, list[Corruption]]:
    """The run without its errors, and its errors; `options` are all of a run's, under dotted keys."""
    found: list[Corruption] = []
    if options["target_flip"]:
        to = options["target_flip_to"]
        figure, theory = "clean_loss" if to == "uniform" else "accuracy", "parity" if to == "argmax" else "uniform"
        found.append(Corruption(f"{to} flips in the true loss", (), options["target_flip"], figure, theory))
    if options["gradient_noise"]:
        kind = "batch noise" if options["gradient_noise_shape"] == "batch" else "gradient noise"
        found.append(Corruption(kind, (), options["gradient_noise"], "loss", "gaussian"))
    flips: dict[tuple[str, str, float], list[int]] = {}
    clean: list[Clean] = []
    first = {key.removeprefix("signal."): value for key, value in options.items() if key.startswith("signal.")}
    for signal in (one for one in (first, *options["also"]) if one["name"] != "none"):
        judges = range(1, options["n_layer"]) if signal["layers"] == "all" else signal["layers"]
        if signal["control"] == "flipped" and signal["flip"]:
            if isinstance(judges, str):  # rotate: one place in turn is no place
                judges = range(1, options["n_layer"])
            flips.setdefault((signal["flip_to"], signal["name"], signal["flip"]), []).extend(judges)
        clean += [_without_flips(signal, judge, options["n_layer"]) for judge in judges]
    for (to, name, dose), judges in flips.items():
        theory = "parity" if to == "argmax" else "uniform"
        found.append(Corruption(f"{to} flips in {name}", tuple(sorted(judges)), dose, "loss", theory))
    rest = {k: v for k, v in options.items() if k not in _ERRORS and k.partition(".")[0] not in ("signal", "also")}
    return (tuple(sorted((k, repr(v)) for k, v in rest.items())), tuple(sorted(clean))), found


def _without_flips(signal: Mapping[str, Any], judge: int | str, n_layer: int) -> Clean:
    """A signal at one judge without its errors: several that share the judges are as one that has them all."""
    control = "none" if signal["control"] == "flipped" else signal["control"]
    weight = 1 / n_layer if signal["weight"] is None else signal["weight"]
    kept = {k: v for k, v in signal.items() if k not in (*_FLIPS, "layers", "weight")}
    return (str(judge), float(weight), control, tuple(sorted((k, repr(v)) for k, v in kept.items())))


SHARES = (0.125, 0.25, 0.5)
"""Levels: what the clean arm has reached after these shares of its tokens, early to late."""
RISING = {"accuracy"}


@dataclass(frozen=True)
class Target:
    """What is to be reached: what the clean arm has after a share of its tokens, or a level of the figure itself."""

    share: float | None = None
    level: float | None = None


@dataclass(frozen=True)
class Arm:
    """An arm that carries at most one kind of error: its runs by seed, and their validation rows."""

    name: str
    clean: Clean
    error: Corruption | None
    runs: Mapping[int, Run]
    rows: Mapping[int, Sequence[Mapping[str, Any]]]

    def curve(self, seed: int, figure: str) -> tuple[list[float], list[float]]:
        """Tokens and the figure of every validation of a run."""
        if any(figure not in row for row in self.rows[seed]):
            raise DataError(f"{self.runs[seed].path}: expected {figure} in its validation rows; train it again")
        per_step = self.runs[seed].options["total_batch_tokens"]
        return [row["step"] * per_step for row in self.rows[seed]], [row[figure] for row in self.rows[seed]]

    def reached(self, figure: str, level: float) -> dict[int, float | None]:
        rising = figure in RISING
        return {seed: tokens_to_reach(*self.curve(seed, figure), level, rising=rising) for seed in self.runs}

    @property
    def ends(self) -> dict[int, float]:
        return {seed: run.last_step * run.options["total_batch_tokens"] for seed, run in self.runs.items()}


def dose_response(folder: str | Path, targets: Sequence[Target] = tuple(map(Target, SHARES))) -> dict[str, Any]:
    """Every series of an experiment's folder, at every target, with fits, growth and compounding; JSON-able.

    targets: early to late. Raises ConfigError where the folder's runs may not be compared or hold no series, DataError
    where they lack rows.
    """
    for target in targets:
        if target.share is not None and not 0 < target.share <= 1:
            raise ConfigError(f"expected shares above 0 and at most 1, found {target.share:g}")
    outcomes = read([folder])
    if outcomes.undeclared:
        raise ConfigError("; ".join(outcomes.undeclared))
    arms, notes = _arms(outcomes.runs)
    for arm, losses in outcomes.losses.items():
        notes += [f"{arm}, seed {seed} diverged: its cost is no number" for seed, v in losses.items() if v is None]
    series = [_series(name, reference, members, targets) for name, reference, members in _sorted(arms)]
    if not series:
        raise ConfigError(
            f"{folder}: expected arms that differ in one known error from a clean arm, found none; "
            "experiments/dose_response.toml has some"
        )
    compounds = list(_compounding(arms, targets))
    return {"experiment": outcomes.name, "series": series, "compounding": compounds, "notes": [*outcomes.notes, *notes]}


def _arms(runs: Mapping[str, Sequence[Run]]) -> tuple[list[Arm], list[str]]:
    arms, notes = [], []
    for name, members in runs.items():
        if not members:
            notes.append(f"{name} has no finished run")
            continue
        options = own_options(members[0])
        clean, errors = corruptions(options)
        if len(errors) > 1:
            notes.append(f"{name} has errors of {len(errors)} kinds, so that no dose is its own")
            continue
        rows = {run.seed: [r for r in read_rows(run.source) if r["kind"] == "val"] for run in members}
        arms.append(Arm(name, clean, errors[0] if errors else None, {run.seed: run for run in members}, rows))
    return arms, notes


def _sorted(arms: Sequence[Arm]) -> Iterator[tuple[str, Arm, list[Arm]]]:
    """(series, the clean arm, arms by dose), in the order of the experiment's file."""
    for reference in (arm for arm in arms if arm.error is None):
        found: dict[str, list[Arm]] = {}
        for arm in arms:
            if arm.error and arm.clean == reference.clean:
                found.setdefault(arm.error.series, []).append(arm)
        for name, members in found.items():
            yield name, reference, sorted(members, key=lambda arm: arm.error.dose if arm.error else 0.0)


def _level(reference: Arm, figure: str, target: Target) -> float:
    """The level itself, or the clean arm's mean over seeds after a share of its tokens, linear between validations."""
    if target.level is not None:
        return target.level
    tokens = {seed: (target.share or 1.0) * end for seed, end in reference.ends.items()}
    return float(np.mean([np.interp(tokens[seed], *reference.curve(seed, figure)) for seed in reference.runs]))


def _series(name: str, reference: Arm, members: Sequence[Arm], targets: Sequence[Target]) -> dict[str, Any]:
    error = members[0].error
    assert error is not None
    formula, abscissa = THEORIES[error.theory]
    vocabulary = count_vocabulary(next(iter(reference.runs.values())).options)
    if vocabulary is None:
        raise DataError(f"{reference.name}: expected a tokenizer that gptlab knows, found one of a patch")
    levels, by_arm = [], {arm.name: [] for arm in members}
    doses = [arm.error.dose for arm in members if arm.error]
    predicted = [abscissa(dose, vocabulary) for dose in doses]
    for target in targets:
        level, base, found = _at(reference, members, error, target)
        for arm, m in zip(members, found, strict=True):
            by_arm[arm.name].append(m)
        fit = fit_exponent([(x, m.logs) for x, m in zip(predicted, found, strict=True) if m.whole])
        fitted = [math.exp(fit.exponent * x) if fit and math.isfinite(x) else None for x in predicted]
        arrived = [tokens for tokens in base.values() if tokens is not None]
        levels.append({
            "share": target.share,
            "level": level,
            "reference_tokens": float(np.mean(arrived)) if arrived else None,
            "doses": [
                {"arm": arm.name, "dose": dose, "n": m.n, "censored": m.censored, "multiplier": m.ratio,
                 "interval": m.interval, "fitted": expected}
                for arm, dose, m, expected in zip(members, doses, found, fitted, strict=True)
            ],
            "fit": asdict(fit) if fit else None,
        })  # fmt: skip
    whole = {arm: ms for arm, ms in by_arm.items() if len(ms) > 1 and ms[0].whole and ms[-1].whole}  # else too small
    grown = {arm: growth(ms[0].logs, ms[-1].logs) for arm, ms in whole.items()}
    return {
        "name": name,
        "reference": reference.name,
        "figure": error.figure,
        "theory": formula,
        "levels": levels,
        "growth": {arm: {"ratio": g[0], "interval": g[1]} for arm, g in grown.items() if g},
    }


def _at(
    reference: Arm, members: Sequence[Arm], error: Corruption, target: Target
) -> tuple[float, dict[int, float | None], list[Multiplier]]:
    """The level of a target, the clean arm's tokens to it, and each arm's multiplier."""
    plain, own = error.figures
    level = _level(reference, plain, target)
    base = reference.reached(plain, level)
    return level, base, [multiplier(arm.reached(own, level), base, arm.ends) for arm in members]


def _compounding(arms: Sequence[Arm], targets: Sequence[Target]) -> Iterator[dict[str, Any]]:
    """For every error at all judges together and at each alone, at one dose: does it multiply or add?"""
    for everywhere in arms:
        error = everywhere.error
        if error is None or len(error.judges) < 2:
            continue
        alone = [
            arm
            for arm in arms
            if arm.error and arm.clean == everywhere.clean and len(arm.error.judges) == 1
            and (arm.error.kind, arm.error.dose) == (error.kind, error.dose)
        ]  # fmt: skip
        reference = next((arm for arm in arms if arm.error is None and arm.clean == everywhere.clean), None)
        if reference is None or {arm.error.judges[0] for arm in alone if arm.error} != set(error.judges):
            continue
        for target in targets:
            level, _, (every, *singles) = _at(reference, [everywhere, *alone], error, target)
            found = compounding(singles, every)
            yield {
                "kind": error.kind, "dose": error.dose, "share": target.share, "level": level,
                "arms": [everywhere.name, *(arm.name for arm in alone)],
                "singles": [m.ratio for m in singles],
                **(asdict(found) if found else {"verdict": "undecided: no seed is in all of them"}),
            }  # fmt: skip
