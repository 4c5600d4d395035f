"""The error over a ledger: levels that add up, the simulated nights' promise, and metrics that are not normal."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from scripts import load_script

from gptlab.analysis.statistics import two_sided_p
from gptlab.judge.evidence import critical_value, design, keeps, level_left, next_level, screened

LOOKS = (8, 16)


@pytest.mark.parametrize("failures", [0, 1, 7, 100, 10_000])
def test_levels_that_are_spent_and_left_add_up_to_the_error_rate(failures: int) -> None:
    spent = sum(next_level(0.05, m) for m in range(failures))
    assert spent + level_left(0.05, failures) == pytest.approx(0.05, rel=1e-9)
    assert next_level(0.05, failures) < level_left(0.05, failures)


def test_the_looks_of_a_confirmation_together_keep_its_level() -> None:
    generator = np.random.default_rng(3)
    gains = generator.standard_normal((400_000, 16))
    for failures in (0, 30):  # simulated levels, and those too small to be simulated
        level = next_level(0.05, failures)
        won = np.zeros(len(gains), dtype=bool)
        for k, n in enumerate(LOOKS):
            part = gains[:, :n]
            won |= part.mean(1) / part.std(1, ddof=1) * math.sqrt(n) > critical_value(level, LOOKS, k)
        assert won.mean() < level + 4 * math.sqrt(level / len(gains))
        assert won.mean() > level / 2


def test_screening_passes_what_is_large_and_gives_up_what_is_not_positive() -> None:
    gains = np.array([[3.0, 3.2], [-0.1, -0.2], [0.8, 0.2]])
    assert screened(gains, 1.0, last=False).tolist() == [1, -1, 0]
    assert screened(gains, 1.0, last=True).tolist() == [1, -1, -1]
    assert screened(np.zeros((1, 2)), 0.0, last=True).tolist() == [-1]


@pytest.mark.parametrize("digits", [1, 2])
def test_a_metric_of_few_digits_is_not_kept_more_often_than_promised(digits: int) -> None:
    """Gains that repeat look as if they had no spread: on 4 seeds 1 of 8 nulls would have been kept."""
    generator = np.random.default_rng(5)
    level, kept = next_level(0.05, 0), 0
    for _ in range(4000):
        baseline, idea = np.round(generator.normal(0, 0.4 * 10**-digits, (2, 8)), digits)
        gains = idea - baseline
        kept += any(
            keeps(baseline[:n].tolist(), gains[:n].tolist(), level, (4, 8), k) == 1 for k, n in ((0, 4), (1, 8))
        )
    assert kept / 4000 < level + 4 * math.sqrt(level / 4000)


@pytest.mark.parametrize("baseline", [[0.5] * 8, [0.5 + 0.01 * k for k in range(8)]])
def test_a_trainer_without_noise_is_kept_or_not_by_the_sign_of_its_gain(baseline: list[float]) -> None:
    level = next_level(0.05, 0)
    assert keeps(baseline, [0.25] * 8, level, LOOKS, 0) == 1
    assert keeps(baseline, [-0.25] * 8, level, LOOKS, 0) == -1


def test_a_design_says_what_can_be_found_and_what_it_costs() -> None:
    found = design(0.02, (2, 4, 8), LOOKS, 0.05)
    assert found["smallest_effect"] < found["smallest_effect_later"] < 0.05
    assert found["runs_of_a_discarded_idea"] == [2, 8]
    assert found["runs_of_a_kept_idea"] == [18, 40]
    assert two_sided_p(critical_value(next_level(0.05, 0), LOOKS, 1), 15) < 0.01


def test_the_committed_nights_keep_the_promise_and_the_naive_rules_do_not() -> None:
    nights = load_script("benchmarks/judge_nights.py")
    found = json.loads(nights.RESULTS.read_text())
    for correlation in ("correlation_0", "correlation_0.5"):
        for effect, rules in found[correlation].items():
            assert rules["judge"]["upper_bound"] <= 0.05, (correlation, effect)
            assert all(
                rules[name]["nights_with_a_false_keep"] > 0.4 for name in ("lower_loss", "paired_t", "mad_score")
            )
    assert found["nights"] >= 1000
    assert nights.table(found) in nights.PAGE.read_text(encoding="utf-8"), "run `python benchmarks/judge_nights.py`"


def test_a_few_nights_simulated_now_are_like_the_committed_ones() -> None:
    nights = load_script("benchmarks/judge_nights.py")
    found = nights.simulate(150, 3.0, 0.5, seed=11)
    assert found["judge"]["found"] > 0.95
    assert found["judge"]["nights_with_a_false_keep"] < 0.08
    assert abs(found["judge"]["overstatement"]) < 0.1
    assert found["lower_loss"]["nights_with_a_false_keep"] > 0.5
