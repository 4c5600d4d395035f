"""How often a verdict is wrong: thousands of experiments whose truth is known, judged by `gptlab.analysis.compare`.

python benchmarks/rigor.py [--experiments 10000]   simulated ones; about 30 minutes, less with --part NAME
python benchmarks/rigor.py --real FOLDER           drawn from a real experiment of twins (experiments/aa.toml)

Each keeps the other's part of the results, and renews the table in docs/verdicts.md.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from figures import keep, measured, rewrite
from scipy.stats import binomtest

from gptlab.analysis import compare, verdict
from gptlab.analysis.design import seeds_for_difference
from gptlab.analysis.statistics import failure_rate_bound, look_level

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "verdicts.md"
MARKS = ("<!-- rigor: written by benchmarks/rigor.py -->", "<!-- rigor ends -->")

LOOKS = (5, 10, 20)
SIGMA = 0.02
"""Spread of a loss over seeds, nats."""

CORRELATION = 0.5
"""Of two arms over seeds: with it, paired differences have the spread SIGMA too."""

NOTHING = SIGMA / 1000
"""A delta that lets no verdict be 'no difference', so that 'better' and 'worse' have no shelter."""

DECIDED = ("better", "worse")
KINDS = ("better", "worse", "no difference", "inactive", "undecided")
NAMES = ("baseline", "arm 1", "arm 2", "arm 3", "arm 4")


def named(losses: np.ndarray) -> dict[str, dict[int, float]]:
    """Rows of losses (arms, seeds), the baseline's first, as `compare` takes them."""
    return {name: dict(enumerate(map(float, row), 1)) for name, row in zip(NAMES, losses, strict=False)}


@dataclass(frozen=True)
class Scenario:
    """Experiments of one kind. effects: what each arm truly adds to its baseline's loss, in units of SIGMA.

    seeds: the numbers of seeds at which the experiment is judged, declared as looks where there are several.
    tails: the noise: "normal"; "heavy" (Student's t with 3 degrees of freedom); "skewed", that of an arm's difference
    being lognormal with mean 0; "rare failure", in which an arm adds its effect on 85% of seeds and 25 sigma on 15%.
    baseline_seeds: of the baseline in all, where that is more; unpaired: its seeds are no arm's.
    """

    name: str
    effects: tuple[float, ...]
    seeds: tuple[int, ...]
    delta: float = NOTHING
    tails: str = "normal"
    correlation: float = CORRELATION
    baseline_seeds: int = 0
    unpaired: bool = False

    @property
    def looks(self) -> tuple[int, ...] | None:
        return self.seeds if len(self.seeds) > 1 else None

    def draw(self, generator: np.random.Generator) -> dict[str, dict[Any, float]]:
        """The losses of one experiment at its last look."""
        seeds = max(self.seeds[-1], self.baseline_seeds)
        shape = (len(self.effects) + 2, seeds)  # what all arms share, the baseline, the arms
        if self.tails == "heavy":
            noise = generator.standard_t(3, shape) / np.sqrt(3)
        else:
            noise = generator.standard_normal(shape)
        own = np.sqrt(self.correlation) * noise[0] + np.sqrt(1 - self.correlation) * noise[1:]
        effects = np.broadcast_to(np.array([0.0, *self.effects])[:, None], own.shape)
        if self.tails == "skewed":
            effects = effects + np.vstack([0 * own[:1], np.exp(own[1:]) - np.exp(0.5)])
        if self.tails == "rare failure":
            failed = generator.random(own.shape) < 0.15
            failed[0] = False
            effects = np.where(failed, 25.0, effects)
        drawn = named(3.0 + SIGMA * (own + effects))
        if self.unpaired:
            return {arm: {f"{arm} {seed}": x for seed, x in row.items()} for arm, row in drawn.items()}
        return {a: {s: x for s, x in row.items() if a == NAMES[0] or s <= self.seeds[-1]} for a, row in drawn.items()}

    def verdicts(self, losses: dict[str, dict[int, float]]) -> Iterator[dict[str, str]]:
        """The verdict on every arm at each look."""
        for n in self.seeds:
            further = range(self.seeds[-1] + 1, self.baseline_seeds + 1)
            seen = {arm: {s: x for k, (s, x) in enumerate(row.items()) if k < n} for arm, row in losses.items()}
            seen[NAMES[0]] |= {s: losses[NAMES[0]][s] for s in further}
            declared: dict[str, Any] = {"seeds": range(1, n + 1), "baseline_seeds": further} if further else {}
            arms = compare(seen, delta=self.delta, looks=self.looks, **declared)["arms"]
            yield {arm: verdict["verdict"] for arm, verdict in arms.items()}


