"""An experiment's runs as dose and response: arms that differ in one error's size, at levels that the clean arm set.

The figures are computed in dose_response.py; here runs are read, sorted by what their options make wrong on purpose,
and put in one JSON-able result.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gptlab.analysis.comparability import own_options
from gptlab.analysis.dose_response import (
    THEORIES,
    Multiplier,
    compounding,
    fit_exponent,
    growth,
    multiplier,
    tokens_to_reach,
)
from gptlab.analysis.load import read
from gptlab.analysis.run import Run, count_vocabulary
from gptlab.errors import ConfigError, DataError
from gptlab.runs.records import read_rows

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
        figure, theory = ("clean_loss", "uniform") if to == "uniform" else ("accuracy", "parity")
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
        theory = "uniform" if to == "uniform" else "parity"
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
