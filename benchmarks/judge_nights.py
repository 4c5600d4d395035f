"""How often a night of ideas fools `gptlab judge`, and three rules that are in use: nights whose truth is known.

python benchmarks/judge_nights.py [--nights 1000]    seconds; writes benchmarks/results/measured.json and
its table in docs/judge.md

A night is 100 ideas in an order drawn for it; `effects` of them gain so many sigma, the baseline's standard deviation
over seeds, and the others nothing. Runs of one seed share their noise with a correlation, as pairs do. What the
judge does here is what it does in a lab: the functions are gptlab/judge/evidence.py's. Nothing is adopted, so
that every idea is compared with the same baseline, whose screening runs all ideas share.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from figures import keep, rewrite

from gptlab.analysis.statistics import critical_t, failure_rate_bound
from gptlab.judge.evidence import confirmed, next_level, screened
from gptlab.judge.lab import Plan

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "judge.md"
MARKS = ("<!-- nights: written by benchmarks/judge_nights.py -->", "<!-- nights end -->")
IDEAS, REAL = 100, 10
PLAN = Plan()
NAIVE_SEEDS = 5
"""Seeds of the paired t test and of the MAD score."""

MAD_SCORE = 2.0
"""Robust standard deviations (1.4826 MAD of the baseline's seeds) by which a mean must be lower."""


@dataclass(frozen=True)
class Nights:
    """Nights of one kind. gains: what every idea truly gains (nights, ideas), in sigma."""

    generator: np.random.Generator
    gains: np.ndarray
    correlation: float

    def shared(self, n: int) -> tuple[np.ndarray, np.ndarray]:
        """What runs of a seed share, and the baseline's losses, (nights, n)."""
        common = np.sqrt(self.correlation) * self._normal(n)
        return common, common + np.sqrt(1 - self.correlation) * self._normal(n)

    def losses(self, common: np.ndarray, idea: int) -> np.ndarray:
        """An idea's losses on seeds whose runs share `common` (nights, n)."""
        own = np.sqrt(1 - self.correlation) * self._normal(common.shape[-1])
        return common + own - self.gains[:, idea, None]

    def _normal(self, n: int) -> np.ndarray:
        return self.generator.standard_normal((len(self.gains), n))


Kept = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Which ideas were kept, the gains that were claimed (nan where none), (nights, ideas); runs of a night (nights,)."""


def judge(nights: Nights) -> Kept:
    """What `gptlab judge` does."""
    looks = PLAN.looks
    common, baseline = nights.shared(looks[-1])
    floor = baseline.std(1, ddof=1)
    kept, claimed, runs = _nothing(nights, looks[-1])
    failures = np.zeros(len(nights.gains), dtype=int)
    for idea in range(IDEAS):
        gains = baseline - nights.losses(common, idea)
        passed = np.zeros(len(gains), dtype=int)
        for before, n in zip((0, *looks), looks, strict=False):
            waiting = passed == 0
            runs += waiting * (n - before)
            passed = np.where(waiting, screened(gains[:, :n], floor, last=n == looks[-1]), passed)
        _confirm(nights, idea, passed == 1, failures, (kept, claimed, runs))
        failures += (passed == 1) & ~kept[:, idea]
    return kept, claimed, runs


def _confirm(nights: Nights, idea: int, passed: np.ndarray, failures: np.ndarray, found: Kept) -> None:
    """Confirm an idea in the nights in which it has passed."""
    kept, claimed, runs = found
    looks = PLAN.confirm_looks
    common, baseline = nights.shared(looks[-1])
    gains = baseline - nights.losses(common, idea)
    verdict = np.where(passed, 0, -1)
    for k, n in enumerate(looks):
        waiting = verdict == 0
        runs += 2 * waiting * (n - (looks[k - 1] if k else 0))
        for m in np.unique(failures[waiting]):
            now = waiting & (failures == m)
            verdict[now] = confirmed(gains[now, :n], next_level(PLAN.error_rate, int(m)), looks, k)
        won = waiting & (verdict == 1)
        claimed[won, idea] = gains[won, :n].mean(1)
    kept[:, idea] = verdict == 1


def lower_loss(nights: Nights) -> Kept:
    """Keep whatever has a lower loss than the best so far, each at one seed; the claim is the gain over the start."""
    kept, claimed, runs = _nothing(nights, 1)
    baseline = nights.shared(1)[1]
    best, start = baseline[:, 0].copy(), baseline[:, 0]
    for idea in range(IDEAS):
        loss = nights.losses(nights.shared(1)[0], idea)[:, 0]
        kept[:, idea] = loss < best
        claimed[:, idea] = np.where(kept[:, idea], start - loss, np.nan)
        best = np.minimum(best, loss)
        runs += 1
    return kept, claimed, runs


def paired_test(nights: Nights) -> Kept:
    """Keep what a paired t test of 5% calls better."""
    return _over_seeds(
        nights, lambda gains, _: gains.mean(1) / (gains.std(1, ddof=1) / np.sqrt(NAIVE_SEEDS)),
        critical_t(0.05, NAIVE_SEEDS - 1),
    )  # fmt: skip


def mad_score(nights: Nights) -> Kept:
    """Keep one run that is better than the baseline's median by MAD_SCORE robust standard deviations."""
    kept, claimed, runs = _nothing(nights, NAIVE_SEEDS)
    common, baseline = nights.shared(NAIVE_SEEDS)
    middle = np.median(baseline, 1)
    spread = 1.4826 * np.median(np.abs(baseline - middle[:, None]), 1)
    for idea in range(IDEAS):
        gain = middle - nights.losses(common[:, :1], idea)[:, 0]
        kept[:, idea] = gain > MAD_SCORE * spread
        claimed[:, idea] = np.where(kept[:, idea], gain, np.nan)
        runs += 1
    return kept, claimed, runs


def _over_seeds(nights: Nights, score: Callable[[np.ndarray, np.ndarray], np.ndarray], bound: float) -> Kept:
    kept, claimed, runs = _nothing(nights, NAIVE_SEEDS)
    common, baseline = nights.shared(NAIVE_SEEDS)
    for idea in range(IDEAS):
        gains = baseline - nights.losses(common, idea)
        kept[:, idea] = score(gains, baseline) > bound
        claimed[:, idea] = np.where(kept[:, idea], gains.mean(1), np.nan)
        runs += NAIVE_SEEDS
    return kept, claimed, runs


def _nothing(nights: Nights, runs: int) -> Kept:
    shape = nights.gains.shape
    return np.zeros(shape, dtype=bool), np.full(shape, np.nan), np.full(shape[0], float(runs))


RULE_NAMES = {
    "judge": "`gptlab judge`", "lower_loss": "keep any lower loss", "paired_t": "one paired t test of 5%",
    "mad_score": "a MAD score above 2",
}  # fmt: skip
RULES = {"judge": judge, "lower_loss": lower_loss, "paired_t": paired_test, "mad_score": mad_score}


def row(kept: Kept, gains: np.ndarray) -> dict[str, Any]:
    """Figures of a rule over nights."""
    found, claimed, runs = kept
    real, wrong = gains > 0, found & (gains == 0)
    fooled = int(wrong.any(1).sum())
    right = found & real
    return {
        "nights_with_a_false_keep": fooled / len(gains),
        "upper_bound": failure_rate_bound(fooled, len(gains)),
        "false_keeps": float(wrong.sum(1).mean()),
        "claimed_by_false_keeps": float(claimed[wrong].mean()) if wrong.any() else None,
        "best_claim": float(np.where(wrong, claimed, -np.inf).max(1)[wrong.any(1)].mean()) if fooled else None,
        "found": float(found[real].mean()) if real.any() else None,
        "overstatement": float((claimed - gains)[right].mean()) if right.any() else None,
        "runs": float(runs.mean()),
    }


def simulate(nights: int, effect: float, correlation: float, seed: int) -> dict[str, Any]:
    """Every rule on nights of which REAL ideas gain `effect` sigma."""
    generator = np.random.default_rng([seed, round(10 * effect), round(10 * correlation)])
    gains = np.zeros((nights, IDEAS))
    gains[:, :REAL] = effect
    gains = generator.permuted(gains, axis=1)
    drawn = Nights(generator, gains, correlation)
    return {name: row(rule(drawn), gains) for name, rule in RULES.items()}


def table(results: dict[str, Any]) -> str:
    """The results as Markdown, a table a correlation."""
    head = ("rule", "10 ideas gain", "nights with a false keep", "false keeps a night", "their mean claim", "found",
            "overstated by", "runs a night")  # fmt: skip
    found = []
    for correlation in ("correlation_0", "correlation_0.5"):
        rows = [
            (
                RULE_NAMES[name], f"{effect.removeprefix('effect_')} σ" if effect != "effect_0" else "nothing",
                f"{rules[name]['nights_with_a_false_keep']:.1%}", f"{rules[name]['false_keeps']:.2f}",
                _sigma(rules[name]["claimed_by_false_keeps"]),
                "–" if rules[name]["found"] is None else f"{rules[name]['found']:.0%}",
                _sigma(rules[name]["overstatement"]), f"{rules[name]['runs']:.0f}",
            )
            for effect, rules in results[correlation].items()
            for name in RULES
        ]  # fmt: skip
        lines = [f"| {' | '.join(row)} |" for row in (head, ("---",) * len(head), *rows)]
        title = f"Runs of one seed have a correlation of {correlation.removeprefix('correlation_')}:"
        found.append("\n".join([title, "", *lines]))
    return "\n\n".join(found)


def _sigma(value: float | None) -> str:
    return "–" if value is None else f"{value + 0.0:.2f} σ"


def main() -> None:
    parser = argparse.ArgumentParser(description="Simulate nights of ideas.")
    parser.add_argument("--nights", type=int, default=1000)
    nights = parser.parse_args().nights
    started = time.process_time()
    found = {
        f"correlation_{correlation:g}": {f"effect_{e:g}": simulate(nights, e, correlation, 7) for e in (0, 1, 2, 3)}
        for correlation in (0.0, 0.5)
    }
    about = {
        "nights": nights, "ideas": IDEAS, "real": REAL, "looks": list(PLAN.looks),
        "confirm": list(PLAN.confirm_looks), "error_rate": PLAN.error_rate,
    }  # fmt: skip
    keep("judge_nights", {**about, **found})
    rewrite(PAGE, *MARKS, table(found) + "\n\n")
    print(table(found), f"{time.process_time() - started:.0f} s of CPU")


if __name__ == "__main__":
    main()
