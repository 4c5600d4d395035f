"""The statistics against scipy's own tests and numbers worked by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy import stats

from gptlab.analysis import statistics
from gptlab.analysis.statistics import (
    CHOICE,
    PairedT,
    equivalent,
    holm,
    jackknife,
    more_baseline_t,
    paired_t,
    repeated,
    welch_t,
    wilcoxon_p,
)

SAMPLES = {
    "two": [0.01, 0.03],
    "five": [0.012, -0.004, 0.03, 0.011, 0.02],
    "twenty": list(np.random.default_rng(0).standard_normal(20)),
    "a tiny spread": [1.0, 1.0 + 1e-9, 1.0 - 1e-9],
}


@pytest.mark.parametrize("differences", SAMPLES.values(), ids=SAMPLES)
def test_the_paired_t_is_scipys(differences: list[float]) -> None:
    baseline = np.linspace(3.0, 3.1, len(differences))
    expected = stats.ttest_rel(baseline + differences, baseline)
    found = paired_t(list(baseline + differences - baseline))
    interval = expected.confidence_interval(0.9)
    assert found.p == pytest.approx(expected.pvalue, rel=1e-9)
    assert found.interval(0.9) == pytest.approx((interval.low, interval.high), rel=1e-9)


@pytest.mark.parametrize(("differences", "p"), [([0.0, 0.0, -0.0], 1.0), ([0.1, 0.1, 0.1], 0.0)])
def test_differences_without_spread_have_a_p_and_an_interval(differences: list[float], p: float) -> None:
    test = paired_t(differences)
    assert (test.p, test.interval()) == (p, (differences[0], differences[0]))


@pytest.mark.parametrize("differences", [[], [0.1], [0.1, float("nan")], [0.1, float("inf")]])
def test_what_cannot_be_tested_is_refused(differences: list[float]) -> None:
    with pytest.raises(ValueError, match="at least 2 finite"):
        paired_t(differences)


@pytest.mark.parametrize("others", [3, 5, 40])
@pytest.mark.parametrize("own", SAMPLES.values(), ids=SAMPLES)
def test_welchs_t_is_scipys(own: list[float], others: int) -> None:
    other = list(np.random.default_rng(1).standard_normal(others) * 0.3)
    expected, found = stats.ttest_ind(own, other, equal_var=False), welch_t(own, other)
    interval = expected.confidence_interval(0.9)
    assert (found.p, found.freedom) == (pytest.approx(expected.pvalue, rel=1e-9), pytest.approx(expected.df, rel=1e-9))
    assert found.interval(0.9) == pytest.approx((interval.low, interval.high), rel=1e-9)


def test_a_larger_baseline_is_used_where_seeds_pair_badly_and_costs_a_little() -> None:
    rng = np.random.default_rng(2)
    other, extra = list(rng.standard_normal(8)), list(rng.standard_normal(12))
    alike, apart = (
        [x + 0.1 * e for x, e in zip(other, rng.standard_normal(8), strict=True)],
        list(rng.standard_normal(8)),
    )
    for own, expected in ((alike, paired_t([a - b for a, b in zip(alike, other, strict=True)])), (apart, None)):
        found, used = more_baseline_t(own, other, extra)
        expected = expected or welch_t(own, [*other, *extra])
        assert used == (own is apart)
        assert found.mean == expected.mean
        assert (found.n, found.freedom) == (8, 7)
        assert found.deviation == pytest.approx(CHOICE * expected.deviation)


@pytest.mark.parametrize(
    ("runs", "found"),
    [
        ({1: [2.71828183], 2: [2.5], 3: [2.71828183]}, (1, 3)),
        ({1: [10.98, 5.1, 4.2, 3.9, 3.8], 2: [10.98, 5.1, 4.2, 3.9, 3.8]}, (1, 2)),
        ({1: [10.98, 5.1, 4.2, 3.9], 2: [10.98, 5.1, 4.2, 3.9]}, None),
        ({1: [3.279], 2: [3.279]}, None),
        ({1: [0.0] * 9, 2: [0.0] * 9}, None),
        ({1: [2.71828183], 2: [2.71828184]}, None),
        ({}, None),
    ],
)
def test_one_run_under_two_names_is_found_and_short_figures_may_agree(runs: Any, found: Any) -> None:
    assert repeated(runs) == found


@pytest.mark.parametrize(
    ("p", "adjusted"),
    [
        # 3 * 0.01; then 2 * 0.03; then 1 * 0.04, which may not be smaller than the one before
        ([0.01, 0.04, 0.03], [0.03, 0.06, 0.06]),
        ([0.04, 0.001, 0.012, 0.5], [0.08, 0.004, 0.036, 0.5]),
        ([0.9, 0.8], [1.0, 1.0]),
        ([0.02], [0.02]),
        ([], []),
    ],
)
def test_holm_by_hand(p: list[float], adjusted: list[float]) -> None:
    assert holm(p) == pytest.approx(adjusted)


def test_wilcoxon_leaves_zeros_out_and_never_gives_nan() -> None:
    assert wilcoxon_p([0.0, 0.0]) == 1.0
    assert wilcoxon_p([1.0, 2.0, 3.0, 4.0, 5.0]) == 2 / 2**5  # all signs equal: the two ends of 2^5
    assert wilcoxon_p([0.0, 1.0, 2.0, 3.0, 4.0, 5.0]) == 2 / 2**5
    assert 0 < wilcoxon_p([1.0, 1.0, -1.0, 2.0, 3.0]) < 1


def test_the_jackknife_of_a_mean_is_its_t_interval() -> None:
    x = np.random.default_rng(1).standard_normal(12)
    without = [float(np.delete(x, i).mean()) for i in range(12)]
    assert jackknife(float(x.mean()), without) == pytest.approx(paired_t(list(x)).interval())


def test_the_jackknife_needs_two_groups() -> None:
    with pytest.raises(ValueError, match="2 groups"):
        jackknife(1.0, [1.0])


@pytest.mark.parametrize(
    ("mean", "expected"), [(0.0, True), (0.0049, True), (0.0052, False), (-0.0052, False), (0.02, False)]
)
def test_equivalence_is_two_one_sided_tests(mean: float, expected: bool) -> None:
    test = PairedT(n=10, mean=mean, deviation=0.0085, p=0.5)  # half a 90% interval: 1.833 * 0.0085 / sqrt(10) = 0.00493
    below, above = ((s * mean + 0.01) / (0.0085 / 10**0.5) for s in (1, -1))
    assert equivalent(test, 0.01) is expected
    assert bool(max(stats.t.sf(below, 9), stats.t.sf(above, 9)) <= 0.05) is expected


def test_correlation_and_spread_are_none_where_they_mean_nothing() -> None:
    assert statistics.correlation([1.0, 2.0], [1.0, 2.0]) is None
    assert statistics.correlation([1.0, 1.0, 1.0], [1.0, 2.0, 3.0]) is None
    assert statistics.correlation([1.0, 2.0, 3.0], [2.0, 4.0, 6.0]) == pytest.approx(1.0)
    assert statistics.spread([1.0]) is None