NO_EFFECT = (
    Scenario("four arms, looks at 5, 10 and 20", (0.0,) * 4, LOOKS),
    Scenario("four arms, looks at 5, 10 and 20, heavy tails", (0.0,) * 4, LOOKS, tails="heavy"),
    Scenario("four arms, looks at 5, 10 and 20, delta of one sigma", (0.0,) * 4, LOOKS, SIGMA),
    Scenario("four arms, 5 seeds", (0.0,) * 4, (5,)),
    Scenario("one arm, looks at 3, 6 and 9", (0.0,), (3, 6, 9)),
    Scenario("one arm, 5 seeds", (0.0,), (5,)),
)
APART = tuple(
    Scenario(
        f"{arms} arm{'s' * (arms > 1)}, {n} runs each, no common seeds",
        (0.0,) * arms,
        (n,),
        correlation=0.0,
        unpaired=True,
    )
    for arms, n in ((1, 2), (1, 3), (1, 5), (4, 5), (4, 20))
)
"""Logs without seeds, whose arms are compared by Welch's t."""

LARGER = tuple(
    Scenario(f"four arms, {n} seeds, correlation {r:g}" + f", {more} of the baseline" * bool(more), (0.0,) * 4, (n,),
             correlation=r, baseline_seeds=more)
    for n in (5,) for r in (0.0, 0.5, 0.9) for more in (0, 20)
)  # fmt: skip
BADLY_PAIRED = tuple(
    Scenario("-2 sigma, 5 seeds, correlation 0" + f", {more} of the baseline" * bool(more), (-2.0, 0.0, 0.0, 0.0), (5,),
             correlation=0.0, baseline_seeds=more)
    for more in (0, 20)
)  # fmt: skip
"""Experiments with a larger baseline, which is used where seeds pair badly."""


@dataclass(frozen=True)
class Fed:
    """What somebody may feed to `compare`, and what is right. change: of the losses drawn, in place.

    arguments: of `compare`; effect: of the arm, in units of SIGMA.
    """

    name: str
    right: str
    change: Callable[[dict[str, dict[int, float]], np.random.Generator], None]
    arguments: Mapping[str, Any] = field(default_factory=dict)
    seeds: int = 5
    effect: float = 0.0


