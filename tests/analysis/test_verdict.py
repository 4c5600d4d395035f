"""Every verdict with its reason, the order of the rules, and figures that are never NaN."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from scipy import stats

from gptlab.analysis import compare
from gptlab.analysis.statistics import look_level, sign_flip_p
from gptlab.errors import ConfigError

SPREAD = [0.0, 0.02, -0.01, 0.03, -0.02]  # over seeds, common to all arms
JITTER = [0.001, -0.002, 0.0015, -0.001, 0.0005]  # an arm's own; its mean is 0


def arm(difference: float, jitter: float = 1.0, seeds: int = 5) -> dict[int, float]:
    return {s + 1: 3.0 + SPREAD[s % 5] + difference + jitter * JITTER[s % 5] for s in range(seeds)}


BASELINE = {s + 1: 3.0 + SPREAD[s % 5] for s in range(20)}


def verdict(losses: dict[int, Any], others: dict[str, Any] | None = None, **arguments: Any) -> dict[str, Any]:
    arguments = {"delta": 0.01, **arguments}
    return compare({"baseline": BASELINE, "tried": losses, **(others or {})}, **arguments)["arms"]["tried"]


SIGNAL = {"doses": {"tried": 0.4}}
WITH_PLACEBO = {"doses": {"tried": 0.4}, "placebos": {"tried": "placebo"}}
WITHOUT_PLACEBO = {"doses": {"tried": 0.4}}
NO_FINITE = {**arm(-0.05), 3: float("nan")}
LOST, KEPT = dict.fromkeys(range(1, 6)), arm(-0.05)
OF_LOST = {"baseline": "lost"}

# name: (losses of the arm, of other arms, arguments, verdict, what the reason says, whether more_seeds is a number)
CASES: dict[str, tuple[Any, Any, Any, str, str, bool]] = {
    "better": (arm(-0.05), {}, {}, "better", "0.05 below its baseline", True),
    "worse": (arm(+0.05), {}, {}, "worse", "0.05 above its baseline", True),
    "within delta": (arm(0.003), {}, {}, "no difference", "lies within ±0.01", True),
    "certain but within delta": (arm(-0.005, 0.01), {}, {}, "no difference", "lies within ±0.01", True),
    "exactly 0": (BASELINE, {}, {"delta": 0}, "no difference", "exactly 0 on all 20 seeds", True),
    "exactly 0 on one seed": ({1: 3.0}, {}, {}, "no difference", "exactly 0 on 1 seed", True),
    "neither": (arm(0.006, 5), {}, {}, "undecided", "is not within ±0.01", True),
    "inactive": (arm(0.001, 3), {}, {"doses": {"tried": 0.0099}}, "inactive", "mean dose is 0.0099", True),
    "a small dose that does something": (arm(+1.0), {}, {"doses": {"tried": 0.009}}, "worse", "1 above", True),
    "inactive and equal": (BASELINE, {}, {"doses": {"tried": 0.0}}, "inactive", "under 1%", True),
    "an active signal that harms": (arm(+0.05), {}, SIGNAL, "worse", "above its baseline", True),
    "a signal without a placebo": (arm(-0.05), {}, SIGNAL, "undecided", "no placebo arm", False),
    "a signal below its placebo": (
        arm(-0.05), {"placebo": arm(-0.01, -1)}, WITH_PLACEBO, "better", "below its placebo placebo", True
    ),
    "a signal as good as its placebo": (
        arm(-0.05), {"placebo": arm(-0.05, -1)}, WITH_PLACEBO, "undecided", "not better than its placebo", False
    ),
    "a signal hardly below its placebo": (
        arm(-0.05), {"placebo": arm(-0.0485, -1)}, WITH_PLACEBO, "undecided", "not better than its placebo", True
    ),
    "a signal worse than its placebo": (
        arm(-0.05), {"placebo": arm(-0.09)}, WITH_PLACEBO, "undecided", "not better than its placebo", False
    ),
    "a placebo with too few seeds": (
        arm(-0.05), {"placebo": arm(0.0, -1, 3)}, WITH_PLACEBO, "undecided", "3 seeds of 5 pair", True
    ),
    "a control needs no placebo": (
        arm(-0.05), {}, {"doses": {"tried": 0.4}, "controls": ["tried"]}, "better", "below its baseline", True
    ),
    "no seed": ({}, {}, {}, "undecided", "0 seeds", True),
    "one seed": (arm(-0.5, seeds=1), {}, {}, "undecided", "a spread takes at least 2", True),
    "two seeds": (arm(-0.015, seeds=2), {}, {}, "undecided", "p = 0.061, threshold 0.05", True),
    "two seeds by chance": ({1: 2.96, 2: 2.9802}, {}, {}, "undecided", "two seeds can agree by chance", True),
    "two seeds far away": ({1: 2.5, 2: 2.5201}, {}, {}, "better", "0.5 below", True),
    "a seed that diverged": (NO_FINITE, {}, {}, "undecided", "diverged on 1 of 5 seeds, its baseline on 0", False),
    "every seed diverged": (LOST, {}, {}, "worse", "diverged on 5 of 5 seeds, its baseline on 0 (p = 0.0079", True),
    "every seed diverged, of a signal": (LOST, {}, WITHOUT_PLACEBO, "worse", "diverged on 5 of 5 seeds", True),
    "every seed diverged, of four arms": (
        LOST, {f"arm {k}": arm(0.001, k) for k in (2, 3, 4)}, {}, "worse", "threshold 0.013", True
    ),
    "a baseline that diverges": (KEPT, {"lost": LOST}, OF_LOST, "better", "it diverged on 0 of 5 seeds", True),
    "a baseline that diverges, without a placebo": (
        KEPT, {"lost": LOST}, {**OF_LOST, **WITHOUT_PLACEBO}, "undecided", "no placebo arm", False
    ),
    "a placebo that diverges too": (
        KEPT, {"lost": LOST, "placebo": LOST}, {**OF_LOST, **WITH_PLACEBO}, "better", "its placebo placebo on 5", True
    ),
    "a placebo that does not diverge either": (
        KEPT, {"lost": LOST, "placebo": KEPT}, {**OF_LOST, **WITH_PLACEBO}, "undecided", "than its placebo", False
    ),
    "one failure in ten": (
        {**arm(-0.05, seeds=10), 4: None}, {}, {}, "undecided", "diverged on 1 of 10 seeds, its baseline on 0", False
    ),
    "a long tail of harm": (
        {**{s: 2.95 + SPREAD[(s - 1) % 5] + 0.001 * s for s in range(1, 10)}, 10: 2.99}, {}, {}, "better", "flips", True
    ),
    "too few of the declared seeds": (
        arm(-0.05), {}, {"planned": 8}, "undecided", "5 of the 8 declared seeds", True
    ),
    "before the first look": (arm(-0.05), {}, {"looks": [6, 12]}, "undecided", "first declared look is at 6", True),
    "without a delta": (arm(0.001, 3), {}, {"delta": None}, "undecided", "no delta was declared", True),
    "without a delta, exactly 0": (BASELINE, {}, {"delta": None}, "no difference", "exactly 0 on all 20", True),
    "without a delta, still worse": (arm(+0.05), {}, {"delta": None}, "worse", "above its baseline", True),
    "one run five times": (dict.fromkeys(range(1, 6), 2.5), {}, {}, "undecided", "its losses are equal", False),
    "one run twice": ({1: 2.5, 2: 2.5}, {}, {}, "undecided", "its losses are equal on all 2 seeds", False),
    "declared seeds are missing": (
        arm(-0.05, seeds=3), {}, {"seeds": range(1, 6)}, "undecided",
        "3 of the 5 declared seeds are there, seeds 4, 5 of it missing", True,
    ),
    "declared seeds of the baseline are missing": (
        arm(-0.05), {}, {"seeds": [1, 2, 3, 4, 5, 21]}, "undecided",
        "seed 21 of it missing and seed 21 of its baseline missing", True,
    ),
    "declared seeds are there": (arm(-0.05), {}, {"seeds": [5, 4, 3, 2, 1]}, "better", "below its baseline", True),
    "a seed is missing at a look": (
        {k: v for k, v in arm(-0.05, seeds=8).items() if k != 3}, {}, {"seeds": range(1, 11), "looks": [5, 10]},
        "undecided", "first declared look is at 5; seed 3 of it missing", True,
    ),
    "a seed is missing after a look": (
        {k: v for k, v in arm(-0.05, seeds=8).items() if k != 6}, {}, {"seeds": range(1, 11), "looks": [5, 10]},
        "better", "below its baseline", True,
    ),
    "at a look": (arm(-0.05), {}, {"looks": [5, 10]}, "better", "threshold 0.031", True),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_every_verdict_with_its_reason(case: tuple[Any, Any, Any, str, str, bool]) -> None:
    losses, others, arguments, expected, reason, countable = case
    if "two seeds" in reason:  # the t test alone would have been content
        assert stats.ttest_rel(list(losses.values()), [BASELINE[1], BASELINE[2]]).pvalue < 0.05
    found = verdict(losses, others, **arguments)
    assert (found["verdict"], reason in found["reason"]) == (expected, True), found["reason"]
    assert (found["more_seeds"] is not None) is countable
    if found["more_seeds"] is not None:
        assert (found["more_seeds"] > 0) is (expected == "undecided")


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_result_is_json_without_nan_and_the_same_again(case: tuple[Any, Any, Any, str, str, bool]) -> None:
    losses, others, arguments, *_ = case
    of_arms = {"baseline": BASELINE, "tried": losses, **others}
    first = json.dumps(compare(of_arms, **{"delta": 0.01, **arguments}), allow_nan=False)
    again = json.dumps(compare(of_arms, **{"delta": 0.01, **arguments}), allow_nan=False)
    assert first == again


def test_the_figures_are_those_of_the_paired_test() -> None:
    found = verdict(arm(0.01, 5))
    expected = stats.ttest_rel([arm(0.01, 5)[s] for s in range(1, 6)], [BASELINE[s] for s in range(1, 6)])
    assert found["p_holm"] == pytest.approx(expected.pvalue)
    assert found["interval"] == pytest.approx(list(expected.confidence_interval()))
    assert found["difference"] == pytest.approx(0.01)
    assert (found["n"], found["seeds"]) == (5, [1, 2, 3, 4, 5])
    assert found["seed_correlation"] == pytest.approx(
        np.corrcoef(list(arm(0.01, 5).values()), [BASELINE[s] for s in range(1, 6)])[0, 1]
    )
    assert compare({"baseline": arm(0.0, 0.0), "a": arm(0.0)})["noise_floor"] == pytest.approx(np.std(SPREAD, ddof=1))


def with_p(p: float, seeds: int = 5) -> dict[int, float]:
    """An arm above the baseline whose paired t test has just this p."""
    jitter = np.array((JITTER * 4)[:seeds]) + 1e-6 * np.arange(seeds)  # no two seeds are equal
    t = stats.t.isf(p / 2, seeds - 1)
    mean = t * jitter.std(ddof=1) / seeds**0.5 + jitter.mean() * 0
    return {s + 1: BASELINE[s + 1] + float(jitter[s] - jitter.mean() + mean) for s in range(seeds)}


def test_holm_steps_down_over_arms_that_are_no_controls() -> None:
    losses = {"baseline": BASELINE, "a": with_p(0.012), "b": with_p(0.024), "c": with_p(0.06), "d": with_p(0.04)}
    found = compare(losses, delta=0, controls=["d"])["arms"]
    # of three arms: 0.012 < 0.05/3, 0.024 < 0.05/2, 0.06 > 0.05; the control is judged by itself
    assert [found[a]["verdict"] for a in "abcd"] == ["worse", "worse", "undecided", "worse"]
    assert [found[a]["p_holm"] for a in "abcd"] == pytest.approx([0.036, 0.048, 0.06, 0.04], rel=1e-6)
    assert [found[a]["level"] for a in "abcd"] == pytest.approx([0.05 / 3, 0.05 / 2, 0.05, 0.05])
    losses["a"] = with_p(0.018)  # not below 0.05/3: Holm stops, though the next would pass by itself
    found = compare(losses, delta=0, controls=["d"])["arms"]
    assert [found[a]["verdict"] for a in "abc"] == ["undecided"] * 3


def test_an_arm_that_lacks_seeds_counts_as_untested_in_its_family() -> None:
    losses = {"baseline": BASELINE, "a": with_p(0.03), "b": {s: x for s, x in with_p(0.01).items() if s < 5}}
    found = compare(losses, seeds=range(1, 6))["arms"]
    assert [found[a]["verdict"] for a in "ab"] == ["undecided", "undecided"]  # 0.03 is not below 0.05/2
    assert (found["b"]["p_holm"], found["b"]["seeds_missing"]) == (None, [5])
    assert compare(losses, seeds=range(1, 5))["arms"]["b"]["seeds_missing"] == []


def test_an_arm_without_seeds_keeps_its_place_in_the_family() -> None:
    assert verdict(with_p(0.03), delta=0)["verdict"] == "worse"
    assert verdict(with_p(0.03), {"later": {}}, delta=0)["verdict"] == "undecided"


def test_each_look_has_its_own_level_and_seeds_between_looks_wait() -> None:
    looks = [5, 10, 20]
    levels = [look_level(0.05, looks, n) for n in looks]
    for n, nominal in zip(looks, levels, strict=True):
        assert verdict(with_p(nominal * 1.01, n), delta=0, looks=looks)["verdict"] == "undecided"
        assert verdict(with_p(nominal * 0.99, n), delta=0, looks=looks)["verdict"] == "worse"
    found = verdict({**with_p(0.5, 5), **dict.fromkeys((6, 7, 8), 9.0)}, delta=0, looks=looks)
    assert (found["n"], found["seeds_found"], found["seeds"]) == (5, 8, [1, 2, 3, 4, 5])
    assert found["p"] == pytest.approx(0.5)


def test_seeds_still_needed_end_at_a_declared_look() -> None:
    unsure = arm(0.02, 20)
    fixed, looked = verdict(unsure), verdict(unsure, looks=[5, 10, 200])
    assert fixed["verdict"] == looked["verdict"] == "undecided"
    assert 10 < 5 + fixed["more_seeds"] < 200
    assert 5 + looked["more_seeds"] == 200


def test_no_difference_is_tested_at_the_looks_level_too() -> None:
    half = 0.01 - 0.0005
    jitter = half / (stats.t.isf(0.05, 4) * np.std(JITTER, ddof=1) / 5**0.5)  # the 90% interval just fits
    assert verdict(arm(0.0, jitter))["verdict"] == "no difference"
    assert verdict(arm(0.0, jitter), looks=[5, 10])["verdict"] == "undecided"


def test_arms_pair_only_within_their_group() -> None:
    small, large = arm(0.0), {s: x - 1 for s, x in arm(0.0).items()}
    losses = {"s": small, "s+": {s: x - 0.05 for s, x in arm(0).items()}, "l": large, "l+": {**large, 1: 2.1, 2: 2.2}}
    result = compare(losses, groups={"small": ["s", "s+"], "large": ["l", "l+"]})
    assert (result["baseline"], list(result["arms"])) == ("s", ["s+", "l+"])
    assert result["arms"]["s+"]["difference"] == pytest.approx(-0.05)
    assert (result["arms"]["l+"]["baseline"], result["arms"]["l+"]["group"]) == ("l", "large")
    assert 0 < result["arms"]["l+"]["difference"] < 0.2


@pytest.mark.parametrize("seed", [int, str], ids=["numbers", "text, as JSON has them"])
def test_seeds_are_in_the_order_of_numbers(seed: Any) -> None:
    losses = {
        name: {seed(s): x for s, x in reversed(row.items())} for name, row in {"b": BASELINE, "a": arm(0)}.items()
    }
    losses["a"] |= {seed(10): 9.0}
    assert compare(losses, looks=[5, 10])["arms"]["a"]["seeds"] == [seed(s) for s in range(1, 6)]


RUNS = {
    "clear": ([2.95, 2.94, 2.96, 2.953], "better", "unpaired, 4 runs against 20 (no common seeds; Welch's t): 0."),
    "worse": ([3.1, 3.12, 3.11], "worse", "unpaired, 3 runs"),
    "unclear": ([3.0, 3.02, 2.98], "undecided", "Welch's t): p ="),
    "one": ([2.9], "undecided", "unpaired, 1 runs"),
}


@pytest.mark.parametrize("case", RUNS)
@pytest.mark.parametrize("numbered", [False, True], ids=["no common seeds", "declared unpaired"])
def test_runs_without_common_seeds_are_compared_by_welchs_t(case: str, numbered: bool) -> None:
    runs, expected, reason = RUNS[case]
    own = {k if numbered else f"run {k}": x for k, x in enumerate(runs, 1)}
    found = compare({"baseline": BASELINE, "tried": own}, delta=0.001, unpaired=numbered)["arms"]["tried"]
    assert found["verdict"] == expected
    assert (
        reason.replace("no common seeds", "equal seeds mean nothing" if numbered else "no common seeds")
        in found["reason"]
    )
    assert (found["paired"], found["n"], found["n_baseline"]) == (False, len(runs), 20)
    if len(runs) > 1:
        assert found["p"] == pytest.approx(stats.ttest_ind(runs, list(BASELINE.values()), equal_var=False).pvalue)


def test_seeds_that_overlap_in_part_stay_pairs_with_the_missing_named() -> None:
    found = compare({"baseline": BASELINE, "tried": arm(-0.05)}, seeds=range(1, 21))["arms"]["tried"]
    assert (found["verdict"], found["paired"]) == ("undecided", True)


@pytest.mark.parametrize("arguments", [{"looks": [2, 4]}, {"planned": 3}, {"baseline_seeds": [9]}])
def test_a_plan_of_pairs_is_not_read_unpaired(arguments: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="unpaired: expected no looks"):
        compare({"baseline": BASELINE, "tried": arm(-0.05)}, unpaired=True, **arguments)
    apart = {"a": {1: 1.0, 2: 1.1}, "b": {3: 1.2, 4: 1.4}}
    if "baseline_seeds" not in arguments:
        assert compare(apart, baseline="a", seeds=[1, 2], **arguments)["arms"]["b"]["verdict"] == "undecided"


def test_further_seeds_of_the_baseline_are_used_as_declared_or_missed() -> None:
    baseline = {s: 3 + 0.01 * math.sin(7 * s) for s in range(1, 21)}
    own = {s: 2.985 + 0.01 * math.cos(5 * s * s) for s in range(1, 6)}
    losses, further = {"baseline": baseline, "tried": own}, range(6, 21)
    found = compare(losses, seeds=range(1, 6), planned=5, baseline_seeds=further)["arms"]["tried"]
    assert (found["paired"], found["n"], found["n_baseline"]) == (False, 5, 20)
    assert "unpaired, 5 runs against 20 (its seeds go with the baseline's at r =" in found["reason"]
    assert found["difference"] == pytest.approx(np.mean([*own.values()]) - np.mean([*baseline.values()]))
    del baseline[17]
    found = compare(losses, seeds=range(1, 6), planned=5, baseline_seeds=further)["arms"]["tried"]
    assert (found["verdict"], found["seeds_missing"]) == ("undecided", [17])
    assert "seed 17 of its baseline missing" in found["reason"]


def test_two_seeds_that_are_one_run_give_no_verdict() -> None:
    twice = {**arm(-0.05), 4: arm(-0.05)[2]}
    twice = {s: x + 1e-9 * math.pi * 1000 for s, x in twice.items()}
    found = verdict(twice)
    assert (found["verdict"], found["more_seeds"]) == ("undecided", None)
    assert "its losses of seeds 2, 4 are equal to many digits" in found["reason"]


METRICS = {"accuracy": None, "truth_probability": None, "a figure of a patch": "higher"}


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("case", ["better", "worse", "within delta", "a signal below its placebo", "neither"])
def test_where_higher_is_better_every_verdict_is_the_mirrored_one(case: str, metric: str) -> None:
    losses, others, arguments, expected, *_ = CASES[case]
    mirrored = {name: {s: -x for s, x in row.items()} for name, row in {**others, "baseline": BASELINE}.items()}
    arms = {"baseline": mirrored.pop("baseline"), "tried": {s: -x for s, x in losses.items()}, **mirrored}
    result = compare(arms, delta=0.01, **arguments, metric=metric, better=METRICS[metric])
    found, as_loss = result["arms"]["tried"], verdict(losses, others, **arguments)
    assert (result["metric"], result["better"]) == (metric, "higher")
    assert (found["verdict"], found["p"], found["more_seeds"]) == (expected, as_loss["p"], as_loss["more_seeds"])
    assert found["difference"] == -as_loss["difference"], "differences are as they were measured"
    if expected in ("better", "worse"):
        assert ("below" in found["reason"]) == ("above" in as_loss["reason"])


def test_a_metric_whose_direction_nobody_knows_needs_one() -> None:
    with pytest.raises(ConfigError, match='expected "lower" or "higher" for the metric \'mine\', found None'):
        compare({"a": BASELINE, "b": BASELINE}, metric="mine")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"baseline": "basline"}, "no arm 'basline'; did you mean 'baseline'"),
        ({"placebos": {"tried": "plcebo"}}, "no arm 'plcebo'"),
        ({"delta": float("nan")}, "expected a number in the metric's unit, at least 0"),
        ({"looks": [10, 5]}, "rising numbers of seeds"),
        ({"groups": {"g": ["baseline"]}}, "every arm in one group, found 'tried' in 0"),
        ({"groups": {"g": ["baseline", "tried"]}, "baseline": "tried"}, "first in its group"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        verdict(arm(0), **arguments)


@pytest.mark.parametrize("losses", [{"baseline": BASELINE}, {}, {"baseline": [1.0], "a": [2.0]}])
def test_losses_that_cannot_be_compared_are_refused(losses: Any) -> None:
    with pytest.raises(ConfigError, match="expected"):
        compare(losses)


def test_huge_and_tiny_differences_give_finite_figures() -> None:
    for difference in (1e-300, 3e38, -1e-12):
        found = verdict({s: x + difference for s, x in BASELINE.items()})
        assert all(math.isfinite(found[key]) for key in ("difference", "p", "p_holm", "sigma"))


def test_the_function_stays_the_export_after_its_module_is_imported_and_needs_no_torch() -> None:
    code = (
        "import sys, gptlab.analysis, gptlab.analysis.load; from gptlab.analysis import compare;"
        "compare({'baseline': {1: 1.0, 2: 2.0}, 'a': {1: 1.5, 2: 2.4}});"
        "print(callable(gptlab.analysis.compare), 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "False"]


@pytest.mark.parametrize(("failures", "n", "bound"), [(0, 5, 0.4507), (0, 10, 0.2589), (1, 5, 0.6574), (5, 5, 1.0)])
def test_what_failure_rate_is_left_open(failures: int, n: int, bound: float) -> None:
    """The rate at which so few failures would come once in twenty times: (1 - rate)^n = 0.05 without any."""
    losses = {seed: None if seed <= failures else loss for seed, loss in arm(0.01, seeds=n).items()}
    found = verdict(losses)
    assert found["failure_rate_bound"] == pytest.approx(bound, abs=1e-4)
    assert stats.binom.cdf(failures, n, found["failure_rate_bound"]) == pytest.approx(0.05 if failures < n else 1.0)


def test_five_seeds_say_which_failure_rates_they_cannot_see_and_which_seed_stands_apart() -> None:
    found = verdict(arm(-0.05))
    assert "5 clean seeds leave failure rates up to 45% open" in found["reason"]
    assert found["outlier"] is None
    apart = verdict({**arm(-0.05), 4: 3.4})
    assert (apart["outlier"], "; seed 4 stands apart from the others" in apart["reason"]) == (4, True)


@pytest.mark.parametrize("n", [3, 9, 18])
def test_flips_of_signs_are_those_of_scipy(n: int) -> None:
    x = np.random.Generator(np.random.PCG64(n)).normal(0.5, 1, n)
    expected = stats.permutation_test((x,), np.sum, permutation_type="samples", vectorized=False, n_resamples=9999,
                                      rng=np.random.default_rng(1))  # fmt: skip
    assert sign_flip_p(x) == pytest.approx(expected.pvalue, abs=1e-9 if n < 12 else 0.02)


def test_a_long_tail_that_flips_of_signs_do_not_confirm_is_undecided() -> None:
    """The t test is content with what two large differences make of ten."""
    losses = {s: BASELINE[s] - 0.0002 * (s % 3 + 1) for s in range(1, 9)} | {9: BASELINE[9] + 0.0001, 10: BASELINE[10]}
    assert verdict(losses, delta=None)["verdict"] == "better"
    skewed = {**losses, 9: BASELINE[9] + 0.00049, 10: BASELINE[10] + 0.00049}
    found = verdict(skewed, delta=None)
    assert found["verdict"] == "undecided"