def _repeat(losses: dict[str, dict[int, float]], generator: np.random.Generator) -> None:
    for row in losses.values():
        row |= {seed: row[(seed + 1) // 2] for seed in sorted(row, reverse=True)}


def _nothing(losses: dict[str, dict[int, float]], generator: np.random.Generator) -> None:
    pass


def _same(losses: dict[str, dict[int, float]], generator: np.random.Generator) -> None:
    losses["arm 1"] |= dict.fromkeys(losses["arm 1"], 2.9)


def _lose(losses: dict[str, dict[int, float]], generator: np.random.Generator) -> None:
    for seed in generator.permutation(list(losses["arm 1"]))[:2]:
        del losses["arm 1"][int(seed)]


def _diverge(rates: tuple[float, float]) -> Callable[[dict[str, dict[int, float]], np.random.Generator], None]:
    """Runs of the baseline and of the arm diverge at these rates."""

    def change(losses: dict[str, dict[int, float]], generator: np.random.Generator) -> None:
        for row, share in zip(losses.values(), rates, strict=True):
            row |= {seed: math.nan for seed in row if generator.random() < share}

    return change


FED = (
    Fed("five identical losses of an arm", "undecided", _same),
    Fed("an arm without 2 of 5 seeds, 5 sigma lower", "undecided", _lose, {"seeds": range(1, 6)}, effect=-5.0),
    Fed("ten seeds that are five runs, each twice", "undecided", _repeat, seeds=10),
    Fed("an arm that diverges on 5 of 5 seeds", "worse", _diverge((0.0, 1.0))),
    Fed("a baseline that diverges on 5 of 5 seeds", "better", _diverge((1.0, 0.0))),
    Fed("both diverge on 30% of 10 seeds", "undecided", _diverge((0.3, 0.3)), seeds=10),
    Fed("50 sigma of harm at a dose of 0.9%", "worse", _nothing, {"doses": {"arm 1": 0.009}}, effect=50.0),
    Fed("no effect at a dose of 0.9%", "inactive", _nothing, {"doses": {"arm 1": 0.009}}),
    Fed("-3 sigma on 20 seeds, no delta declared", "better", _nothing, seeds=20, effect=-3.0),
)  # fmt: skip
TWO_SEEDS = (
    Scenario("no effect", (0.0,), (2,), SIGMA / 2),
    Scenario("an effect of 1 sigma", (1.0,), (2,), SIGMA / 2),
    Scenario("an effect of 3 sigma", (3.0,), (2,), SIGMA / 2),
    Scenario("an effect of 100 sigma", (100.0,), (2,), SIGMA / 2),
)

MISLEADING = tuple(
    Scenario(name, (effect,), (n,), tails=tails)
    for name, effect, tails in (
        ("2.5 sigma lower on 85% of seeds, 25 sigma higher on 15%", -2.5, "rare failure"),
        ("no effect on the mean, a long tail of high losses", 0.0, "skewed"),
    )
    for n in (5, 8, 10, 20)
)
"""Arms whose mean is no better, which few seeds do not show."""


def planted() -> tuple[Scenario, ...]:
    """Experiments with one true effect among four arms, of the size they are planned to find with power 0.9."""
    alone = {effect: planned(effect, lambda n: (n,)) for effect in (1.0, -2.0)}
    looked = {effect: planned(effect, lambda n: (max(3, n // 4), max(4, n // 2), n)) for effect in (1.0, -2.0)}
    return tuple(
        Scenario(f"{effect:+g} sigma, {how}", (effect, 0.0, 0.0, 0.0), seeds)
        for how, found in (("no looks", alone), ("three looks", looked))
        for effect, seeds in found.items()
    )


def planned(effect: float, looks: Callable[[int], tuple[int, ...]]) -> tuple[int, ...]:
    """The fewest seeds, as the looks of an experiment, at whose last look `effect` is shown with power 0.9."""
    n = 6
    while True:
        seeds = looks(n)
        strictest = look_level(0.05 / 4, seeds if len(seeds) > 1 else None, n)
        needed = seeds_for_difference(effect, 1.0, strictest, power=0.9)
        if needed is not None and needed <= n:
            return seeds
        n += 1


def errors(scenario: Scenario, experiments: int, generator: np.random.Generator) -> dict[str, Any]:
    """How often, at any look, an arm that does nothing is called better or worse: of all experiments, of all arms."""
    family = several = arms = none = 0
    for _ in range(experiments):
        wrong: set[str] = set()
        last: dict[str, str] = {}
        for last in scenario.verdicts(scenario.draw(generator)):
            wrong |= {arm for arm, verdict in last.items() if verdict in DECIDED}
        family += bool(wrong)
        several += len(wrong) > 1
        arms += len(wrong)
        none += sum(verdict == "no difference" for verdict in last.values())
    total = experiments * len(scenario.effects)
    return _described(scenario) | {
        "experiments_with_an_error": rate(family, experiments),
        "several_where_one": rate(several, family) if family else None,
        "arms_in_error": rate(arms, total),
        "arms_with_no_difference_at_last": rate(none, total),
    }


def found(scenario: Scenario, experiments: int, generator: np.random.Generator) -> dict[str, Any]:
    """How often the planted effect of the first arm gets its verdict at some look, and how often the opposite one."""
    right, opposite = DECIDED if scenario.effects[0] < 0 else DECIDED[::-1]
    hits = wrong = 0
    for _ in range(experiments):
        said = [verdicts["arm 1"] for verdicts in scenario.verdicts(scenario.draw(generator))]
        hits += right in said
        wrong += opposite in said
    return _described(scenario) | {"found": rate(hits, experiments), "opposite": rate(wrong, experiments)}


def misled(scenario: Scenario, experiments: int, generator: np.random.Generator) -> dict[str, Any]:
    """How often the arm is called better, and the failure rate that seeds without a failure leave open."""
    hits = sum(next(scenario.verdicts(scenario.draw(generator)))["arm 1"] == "better" for _ in range(experiments))
    bound = failure_rate_bound(0, scenario.seeds[0])
    return _described(scenario) | {"better": rate(hits, experiments), "failure_rate_bound": bound}


def two_seeds(scenario: Scenario, experiments: int, generator: np.random.Generator) -> dict[str, Any]:
    """The share of each verdict from two seeds."""
    said = [next(scenario.verdicts(scenario.draw(generator)))["arm 1"] for _ in range(experiments)]
    kinds = ("undecided", "no difference", *DECIDED)
    return _described(scenario) | {kind: rate(said.count(kind), experiments) for kind in kinds}


def fed(kind: Fed, experiments: int, generator: np.random.Generator) -> dict[str, Any]:
    """The share of each verdict on the arm."""
    said = []
    for _ in range(experiments):
        losses = Scenario(kind.name, (kind.effect,), (kind.seeds,)).draw(generator)
        kind.change(losses, generator)
        said.append(compare(losses, **kind.arguments)["arms"]["arm 1"]["verdict"])
    shares = {verdict: rate(said.count(verdict), experiments) for verdict in KINDS}
    return {"name": kind.name, "seeds": (kind.seeds,), "right": kind.right, **shares}


def _described(scenario: Scenario) -> dict[str, Any]:
    return {
        "name": scenario.name,
        "effects_in_sigma": scenario.effects,
        "seeds": scenario.seeds,
        "delta_in_sigma": scenario.delta / SIGMA,
        "tails": scenario.tails,
    }


def rate(hits: int, trials: int) -> dict[str, Any]:
    """A rate with its exact 95% binomial interval."""
    return {"hits": hits, "of": trials, "rate": hits / trials, "interval": binomtest(hits, trials).proportion_ci()}


def simulated(experiments: int, only: str | None = None) -> dict[str, Any]:
    """The simulated parts of the results, or one of them; every scenario has its own stream of numbers.

    Wilcoxon's p and the seeds still needed are left out: they decide nothing and take three quarters of the time.
    """
    verdict.wilcoxon_p = lambda differences: math.nan
    verdict._more = lambda design, pairing, in_family: None
    parts: list[tuple[str, Any, Any]] = [
        ("no_effect", errors, NO_EFFECT),
        ("planted", found, planted()),
        ("two_seeds", two_seeds, TWO_SEEDS),
        ("misleading", misled, MISLEADING),
        ("unpaired", errors, APART),
        ("larger_baseline", errors, LARGER),
        ("badly_paired", found, BADLY_PAIRED),
        ("fed", fed, FED),
    ]
    results: dict[str, Any] = {"experiments": experiments}
    for number, (part, judge, scenarios) in enumerate(parts):
        if only and part != only:
            continue
        results[part] = []
        for i, scenario in enumerate(scenarios):
            print(f"{part}: {scenario.name}", file=sys.stderr, flush=True)
            results[part].append(judge(scenario, experiments, np.random.default_rng([number, i])))
    return results


def real(folder: Path, draws: int) -> dict[str, Any]:
    """What verdicts say of experiments drawn from real runs: errors between twins, and effects that were planted.

    The first two arms differ by --init_jitter alone; each further arm truly differs from the first. The draws share
    runs, so that their intervals are narrower than those of as many new runs would be.
    """
    from gptlab.analysis.load import read

    table = read([folder])
    first, *others = table.losses
    if not others or table.undeclared or set(table.changes[others[0]]) != {"init_jitter"}:
        raise SystemExit(f"{folder}: expected two arms that differ by --init_jitter, found {', '.join(table.losses)}")
    seeds = [seed for seed in table.losses[first] if all(seed in table.losses[arm] for arm in others)]
    if len(seeds) < LOOKS[-1]:
        raise SystemExit(f"{folder}: expected at least {LOOKS[-1]} seeds of all arms, found {len(seeds)}")
    pairs = {arm: np.array([[table.losses[name][s] for name in (first, arm)] for s in seeds]) for arm in others}
    generator = np.random.default_rng([9, 0])
    twins, *planted_arms = pairs
    changes = {arm: ", ".join(f"{k} {v[1]:g}" for k, v in table.changes[arm].items()) for arm in planted_arms}
    return {
        "real": _twins(pairs[twins], draws, generator),
        "real_planted": [_planted(changes[arm], pairs[arm], draws, generator) for arm in planted_arms],
    }


def _drawn(pairs: np.ndarray, most: int, *, swap: bool) -> Callable[[np.random.Generator], dict[str, dict[int, float]]]:
    """Draws `most` of the seeds' pairs (seeds, 2); with swap either of the two is the baseline, seed by seed."""

    def draw(generator: np.random.Generator) -> dict[str, dict[int, float]]:
        rows = pairs[generator.permutation(len(pairs))[:most]]
        return named((generator.permuted(rows, axis=1) if swap else rows).T)

    return draw


def _twins(pairs: np.ndarray, draws: int, generator: np.random.Generator) -> dict[str, Any]:
    """Errors where there is nothing to find, with the looks in use."""
    spread = float(np.std(pairs[:, 0] - pairs[:, 1], ddof=1))
    name = f"real twins, looks at {', '.join(map(str, LOOKS))} of {len(pairs)} seeds"
    scenario = Drawn(name, (0.0,), LOOKS, spread / 1000, draw_from=_drawn(pairs, LOOKS[-1], swap=True))
    known = {"available_seeds": len(pairs), "spread_of_differences": spread, "delta_in_sigma": 0.001, "tails": "real"}
    return errors(scenario, draws, generator) | known


def _planted(name: str, pairs: np.ndarray, draws: int, generator: np.random.Generator) -> dict[str, Any]:
    """How often as many seeds as the planner asks for, power 0.9, find what all the seeds together show."""
    differences = pairs[:, 1] - pairs[:, 0]
    mean, spread = float(differences.mean()), float(np.std(differences, ddof=1))
    needed = seeds_for_difference(mean, spread, look_level(0.05, None, 0), power=0.9) or len(pairs)
    n = min(max(3, needed), len(pairs))
    scenario = Drawn(name, (mean / SIGMA,), (n,), spread / 1000, draw_from=_drawn(pairs, n, swap=False))
    known = {"available_seeds": len(pairs), "effect": mean, "spread_of_differences": spread, "tails": "real"}
    return found(scenario, draws, generator) | known


@dataclass(frozen=True)
class Drawn(Scenario):
    """A scenario whose losses were measured."""

    draw_from: Callable[[np.random.Generator], dict[str, dict[int, float]]] | None = None

    def draw(self, generator: np.random.Generator) -> dict[str, dict[Any, float]]:
        assert self.draw_from is not None
        return self.draw_from(generator)


def table(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    lines = [
        "| no effect anywhere | experiments with a 'better' or 'worse' | arms with one | 'no difference' at the end |",
        "|---|---|---|---|",
    ]
    rows = [
        *results.get("no_effect", []),
        *([results["real"]] if "real" in results else []),
        *results.get("unpaired", []),
    ]
    for row in rows:
        cells = (row[key] for key in ("experiments_with_an_error", "arms_in_error"))
        none = row["arms_with_no_difference_at_last"]["rate"]
        lines.append(f"| {row['name']} | {' | '.join(map(percent, cells))} | {none:.1%} |")
    if "planted" in results:
        lines += [
            "",
            "| a planted effect, one arm of four | seeds | found | called the opposite |",
            "|---|---|---|---|",
        ]
        for row in results["planted"]:
            seeds = ", ".join(map(str, row["seeds"]))
            lines.append(f"| {row['name']} | {seeds} | {percent(row['found'])} | {row['opposite']['rate']:.2%} |")
        for row in results.get("real_planted", ()):
            size = f"{row['effect']:+.3f} nats, {row['effect'] / row['spread_of_differences']:+.1f} sigma"
            name = f"real runs, {row['name']}: {size}"
            lines.append(f"| {name} | {row['seeds'][0]} | {percent(row['found'])} | {row['opposite']['rate']:.2%} |")
        lines += ["", "| two seeds, delta half a sigma | undecided | no difference | better | worse |"]
        lines.append("|---|---|---|---|---|")
        for row in results["two_seeds"]:
            kinds = ("undecided", "no difference", *DECIDED)
            lines.append(f"| {row['name']} | " + " | ".join(f"{row[k]['rate']:.1%}" for k in kinds) + " |")
    if "misleading" in results:
        lines += ["", "| an arm whose mean is no better | seeds | called better | failure rate left open |"]
        lines.append("|---|---|---|---|")
        for row in results["misleading"]:
            open_rate = f"{row['failure_rate_bound']:.0%}"
            lines.append(f"| {row['name']} | {row['seeds'][0]} | {percent(row['better'])} | {open_rate} |")
    if "larger_baseline" in results:
        lines += ["", "| a shared baseline, no effect anywhere | experiments with an error | of these with several |"]
        lines.append("|---|---|---|")
        for row in results["larger_baseline"]:
            together = f"{row['several_where_one']['rate']:.0%}" if row["several_where_one"] else "–"
            lines.append(f"| {row['name']} | {percent(row['experiments_with_an_error'])} | {together} |")
        lines += ["", "| a planted effect that pairs badly | found |", "|---|---|"]
        lines += [f"| {row['name']} | {percent(row['found'])} |" for row in results.get("badly_paired", [])]
    if "fed" in results:
        lines += ["", f"| what is fed | seeds | right | {' | '.join(KINDS)} |", "|---|---|---|" + "---|" * len(KINDS)]
        for row in results["fed"]:
            shares = " | ".join(f"{row[kind]['rate']:.1%}" for kind in KINDS)
            lines.append(f"| {row['name']} | {row['seeds'][0]} | {row['right']} | {shares} |")
    return "\n".join(lines)


def percent(found: dict[str, Any]) -> str:
    low, high = found["interval"]
    return f"{found['rate']:.2%} [{low:.2%}, {high:.2%}]"


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experiments", type=int, default=10_000, help="experiments of each kind [10000]")
    parser.add_argument("--real", type=Path, metavar="FOLDER", help="the folder of experiments/aa.toml, or one like it")
    parser.add_argument("--part", metavar="NAME", help="renew one part of the simulated ones [all]")
    options = parser.parse_args(argv)
    results = measured("rigor")
    if options.real:
        results |= real(options.real, options.experiments)
    else:
        results |= simulated(options.experiments, options.part)
    keep("rigor", results)
    print(table(results))
    rewrite(PAGE, *MARKS, table(results) + "\n\n")


if __name__ == "__main__":
    main(sys.argv[1:])
